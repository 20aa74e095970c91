//! Power cuts: what was written since the last sync reaches the disk in any order, in part, or not
//! at all. And SIGKILL: it reaches the disk up to some point.
//!
//! The writes of a session are recorded below imago. From the record are made the states in which a
//! cut may leave the file; in each of them qemu-img has to find no damage (lost clusters are none),
//! and each sector to be what it was at the last flush, or something newer.

use super::super::file::Logged;
use super::*;
use crate::disk::lock::Access;
use crate::disk::open::Found;
use crate::disk::testing::Op;

const SECTOR_BYTES: usize = 512;

/// A session with an image: what reached its file, and when which flush had ended.
struct Session {
    before: Vec<u8>,
    log: Vec<Logged>,
    /// Place in the log, and the disk as it was there.
    flushes: Vec<(usize, Vec<u8>)>,
    /// The disk after each operation, and the place in the log that the operation began at.
    versions: Vec<(usize, Vec<u8>)>,
}

fn image(path: &Path) -> Qcow2Image {
    let spec = spec(path, Format::Qcow2);
    let found = Found::at(path).unwrap();
    let file = found.open(Access::Write).unwrap();
    super::super::open(&spec, &found, file, Access::Write).unwrap()
}

fn session(path: &Path, ops: &[Op], disk: Vec<u8>) -> Session {
    let before = fs::read(path).unwrap();
    let image = image(path);
    let mut log = Vec::new();
    let mut mirror = disk;
    let mut flushes = vec![(0, mirror.clone())];
    let mut versions = vec![(0, mirror.clone())];
    for op in ops {
        let start = log.len();
        op.apply(&image, &mut mirror);
        log.extend(image.file.take_log());
        if matches!(op, Op::Flush) {
            flushes.push((log.len(), mirror.clone()));
        }
        versions.push((start, mirror.clone()));
    }
    // Its end writes tables too.
    let file = image.file.clone();
    drop(image);
    log.extend(file.take_log());
    Session {
        before,
        log,
        flushes,
        versions,
    }
}

/// Applies an entry of the log to the file, in those of its sectors that `survives` has.
fn apply(file: &mut Vec<u8>, entry: &Logged, mut survives: impl FnMut() -> bool) {
    let (at, zeros, bytes);
    match entry {
        Logged::Sync => return,
        Logged::Write(offset, written) => (at, bytes) = (*offset as usize, written),
        Logged::Punch(offset, len) => {
            let end = file.len();
            zeros = vec![0; (*len as usize).min(end.saturating_sub(*offset as usize))];
            (at, bytes) = (*offset as usize, &zeros);
        }
    }
    if file.len() < at + bytes.len() {
        file.resize(at + bytes.len(), 0);
    }
    // A sector is written whole or not at all.
    let mut done = 0;
    while done < bytes.len() {
        let end = (((at + done) / SECTOR_BYTES + 1) * SECTOR_BYTES - at).min(bytes.len());
        if survives() {
            file[at + done..at + end].copy_from_slice(&bytes[done..end]);
        }
        done = end;
    }
}

/// Numbers from a seed (splitmix64).
fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut number = *seed;
    number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

impl Session {
    /// The file if the power is cut, or the monitor killed, after `end` entries of the log.
    fn cut(&self, end: usize, kind: Cut, seed: &mut u64) -> Vec<u8> {
        let synced = self.log[..end]
            .iter()
            .rposition(|entry| matches!(entry, Logged::Sync));
        let mut file = self.before.clone();
        for (place, entry) in self.log[..end].iter().enumerate() {
            if kind == Cut::Kill || Some(place) <= synced {
                apply(&mut file, entry, || true);
                continue;
            }
            match random(seed) % 3 {
                0 => {}
                1 => apply(&mut file, entry, || true),
                _ => apply(&mut file, entry, || random(seed).is_multiple_of(2)),
            }
        }
        file
    }

