//! Disk images that cannot be used.

use std::os::unix::fs::FileExt;

use super::*;

/// The exact words for the value of `--disk`, and those for what can be done about it.
#[track_caller]
fn assert_image_refused(files: &Files, disk: &str, words: &[&str]) {
    assert_refused(files.boot(&["--disk", disk]), FAILED, words);
}

fn qemu_img(args: &[&str]) {
    let mut command = Command::new("qemu-img");
    command.args(args);
    let made = run(command);
    assert_eq!(made.status, Some(0), "{args:?}: {made:?}");
}

/// A qcow2 image of 1 MiB with these options of qemu-img.
fn qcow2(files: &Files, name: &str, options: &[&str]) -> String {
    let path = text(&files.path(name));
    qemu_img(&[&["create", "-q", "-f", "qcow2"], options, &[&path, "1M"]].concat());
    path
}

/// Sets bytes of an image's header (docs/interop/qcow2.txt in QEMU's source).
fn overwrite(path: &str, offset: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

/// Where the kind of encryption is, as a big-endian number of 32 bits.
const CRYPT_METHOD: u64 = 32;
/// Where the incompatible features are, of 64 bits.
const INCOMPATIBLE: u64 = 72;

kvm_test!(disk_that_is_no_image_is_refused, || {
    let files = Files::new();
    assert_image_refused(
        &files,
        "/no/such.img",
        &[
            "cannot open the disk image \"/no/such.img\": No such file",
            "qemu-img create -f raw /no/such.img 10G makes one",
        ],
    );
    let directory = text(files.0.path());
    let words = format!("{directory:?} is a directory and no disk image");
    assert_image_refused(&files, &directory, &[&words]);
    let odd = files.file("odd.img", &[0; 511]);
    let words = format!("the raw disk image {odd:?} has 511 bytes, which is no multiple of 512");
    let remedy = format!("truncate --size=%512 {odd}");
    assert_image_refused(&files, &odd, &[&words, &remedy]);
    let empty = files.file("empty.img", b"");
    let words = format!("the disk image {empty:?} is empty");
    assert_image_refused(&files, &empty, &[&words, "truncate --size=10G"]);
    let raw = files.file("raw.qcow2", &[0; 4096]);
    let words =
        format!("cannot use the qcow2 image {raw:?}: it does not begin as a qcow2 image does");
    assert_image_refused(&files, &raw, &[&words]);
});

kvm_test!(disk_of_another_guest_is_refused_with_its_name, || {
    let files = Files::new();
    let image = files.file("disk.img", &[0; 4096]);
    Tiny::Echo.write(&files.path("guest"));
    let mut vm = Vm::spawn({
        let mut command = files.boot(&["--disk", &image]);
        command.stdin(Stdio::piped());
        command
    });
    vm.wait_for("ready");
    let words = format!(
        "the disk image {image:?} is in use by minivmm (process {})",
        vm.pid()
    );
    let remedy = "readonly=on or ephemeral=on";
    for keys in ["", ",readonly=on", ",ephemeral=on"] {
        assert_image_refused(&files, &format!("{image}{keys}"), &[&words, remedy]);
    }
    // QEMU's programs see it too.
    let mut convert = Command::new("qemu-img");
    let copy = text(&files.path("copy.img"));
    convert.args(["convert", "-f", "raw", "-O", "raw", &image, &copy]);
    let convert = run(convert);
    assert_ne!(convert.status, Some(0), "{convert:?}");
    assert!(convert.stderr.contains("lock"), "{convert:?}");
});

kvm_test!(disk_with_a_wrong_backing_file_is_refused, || {
    let files = Files::new();
    let base = files.file("base.img", &[0; 4096]);
    let image = qcow2(&files, "disk.qcow2", &["-F", "raw", "-b", &base]);
    let words = format!("cannot use the backing file {base:?} of the disk image {image:?}: ");
    fs::remove_file(&base).unwrap();
    let missing = format!("{words}cannot open the disk image {base:?}: No such file");
    assert_image_refused(&files, &image, &[&missing, "qemu-img rebase -u"]);
    // Its own backing file.
    fs::copy(&image, &base).unwrap();
    qemu_img(&[
        "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &image, &image,
    ]);
    let words = format!("cannot use the backing file {image:?} of the disk image {image:?}: ");
    let looping = format!("{words}the file is part of the image already: they are in a loop");
    assert_image_refused(&files, &image, &[&looping]);
    // One that any image might name.
    let outside = qcow2(
        &files,
        "outside.qcow2",
        &["-u", "-F", "raw", "-b", "/etc/passwd"],
    );
    let words = "\"/etc/passwd\" does not lie in a directory of the image's";
    assert_image_refused(&files, &outside, &[words, "backing=/etc/passwd allows it"]);
});

kvm_test!(qcow2_disk_of_a_kind_we_do_not_know_is_refused, || {
    let files = Files::new();
    // AES and LUKS.
    let encrypted = [1_u32, 2].map(|method| {
        let image = qcow2(&files, &format!("{method}.qcow2"), &[]);
        overwrite(&image, CRYPT_METHOD, &method.to_be_bytes());
        image
    });
    let of = |image: &str| format!("cannot use the qcow2 image {image:?}: ");
    for image in encrypted {
        let words = format!("{}it is encrypted", of(&image));
        assert_image_refused(&files, &image, &[&words]);
    }
    for (name, bits, why) in [
        (
            "dirty.qcow2",
            1_u64,
            "it was not closed properly (its header is marked dirty)",
        ),
        ("damaged.qcow2", 2, "it is marked as damaged"),
        (
            "unknown.qcow2",
            1 << 20,
            "it has unknown incompatible features (bits 0x100000)",
        ),
    ] {
        let image = qcow2(&files, name, &[]);
        overwrite(&image, INCOMPATIBLE, &bits.to_be_bytes());
        assert_image_refused(&files, &image, &[&format!("{}{why}", of(&image))]);
    }
});

kvm_test!(raw_disk_that_begins_like_a_qcow2_is_raw, || {
    let files = Files::new();
    let header = qcow2(
        &files,
        "outside.qcow2",
        &["-u", "-F", "raw", "-b", "/etc/passwd"],
    );
    let image = text(&files.path("disk.img"));
    fs::copy(header, &image).unwrap();
    let file = File::options().write(true).open(&image).unwrap();
    file.set_len(1 << 20).unwrap();
    let guest = run(files.boot(&["--disk", &image]));
    assert_eq!(guest.status, Some(0), "{guest:?}");
    // Images with such names are qcow2 often enough.
    assert!(guest.stderr.contains("give format=qcow2"), "{guest:?}");
});

#[test]
fn disks_options_that_make_no_sense_are_refused() {
    assert_bad_values(
        "--disk",
        &[
            ("", "path"),
            ("a,serial=123456789012345678901", "at most 20"),
            ("a,queues=0", "1 to 32 queues"),
            ("a,format=vmdk", "raw"),
            ("a,io=none", "auto, uring or threads"),
            ("a,iops=many", "requests a second"),
            ("a,readonly=on,ephemeral=on", "exclude each other"),
            ("a,backing=b", "needs format=qcow2"),
            ("a,size=1G", "size"),
        ],
    );
}

kvm_test!(more_disks_than_there_is_room_for_are_refused, || {
    let files = Files::new();
    let image = files.file("disk.img", &[0; 512]);
    let disks = ["--disk", &image].repeat(200);
    let args = [&["--rng=off"], &disks[..]].concat();
    assert_refused(
        files.boot(&args),
        FAILED,
        &["200 virtio devices are more than the 31 that a guest can have"],
    );
});
