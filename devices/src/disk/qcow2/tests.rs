use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use proptest::prelude::*;

use super::*;
use crate::disk::testing::{self, check, has_qemu_img, ops, read, run, spec, try_run, write};
use crate::disk::{Format, OpenError, Storage, open};

mod chain;
mod power;

/// A directory, and the image `disk.qcow2` in it that qemu-img made with these options.
fn made(options: &str) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    run(
        directory.path(),
        &format!("qemu-img create -q -f qcow2 {options}"),
    );
    let path = directory.path().join("disk.qcow2");
    (directory, path)
}

fn opened(path: &Path) -> Storage {
    testing::opened(&spec(path, Format::Qcow2))
}

/// What QEMU reads.
fn as_qemu_reads(path: &Path) -> Vec<u8> {
    let directory = path.parent().unwrap();
    let name = path.file_name().unwrap().to_str().unwrap();
    run(
        directory,
        &format!("qemu-img convert -f qcow2 -O raw {name} read.raw"),
    );
    fs::read(directory.join("read.raw")).unwrap()
}

const SECTORS: u64 = 2048;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn image_is_what_was_written_to_it_for_qemu_too(
        first in ops(SECTORS),
        second in ops(SECTORS),
        options in prop::sample::select(vec![
            "disk.qcow2 1M",
            "-o cluster_size=512 disk.qcow2 1M",
            "-o cluster_size=4k,refcount_bits=64 disk.qcow2 1M",
            "-o cluster_size=2M disk.qcow2 1M",
            "-o compat=0.10,cluster_size=8k disk.qcow2 1M",
            "-o preallocation=metadata,cluster_size=1k disk.qcow2 1M",
        ]),
    ) {
        if !has_qemu_img() {
            return Ok(());
        }
        let (_directory, path) = made(options);
        let mut mirror = vec![0; (SECTORS * 512) as usize];
        for ops in [first, second] {
            let storage = opened(&path);
            for op in ops {
                op.apply(storage.image(), &mut mirror);
            }
            prop_assert!(read(storage.image(), 0, mirror.len()).unwrap() == mirror);
        }
        prop_assert_eq!(check(&path), (0, 0));
        prop_assert!(as_qemu_reads(&path) == mirror);
    }
}

/// A file of which some sectors can be compressed, and no two are alike.
fn data(directory: &Path) -> Vec<u8> {
    let mut bytes = vec![0; 2 << 20];
    for (sector, bytes) in bytes.chunks_mut(512).enumerate() {
        bytes[..8].copy_from_slice(&(sector as u64 + 1).to_le_bytes());
    }
    fs::write(directory.join("data.raw"), &bytes).unwrap();
    bytes
}

#[test]
fn compressed_clusters_and_backing_files_read_right_and_can_be_written() {
    if !has_qemu_img() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let mut mirror = data(at);
    run(
        at,
        "qemu-img convert -q -c -f raw -O qcow2 data.raw base.qcow2",
    );
    run(
        at,
        "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 middle.qcow2",
    );
    run(
        at,
        "qemu-img create -q -f qcow2 -o cluster_size=4k -b middle.qcow2 -F qcow2 disk.qcow2 3M",
    );
    mirror.resize(3 << 20, 0);
    let before = fs::read(at.join("base.qcow2")).unwrap();
    {
        let storage = opened(&at.join("disk.qcow2"));
        assert!(read(storage.image(), 0, mirror.len()).unwrap() == mirror);
        for offset in [0, 4096 + 512, 100 << 10, (2 << 20) - 1024] {
            write(storage.image(), offset, &[0x5a; 3072]).unwrap();
            mirror[offset as usize..][..3072].fill(0x5a);
        }
        storage
            .image()
            .write_zeroes(1 << 20, 70 << 10, true)
            .unwrap();
        mirror[1 << 20..][..70 << 10].fill(0);
        assert!(read(storage.image(), 0, mirror.len()).unwrap() == mirror);
    }
    assert_eq!(check(&at.join("disk.qcow2")), (0, 0));
    assert!(as_qemu_reads(&at.join("disk.qcow2")) == mirror);
    assert!(
        fs::read(at.join("base.qcow2")).unwrap() == before,
        "the backing file changed"
    );

    // Over the compressed clusters themselves.
    fs::copy(at.join("base.qcow2"), at.join("disk.qcow2")).unwrap();
    {
        let storage = opened(&at.join("disk.qcow2"));
        write(storage.image(), 65536 + 512, &[1; 512]).unwrap();
    }
    assert_eq!(check(&at.join("disk.qcow2")), (0, 0));
}

