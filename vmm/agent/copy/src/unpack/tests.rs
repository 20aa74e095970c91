use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

use agent_protocol::MessageError;

use super::*;
use crate::pack;

/// Copies `from` to `to`, and returns what was left out.
fn copy(from: &Path, to: &Path, contents: bool) -> Result<Vec<String>, UnpackError> {
    let mut pieces = Vec::new();
    pack(from, &mut pieces).unwrap();
    agent_protocol::write(&mut pieces, &Piece::End).unwrap();
    let mut notes = Vec::new();
    let target = Target::Path { path: to, contents };
    let mut note = |note| notes.push(note);
    unpack(&pieces[..], target, Ownership::Own, Limits::NONE, &mut note)?;
    Ok(notes)
}

/// What comes of pieces of a hostile end.
fn receive(pieces: &[Piece], to: &Path) -> Result<(), UnpackError> {
    let contents = false;
    receive_within(pieces, Target::Path { path: to, contents }, Limits::NONE)
}

/// The same, to another target.
fn receive_within(pieces: &[Piece], target: Target, limits: Limits) -> Result<(), UnpackError> {
    let mut bytes = Vec::new();
    for piece in pieces {
        agent_protocol::write(&mut bytes, piece).unwrap();
        if let Piece::Data(length) = piece {
            bytes.extend(vec![b'x'; (*length as usize).min(CHUNK)]);
        }
    }
    unpack(&bytes[..], target, Ownership::Own, limits, &mut |_| {})
}

fn entry(name: &str, kind: Kind) -> Piece {
    Piece::Entry(Entry {
        name: name.as_bytes().to_vec(),
        kind,
        mode: 0o4755,
        uid: 1,
        gid: 1,
        seconds: 1_000_000_000,
        nanoseconds: 5,
    })
}

fn link(name: &str, target: &Path) -> Piece {
    entry(name, Kind::Symlink(target.as_os_str().as_bytes().to_vec()))
}

/// A directory with files of all kinds.
fn tree() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    fs::create_dir_all(tree.join("sub/empty")).unwrap();
    fs::write(tree.join("large"), vec![7; 3 * CHUNK + 5]).unwrap();
    fs::write(tree.join("sub/none"), "").unwrap();
    fs::write(tree.join(OsStr::from_bytes(b"odd \xff\n")), "odd").unwrap();
    symlink("../nowhere", tree.join("sub/link")).unwrap();
    fs::set_permissions(tree.join("sub/none"), fs::Permissions::from_mode(0o641)).unwrap();
    fs::set_permissions(tree.join("sub"), fs::Permissions::from_mode(0o555)).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        tree.join("fifo"),
        rustix::fs::FileType::Fifo,
        Mode::RUSR,
        0,
    )
    .unwrap();
    directory
}

