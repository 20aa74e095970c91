use std::error::Error;
use std::fs;
use std::os::unix::net::UnixListener;

use super::super::testing;
use super::*;

fn spec(path: &Path) -> ImageSpec {
    testing::spec(path, Format::Raw)
}

/// A directory with an image of that many bytes in it.
fn image(len: u64) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    File::create(&path).unwrap().set_len(len).unwrap();
    (directory, path)
}

#[test]
fn raw_image_opens_with_its_size() {
    let (_directory, path) = image(1 << 20);
    let storage = testing::opened(&spec(&path));
    assert_eq!(storage.image().size(), 1 << 20);
}

#[test]
fn image_that_is_not_there_is_named() {
    let (directory, _) = image(512);
    let path = directory.path().join("none.img");
    let error = open(&spec(&path)).unwrap_err();
    assert!(error.to_string().contains("none.img"), "{error}");
    assert_eq!(
        error.source().unwrap().to_string(),
        "No such file or directory (os error 2)"
    );
    assert!(error.remedy().unwrap().contains("qemu-img create"));
}

#[test]
fn what_is_no_file_is_refused_by_name() {
    let (directory, path) = image(512);
    let fifo = directory.path().join("fifo");
    testing::run(directory.path(), "mkfifo fifo");
    let socket = directory.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    for (path, kind) in [
        (directory.path(), "a directory"),
        (&fifo, "a FIFO"),
        (&socket, "a socket"),
        (Path::new("/dev/zero"), "a character device"),
    ] {
        let error = open(&spec(path)).unwrap_err().to_string();
        assert!(error.contains(kind), "{error}");
    }
    drop(path);
}

#[test]
fn part_of_a_sector_is_refused_with_a_remedy() {
    let (_directory, path) = image(511);
    let error = open(&spec(&path)).unwrap_err();
    assert!(error.to_string().contains("511 bytes"), "{error}");
    assert!(error.remedy().unwrap().contains("truncate --size=%512"));
    let (_directory, path) = image(0);
    let error = open(&spec(&path)).unwrap_err();
    assert!(error.to_string().contains("is empty"), "{error}");
}

#[test]
fn second_writer_is_refused_and_the_first_stays() {
    let (_directory, path) = image(4096);
    let _first = testing::opened(&spec(&path));
    let error = open(&spec(&path)).unwrap_err();
    assert!(error.to_string().contains("disk.img"), "{error}");
    assert!(error.to_string().contains("is in use"), "{error}");
    let mut reader = spec(&path);
    reader.readonly = true;
    assert!(matches!(open(&reader), Err(OpenError::InUse { .. })));
}

#[test]
fn readers_share_an_image() {
    let (_directory, path) = image(4096);
    let mut reader = spec(&path);
    reader.readonly = true;
    let _first = testing::opened(&reader);
    let _second = testing::opened(&reader);
    assert!(matches!(open(&spec(&path)), Err(OpenError::InUse { .. })));
}

#[test]
fn image_that_cannot_be_written_opens_readonly() {
    let (_directory, path) = image(4096);
    let mut permissions = fs::metadata(&path).unwrap().permissions();
    permissions.set_readonly(true);
    fs::set_permissions(&path, permissions).unwrap();
    let mut reader = spec(&path);
    reader.readonly = true;
    testing::opened(&reader);
    // Root writes it all the same.
    if let Err(error) = open(&spec(&path)) {
        assert!(matches!(error, OpenError::Write(..)), "{error}");
        assert!(error.remedy().unwrap().contains("readonly=on"));
    }
}

#[test]
fn direct_io_is_refused_where_there_is_none() {
    // memfds, like tmpfs before Linux 6.6, have no O_DIRECT.
    let (_directory, path) = image(4096);
    let mut direct = spec(&path);
    direct.direct = true;
    match open(&direct) {
        Ok(Storage::Raw(file)) => assert!(file.is_direct()),
        Ok(other) => panic!("{other:?}"),
        Err(error) => {
            assert!(matches!(error, OpenError::Direct(..)), "{error}");
            assert!(error.remedy().unwrap().contains("direct=on"));
        }
    }
}