    /// Whether each sector is what it was at the last flush, or became later.
    fn check_disk(&self, end: usize, disk: &[u8]) {
        let (_, flushed) = self
            .flushes
            .iter()
            .rev()
            .find(|(place, _)| *place <= end)
            .unwrap();
        let since = self
            .flushes
            .iter()
            .rev()
            .find(|(place, _)| *place <= end)
            .unwrap()
            .0;
        let later: Vec<&Vec<u8>> = self
            .versions
            .iter()
            .filter(|(place, _)| (since..=end).contains(place))
            .map(|(_, disk)| disk)
            .collect();
        for (sector, now) in disk.chunks(SECTOR_BYTES).enumerate() {
            let range = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
            let known = now == &flushed[range.clone()]
                || later.iter().any(|disk| now == &disk[range.clone()])
                // What was zeroed or discarded may have lost its space already.
                || now.iter().all(|byte| *byte == 0);
            let newer: Vec<u8> = later.iter().map(|disk| disk[range.start]).collect();
            assert!(
                known,
                "cut at {end}: sector {sector} is {:x?}, neither {:x} as flushed nor newer: {newer:x?}",
                &now[..16],
                flushed[range.start],
            );
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Cut {
    Power,
    Kill,
}

const DISK: u64 = 512;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn power_cut_leaves_no_damage_and_what_was_flushed(
        ops in ops(DISK),
        mut seed in any::<u64>(),
        options in prop::sample::select(vec![
            "-o cluster_size=512 disk.qcow2 256k",
            "-o cluster_size=512 -b base.img -F raw disk.qcow2 256k",
            "-o cluster_size=512,refcount_bits=64 disk.qcow2 256k",
            "-o cluster_size=4k -b base.img -F raw disk.qcow2 256k",
            // One whose clusters are compressed.
            "-o cluster_size=512 base.img disk.qcow2",
        ]),
    ) {
        if !has_qemu_img() {
            return Ok(());
        }
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        let base = vec![0x77; (DISK * 512) as usize];
        fs::write(at.join("base.img"), &base).unwrap();
        match options.ends_with("k") {
            true => run(at, &format!("qemu-img create -q -f qcow2 {options}")),
            false => run(at, &format!("qemu-img convert -c -f raw -O qcow2 {options}")),
        };
        let path = at.join("disk.qcow2");
        let disk = match options.contains("base.img") {
            true => base,
            false => vec![0; base.len()],
        };
        let session = session(&path, &ops, disk);
        for cut in [Cut::Power, Cut::Kill] {
            for _ in 0..8 {
                let end = random(&mut seed) as usize % (session.log.len() + 1);
                fs::write(&path, session.cut(end, cut, &mut seed)).unwrap();
                let (corruptions, _) = check(&path);
                prop_assert_eq!(corruptions, 0, "after {} of {}", end, session.log.len());
                let storage = opened(&path);
                let disk = read(storage.image(), 0, (DISK * 512) as usize).unwrap();
                session.check_disk(end, &disk);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn full_file_system_is_an_error_and_the_image_stays_whole(
        ops in ops(DISK),
        after in 0..60u64,
        refused in 1..20u64,
        options in prop::sample::select(vec![
            "-o cluster_size=512 disk.qcow2 256k",
            "-o cluster_size=4k -b base.img -F raw disk.qcow2 256k",
        ]),
    ) {
        if !has_qemu_img() {
            return Ok(());
        }
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        fs::write(at.join("base.img"), vec![0x77; (DISK * 512) as usize]).unwrap();
        run(at, &format!("qemu-img create -q -f qcow2 {options}"));
        let path = at.join("disk.qcow2");
        let image = image(&path);
        let len = (DISK * 512) as usize;
        let mut mirror = read(&image, 0, len).unwrap();
        image.file.fill(after, refused);
        for op in ops {
            let (range, done, value) = match op {
                Op::Write(at, len, byte) => (at..at + len as u64, write(&image, at, &vec![byte; len]), byte),
                Op::Zero(at, len, unmap) => {
                    let range = at..at + len as u64;
                    (range, image.write_zeroes(at, len as u64, unmap), 0)
                }
                Op::Discard(at, len) => {
                    let _ = image.discard(at, len as u64);
                    (at..at + len as u64, Err(io::ErrorKind::Other.into()), 0)
                }
                Op::Flush => (0..0, image.flush(), 0),
            };
            let range = range.start as usize..range.end as usize;
            match done {
                Ok(()) => mirror[range].fill(value),
                // What it holds now is undefined, and stays what it is.
                Err(_) => {
                    let now = read(&image, range.start as u64, range.len()).unwrap();
                    mirror[range].copy_from_slice(&now);
                }
            }
            prop_assert!(read(&image, 0, len).unwrap() == mirror);
        }
        // There is space again.
        image.file.fill(u64::MAX, 0);
        image.flush().unwrap();
        prop_assert!(read(&image, 0, len).unwrap() == mirror);
        drop(image);
        let (corruptions, _) = check(&path);
        prop_assert_eq!(corruptions, 0);
        prop_assert!(as_qemu_reads(&path) == mirror);
    }
}
