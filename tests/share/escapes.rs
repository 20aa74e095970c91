//! Ways out of the directory.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::process::Command;

use crate::client::{ANSWER, Guest, HIPRIO, REQUEST, REQUESTS};
use crate::fuse::*;
use crate::harness::netns::{self, root_test};
use crate::harness::vm;
use crate::{directory, mounted, script};

root_test!(names_do_not_lead_out, || {
    let outer = directory();
    fs::write(outer.path().join("secret"), "secret").unwrap();
    let inner = outer.path().join("share");
    fs::create_dir(&inner).unwrap();
    fs::create_dir(inner.join("below")).unwrap();
    let mut guest = Guest::new(&inner, false).mount();
    let below = guest.lookup(ROOT, "below").unwrap().node;
    // What is found or made is in the directory, whatever it is called.
    let names = [
        "../secret",
        "../../secret",
        "../share/new",
        "/secret",
        "/etc/passwd",
        "below/../../secret",
        "/proc/self/root/etc",
    ];
    let everywhere = names.map(|name| [(ROOT, name), (below, name)]);
    let everywhere = everywhere.as_flattened();
    for &(parent, name) in everywhere {
        assert_eq!(guest.lookup(parent, name), Err(libc::ENOENT), "{name}");
        let taken = guest.rename((parent, name), (ROOT, "taken"));
        assert_eq!(taken, Err(libc::ENOENT), "{name}");
        assert_eq!(guest.unlink(parent, name), Err(libc::ENOENT), "{name}");
    }
    for &(parent, name) in everywhere {
        let _ = guest.create(GUEST_ROOT, parent, name);
        let _ = guest.unlink(parent, name);
        let _ = guest.mkdir(parent, name);
        let _ = guest.rmdir(parent, name);
        let _ = guest.mknod(parent, name, libc::S_IFREG | 0o644, 0);
        let _ = guest.rename((parent, name), (parent, "taken"));
        let _ = guest.symlink(parent, name, "x");
    }
    // The directory above the root is the root.
    for name in ["..", "."] {
        match guest.lookup(ROOT, name) {
            Ok(found) => {
                let names = guest.list(found.node).unwrap();
                assert!(names.contains(&"below".to_owned()), "{name}");
            }
            Err(error) => assert_eq!(error, libc::EINVAL),
        }
    }
    assert!(guest.rmdir(ROOT, "..").is_err());
    // A name ends where its first NUL is, and there has to be one.
    for body in [
        &b"below\0/../../secret\0"[..],
        b"below",
        b"",
        b"\0",
        b"be\0low\0",
    ] {
        assert!(guest.call(LOOKUP, ROOT, body).is_err(), "{body:?}");
    }
    assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 2);
    assert_eq!(fs::read(outer.path().join("secret")).unwrap(), b"secret");
});

root_test!(symbolic_links_are_not_followed, || {
    let outer = directory();
    let inner = outer.path().join("share");
    fs::create_dir(&inner).unwrap();
    fs::write(outer.path().join("secret"), "secret").unwrap();
    symlink("../secret", inner.join("theirs")).unwrap();
    symlink("/", inner.join("root")).unwrap();
    let mut guest = Guest::new(&inner, false).mount();
    for target in [
        "/etc/passwd",
        "../secret",
        "/proc/self/root",
        "/proc/1/root/etc",
        "/proc/self/cwd",
    ] {
        guest.symlink(ROOT, "mine", target).unwrap();
        let link = guest.lookup(ROOT, "mine").unwrap();
        assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(
            guest.call(READLINK, link.node, &[]).unwrap(),
            target.as_bytes()
        );
        assert_eq!(guest.open(link.node, libc::O_RDONLY), Err(libc::EBADF));
        assert!(guest.lookup(link.node, "etc").is_err());
        assert!(guest.create(GUEST_ROOT, link.node, "new").is_err());
        assert!(guest.setattr(link.node, 1 << 3, 0, [0; 3]).is_err());
        // Nor by way of its name.
        let body = [words(&[libc::O_RDWR as u32, 0o644, 0, 0]), b"mine\0".into()].concat();
        assert!(guest.call(CREATE, ROOT, &body).is_err());
        guest.unlink(ROOT, "mine").unwrap();
    }
    for name in ["theirs", "root"] {
        let link = guest.lookup(ROOT, name).unwrap();
        assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(guest.open(link.node, libc::O_RDONLY), Err(libc::EBADF));
        assert!(guest.lookup(link.node, "etc").is_err());
    }
    assert_eq!(fs::read(outer.path().join("secret")).unwrap(), b"secret");
});