#[test]
fn discarded_clusters_give_their_space_back() {
    use std::os::unix::fs::MetadataExt;
    if !has_qemu_img() {
        return;
    }
    let (_directory, path) = made("disk.qcow2 64M");
    let storage = opened(&path);
    write(storage.image(), 0, &vec![1; 8 << 20]).unwrap();
    storage.image().flush().unwrap();
    let full = fs::metadata(&path).unwrap().blocks();
    storage.image().discard(0, 64 << 20).unwrap();
    storage.image().flush().unwrap();
    let after = fs::metadata(&path).unwrap().blocks();
    assert!(after + (7 << 11) < full, "{full} blocks, then {after}");
    assert!(
        read(storage.image(), 0, 8 << 20)
            .unwrap()
            .iter()
            .all(|byte| *byte == 0)
    );
    // What was never written takes no tables.
    let before = fs::metadata(&path).unwrap().len();
    storage
        .image()
        .write_zeroes(32 << 20, 32 << 20, true)
        .unwrap();
    storage.image().flush().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), before);
    drop(storage);
    assert_eq!(check(&path), (0, 0));
}

#[test]
fn disk_grows_while_it_is_used() {
    if !has_qemu_img() {
        return;
    }
    let (_directory, path) = made("disk.qcow2 1M");
    let storage = opened(&path);
    let image = storage.image();
    write(image, (1 << 20) - 512, &[3; 512]).unwrap();
    image.grow(3 << 30).unwrap();
    assert_eq!(image.size(), 3 << 30);
    assert_eq!(
        read(image, (1 << 20) - 512, 1024).unwrap(),
        [[3; 512], [0; 512]].concat()
    );
    write(image, (3 << 30) - 512, &[4; 512]).unwrap();
    for size in [1 << 20, (3 << 30) + 1, 1 << 50] {
        let error = image.grow(size).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{size}: {error}");
    }
    drop(storage);
    assert_eq!(check(&path), (0, 0));
    let storage = opened(&path);
    assert_eq!(
        read(storage.image(), (3 << 30) - 512, 512).unwrap(),
        [4; 512]
    );
}

#[test]
fn direct_io_reads_and_writes_what_the_guest_gives() {
    if !has_qemu_img() {
        return;
    }
    let (_directory, path) = made("disk.qcow2 1M");
    let mut direct = spec(&path, Format::Qcow2);
    direct.direct = true;
    match open(&direct) {
        // No O_DIRECT on this file system.
        Err(OpenError::Direct(..)) => return,
        Err(error) => panic!("{error}"),
        Ok(storage) => {
            write(storage.image(), 512, &[9; 1536]).unwrap();
            assert_eq!(
                read(storage.image(), 0, 1024).unwrap(),
                [[0; 512], [9; 512]].concat()
            );
            storage.image().grow(2 << 20).unwrap();
            storage.image().flush().unwrap();
        }
    }
    assert_eq!(check(&path), (0, 0));
}

