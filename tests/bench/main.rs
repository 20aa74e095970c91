//! `make bench`: minivmm beside other monitors and beside the machine's limits, in one run.
//!
//!     bench [--quick] [--json FILE] [--svg FILE] PART...
//!
//! | part | file | what it compares |
//! | --- | --- | --- |
//! | `native` | `native.rs`, `latency.rs`, `counts.rs` | the data path, by the freestanding guest: throughput, round trips, system calls |
//! | `disk` | `disk.rs` | disks, by the same guest; a part of `native` too |
//! | `share` | `share.rs` | shared directories, by the same guest |
//! | `user-net`, `vsock` | `user_net.rs`, `vsock.rs`, `streams.rs` | streams between host and guest |
//! | `start` | `start.rs` | how soon a guest runs |
//! | `density` | `density.rs` | many guests on one link |
//! | `run` | `run.rs` | a command in a guest, beside virtme-ng |
//! | `linux [boot\|net\|disk\|run] ROUNDS` | `linux.rs` | Linux guests, here or in the lab |
//!
//! `monitors.rs` says who is compared, `wire.rs` and `traffic.rs` are the network and its far end, `bare.rs` the limit,
//! `usage.rs` what threads cost, `report.rs` and `svg.rs` what is shown. It leaves nothing behind.

/// Of the tests' harness, what an example can use too.
#[allow(dead_code)] // The tests use more of it.
#[path = "../harness"]
mod harness {
    pub mod assets;
    pub mod debian;
    pub mod elf;
    pub mod fsx;
    pub mod initramfs;
    pub mod iperf;
    pub mod linux;
    pub mod memory;
    pub mod netns;
    pub mod patience;
    pub mod process;
    pub mod site;
    pub mod tiny;
    pub mod vm;
    pub use patience::{PATIENCE, eventually};
}
mod bare;
mod counts;
mod density;
mod disk;
#[path = "../lab/mod.rs"]
mod lab;
mod latency;
mod linux;
mod monitors;
mod native;
mod report;
mod run;
mod share;
mod start;
mod streams;
mod svg;
mod traffic;
mod usage;
mod user_net;
mod vsock;
mod wire;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use native::Effort;
use report::Table;

const USAGE: &str = "usage: bench [--quick] [--json FILE] [--svg FILE] \
     (native | disk | share | user-net | vsock | start | density | run | \
     linux [boot|net|disk|run] ROUNDS)...";

/// For a result that shows more than noise, and for a first impression.
const FULL: Effort = Effort {
    rounds: 3,
    flood: Duration::from_millis(500),
    pings: 1500,
    quick: false,
};
const QUICK: Effort = Effort {
    rounds: 3,
    flood: Duration::from_millis(400),
    pings: 1000,
    quick: true,
};

/// What is asked for.
#[derive(Debug)]
struct Request {
    effort: Effort,
    json: Option<String>,
    svg: Option<String>,
    parts: Vec<Part>,
}

#[derive(Debug)]
enum Part {
    Native,
    Disk,
    Share,
    UserNet,
    Vsock,
    Start,
    Density,
    Run,
    /// A part of it, if not all, and how often.
    Linux(Option<String>, usize),
}

fn main() -> ExitCode {
    let Some(request) = parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let mut run = Run::new(request.effort);
    for part in &request.parts {
        match part {
            Part::Native => {
                run.here("throughput", native::run);
                run.here("latency", latency::run);
                run.here("system calls, exits", counts::run);
                run.here("disks", disk::run);
            }
            Part::Disk => run.here("disks", disk::run),
            Part::Share => run.here("shares", share::run),
            Part::UserNet => run.here("user networks", user_net::run),
            Part::Vsock => run.here("vsock", vsock::run),
            Part::Start => run.here("start", start::run),
            Part::Density => run.here("density", density::run),
            Part::Run => run.here("commands in guests", run::run),
            Part::Linux(part, rounds) => {
                run.part("Linux guests", || linux::run(part.as_deref(), *rounds))
            }
        }
    }
    let (tables, mut done) = run.end();
    let save = |path: &Option<String>, text: String| {
        let Some(path) = path else { return true };
        let written = std::fs::write(path, text);
        written
            .inspect_err(|why| eprintln!("cannot write {path}: {why}"))
            .is_ok()
    };
    done &= save(&request.json, json(&tables));
    done &= save(&request.svg, svg::chart(&tables));
    ExitCode::from(u8::from(!done))
}

/// What has been measured so far, and how long each part took.
struct Run {
    effort: Effort,
    tables: Vec<Table>,
    durations: Table,
    start: Instant,
    /// Whether every part could be measured.
    done: bool,
}

impl Run {
    fn new(effort: Effort) -> Self {
        Self {
            effort,
            tables: Vec::new(),
            durations: Table::new("how long the benchmark took", &[("s", 0)]),
            start: Instant::now(),
            done: true,
        }
    }

    /// Runs a part that needs this machine's own KVM.
    fn here(&mut self, name: &str, part: fn(Effort) -> Vec<Table>) {
        let effort = self.effort;
        self.part(name, || {
            let can = harness::netns::is_root() && Path::new("/dev/kvm").exists();
            if !can {
                eprintln!("This part needs root and /dev/kvm.");
                return (Vec::new(), false);
            }
            (part(effort), true)
        });
    }

    /// Runs a part, which says whether it is complete, and shows its tables. What the others have
    /// measured is not lost where one panics.
    fn part(&mut self, name: &str, part: impl FnOnce() -> (Vec<Table>, bool)) {
        let start = Instant::now();
        let measured = catch_unwind(AssertUnwindSafe(part));
        let (tables, done) = measured.unwrap_or_default();
        self.durations
            .add(name, &[Some(start.elapsed().as_secs_f64())]);
        self.tables.extend(tables.into_iter().inspect(Table::print));
        self.done &= done;
    }

    /// Shows how long it took. All tables, and whether they are complete.
    fn end(mut self) -> (Vec<Table>, bool) {
        let whole = self.start.elapsed().as_secs_f64();
        self.durations.add("all of it", &[Some(whole)]);
        self.durations.print();
        self.tables.push(self.durations);
        (self.tables, self.done)
    }
}

fn parse(args: impl Iterator<Item = String>) -> Option<Request> {
    let mut args = args.peekable();
    let mut request = Request {
        effort: FULL,
        json: None,
        svg: None,
        parts: Vec::new(),
    };
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--quick" => request.effort = QUICK,
            "--json" => request.json = Some(args.next()?),
            "--svg" => request.svg = Some(args.next()?),
            "native" => request.parts.push(Part::Native),
            "disk" => request.parts.push(Part::Disk),
            "share" => request.parts.push(Part::Share),
            "user-net" => request.parts.push(Part::UserNet),
            "vsock" => request.parts.push(Part::Vsock),
            "start" => request.parts.push(Part::Start),
            "density" => request.parts.push(Part::Density),
            "run" => request.parts.push(Part::Run),
            "linux" => {
                let part =
                    args.next_if(|part| ["boot", "net", "disk", "run"].contains(&part.as_str()));
                let rounds = args.next()?.parse().ok().filter(|&rounds| rounds > 0)?;
                request.parts.push(Part::Linux(part, rounds));
            }
            _ => return None,
        }
    }
    (!request.parts.is_empty()).then_some(request)
}

/// All that was measured, and on what.
fn json(tables: &[Table]) -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, |cpus| cpus.get());
    let tables: Vec<_> = tables.iter().map(Table::json).collect();
    let all = serde_json::json!({"kernel": kernel.trim(), "cpus": cpus, "tables": tables});
    format!("{all:#}\n")
}
