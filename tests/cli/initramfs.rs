//! `minivmm initramfs`: files and stdout, and what cannot be made.

use super::*;

/// A bzImage, as far as its release is read.
fn kernel(files: &Files) -> String {
    let mut image = vec![0; 0x400];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x20e..0x210].copy_from_slice(&0x180u16.to_le_bytes());
    image[0x380..0x38c].copy_from_slice(b"9.9.9-test x");
    files.file("bzImage", &image)
}

#[test]
fn initramfs_is_the_same_in_a_file_and_on_stdout() {
    let files = Files::new();
    let (kernel, output) = (kernel(&files), files.path("initramfs"));
    // One that is there already is replaced.
    fs::write(&output, "before").unwrap();
    let args = ["initramfs", "--kernel", &kernel, "--modules", "none", "-o"];
    let made = run(minivmm(args.iter().chain([&&*text(&output)])));
    assert_eq!(made.status, Some(0), "{made:?}");
    let piped = minivmm(args.iter().chain([&"-"])).output().unwrap();
    assert!(piped.status.success(), "{piped:?}");
    let archive = fs::read(output).unwrap();
    assert!(archive == piped.stdout && archive.starts_with(b"070701"));
    // Nothing else is left: the kernel, the guest of all these tests, and the archive.
    assert_eq!(fs::read_dir(files.0.path()).unwrap().count(), 3);
}

#[test]
fn initramfs_without_a_kernel_or_its_modules_is_refused() {
    let files = Files::new();
    let output = files.path("initramfs");
    let command = |kernel: &str| {
        let output = text(&output);
        minivmm(["initramfs", "--kernel", kernel, "-o", &output])
    };
    for (choice, texts) in [
        (
            "9.9.9-none",
            ["9.9.9-none", "/boot/vmlinuz-9.9.9-none", "linux-image-"],
        ),
        (
            &*text(files.0.path()),
            ["arch/x86/boot/bzImage", "has no", "make bzImage"],
        ),
        (
            "/dev/null",
            ["/dev/null", "cannot read the kernel", "no regular file"],
        ),
        (
            &*kernel(&files),
            ["/lib/modules/9.9.9-test", "--modules", "Fedora"],
        ),
    ] {
        assert_refused(command(choice), FAILED, &texts);
    }
    assert!(!output.exists());
    let mut full = minivmm(["initramfs", "--modules", "none", "--kernel"]);
    full.args([&kernel(&files), "-o", "/dev/full"]);
    assert_refused(full, FAILED, &["/dev/full", "No space left"]);
}
