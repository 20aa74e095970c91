//! Disks, by the freestanding guest: minivmm beside QEMU and beside a loop on the same file, in turns.
//!
//! All use one file on the file system that the program lies on. It is in the page cache as a whole
//! for those that use that, and what was written is on the disk before the next one begins.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use rustix::fs::{Advice, fadvise};
use tempfile::TempDir;

use super::bare::HugePages;
use super::monitors::{self, Aio, Monitor};
use super::native::{Effort, wait_for_line};
use super::report::{Column, Table};
use super::usage::Usage;

const COLUMNS: [Column; 3] = [("kreq/s", 1), ("MB/s", 0), ("CPU us/request", 2)];
/// The name of the limit's row.
const BARE: &str = "bare file";
/// The size of the file.
const SIZE: u64 = 256 << 20;
const KB: usize = 1 << 10;
const MB: usize = 1 << 20;

/// What is read or written.
#[derive(Clone, Copy, Debug)]
struct Case {
    writes: bool,
    /// The bytes of a request: small ones anywhere, large ones one after the other.
    block: usize,
    depth: usize,
    /// Without the page cache.
    direct: bool,
}

/// Measures all cases; a few where it is to be quick.
pub fn run(effort: Effort) -> Vec<Table> {
    let image = Image::new();
    let monitors = monitors::with_disks();
    let mut tables = Vec::new();
    for direct in [false, true] {
        image.prepare(direct);
        for block in [4 * KB, MB] {
            for writes in [false, true] {
                let depths: &[usize] = if effort.quick { &[32] } else { &[1, 32] };
                for &depth in depths {
                    let case = Case {
                        writes,
                        block,
                        depth,
                        direct,
                    };
                    tables.push(case.compare(&image, &monitors, effort));
                }
            }
        }
    }
    tables
}

impl Case {
    /// One table: the limit and every monitor once a round.
    fn compare(self, image: &Image, monitors: &[(Monitor, Aio)], effort: Effort) -> Table {
        let verb = if self.writes { "writes" } else { "reads" };
        let size = match self.block {
            MB => "1 MiB sequentially",
            _ => "4 KiB at random",
        };
        let cache = if self.direct { "direct" } else { "cached" };
        let title = format!("guest {verb} {size}, {} at a time, {cache}", self.depth);
        eprintln!("{title}");
        let mut table = Table::new(title, &COLUMNS);
        let (rounds, time) = match effort.quick {
            true => (2, effort.flood / 2),
            false => (effort.rounds, effort.flood * 3 / 5),
        };
        for _ in 0..rounds {
            table.add(BARE, &self.figures(self.bare(image, time)));
            for (monitor, aio) in monitors {
                let done = self.guest(image, monitor, *aio, time);
                table.add(&monitor.name, &self.figures(done));
            }
        }
        table.add_ratio("of bare", 0, BARE);
        table.add_ratio("of QEMU", 0, "QEMU");
        table
    }

    fn figures(self, (requests, time, usage): (f64, Duration, Usage)) -> [Option<f64>; 3] {
        let rate = requests / time.as_secs_f64();
        [
            Some(rate / 1000.0),
            Some(rate * self.block as f64 / 1e6),
            Some(usage.cpu * 1e6 / requests),
        ]
    }

    /// How many requests a loop in this thread does in this time.
    fn bare(self, image: &Image, time: Duration) -> (f64, Duration, Usage) {
        image.settle();
        let file = image.open(self.direct);
        let mut blocks = Blocks::new(self.block);
        let mut memory = HugePages::new(self.block * self.depth);
        let memory = memory.bytes();
        let (start, usage) = (Instant::now(), Usage::of_this_thread());
        let is_over = || start.elapsed() > time;
        let requests = match self.direct {
            true => self.by_ring(&file, memory, &mut blocks, is_over),
            false => self.one_by_one(&file, memory, &mut blocks, is_over),
        };
        let usage = Usage::of_this_thread().since(usage);
        (requests as f64, start.elapsed(), usage)
    }

    /// What the page cache has is there at once.
    fn one_by_one(
        self,
        file: &File,
        memory: &mut [u8],
        blocks: &mut Blocks,
        is_over: impl Fn() -> bool,
    ) -> u64 {
        let mut requests = 0;
        while !is_over() {
            for buffer in memory.chunks_exact_mut(self.block) {
                let offset = blocks.next().expect("there is always one");
                let done = match self.writes {
                    true => file.write_all_at(buffer, offset),
                    false => file.read_exact_at(buffer, offset),
                };
                done.expect("the file");
                requests += 1;
            }
        }
        requests
    }

