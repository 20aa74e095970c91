//! The files below an image.

use std::error::Error;

use super::*;

/// The error with what is behind it, as the user sees it.
fn refused(spec: &crate::disk::ImageSpec) -> (String, OpenError) {
    let error = open(spec).unwrap_err();
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    (text, error)
}

/// An image whose header names `backing`, which need not be there.
fn naming(directory: &Path, name: &str, backing: &str, format: &str) -> PathBuf {
    let command = format!("qemu-img create -q -f qcow2 -u -b {backing} -F {format} {name} 1M");
    run(directory, &command);
    directory.join(name)
}

#[test]
fn missing_backing_file_is_named() {
    if !has_qemu_img() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = naming(directory.path(), "disk.qcow2", "none.img", "raw");
    let (text, error) = refused(&spec(&path, Format::Qcow2));
    assert!(
        text.contains("disk.qcow2") && text.contains("none.img"),
        "{text}"
    );
    assert!(error.remedy().unwrap().contains("qemu-img rebase -u"));
}

#[test]
fn format_of_a_backing_file_is_never_guessed() {
    if !has_qemu_img() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    File::create(at.join("base.img"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let path = naming(at, "disk.qcow2", "base.img", "vmdk");
    let (text, _) = refused(&spec(&path, Format::Qcow2));
    assert!(text.contains("\"vmdk\", not raw or qcow2"), "{text}");
    // The extension's number becomes an unknown one.
    let bytes = fs::read(&path).unwrap();
    let number = 0xe279_2acau32.to_be_bytes();
    let place = bytes
        .windows(4)
        .position(|window| window == number)
        .unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[1, 2, 3, 4], place as u64).unwrap();
    let (text, error) = refused(&spec(&path, Format::Qcow2));
    assert!(text.contains("its format is not named"), "{text}");
    assert!(
        error
            .remedy()
            .unwrap()
            .contains("qemu-img rebase -u -F raw -b base.img")
    );
}

#[test]
fn backing_file_elsewhere_is_opened_if_the_user_names_it() {
    if !has_qemu_img() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    for name in ["images", "images/below", "elsewhere"] {
        fs::create_dir(at.join(name)).unwrap();
        fs::write(at.join(name).join("base.img"), vec![7; 1 << 20]).unwrap();
    }
    let images = at.join("images");
    std::os::unix::fs::symlink(at.join("elsewhere/base.img"), images.join("link.img")).unwrap();
    std::os::unix::fs::symlink("below/base.img", images.join("inside.img")).unwrap();
    for inside in [
        "base.img",
        "below/base.img",
        "inside.img",
        "../images/base.img",
    ] {
        let path = naming(&images, "disk.qcow2", inside, "raw");
        let storage = opened(&path);
        assert_eq!(
            read(storage.image(), 4096, 512).unwrap(),
            [7; 512],
            "{inside}"
        );
    }
    let absolute = at.join("elsewhere/base.img");
    for outside in [
        "../elsewhere/base.img",
        "link.img",
        absolute.to_str().unwrap(),
    ] {
        let path = naming(&images, "disk.qcow2", outside, "raw");
        let mut spec = spec(&path, Format::Qcow2);
        let (text, error) = refused(&spec);
        assert!(
            text.contains("does not lie in a directory of the image's"),
            "{text}"
        );
        let remedy = error.remedy().unwrap();
        assert!(remedy.starts_with("backing="), "{remedy}");
        spec.backing = Some(absolute.clone());
        let storage = testing::opened(&spec);
        assert_eq!(
            read(storage.image(), 4096, 512).unwrap(),
            [7; 512],
            "{outside}"
        );
    }
}

#[test]
fn image_in_no_directory_has_no_files_of_its_own() {
    use std::os::fd::{AsRawFd, FromRawFd};
    if !has_qemu_img() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path().join("base.img");
    fs::write(&base, vec![7; 1 << 20]).unwrap();
    let path = naming(
        directory.path(),
        "disk.qcow2",
        base.to_str().unwrap(),
        "raw",
    );
    // SAFETY: memfd_create takes a name that ends with a 0, and flags.
    let fd = unsafe { libc::memfd_create(c"image".as_ptr(), libc::MFD_CLOEXEC) };
    // SAFETY: memfd_create has returned this descriptor, which nothing else owns.
    let memfd = unsafe { File::from_raw_fd(fd) };
    memfd.write_all_at(&fs::read(path).unwrap(), 0).unwrap();
    let mut spec = spec(
        format!("/proc/self/fd/{}", memfd.as_raw_fd()),
        Format::Qcow2,
    );
    let (text, _) = refused(&spec);
    assert!(text.contains("does not lie in"), "{text}");
    spec.backing = Some(base);
    testing::opened(&spec);
}

#[test]
fn what_is_no_file_is_refused_below_an_image_too() {
    if !has_qemu_img() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    run(at, "mkfifo fifo");
    fs::create_dir(at.join("folder")).unwrap();
    for (name, kind) in [
        ("fifo", "a FIFO"),
        ("folder", "a directory"),
        ("/dev/zero", "a character device"),
    ] {
        let path = naming(at, "disk.qcow2", name, "raw");
        let (text, _) = refused(&spec(&path, Format::Qcow2));
        assert!(text.contains(kind), "{text}");
    }
}

#[test]
fn loop_of_backing_files_is_refused() {
    if !has_qemu_img() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let path = at.join("disk.qcow2");
    fs::rename(naming(at, "new.qcow2", "disk.qcow2", "qcow2"), &path).unwrap();
    let (text, _) = refused(&spec(&path, Format::Qcow2));
    assert!(text.contains("in a loop"), "{text}");
    for (name, below) in [("a", "b"), ("b", "c"), ("c", "b")] {
        naming(
            at,
            &format!("{name}.qcow2"),
            &format!("{below}.qcow2"),
            "qcow2",
        );
    }
    let (text, _) = refused(&spec(at.join("a.qcow2"), Format::Qcow2));
    assert!(text.contains("in a loop"), "{text}");
}

#[test]
fn chain_of_backing_files_has_an_end() {
    if !has_qemu_img() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    fs::write(at.join("0.qcow2"), vec![7; 1 << 20]).unwrap();
    naming(at, "1.qcow2", "0.qcow2", "raw");
    for number in 2..17 {
        naming(
            at,
            &format!("{number}.qcow2"),
            &format!("{}.qcow2", number - 1),
            "qcow2",
        );
    }
    let storage = opened(&at.join("15.qcow2"));
    assert_eq!(read(storage.image(), 4096, 512).unwrap(), [7; 512]);
    drop(storage);
    let (text, _) = refused(&spec(at.join("16.qcow2"), Format::Qcow2));
    assert!(text.contains("more than 16 files"), "{text}");
}

#[test]
fn backing_file_that_is_written_is_refused_and_readers_share_it() {
    if !has_qemu_img() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let base = at.join("base.img");
    File::create(&base).unwrap().set_len(1 << 20).unwrap();
    let one = opened(&naming(at, "one.qcow2", "base.img", "raw"));
    let _other = opened(&naming(at, "other.qcow2", "base.img", "raw"));
    let (text, _) = refused(&spec(&base, Format::Raw));
    assert!(text.contains("base.img\" is in use"), "{text}");
    drop((one, _other));
    let _writer = testing::opened(&spec(&base, Format::Raw));
    let (text, _) = refused(&spec(at.join("one.qcow2"), Format::Qcow2));
    assert!(text.contains("base.img\" is in use"), "{text}");
}

#[test]
fn smaller_backing_file_ends_in_zeros() {
    if !has_qemu_img() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    // Not even whole sectors.
    fs::write(at.join("base.img"), vec![7; 1000]).unwrap();
    let storage = opened(&naming(at, "disk.qcow2", "base.img", "raw"));
    let mut expected = vec![7; 1000];
    expected.resize(2048, 0);
    assert_eq!(read(storage.image(), 0, 2048).unwrap(), expected);
    write(storage.image(), 512, &[8; 512]).unwrap();
    expected[512..1024].fill(8);
    assert_eq!(read(storage.image(), 0, 2048).unwrap(), expected);
}

#[test]
fn disk_over_a_larger_backing_file_does_not_grow() {
    if !has_qemu_img() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    fs::write(at.join("base.img"), vec![7; 2 << 20]).unwrap();
    let storage = opened(&naming(at, "disk.qcow2", "base.img", "raw"));
    let error = storage.image().grow(2 << 20).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
}
