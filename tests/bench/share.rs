//! Shared directories, by the freestanding guest: minivmm's file server beside a virtiofsd of the host's,
//! for minivmm and for QEMU, and beside a loop of system calls on the same file, in turns.
//!
//! The directory is in memory (tmpfs), so that no disk is measured.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, fstat, statat};
use tempfile::TempDir;

use crate::harness::eventually;
use crate::harness::process::Killed;
use crate::harness::vm::Vm;

use super::bare::HugePages;
use super::monitors::{self, Monitor};
use super::native::{Effort, wait_for_line};
use super::report::{Column, Table};
use super::usage::Usage;

const COLUMNS: [Column; 4] = [
    ("kreq/s", 1),
    ("MB/s", 0),
    ("CPU us/request", 2),
    ("kicks/kreq", 1),
];
/// The name of the limit's row.
const BARE: &str = "bare directory";
/// The file that the guest uses, and its size.
const FILE: &str = "load";
const SIZE: u64 = 32 << 20;
const KB: usize = 1 << 10;
const MB: usize = 1 << 20;
/// In memory on every Linux.
const MEMORY: &str = "/dev/shm";
/// Where Debian has a virtiofsd: of QEMU's own, in C, or the one in Rust.
const OLD: &str = "/usr/lib/qemu/virtiofsd";
const NEW: &str = "/usr/libexec/virtiofsd";

/// What a request is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Operation {
    Read,
    Write,
    Lookup,
    Attributes,
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
struct Case {
    title: &'static str,
    operation: Operation,
    /// The bytes of a request that reads or writes: small ones anywhere, others one after the other.
    block: usize,
    depth: usize,
    is_quick: bool,
}

const fn case(title: &'static str, operation: Operation, block: usize, depth: usize) -> Case {
    Case {
        title,
        operation,
        block,
        depth,
        is_quick: true,
    }
}

/// One that the quick run leaves out.
const fn in_full(case: Case) -> Case {
    Case {
        is_quick: false,
        ..case
    }
}

use Operation::{Attributes, Lookup, Read, Write};

const CASES: [Case; 8] = [
    in_full(case("reads 64 KiB sequentially", Read, 64 * KB, 1)),
    case("reads 1 MiB sequentially", Read, MB, 1),
    in_full(case("writes 64 KiB sequentially", Write, 64 * KB, 1)),
    case("writes 1 MiB sequentially", Write, MB, 1),
    case("reads 4 KiB at random, 1 at a time", Read, 4 * KB, 1),
    case("reads 4 KiB at random, 8 at a time", Read, 4 * KB, 8),
    case("looks a name up (LOOKUP)", Lookup, 4 * KB, 1),
    in_full(case("asks for attributes (GETATTR)", Attributes, 4 * KB, 1)),
];

/// Who serves the directory to whom.
#[derive(Debug)]
struct Setup {
    name: String,
    monitor: Monitor,
    /// A server of the host's; minivmm's own without.
    server: Option<PathBuf>,
}

/// Measures all cases; a few where it is to be quick.
pub fn run(effort: Effort) -> Vec<Table> {
    let directory = Directory::new();
    let setups = Setup::all();
    let cases = CASES.iter().filter(|case| case.is_quick || !effort.quick);
    cases
        .map(|case| case.compare(&directory, &setups, effort))
        .collect()
}

impl Case {
    /// One table: the limit and every setup once a round.
    fn compare(&self, directory: &Directory, setups: &[Setup], effort: Effort) -> Table {
        let title = format!("a guest of a share {}", self.title);
        eprintln!("{title}");
        let mut table = Table::new(title, &COLUMNS);
        let (rounds, time) = match effort.quick {
            true => (2, effort.flood / 2),
            false => (effort.rounds, effort.flood * 3 / 5),
        };
        for _ in 0..rounds {
            let (start, usage) = (Instant::now(), Usage::of_this_thread());
            let requests = self.bare(directory, time);
            let usage = Usage::of_this_thread().since(usage);
            table.add(BARE, &self.figures(requests, start.elapsed(), usage, None));
            for setup in setups {
                let figures = self.guest(directory, setup, time);
                table.add(&setup.name, &figures);
            }
        }
        table.add_ratio("of bare", 0, BARE);
        table.add_ratio("of QEMU", 0, "QEMU");
        table
    }

    fn figures(
        &self,
        requests: f64,
        time: Duration,
        usage: Usage,
        kicks: Option<f64>,
    ) -> [Option<f64>; COLUMNS.len()] {
        let rate = requests / time.as_secs_f64();
        let has_data = matches!(self.operation, Read | Write);
        [
            Some(rate / 1000.0),
            has_data.then_some(rate * self.block as f64 / 1e6),
            Some(usage.cpu * 1e6 / requests),
            kicks.map(|kicks| kicks * 1000.0 / requests),
        ]
    }