    fn by_ring(
        self,
        file: &File,
        memory: &mut [u8],
        blocks: &mut Blocks,
        is_over: impl Fn() -> bool,
    ) -> u64 {
        let mut ring = IoUring::new(self.depth as u32).expect("an io_uring");
        let fd = types::Fd(file.as_raw_fd());
        let len = self.block as u32;
        let mut offer = |ring: &mut IoUring, place: u64| {
            let offset = blocks.next().expect("there is always one");
            let buffer = memory[place as usize * self.block..].as_mut_ptr();
            let entry = match self.writes {
                true => opcode::Write::new(fd, buffer, len).offset(offset).build(),
                false => opcode::Read::new(fd, buffer, len).offset(offset).build(),
            };
            // SAFETY: the buffer and the file outlive the request, which is waited for below; no
            // other request has this buffer.
            let pushed = unsafe { ring.submission().push(&entry.user_data(place)) };
            pushed.expect("the ring has so many places");
        };
        (0..self.depth as u64).for_each(|place| offer(&mut ring, place));
        let (mut requests, mut waiting) = (0, self.depth);
        while waiting > 0 {
            ring.submit_and_wait(1).expect("the ring");
            let is_over = is_over();
            while let Some(done) = { ring.completion().next() } {
                assert_eq!(done.result(), len as i32, "the file");
                requests += 1;
                if is_over {
                    waiting -= 1;
                } else {
                    offer(&mut ring, done.user_data());
                }
            }
        }
        requests
    }

    fn guest(
        self,
        image: &Image,
        monitor: &Monitor,
        aio: Aio,
        time: Duration,
    ) -> (f64, Duration, Usage) {
        image.settle();
        let op = if self.writes { "write" } else { "read" };
        let order = match self.block {
            MB => "sequential",
            _ => "random",
        };
        let (block, depth, ms) = (self.block, self.depth, time.as_millis());
        let options =
            format!("mode=disk-load op={op} block={block} depth={depth} order={order} ms={ms}");
        let mut vm = monitor.start_with_disk(&image.path, aio, self.direct, &options);
        wait_for_line(&mut vm, "READY ");
        let usage = Usage::of_workers(vm.pid());
        let line = wait_for_line(&mut vm, "OK ");
        let usage = Usage::of_workers(vm.pid()).since(usage);
        let ns = line.number("ns") as u64;
        (line.number("requests"), Duration::from_nanos(ns), usage)
    }
}

/// The offset of one block after the other, as the guest chooses them (`tests/guest/src/disk/load.rs`).
struct Blocks {
    size: u64,
    state: u64,
}

impl Blocks {
    fn new(size: usize) -> Self {
        Self {
            size: size as u64,
            state: 0x2545_f491_4f6c_dd1d,
        }
    }
}

impl Iterator for Blocks {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.size == MB as u64 {
            self.state += 1;
        } else {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
        }
        Some(self.state % (SIZE / self.size) * self.size)
    }
}

/// The file, which goes with its directory.
struct Image {
    path: PathBuf,
    file: File,
    _directory: TempDir,
}

impl Image {
    /// One whose every byte has been written.
    fn new() -> Self {
        let program = std::env::current_exe().expect("this program has a path");
        let directory = program.parent().unwrap_or(Path::new("."));
        let directory = tempfile::tempdir_in(directory).expect("a directory beside the program");
        let path = directory.path().join("disk.img");
        let mut file = File::create_new(&path).expect("the file");
        let block = vec![0x5a; MB];
        (0..SIZE / MB as u64).for_each(|_| file.write_all(&block).expect("256 MiB of room"));
        let file = File::open(&path).expect("the file");
        Self {
            path,
            file,
            _directory: directory,
        }
    }

    /// Has it in the page cache as a whole, or not at all.
    fn prepare(&self, direct: bool) {
        self.settle();
        if direct {
            fadvise(&self.file, 0, None, Advice::DontNeed).expect("the file");
        } else {
            let mut block = vec![0; MB];
            let mut file = File::open(&self.path).expect("the file");
            while file.read(&mut block).expect("the file") > 0 {}
        }
    }

    /// Waits until what was written is on the disk.
    fn settle(&self) {
        self.file.sync_all().expect("the file");
    }

    fn open(&self, direct: bool) -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if direct {
            options.custom_flags(libc::O_DIRECT);
        }
        options.open(&self.path).expect("the file")
    }
}
