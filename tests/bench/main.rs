//! `make bench`: minivmm beside other monitors and beside the machine's limits, in one run.
//!
//!     bench [--quick] [--json FILE] [--svg FILE] PART...
//!
//! | part | file | what it compares |
//! | --- | --- | --- |
//! | `native` | `native.rs`, `latency.rs`, `counts.rs` | the data path, by the freestanding guest: throughput, round trips, system calls |
//! | `start` | `start.rs` | how soon a guest runs |
//! | `density` | `density.rs` | many guests on one link |
//! | `linux [boot\|net] ROUNDS` | `linux.rs` | Linux guests, here or in the lab |
//!
//! `monitors.rs` says who is compared, `wire.rs` and `traffic.rs` are the network and its far end, `bare.rs` the limit,
//! `usage.rs` what threads cost, `report.rs` and `svg.rs` what is shown. It leaves nothing behind.

/// Of the tests' harness, what an example can use too.
#[allow(dead_code)] // The tests use more of it.
#[path = "../harness"]
mod harness {
    pub mod assets;
    pub mod elf;
    pub mod initramfs;
    pub mod iperf;
    pub mod linux;
    pub mod memory;
    pub mod netns;
    pub mod patience;
    pub mod process;
    pub mod site;
    pub mod vm;
    pub use patience::{PATIENCE, eventually};
}
mod bare;
mod counts;
mod density;
#[path = "../lab/mod.rs"]
mod lab;
mod latency;
mod linux;
mod monitors;
mod native;
mod report;
mod start;
mod svg;
mod traffic;
mod usage;
mod wire;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use native::Effort;
use report::Table;

const USAGE: &str = "usage: bench [--quick] [--json FILE] [--svg FILE] \
     (native | start | density | linux [boot|net] ROUNDS)...";

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
    Start,
    Density,
    /// A part of it, if not all, and how often.
    Linux(Option<String>, usize),
}

fn main() -> ExitCode {
    let Some(request) = parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let mut tables = Vec::new();
    let mut done = true;
    for part in &request.parts {
        match part {
            Part::Native => {
                done &= here(request.effort, &mut tables, native::run);
                done &= here(request.effort, &mut tables, latency::run);
                done &= here(request.effort, &mut tables, counts::run);
            }
            Part::Start => done &= here(request.effort, &mut tables, start::run),
            Part::Density => done &= here(request.effort, &mut tables, density::run),
            Part::Linux(part, rounds) => {
                let (measured, complete) = linux::run(part.as_deref(), *rounds);
                measured.iter().for_each(Table::print);
                tables.extend(measured);
                done &= complete;
            }
        }
    }
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

/// Runs a part that needs this machine's own KVM, and shows its tables.
fn here(effort: Effort, tables: &mut Vec<Table>, part: fn(Effort) -> Vec<Table>) -> bool {
    if !harness::netns::is_root() || !Path::new("/dev/kvm").exists() {
        eprintln!("This part needs root and /dev/kvm.");
        return false;
    }
    tables.extend(part(effort).into_iter().inspect(Table::print));
    true
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
            "start" => request.parts.push(Part::Start),
            "density" => request.parts.push(Part::Density),
            "linux" => {
                let part = args.next_if(|part| ["boot", "net"].contains(&part.as_str()));
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
