//! System calls and exits for a frame and for a ping, which perf counts, and interrupts. What a
//! guest takes until its NIC runs is counted for itself and taken away.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::process::children;
use crate::harness::vm::Vm;

use super::monitors::{self, Monitor};
use super::native::{Effort, Line, wait_for_line};
use super::report::{Column, Table};
use super::traffic::{FarEnd, Load};
use super::wire::Wire;

/// What perf counts, as the columns have it.
const EVENTS: [&str; 3] = [
    "raw_syscalls:sys_enter",
    "kvm:kvm_exit",
    "kvm:kvm_userspace_exit",
];
/// The last one is there with interrupts alone.
const COLUMNS: [Column; 4] = [
    ("system calls", 1),
    ("exits to KVM", 2),
    ("to the monitor", 2),
    ("interrupts", 2),
];
/// A guest that has done nothing but start, and exchanged its first frames.
const START: &str = "mode=ping-pong size=60 ms=4000 count=0";
/// No load lasts longer.
const LIMIT: Duration = Duration::from_secs(20);
const FLOOD: Load = Load {
    size: 1514,
    rate: None,
    burst: 1,
    waits: false,
};

/// What a guest does, and the number in its report by which the counts are divided.
struct Case {
    title: &'static str,
    options: &'static str,
    load: Option<Load>,
    key: &'static str,
    unit: f64,
    interrupts: bool,
}

const CASES: [Case; 4] = [
    Case {
        title: "for 1000 frames of 1514 B that a guest sends",
        options: "mode=send",
        load: None,
        key: "frames",
        unit: 1000.0,
        interrupts: false,
    },
    Case {
        title: "for 1000 frames of 1514 B that a guest receives",
        options: "mode=receive",
        load: Some(FLOOD),
        key: "frames",
        unit: 1000.0,
        interrupts: false,
    },
    Case {
        title: "for 1000 of them, with interrupts",
        options: "mode=receive interrupts=on",
        load: Some(FLOOD),
        key: "frames",
        unit: 1000.0,
        interrupts: true,
    },
    Case {
        title: "for a ping",
        options: "mode=ping-pong size=60 gap=500",
        load: None,
        key: "pings",
        unit: 1.0,
        interrupts: false,
    },
];

/// Counts, where perf can.
pub fn run(effort: Effort) -> Vec<Table> {
    if !has_perf() {
        eprintln!("perf counts neither system calls nor exits here");
        return Vec::new();
    }
    let mut tables = CASES.each_ref().map(|case| {
        let columns = COLUMNS.len() - usize::from(!case.interrupts);
        Table::new(case.title, &COLUMNS[..columns])
    });
    let wire = Wire::new();
    let monitors = monitors::all(effort.quick);
    eprintln!("system calls, exits, interrupts");
    // They differ little from round to round.
    let rounds = if effort.quick { 1 } else { effort.rounds };
    for _ in 0..rounds {
        for monitor in &monitors {
            let Some(start) = Counted::take(&wire, monitor, START, None) else {
                continue;
            };
            let cases = CASES.iter().zip(&mut tables);
            let can = |case: &Case| !case.interrupts || monitor.has_messages();
            for (case, table) in cases.filter(|(case, _)| can(case)) {
                table.add(&monitor.name, &case.figures(&wire, monitor, effort, &start));
            }
        }
    }
    tables.into()
}

impl Case {
    fn figures(
        &self,
        wire: &Wire,
        monitor: &Monitor,
        effort: Effort,
        start: &Counted,
    ) -> Vec<Option<f64>> {
        let ms = match self.unit {
            1.0 => 4000,
            _ => effort.flood.as_millis(),
        };
        let options = format!("{} ms={ms} count={}", self.options, effort.pings);
        let Some(counted) = Counted::take(wire, monitor, &options, self.load) else {
            return vec![None; COLUMNS.len() - usize::from(!self.interrupts)];
        };
        let times = counted.line.number(self.key) / self.unit;
        let events = counted.events.iter().zip(start.events);
        // A KVM that traces no exits has none at the start either.
        let mut figures: Vec<_> = events
            .map(|(&count, at_start)| (at_start > 0.0).then(|| (count - at_start).max(0.0) / times))
            .collect();
        if self.interrupts {
            figures.push(Some(counted.line.number("interrupts") / times));
        }
        figures
    }
}

fn perf(output: &Path) -> Command {
    let mut perf = Command::new("perf");
    perf.args(["stat", "-x", ",", "-e", &EVENTS.join(","), "-o"]);
    perf.arg(output).arg("--");
    perf
}

fn has_perf() -> bool {
    let mut perf = perf(Path::new("/dev/null"));
    perf.arg("true").stdout(Stdio::null()).stderr(Stdio::null());
    perf.status().is_ok_and(|status| status.success())
}

/// What a guest reported, and what its monitor took for it from exec on.
#[derive(Debug)]
struct Counted {
    line: Line,
    events: [f64; EVENTS.len()],
}

impl Counted {
    fn take(wire: &Wire, monitor: &Monitor, options: &str, load: Option<Load>) -> Option<Self> {
        let dir = tempfile::tempdir().ok()?;
        let output = dir.path().join("counts");
        let tap = wire.macvtap(1);
        let command = monitor.command(Some(&tap), options);
        let mut perf = perf(&output);
        perf.arg(command.get_program()).args(command.get_args());
        perf.stdin(Stdio::null());
        let _far = FarEnd::start(&wire.far, tap.mac, load, LIMIT);
        let mut vm = Vm::spawn(perf);
        let line = wait_for_line(&mut vm, "OK ");
        for pid in children(vm.pid()) {
            kill_process(Pid::from_raw(pid as i32)?, Signal::KILL).ok()?;
        }
        vm.wait_exit();
        let text = std::fs::read_to_string(output).ok()?;
        let count = |event: &str| {
            let line = text.lines().find(|line| line.contains(event))?;
            line.split(',').next()?.parse().ok()
        };
        let counts: Option<Vec<f64>> = EVENTS.iter().map(|event| count(event)).collect();
        Some(Self {
            line,
            events: counts?.try_into().ok()?,
        })
    }
}
