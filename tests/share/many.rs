//! More files than the file server may have descriptors.

use super::*;

const FILES: u32 = 50_000;
const DESCRIPTORS: u32 = 4_096;

/// Makes files as a guest unpacks an archive, and reads them as one makes an archive: it remembers all of them.
fn unpack_and_archive(directory: &TempDir, options: &str) {
    let program = limited(directory, DESCRIPTORS, options);
    let mut guest = Guest::by(directory.path(), false, &program).mount();
    let name = |n: u32| format!("file-{n}");
    let mut nodes = Vec::new();
    let mut below = 0;
    for n in 0..FILES {
        if n % 1_000 == 0 {
            below = guest.mkdir(ROOT, &format!("dir-{n}")).unwrap().node;
        }
        let (file, handle) = guest.create(GUEST_ROOT, below, &name(n)).unwrap();
        guest.release(file.node, handle).unwrap();
        nodes.push(file.node);
    }
    let paths = (0..FILES).map(|n| {
        let below = format!("dir-{}", n / 1_000 * 1_000);
        directory.path().join(below).join(name(n))
    });
    let paths: Vec<_> = paths.collect();
    fs::write(&paths[0], "first").unwrap();
    fs::write(&paths[FILES as usize - 1], "last").unwrap();
    assert!(paths.iter().all(|path| path.exists()));

    for n in 0..FILES {
        if n % 1_000 == 0 {
            below = guest.lookup(ROOT, &format!("dir-{n}")).unwrap().node;
        }
        let file = guest.lookup(below, &name(n)).unwrap();
        assert_eq!(file.node, nodes[n as usize]);
    }
    let mut text = |n: usize| guest.read_file(nodes[n]).unwrap();
    assert_eq!(text(0), "first");
    assert_eq!(text(FILES as usize - 1), "last");
    assert_eq!(text(FILES as usize / 2), "");
}

root_test!(
    fifty_thousand_files_take_four_thousand_descriptors_of_root,
    || {
        unpack_and_archive(&directory(), "");
    }
);

root_test!(
    fifty_thousand_files_take_four_thousand_descriptors_of_a_user,
    || {
        let directory = directory();
        unpack_and_archive(&directory, &be_user(&directory));
    }
);

/// A guest of a server with few descriptors, in whose share are many files.
fn crowded(directory: &TempDir) -> Guest {
    let many = directory.path().join("many");
    fs::create_dir(&many).unwrap();
    for n in 0..500 {
        fs::write(many.join(n.to_string()), "").unwrap();
    }
    let program = limited(directory, 200, "");
    Guest::by(directory.path(), false, &program).mount()
}

/// Looks at so many files that all others are closed which can be.
fn crowd(guest: &mut Guest) {
    let many = guest.lookup(ROOT, "many").unwrap().node;
    for n in 0..500 {
        guest.lookup(many, &n.to_string()).unwrap();
    }
}

root_test!(file_is_the_same_wherever_the_guest_moves_it, || {
    let directory = directory();
    let mut guest = crowded(&directory);
    fs::create_dir_all(directory.path().join("a/b/c")).unwrap();
    fs::write(directory.path().join("a/b/c/file"), "text").unwrap();
    let file = guest.walk("a/b/c/file").unwrap().node;
    let b = guest.walk("a/b").unwrap().node;
    crowd(&mut guest);
    assert_eq!(guest.read_file(file).unwrap(), "text");
    crowd(&mut guest);
    guest.rename((ROOT, "a"), (ROOT, "moved")).unwrap();
    assert_eq!(guest.read_file(file).unwrap(), "text");
    crowd(&mut guest);
    guest.mkdir(ROOT, "a").unwrap();
    guest.rename((b, "c"), (ROOT, "c")).unwrap();
    crowd(&mut guest);
    let c = guest.lookup(ROOT, "c").unwrap().node;
    guest.rename((c, "file"), (b, "again")).unwrap();
    crowd(&mut guest);
    assert_eq!(guest.read_file(file).unwrap(), "text");
    assert_eq!(guest.walk("moved/b/again").unwrap().node, file);
});

root_test!(file_without_a_name_stays_while_the_guest_has_it, || {
    let directory = directory();
    let mut guest = crowded(&directory);
    for name in ["removed", "replaced", "other"] {
        fs::write(directory.path().join(name), name).unwrap();
    }
    let mut node = |name| guest.lookup(ROOT, name).unwrap().node;
    let (removed, replaced, other) = (node("removed"), node("replaced"), node("other"));
    crowd(&mut guest);
    guest.unlink(ROOT, "removed").unwrap();
    guest.rename((ROOT, "other"), (ROOT, "replaced")).unwrap();
    crowd(&mut guest);
    for (node, text) in [
        (removed, "removed"),
        (replaced, "replaced"),
        (other, "other"),
    ] {
        assert_eq!(guest.read_file(node).unwrap(), text);
    }
    assert_eq!(guest.getattr(removed).unwrap().links, 0);
    guest.forget(removed, 1);
    assert_eq!(guest.getattr(removed), Err(libc::EBADF));
});

root_test!(exchanged_files_stay_what_they_are, || {
    let directory = directory();
    let mut guest = crowded(&directory);
    let mut make = |name: &str| {
        fs::write(directory.path().join(name), name).unwrap();
        guest.lookup(ROOT, name).unwrap().node
    };
    let (one, two) = (make("one"), make("two"));
    crowd(&mut guest);
    guest.exchange((ROOT, "one"), (ROOT, "two")).unwrap();
    crowd(&mut guest);
    assert_eq!(guest.read_file(one).unwrap(), "one");
    assert_eq!(guest.read_file(two).unwrap(), "two");
    assert_eq!(guest.lookup(ROOT, "one").unwrap().node, two);
});

