//! System calls and exits for a frame and for a ping, which perf counts, and interrupts. What the
//! start of a guest takes is counted for itself and taken away.

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

const COLUMNS: [Column; 7] = [
    ("send: calls", 1),
    ("exits", 1),
    ("receive: calls", 1),
    ("exits", 1),
    ("interrupts", 2),
    ("ping: calls", 1),
    ("exits", 1),
];
/// What perf counts: system calls, and exits of the vCPUs.
const EVENTS: [&str; 2] = ["raw_syscalls:sys_enter", "kvm:kvm_exit"];
/// No load lasts longer.
const LIMIT: Duration = Duration::from_secs(20);

/// Counts, where perf can.
pub fn run(effort: Effort) -> Vec<Table> {
    let mut table = Table::new("for 1000 frames of 1514 B, and for a ping", &COLUMNS);
    if !has_perf() {
        eprintln!("perf counts neither system calls nor exits here");
        return vec![table];
    }
    let wire = Wire::new();
    let load = Some(Load {
        size: 1514,
        rate: None,
        burst: 1,
        waits: false,
    });
    let ms = effort.flood.as_millis();
    for monitor in monitors::all(effort.quick) {
        eprintln!("system calls and exits: {}", monitor.name);
        let counted = |options: &str, load| Counted::take(&wire, &monitor, options, load);
        let Some(start) = counted("mode=hello", None) else {
            continue;
        };
        let each = |counted: Option<Counted>, key: &str, unit: f64| {
            let Some(counted) = counted else {
                return [None; 2];
            };
            let times = counted.line.number(key) / unit;
            // A KVM that traces no exits has none at the start either.
            [0, 1].map(|event| {
                let of_start = start.events[event];
                (of_start > 0.0).then(|| (counted.events[event] - of_start) / times)
            })
        };
        let send = counted(&format!("mode=send ms={ms}"), None);
        let receive = counted(&format!("mode=receive ms={ms}"), load);
        let ping = "mode=ping-pong size=60 gap=500 ms=4000";
        let ping = counted(&format!("{ping} count={}", effort.pings), None);
        let interrupts = monitor.has_messages().then(|| {
            let options = format!("mode=receive interrupts=on ms={ms}");
            let line = counted(&options, load)?.line;
            Some(line.number("interrupts") * 1000.0 / line.number("frames"))
        });
        let [send, receive] = [send, receive].map(|counted| each(counted, "frames", 1000.0));
        let ping = each(ping, "pings", 1.0);
        table.add(
            &monitor.name,
            &[
                send[0],
                send[1],
                receive[0],
                receive[1],
                interrupts.flatten(),
                ping[0],
                ping[1],
            ],
        );
    }
    vec![table]
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
    events: [f64; 2],
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
        let _far = FarEnd::start(wire, tap.mac, load, LIMIT);
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
        Some(Self {
            line,
            events: [count(EVENTS[0])?, count(EVENTS[1])?],
        })
    }
}