#[test]
fn raw_image_that_begins_like_a_qcow2_stays_raw() {
    if !has_qemu_img() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    fs::write(at.join("secret"), vec![0x55; 65536]).unwrap();
    run(
        at,
        "qemu-img create -q -f qcow2 -b secret -F raw evil.qcow2",
    );
    // What a guest writes to its raw disk.
    let evil = fs::read(at.join("evil.qcow2")).unwrap();
    let path = at.join("disk.img");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let storage = testing::opened(&spec(&path, Format::Raw));
    write(storage.image(), 0, &evil[..evil.len() / 512 * 512]).unwrap();
    drop(storage);
    let storage = testing::opened(&spec(&path, Format::Raw));
    assert_eq!(storage.image().size(), 1 << 20);
    assert_eq!(read(storage.image(), 0, 512).unwrap(), evil[..512]);
    drop(storage);
    // And below another image, which says that it is raw.
    run(
        at,
        "qemu-img create -q -f qcow2 -b disk.img -F raw disk.qcow2",
    );
    let storage = opened(&at.join("disk.qcow2"));
    assert_eq!(read(storage.image(), 0, 512).unwrap(), evil[..512]);
}

#[test]
fn qemu_and_minivmm_see_each_others_locks() {
    if !has_qemu_img() {
        return;
    }
    let (directory, path) = made("disk.qcow2 1M");
    let at = directory.path();
    let storage = opened(&path);
    for command in [
        "qemu-io -f qcow2 -c quit disk.qcow2",
        "qemu-img check -f qcow2 disk.qcow2",
    ] {
        let (ok, text) = try_run(at, command);
        assert!(!ok && text.contains("lock"), "{command}: {text}");
    }
    drop(storage);
    let mut reader = spec(&path, Format::Qcow2);
    reader.readonly = true;
    let storage = testing::opened(&reader);
    run(at, "qemu-img check -f qcow2 disk.qcow2");
    let (ok, text) = try_run(at, "qemu-io -f qcow2 -c quit disk.qcow2");
    assert!(!ok && text.contains("lock"), "{text}");
    drop(storage);

    // The other way round: QEMU waits for its input with the image open.
    let mut command = Command::new("qemu-io");
    command.args(["-f", "qcow2", "disk.qcow2"]).current_dir(at);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut qemu_io = command.spawn().unwrap();
    // It shows its prompt when the image is open.
    let mut prompt = [0];
    io::Read::read_exact(&mut qemu_io.stdout.take().unwrap(), &mut prompt).unwrap();
    for spec in [&spec(&path, Format::Qcow2), &reader] {
        let text = open(spec).unwrap_err().to_string();
        let owner = format!("qemu-io (process {})", qemu_io.id());
        assert!(
            text.contains("disk.qcow2") && text.contains(&owner),
            "{text}"
        );
    }
    drop(qemu_io.stdin.take());
    qemu_io.wait().unwrap();
    opened(&path);
}

#[test]
fn image_that_its_files_mark_is_refused() {
    if !has_qemu_img() {
        return;
    }
    for (options, text) in [
        ("-o extended_l2=on disk.qcow2 1M", "extended L2"),
        ("-o compression_type=zstd disk.qcow2 1M", "zstd"),
        ("-o data_file=data.raw disk.qcow2 1M", "external data file"),
        (
            "--object secret,id=key,data=abc -o encrypt.format=aes,encrypt.key-secret=key disk.qcow2 1M",
            "encrypted",
        ),
    ] {
        let (_directory, path) = made(options);
        let error = open(&spec(&path, Format::Qcow2)).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains(text), "{options}: {source}");
        let remedy = error.remedy().unwrap();
        assert!(remedy.contains("qemu-img convert"), "{remedy}");
    }
    let (_directory, path) = made("disk.qcow2 1M");
    let file = File::options().write(true).open(&path).unwrap();
    for (bits, text) in [(1, "dirty"), (2, "damaged"), (1 << 40, "unknown")] {
        file.write_all_at(&u64::to_be_bytes(bits), 72).unwrap();
        let error = open(&spec(&path, Format::Qcow2)).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains(text), "{source}");
        assert!(error.remedy().unwrap().contains(path.to_str().unwrap()));
    }
}