#[test]
fn tree_is_copied_with_its_permissions_times_and_links_and_without_special_files() {
    let from = tree();
    let to = tempfile::tempdir().unwrap();
    let notes = copy(&from.path().join("tree"), to.path(), false).unwrap();
    assert_eq!(notes.len(), 1);
    assert!(notes[0].contains("fifo"), "{notes:?}");
    let (from, to) = (from.path().join("tree"), to.path().join("tree"));
    assert!(!to.join("fifo").exists());
    for name in [&b"large"[..], b"sub/none", b"odd \xff\n"] {
        let name = OsStr::from_bytes(name);
        assert!(fs::read(from.join(name)).unwrap() == fs::read(to.join(name)).unwrap());
    }
    assert_eq!(
        fs::read_link(to.join("sub/link")).unwrap(),
        Path::new("../nowhere")
    );
    assert!(to.join("sub/empty").is_dir());
    for name in ["sub", "sub/none", "large"] {
        let (before, after) = (
            from.join(name).metadata().unwrap(),
            to.join(name).metadata().unwrap(),
        );
        assert_eq!(before.mode(), after.mode(), "{name}");
        assert_eq!(before.mtime_nsec(), after.mtime_nsec(), "{name}");
    }
    // So that they can be removed.
    for sub in [from.join("sub"), to.join("sub")] {
        fs::set_permissions(sub, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[test]
fn holes_of_a_file_take_no_room_on_the_way_nor_in_the_copy() {
    const SIZE: u64 = 1 << 40;
    let directory = tempfile::tempdir().unwrap();
    let at = |path: &str| directory.path().join(path);
    let make = |name: &str, data: &[u64]| {
        let file = fs::File::create(at(name)).unwrap();
        file.set_len(SIZE).unwrap();
        for start in data {
            file.write_all_at(&[1; 5000], *start).unwrap();
        }
    };
    fs::create_dir(at("to")).unwrap();
    for (name, data) in [
        ("empty", &[][..]),
        ("ends", &[0, SIZE - 5000]),
        ("middle", &[1 << 30, 3 << 30]),
    ] {
        make(name, data);
        copy(&at(name), &at("to"), false).unwrap();
        let copied = fs::File::open(at("to").join(name)).unwrap();
        let found = copied.metadata().unwrap();
        assert_eq!(found.len(), SIZE, "{name}");
        assert!(found.blocks() * 512 < 1 << 20, "{name}");
        for start in data {
            // With what is around them.
            let from = start.saturating_sub(5000).min(SIZE - 15_000);
            let (mut before, mut after) = ([0; 15_000], [0; 15_000]);
            let original = fs::File::open(at(name)).unwrap();
            original.read_exact_at(&mut before, from).unwrap();
            copied.read_exact_at(&mut after, from).unwrap();
            assert!(before == after && after.contains(&1), "{name} at {start}");
        }
    }
}

#[test]
fn hole_longer_than_any_file_is_refused() {
    let to = tempfile::tempdir().unwrap();
    for holes in [&[u64::MAX][..], &[i64::MAX as u64, 1], &[1 << 63]] {
        let holes = holes.iter().map(|length| Piece::Hole(*length));
        let pieces: Vec<_> = [entry("file", Kind::File)]
            .into_iter()
            .chain(holes)
            .collect();
        let received = receive(&pieces, to.path());
        assert!(
            matches!(received, Err(UnpackError::Write(..))),
            "{received:?}"
        );
    }
    let received = receive(&[entry("a", Kind::Directory), Piece::Hole(1)], to.path());
    assert!(
        matches!(received, Err(UnpackError::Form(_))),
        "{received:?}"
    );
}

#[test]
fn names_are_chosen_as_by_docker() {
    let directory = tempfile::tempdir().unwrap();
    let at = |path: &str| directory.path().join(path);
    fs::create_dir_all(at("source/in")).unwrap();
    fs::create_dir(at("there")).unwrap();
    fs::write(at("file"), "content").unwrap();
    fs::write(at("old"), "old").unwrap();
    let read = |path: &str| fs::read_to_string(at(path)).unwrap();

    // A file: to a name, over a file, into a directory; a directory that is not there is an error.
    copy(&at("file"), &at("new"), false).unwrap();
    assert_eq!(read("new"), "content");
    copy(&at("file"), &at("old"), false).unwrap();
    assert_eq!(read("old"), "content");
    copy(&at("file"), &at("there"), false).unwrap();
    assert_eq!(read("there/file"), "content");
    assert!(copy(&at("file"), &at("missing/"), false).is_err());
    assert!(copy(&at("file"), &at("missing/name"), false).is_err());

    // A directory: to a name, into a directory, its contents into one; not over a file.
    copy(&at("source"), &at("copy"), false).unwrap();
    assert!(at("copy/in").is_dir());
    copy(&at("source"), &at("there"), false).unwrap();
    assert!(at("there/source/in").is_dir());
    copy(&at("source"), &at("there"), true).unwrap();
    assert!(at("there/in").is_dir());
    copy(&at("source"), &at("also-new"), true).unwrap();
    assert!(at("also-new/in").is_dir());
    assert!(copy(&at("source"), &at("file"), false).is_err());

    // What is neither a file nor a link stays.
    let fifo = at("there/fifo");
    let flags = (rustix::fs::FileType::Fifo, Mode::RUSR);
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, flags.0, flags.1, 0).unwrap();
    assert!(copy(&at("file"), &fifo, false).is_err());
    assert!(copy(&at("file"), &at("there/source"), false).is_ok());
    fs::create_dir(at("there/source/file2")).unwrap();
    fs::write(at("file2"), "").unwrap();
    assert!(copy(&at("file2"), &at("there/source"), false).is_err());

    // A link is followed to its target, and one that is copied is a link.
    symlink(at("old"), at("link")).unwrap();
    fs::write(at("file"), "changed").unwrap();
    copy(&at("file"), &at("link"), false).unwrap();
    assert_eq!(read("old"), "changed");
    copy(&at("link"), &at("there"), false).unwrap();
    assert_eq!(fs::read_link(at("there/link")).unwrap(), at("old"));
}

#[test]
fn nothing_is_made_outside_of_the_target() {
    let directory = tempfile::tempdir().unwrap();
    let (outside, inside) = (
        directory.path().join("outside"),
        directory.path().join("inside"),
    );
    fs::create_dir(&outside).unwrap();
    fs::create_dir(&inside).unwrap();
    fs::write(outside.join("file"), "kept").unwrap();
    let names = ["..", ".", "", "a/b", "/etc/x", "../outside/x", "a\0b"];
    for name in names {
        for kind in [Kind::File, Kind::Directory] {
            let pieces = [entry("top", Kind::Directory), entry(name, kind), Piece::End];
            let received = receive(&pieces, &inside);
            assert!(
                matches!(received, Err(UnpackError::Form(_))),
                "{name}: {received:?}"
            );
        }
    }
    // Through a link that it has made itself, or one that was there.
    let pieces = [
        entry("top", Kind::Directory),
        link("way", &outside),
        entry("way", Kind::Directory),
        entry("file", Kind::File),
    ];
    assert!(receive(&pieces, &inside).is_err());
    symlink(&outside, inside.join("top/other")).unwrap();
    let pieces = [
        entry("top", Kind::Directory),
        entry("other", Kind::Directory),
    ];
    assert!(receive(&pieces, &inside).is_err());
    // A file takes the place of a link.
    let pieces = [
        entry("top", Kind::Directory),
        link("way", &outside.join("file")),
        entry("way", Kind::File),
        Piece::Data(3),
        Piece::Leave,
        Piece::End,
    ];
    receive(&pieces, &inside).unwrap();
    assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "kept");
    assert_eq!(fs::read_to_string(inside.join("top/way")).unwrap(), "xxx");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    assert_eq!(outside.metadata().unwrap().mode() & 0o7777, {
        let made = tempfile::tempdir().unwrap();
        let plain = made.path().join("plain");
        fs::create_dir(&plain).unwrap();
        plain.metadata().unwrap().mode() & 0o7777
    });
}

#[test]
fn set_user_id_and_owners_of_an_end_that_is_not_trusted_are_left_out() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    receive(&[entry("x", Kind::File), Piece::End], &path).unwrap();
    let metadata = path.metadata().unwrap();
    assert_eq!(metadata.mode() & 0o7777, 0o755);
    assert_eq!(metadata.uid(), rustix::process::geteuid().as_raw());
    assert_eq!(
        (metadata.mtime(), metadata.mtime_nsec()),
        (1_000_000_000, 5)
    );
}