root_test!(hard_links_do_not_lead_out, || {
    let outer = directory();
    let inner = outer.path().join("share");
    fs::create_dir(&inner).unwrap();
    let secret = outer.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    fs::write(inner.join("file"), "text").unwrap();
    let mut guest = Guest::new(&inner, false).mount();
    // A link to a symbolic link is one to that, not to what it names.
    for target in ["../secret", "/proc/self/fd/3", "/proc/self/exe"] {
        guest.symlink(ROOT, "soft", target).unwrap();
        let soft = guest.lookup(ROOT, "soft").unwrap().node;
        let hard = guest.link(soft, ROOT, "hard").unwrap();
        assert_eq!(hard.node, soft);
        assert_eq!(guest.call(READLINK, soft, &[]).unwrap(), target.as_bytes());
        for name in ["soft", "hard"] {
            guest.unlink(ROOT, name).unwrap();
        }
    }
    // Nor is a new name made elsewhere, or of a directory, or of what has none.
    let file = guest.lookup(ROOT, "file").unwrap().node;
    for name in ["../new", "/new", "../secret", ".."] {
        let _ = guest.link(file, ROOT, name);
        let _ = guest.unlink(ROOT, name);
    }
    assert!(guest.link(ROOT, ROOT, "new").is_err());
    for node in [0, file + 1, u64::MAX] {
        assert_eq!(guest.link(node, ROOT, "new").map(drop), Err(libc::EBADF));
    }
    assert_eq!(fs::metadata(&secret).unwrap().nlink(), 1);
    assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 2);
    assert_eq!(fs::read_dir(&inner).unwrap().count(), 1);
});

root_test!(device_nodes_are_neither_made_nor_opened, || {
    let directory = directory();
    let null = directory.path().join("null");
    let made = Command::new("mknod")
        .arg(&null)
        .args(["c", "1", "3"])
        .status();
    assert!(made.unwrap().success());
    let mut guest = mounted(&directory);
    let null = guest.lookup(ROOT, "null").unwrap();
    assert_eq!(null.mode & libc::S_IFMT, libc::S_IFCHR);
    assert_eq!(guest.open(null.node, libc::O_RDWR), Err(libc::EBADF));
    for kind in [libc::S_IFCHR, libc::S_IFBLK] {
        assert_eq!(
            guest.mknod(ROOT, "mine", kind | 0o666, 0x101).map(drop),
            Err(libc::EPERM)
        );
    }
    // These are of no device. Opened, a FIFO would wait for its other end.
    for (name, kind) in [("fifo", libc::S_IFIFO), ("socket", libc::S_IFSOCK)] {
        let made = guest.mknod(ROOT, name, kind | 0o600, 0).unwrap();
        assert_eq!(guest.open(made.node, libc::O_RDONLY), Err(libc::EBADF));
    }
});

root_test!(file_systems_that_are_mounted_below_are_not_shown, || {
    let directory = directory();
    let below = directory.path().join("below");
    fs::create_dir(&below).unwrap();
    let mount = format!("mount --bind /proc {}", below.display());
    let run = format!("{mount} && exec {} \"$@\"", vm::binary().display());
    let program = script(
        &directory,
        &format!("exec unshare -m sh -c '{run}' sh \"$@\""),
    );
    let mut guest = Guest::by(directory.path(), false, &program).mount();
    let below = guest.lookup(ROOT, "below").unwrap();
    assert_eq!(guest.list(below.node).unwrap(), [""; 0]);
});

root_test!(numbers_that_were_not_given_out_are_refused, || {
    let directory = directory();
    fs::write(directory.path().join("file"), "text").unwrap();
    let mut guest = mounted(&directory);
    let file = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(file.node, libc::O_RDONLY).unwrap();
    for node in [0, 2 + file.node, 1 << 32, u64::MAX] {
        assert_eq!(guest.lookup(node, "file"), Err(libc::EBADF));
        assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::EBADF));
        assert_eq!(guest.read(node, handle, 0, 4), Err(libc::EBADF));
        guest.forget(node, u64::MAX);
    }
    for handle in [handle + 1, 3, u64::MAX] {
        assert_eq!(guest.read(file.node, handle, 0, 4), Err(libc::EBADF));
        assert_eq!(guest.release(file.node, handle), Err(libc::EBADF));
    }
    // More than it had looked up: it is gone, and the root stays.
    guest.forget(file.node, u64::MAX);
    assert_eq!(guest.open(file.node, libc::O_RDONLY), Err(libc::EBADF));
    assert_eq!(guest.list(ROOT).unwrap(), ["file"]);
});

