use std::sync::Arc;

use proptest::prelude::*;

use super::super::testing::{opened, ops, read, spec, write};
use super::super::{Format, open};
use super::*;

const SECTORS: u64 = 300;

/// A raw image of bytes that tell where they are.
fn base(directory: &Path) -> (PathBuf, Vec<u8>) {
    let path = directory.join("base.img");
    let bytes: Vec<u8> = (0..SECTORS * 512)
        .map(|at| (at / 512 % 251) as u8 + 1)
        .collect();
    std::fs::write(&path, &bytes).unwrap();
    (path, bytes)
}

fn ephemeral(path: &Path) -> Ephemeral {
    let mut spec = spec(path, Format::Raw);
    spec.readonly = true;
    Ephemeral::new(opened(&spec)).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn ephemeral_disk_keeps_what_is_written_and_its_image_stays(ops in ops(SECTORS)) {
        let directory = tempfile::tempdir().unwrap();
        let (path, before) = base(directory.path());
        let disk = ephemeral(&path);
        let mut mirror = before.clone();
        for op in ops {
            op.apply(&disk, &mut mirror);
        }
        let now = read(&disk, 0, mirror.len()).unwrap();
        prop_assert!(now == mirror);
        drop(disk);
        prop_assert!(std::fs::read(&path).unwrap() == before);
    }
}

#[test]
fn two_ephemeral_disks_share_an_image() {
    let directory = tempfile::tempdir().unwrap();
    let (path, before) = base(directory.path());
    let mut spec = spec(&path, Format::Raw);
    spec.ephemeral = true;
    let (one, other) = (opened(&spec), opened(&spec));
    write(one.image(), 512, &[0xaa; 512]).unwrap();
    assert_eq!(read(one.image(), 512, 512).unwrap(), [0xaa; 512]);
    assert_eq!(read(other.image(), 512, 512).unwrap(), before[512..1024]);
    // One that writes it would change what they see.
    spec.ephemeral = false;
    assert!(matches!(open(&spec), Err(OpenError::InUse { .. })));
}

#[test]
fn grown_ephemeral_disk_has_zeros_at_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let (path, before) = base(directory.path());
    let disk = ephemeral(&path);
    let size = SECTORS * 512;
    disk.grow(size + (64 << 10)).unwrap();
    let mut expected = before;
    expected.resize(expected.len() + (64 << 10), 0);
    assert!(read(&disk, 0, expected.len()).unwrap() == expected);
    write(&disk, size, &[7; 1024]).unwrap();
    expected[size as usize..][..1024].fill(7);
    assert!(read(&disk, 0, expected.len()).unwrap() == expected);
    assert!(disk.grow(512).is_err());
}

#[test]
fn queues_use_an_ephemeral_disk_at_the_same_time() {
    let directory = tempfile::tempdir().unwrap();
    let (path, before) = base(directory.path());
    let disk = Arc::new(ephemeral(&path));
    // Each thread has every fourth sector: they meet in each block.
    std::thread::scope(|scope| {
        for queue in 0..4u64 {
            let (disk, before) = (&disk, &before);
            scope.spawn(move || {
                for sector in (queue..SECTORS).step_by(4) {
                    let at = sector * 512;
                    assert!(read(disk.as_ref(), at, 512).unwrap() == before[at as usize..][..512]);
                    write(disk.as_ref(), at, &[queue as u8; 512]).unwrap();
                }
            });
        }
    });
    for sector in 0..SECTORS {
        let now = read(disk.as_ref(), sector * 512, 512).unwrap();
        assert_eq!(now, [(sector % 4) as u8; 512], "sector {sector}");
    }
}

#[test]
fn directory_without_nameless_files_gets_one_without_a_name_all_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let file = unnamed(directory.path()).unwrap();
    file.set_len(1 << 20).unwrap();
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    let missing = directory.path().join("none");
    assert!(unnamed(&missing).is_err());
}

#[test]
fn bitmap_of_a_large_disk_stays_small() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("large.img");
    File::create(&path).unwrap().set_len(1 << 42).unwrap();
    let disk = ephemeral(&path);
    assert!(disk.reading().bits.len() * 8 <= 2 << 20);
    write(&disk, (1 << 42) - 512, &[1; 512]).unwrap();
    assert_eq!(
        read(&disk, (1 << 42) - 1024, 1024).unwrap()[512..],
        [1; 512]
    );
}
