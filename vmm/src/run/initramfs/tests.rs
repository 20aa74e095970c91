//! What is in the archive, read by the same crate and by cpio's own format.

use std::io::Read;

use cpio::NewcReader;

use super::super::modules::tests::{Host, module};
use super::*;

const ALL: Needs = Needs {
    transport: Transport::Pci,
    shares: true,
    overlay: true,
    disks: true,
    nics: true,
};

/// The modules of Debian's kernel, with what they depend on.
const DEBIAN: &[(&str, &[&str])] = &[
    ("fs/ext4/ext4", &["jbd2", "mbcache"]),
    ("fs/jbd2/jbd2", &[]),
    ("fs/mbcache", &[]),
    ("crypto/crc32c_generic", &[]),
    ("fs/fuse/fuse", &[]),
    ("fs/fuse/virtiofs", &["fuse", "virtio", "virtio_ring"]),
    ("fs/overlayfs/overlay", &[]),
    ("drivers/virtio/virtio", &["virtio_ring"]),
    ("drivers/virtio/virtio_ring", &[]),
    (
        "drivers/virtio/virtio_pci",
        &[
            "virtio_ring",
            "virtio_pci_modern_dev",
            "virtio_pci_legacy_dev",
            "virtio",
        ],
    ),
    ("drivers/virtio/virtio_pci_modern_dev", &[]),
    ("drivers/virtio/virtio_pci_legacy_dev", &[]),
    ("drivers/virtio/virtio_mmio", &["virtio_ring", "virtio"]),
    ("drivers/block/virtio_blk", &["virtio_ring", "virtio"]),
    (
        "drivers/net/virtio_net",
        &["virtio_ring", "virtio", "net_failover"],
    ),
    ("drivers/net/net_failover", &["failover"]),
    ("net/core/failover", &[]),
    ("net/vmw_vsock/vsock", &[]),
    (
        "net/vmw_vsock/vmw_vsock_virtio_transport_common",
        &["vsock"],
    ),
    (
        "net/vmw_vsock/vmw_vsock_virtio_transport",
        &[
            "virtio",
            "vmw_vsock_virtio_transport_common",
            "virtio_ring",
            "vsock",
        ],
    ),
];

fn debian() -> (Host, Kernel) {
    let host = Host::new();
    for (path, depends) in DEBIAN {
        host.file(&format!("kernel/{path}.ko"), module("6.1", depends));
    }
    host.file("modules.builtin", "kernel/net/ipv6/ipv6.ko\n");
    let kernel = Kernel {
        image: "bzImage".into(),
        release: "6.1".into(),
        tree: None,
    };
    (host, kernel)
}

/// Name, mode, and contents of each entry.
fn entries(archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
    let mut all = Vec::new();
    let mut rest = archive;
    loop {
        let mut reader = NewcReader::new(rest).unwrap();
        if reader.entry().is_trailer() {
            return all;
        }
        let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
        assert_eq!(
            (
                reader.entry().uid(),
                reader.entry().gid(),
                reader.entry().mtime()
            ),
            (0, 0, 0)
        );
        let mut contents = Vec::new();
        reader.read_to_end(&mut contents).unwrap();
        rest = reader.finish().unwrap();
        all.push((name, mode, contents));
    }
}

fn text(archive: &[u8], name: &str) -> String {
    let entries = entries(archive);
    let (.., contents) = entries.into_iter().find(|entry| entry.0 == name).unwrap();
    String::from_utf8(contents).unwrap()
}

#[test]
fn archive_has_init_and_what_it_loads() {
    let (host, kernel) = debian();
    let archive = make(&kernel, Some(&host.path("")), &ALL).unwrap();
    let entries = entries(&archive);
    let names: Vec<_> = entries.iter().map(|(name, ..)| &**name).collect();
    assert_eq!(names[..4], ["dev", "dev/console", "modules", "init"]);
    assert!(names[4..].is_sorted());
    assert_eq!(names.len(), 6 + DEBIAN.len() - 1, "{names:?}");
    let find = |name| entries.iter().find(|entry| entry.0 == name).unwrap();
    assert_eq!(find("init").1, 0o100_755);
    assert!(find("init").2 == AGENT && AGENT.starts_with(b"\x7fELF"));
    assert_eq!(find("dev/console").1, 0o020_600);
    assert_eq!(find("modules/fuse.ko").2, module("6.1", &[]));
    let console = archive
        .windows(16)
        .any(|bytes| bytes == b"0000000500000001");
    assert!(console, "5:1 is /dev/console");
}

#[test]
fn archive_lists_modules_after_what_they_depend_on() {
    let (host, kernel) = debian();
    let archive = make(&kernel, Some(&host.path("")), &ALL).unwrap();
    let load = text(&archive, "modules/load");
    let order = "virtio_ring virtio_pci_modern_dev virtio_pci_legacy_dev virtio virtio_pci fuse virtiofs \
                 overlay virtio_blk vsock vmw_vsock_virtio_transport_common \
                 vmw_vsock_virtio_transport failover net_failover virtio_net";
    assert_eq!(load.lines().collect::<Vec<_>>().join(" "), order);
    let list = text(&archive, "modules/list");
    for line in [
        "virtiofs virtio_ring virtio fuse",
        "overlay",
        // crc32c_generic is one that ext4 asks for by the name of an algorithm.
        "ext4 crc32c_generic jbd2 mbcache",
    ] {
        let words = |line: &str| {
            let mut words: Vec<_> = line.split(' ').map(str::to_owned).collect();
            words[1..].sort();
            words
        };
        let found = list.lines().any(|other| words(other) == words(line));
        assert!(found, "{line}: {list}");
    }
}

#[test]
fn archive_has_only_what_the_guest_needs() {
    let (host, kernel) = debian();
    let least = Needs {
        transport: Transport::Mmio,
        shares: false,
        overlay: false,
        disks: false,
        nics: false,
    };
    let archive = make(&kernel, Some(&host.path("")), &least).unwrap();
    let load = "virtio_ring\nvirtio\nvirtio_mmio\nvsock\nvmw_vsock_virtio_transport_common\n\
                vmw_vsock_virtio_transport\n";
    assert_eq!(text(&archive, "modules/load"), load);
    assert_eq!(text(&archive, "modules/list").lines().count(), 6);
    let all_inside = make(&kernel, Some(Path::new("none")), &ALL).unwrap();
    assert_eq!(text(&all_inside, "modules/list"), "");
    assert_eq!(text(&all_inside, "modules/load"), "");
}

#[test]
fn archive_of_the_same_input_is_the_same() {
    let (host, kernel) = debian();
    let (copy, _) = debian();
    let first = make(&kernel, Some(&host.path("")), &ALL).unwrap();
    let second = make(&kernel, Some(&copy.path("")), &ALL).unwrap();
    assert!(first == second);
}