root_test!(
    requests_that_make_no_sense_are_answered_and_survived,
    || {
        let directory = directory();
        let mut guest = mounted(&directory);
        for opcode in (0..60).chain([4096, u32::MAX]) {
            for body in [&[][..], &[0xff; 7], &[0xff; 64], &[0; 512]] {
                let bytes = request(opcode, ROOT, GUEST_ROOT, body);
                for room in [0, 1, 15, 16, 24, 0x1000] {
                    guest.transact(REQUESTS, &bytes, room);
                    guest.transact(HIPRIO, &bytes, room);
                }
            }
        }
        // Lengths that are not the chain's.
        for len in [0, 39, 40, 41, 0x10_1000, u32::MAX] {
            let mut bytes = request(LOOKUP, ROOT, GUEST_ROOT, b"file\0");
            bytes[..4].copy_from_slice(&len.to_le_bytes());
            guest.transact(REQUESTS, &bytes, 0x1000);
        }
        for len in 0..40 {
            guest.transact(REQUESTS, &vec![0xff; len], 0x1000);
        }
        let mut guest = guest.mount();
        assert_eq!(guest.list(ROOT).unwrap(), [""; 0]);
    }
);

root_test!(rings_that_make_no_sense_are_survived, || {
    let directory = directory();
    let mut guest = mounted(&directory);
    let bytes = request(GETATTR, ROOT, GUEST_ROOT, &[0; 16]);
    guest.put(REQUESTS, REQUEST, &bytes);
    let len = bytes.len() as u32;
    let chains: [&[(u64, u32, u16, u16)]; 8] = [
        // Circles, an end beyond the table, addresses beyond memory, lengths that wrap, an empty indirect table.
        &[(REQUEST, len, 1, 0)],
        &[(REQUEST, len, 1, 1), (ANSWER, 64, 3, 0)],
        &[(REQUEST, len, 1, 999)],
        &[(1 << 40, len, 1, 1), (ANSWER, 64, 2, 0)],
        &[(REQUEST, len, 1, 1), (u64::MAX - 8 - (4 << 20), 64, 2, 0)],
        &[(REQUEST, u32::MAX, 1, 1), (ANSWER, u32::MAX, 2, 0)],
        &[(REQUEST, 0, 4, 0)],
        // Room before the request.
        &[(ANSWER, 64, 3, 1), (REQUEST, len, 0, 0)],
    ];
    for chain in chains {
        for (index, descriptor) in (0..).zip(chain) {
            guest.describe(REQUESTS, index, *descriptor);
        }
        guest.submit(REQUESTS, 0);
    }
    assert_eq!(guest.list(ROOT).unwrap(), [""; 0]);
    // More are available than there are descriptors: nothing is served until the queue starts again.
    guest.put(REQUESTS, crate::client::AVAIL + 2, &0x7fffu16.to_le_bytes());
    guest.kick(REQUESTS);
    guest.stop(REQUESTS);
    guest.start(REQUESTS);
    assert_eq!(guest.list(ROOT).unwrap(), [""; 0]);
});

root_test!(rename_races_do_not_lead_out, || {
    let outer = directory();
    let inner = outer.path().join("share");
    fs::create_dir_all(inner.join("a/b/c")).unwrap();
    let mut guest = Guest::new(&inner, false).mount();
    let c = guest.walk("a/b/c").unwrap().node;
    // The host moves a directory that the guest is in out of the share: what lies above it then is not the guest's.
    fs::rename(inner.join("a/b/c"), outer.path().join("moved")).unwrap();
    fs::write(outer.path().join("secret"), "secret").unwrap();
    for name in ["..", "../secret", "../../etc/passwd"] {
        if let Ok(found) = guest.lookup(c, name) {
            assert!(guest.lookup(found.node, "secret").is_err(), "{name}");
            assert!(guest.read_file(found.node).is_err(), "{name}");
        }
    }
});