#[test]
fn image_with_internal_snapshots_is_only_read() {
    if !has_qemu_img() {
        return;
    }
    let (directory, path) = made("disk.qcow2 1M");
    run(directory.path(), "qemu-img snapshot -c before disk.qcow2");
    let error = open(&spec(&path, Format::Qcow2)).unwrap_err();
    assert!(error.remedy().unwrap().contains("ephemeral=on"));
    let mut overlaid = spec(&path, Format::Qcow2);
    overlaid.ephemeral = true;
    let storage = testing::opened(&overlaid);
    write(storage.image(), 0, &[1; 512]).unwrap();
    assert_eq!(read(storage.image(), 0, 512).unwrap(), [1; 512]);
}

/// An image with data, compressed clusters, a backing file and clusters of 512 bytes, whose tables
/// are a large part of it.
fn small() -> (tempfile::TempDir, Vec<u8>) {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let bytes: Vec<u8> = (0..64 << 10).map(|at: u32| (at / 100) as u8).collect();
    fs::write(at.join("base.img"), &bytes).unwrap();
    run(
        at,
        "qemu-img convert -c -f raw -O qcow2 -o cluster_size=512 base.img disk.qcow2",
    );
    run(at, "qemu-img rebase -u -b base.img -F raw disk.qcow2");
    {
        let storage = opened(&at.join("disk.qcow2"));
        write(storage.image(), 5000 / 512 * 512, &[7; 2048]).unwrap();
    }
    let bytes = fs::read(at.join("disk.qcow2")).unwrap();
    (directory, bytes)
}

#[test]
fn cluster_far_outside_the_file_is_an_error_and_the_file_stays_small() {
    if !has_qemu_img() {
        return;
    }
    let (_directory, path) = made("-o cluster_size=4k disk.qcow2 1M");
    write(opened(&path).image(), 0, &[1; 512]).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let number = |at| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes) & !(1 << 63)
    };
    let l2_table = number(number(40));
    for entry in [(1u64 << 40) | (1 << 63), (1 << 44) | (1 << 63) | 1] {
        file.write_all_at(&entry.to_be_bytes(), l2_table).unwrap();
        let storage = opened(&path);
        let error = write(storage.image(), 0, &[2; 16384]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{entry:x}: {error}");
        // The rest of the disk works.
        write(storage.image(), 512 << 10, &[3; 16384]).unwrap();
        storage.image().flush().unwrap();
        assert!(fs::metadata(&path).unwrap().len() < 16 << 20);
    }
}

#[test]
fn damaged_image_is_refused_or_read_but_nothing_else_happens() {
    if !has_qemu_img() {
        return;
    }
    let (directory, image) = small();
    let path = directory.path().join("disk.qcow2");
    let len = image.len();
    // Half of the changes hit the header, and what is changed are whole fields as well as bytes.
    let place = prop_oneof![0..160usize, 0..len - 8];
    let value = prop_oneof![
        any::<u64>(),
        (0..64u32).prop_map(|bit| 1 << bit),
        (0..len as u64 / 512).prop_map(|cluster| (1 << 63) | (cluster * 512)),
    ];
    let change = (place, value, 1..=8usize);
    let changes = proptest::collection::vec(change, 1..6);
    let runner = &mut proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(150));
    let result = runner.run(&changes, |changes| {
        let mut bytes = image.clone();
        for (at, value, count) in changes {
            bytes[at..at + count].copy_from_slice(&value.to_be_bytes()[8 - count..]);
        }
        fs::write(&path, &bytes).unwrap();
        if let Ok(storage) = open(&spec(&path, Format::Qcow2)) {
            let image = storage.image();
            let size = image.size().min(256 << 10);
            for offset in (0..size).step_by(4096) {
                let _ = read(image, offset, 4096.min((size - offset) as usize));
            }
            for offset in (0..size).step_by(8192) {
                let _ = write(image, offset, &[1; 512]);
                let _ = image.discard(offset, 512);
                let _ = image.write_zeroes(offset, 512, offset & 8192 == 0);
            }
            let _ = image.flush();
        }
        Ok(())
    });
    result.unwrap();
}