#[test]
fn what_makes_no_sense_or_is_cut_off_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let file = || entry("file", Kind::File);
    let top = || entry("top", Kind::Directory);
    let form: [&[Piece]; 7] = [
        &[Piece::Leave],
        &[Piece::Data(1)],
        &[top(), Piece::Data(1)],
        &[top(), Piece::Leave, Piece::Leave],
        &[file(), file()],
        &[top(), Piece::End],
        &[file(), Piece::Data(CHUNK as u32 + 1)],
    ];
    for pieces in form {
        let received = receive(pieces, directory.path());
        assert!(
            matches!(received, Err(UnpackError::Form(_))),
            "{pieces:?}: {received:?}"
        );
    }
    for pieces in [
        &[][..],
        &[file()],
        &[top(), file(), Piece::Data(3), Piece::Leave],
    ] {
        let received = receive(pieces, directory.path());
        let is_cut_off = matches!(received, Err(UnpackError::Receive(MessageError::Closed)));
        assert!(is_cut_off, "{pieces:?}: {received:?}");
    }
    let failed = receive(
        &[file(), Piece::Failed("no space".into())],
        directory.path(),
    );
    assert_eq!(failed.unwrap_err().to_string(), "no space");
}

#[test]
fn place_is_known_before_the_copy_and_no_link_at_it_is_followed() {
    let directory = tempfile::tempdir().unwrap();
    let at = |path: &str| directory.path().join(path);
    fs::create_dir(at("there")).unwrap();
    fs::create_dir(at("outside")).unwrap();
    fs::write(at("outside/file"), "kept").unwrap();
    for missing in ["missing/name", "missing/", "outside/file/name"] {
        let found = Place::find(&at(missing), Some(OsStr::new("a")));
        assert!(found.is_err(), "{missing}");
    }
    let find = |path: &str, name| Place::find(&at(path), name).unwrap();
    let file = [entry("theirs", Kind::File), Piece::Data(3), Piece::End];
    let tree = [
        entry("theirs", Kind::Directory),
        entry("in", Kind::File),
        Piece::Leave,
        Piece::End,
    ];
    let places = [
        find("there", Some(OsStr::new("mine"))),
        find("new", Some(OsStr::new("mine"))),
        find("there", None),
    ];
    // What the guest has left by an earlier copy.
    symlink(at("outside/file"), at("there/mine")).unwrap();
    symlink(at("outside"), at("new")).unwrap();
    let receive =
        |pieces: &[Piece], place| receive_within(pieces, Target::Place(place), Limits::NONE);
    receive(&file, &places[0]).unwrap();
    assert!(at("there/mine").symlink_metadata().unwrap().is_file());
    assert!(receive(&tree, &places[1]).is_err());
    assert!(receive(&file, &places[2]).is_err());
    receive(&tree, &places[2]).unwrap();
    assert!(at("there/in").is_file());
    let link = [link("theirs", &at("outside")), Piece::End];
    assert!(receive(&link, &find("there", Some(OsStr::new("link")))).is_err());
    assert!(!at("there/link").is_symlink());
    assert_eq!(fs::read_to_string(at("outside/file")).unwrap(), "kept");
    assert_eq!(fs::read_dir(at("outside")).unwrap().count(), 1);
}

#[test]
fn copy_has_no_more_than_it_may() {
    let directory = tempfile::tempdir().unwrap();
    let target = || Target::Path {
        path: directory.path(),
        contents: false,
    };
    let limits = Limits {
        entries: 3,
        bytes: 10,
    };
    let file = |name| [entry(name, Kind::File), Piece::Data(5)];
    let mut pieces = vec![entry("top", Kind::Directory)];
    pieces.extend(file("a"));
    pieces.extend(file("b"));
    pieces.extend([Piece::Leave, Piece::End]);
    receive_within(&pieces, target(), limits).unwrap();
    for more in [Piece::Data(1), link("c", Path::new("a"))] {
        pieces.insert(5, more);
        let received = receive_within(&pieces, target(), limits);
        assert!(
            matches!(received, Err(UnpackError::TooMuch(_))),
            "{received:?}"
        );
        pieces.remove(5);
    }
}