root_test!(names_of_one_file_have_one_number, || {
    let directory = directory();
    let mut guest = crowded(&directory);
    fs::create_dir(directory.path().join("below")).unwrap();
    fs::write(directory.path().join("below/first"), "text").unwrap();
    let first = guest.walk("below/first").unwrap().node;
    crowd(&mut guest);
    let second = guest.link(first, ROOT, "second").unwrap().node;
    assert_eq!(second, first);
    crowd(&mut guest);
    let paths = ["below/first", "third"].map(|name| directory.path().join(name));
    fs::hard_link(&paths[0], &paths[1]).unwrap();
    for path in ["third", "second", "below/first"] {
        assert_eq!(guest.walk(path).unwrap().node, first, "{path}");
        crowd(&mut guest);
    }
    let below = guest.lookup(ROOT, "below").unwrap().node;
    guest.unlink(below, "first").unwrap();
    crowd(&mut guest);
    assert_eq!(guest.read_file(first).unwrap(), "text");
});

root_test!(open_file_stays_open_whatever_happens_to_its_name, || {
    let directory = directory();
    let mut guest = crowded(&directory);
    let path = directory.path().join("file");
    fs::write(&path, "text").unwrap();
    let file = guest.lookup(ROOT, "file").unwrap().node;
    crowd(&mut guest);
    let handle = guest.open(file, libc::O_RDONLY).unwrap();
    fs::remove_file(&path).unwrap();
    crowd(&mut guest);
    assert_eq!(guest.read(file, handle, 0, 9).unwrap(), b"text");
    assert_eq!(guest.getattr(file).unwrap().size, 4);
    guest.release(file, handle).unwrap();
});

root_test!(what_the_host_has_moved_meanwhile_is_stale, || {
    let directory = directory();
    let mut guest = crowded(&directory);
    let path = |name| directory.path().join(name);
    fs::create_dir(path("dir")).unwrap();
    fs::write(path("dir/file"), "text").unwrap();
    fs::write(path("new"), "new").unwrap();
    let file = guest.walk("dir/file").unwrap().node;
    crowd(&mut guest);
    fs::rename(path("dir"), path("moved")).unwrap();
    assert_eq!(guest.read_file(file), Err(libc::ESTALE));
    assert_eq!(guest.lookup(ROOT, "dir"), Err(libc::ENOENT));
    let moved = guest.walk("moved/file").unwrap().node;
    assert_eq!(guest.read_file(moved).unwrap(), "text");
    crowd(&mut guest);
    fs::rename(path("new"), path("moved/file")).unwrap();
    assert_eq!(guest.read_file(moved), Err(libc::ESTALE));
    let new = guest.walk("moved/file").unwrap().node;
    assert_eq!(guest.read_file(new).unwrap(), "new");
});

root_test!(file_is_found_again_in_a_forgotten_directory, || {
    let directory = directory();
    let mut guest = crowded(&directory);
    fs::create_dir_all(directory.path().join("a/b")).unwrap();
    fs::write(directory.path().join("a/b/file"), "text").unwrap();
    let file = guest.walk("a/b/file").unwrap().node;
    let (a, b) = (
        guest.walk("a").unwrap().node,
        guest.walk("a/b").unwrap().node,
    );
    guest.forget(a, 9);
    guest.forget(b, 9);
    assert_eq!(guest.getattr(b), Err(libc::EBADF));
    crowd(&mut guest);
    assert_eq!(guest.read_file(file).unwrap(), "text");
    assert_eq!(guest.walk("a/b").unwrap().node, b);
});

root_test!(closed_and_open_files_go_on_with_another_server, || {
    let directory = directory();
    let mut guest = crowded(&directory);
    fs::create_dir(directory.path().join("below")).unwrap();
    for name in ["closed", "open", "replaced"] {
        fs::write(directory.path().join("below").join(name), name).unwrap();
    }
    let mut node = |name: &str| guest.walk(&format!("below/{name}")).unwrap().node;
    let (closed, open, replaced) = (node("closed"), node("open"), node("replaced"));
    let handle = guest.open(open, libc::O_RDONLY).unwrap();
    crowd(&mut guest);
    let state = guest.save();
    // The first one has only written that down.
    guest.start(client::HIPRIO);
    guest.start(client::REQUESTS);
    assert_eq!(guest.read_file(closed).unwrap(), "closed");
    let program = limited(&directory, 200, "");
    let mut guest = Guest::by(directory.path(), false, &program);
    fs::write(directory.path().join("other"), "other").unwrap();
    fs::rename(
        directory.path().join("other"),
        directory.path().join("below/replaced"),
    )
    .unwrap();
    guest.restore(&state);
    assert_eq!(guest.read(open, handle, 0, 9).unwrap(), b"open");
    assert_eq!(guest.read_file(closed).unwrap(), "closed");
    assert_eq!(guest.read_file(replaced), Err(libc::ESTALE));
    assert_eq!(guest.walk("below/closed").unwrap().node, closed);
    guest.release(open, handle).unwrap();
    assert_eq!(guest.read(open, handle, 0, 9), Err(libc::EBADF));
    crowd(&mut guest);
    assert_eq!(guest.read_file(open).unwrap(), "open");
});