    /// How many requests a loop in this thread does in this time.
    fn bare(&self, directory: &Directory, time: Duration) -> f64 {
        let file = directory.open();
        let place = File::open(directory.path()).expect("the directory");
        let mut memory = HugePages::new(self.block);
        let memory = &mut memory.bytes()[..self.block];
        let blocks = SIZE / self.block as u64;
        let mut state = 1_u64;
        let mut requests = 0;
        let start = Instant::now();
        while start.elapsed() < time {
            // Some of them before a look at the clock, which costs time too.
            for _ in 0..16 {
                state = match self.block {
                    MB => state + 1,
                    // Those of Knuth's MMIX.
                    _ => state.wrapping_mul(6_364_136_223_846_793_005) + 1_442_695_040_888_963_407,
                };
                let offset = (state >> 8) % blocks * self.block as u64;
                match self.operation {
                    Read => file.read_exact_at(memory, offset).expect("the file"),
                    Write => file.write_all_at(memory, offset).expect("the file"),
                    Lookup => {
                        statat(&place, FILE, AtFlags::empty()).expect("the file");
                    }
                    Attributes => {
                        fstat(&file).expect("the file");
                    }
                }
            }
            requests += 16;
        }
        f64::from(requests)
    }

    fn guest(
        &self,
        directory: &Directory,
        setup: &Setup,
        time: Duration,
    ) -> [Option<f64>; COLUMNS.len()] {
        let op = match self.operation {
            Read => "read",
            Write => "write",
            Lookup => "lookup",
            Attributes => "getattr",
        };
        let order = if self.block == 4 * KB {
            "random"
        } else {
            "sequential"
        };
        let (block, depth, ms) = (self.block, self.depth, time.as_millis());
        let options = format!(
            "mode=share-load op={op} block={block} depth={depth} order={order} bytes={SIZE} ms={ms}"
        );
        let (mut vm, server) = setup.start(directory, &options);
        let pids: Vec<u32> = server
            .iter()
            .map(|server| server.process.id())
            .chain([vm.pid()])
            .collect();
        wait_for_line(&mut vm, "READY ");
        let usage = Usage::of_families(&pids);
        let line = wait_for_line(&mut vm, "OK ");
        let usage = Usage::of_families(&pids).since(usage);
        let time = Duration::from_nanos(line.number("ns") as u64);
        let kicks = line.number("kicks");
        self.figures(line.number("requests"), time, usage, Some(kicks))
    }
}

/// What is shared.
struct Directory(TempDir);

impl Directory {
    fn new() -> Self {
        let directory = TempDir::new_in(MEMORY).expect("tmpfs");
        let file = vec![0x5a; SIZE as usize];
        std::fs::write(directory.path().join(FILE), file).expect("room in tmpfs");
        Self(directory)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn open(&self) -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        options.open(self.path().join(FILE)).expect("the file")
    }
}

impl Setup {
    fn all() -> Vec<Self> {
        let own = monitors::ours().map(|monitor| Self {
            name: monitor.name.clone(),
            monitor,
            server: None,
        });
        let mut all: Vec<_> = own.collect();
        let Some(server) = virtiofsd() else {
            eprintln!("there is no virtiofsd to compare with");
            return all;
        };
        let others = monitors::ours().take(1).chain(monitors::microvm());
        all.extend(others.map(|monitor| Self {
            name: format!("{}, virtiofsd", monitor.name),
            monitor,
            server: Some(server.clone()),
        }));
        all
    }

    /// Starts the guest, and the server if it is one of the host's.
    fn start(&self, directory: &Directory, options: &str) -> (Vm, Option<Server>) {
        let path = directory.path();
        let Some(program) = &self.server else {
            let share = format!("{}:bench", path.display());
            let args = ["--share".into(), share.into()].into();
            return (Vm::spawn(self.monitor.command_with(args, options)), None);
        };
        // Outside of what is shared.
        let place = TempDir::new().expect("a directory");
        let socket = place.path().join("socket");
        let server = serve(program, path, &socket);
        let args = match self.monitor.is_ours() {
            true => ["--share".into(), joined("socket=", &socket, ",tag=bench")].into(),
            false => {
                let device = [
                    "-chardev".into(),
                    joined("socket,id=share,path=", &socket, ""),
                    "-device".into(),
                    "vhost-user-fs-device,chardev=share,tag=bench".into(),
                ];
                [monitors::shared_memory(), device.into()].concat()
            }
        };
        let vm = Vm::spawn(self.monitor.command_with(args, options));
        let server = Server {
            process: server,
            _place: place,
        };
        (vm, Some(server))
    }
}

/// A virtiofsd that runs, and where its socket is.
struct Server {
    process: Killed,
    _place: TempDir,
}

/// The host's virtiofsd.
fn virtiofsd() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|directory| directory.join("virtiofsd"));
    let all = in_path.chain([NEW, OLD].map(PathBuf::from));
    all.into_iter().find(|program| program.is_file())
}

/// Starts it, and waits until it listens.
fn serve(program: &Path, directory: &Path, socket: &Path) -> Killed {
    let mut command = Command::new(program);
    command.arg(joined("--socket-path=", socket, ""));
    match program == Path::new(OLD) {
        true => command.args(["-f".into(), "-o".into(), joined("source=", directory, "")]),
        false => command.arg(joined("--shared-dir=", directory, "")),
    };
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let server = command.stderr(Stdio::null()).spawn();
    let server = Killed(server.expect("virtiofsd starts"));
    assert!(eventually(|| socket.exists()), "virtiofsd does not listen");
    server
}

fn joined(before: &str, path: &Path, after: &str) -> OsString {
    let mut text = OsString::from(before);
    text.push(path);
    text.push(after);
    text
}
