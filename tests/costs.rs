//! What a guest costs its host, held against the committed baseline (`tests/costs.json`).
//!
//! Only what the machine's load cannot disturb is measured: sizes and counts, no times, of the
//! program that the tests are built with. A release has other figures, but what makes one worse
//! makes the other worse. `make bench` has the times, and a release.
//!
//! The baseline is of the machines that CI runs on: elsewhere the table is shown, and no more.

#![allow(clippy::unwrap_used)] // A helper that panics fails the test.

mod harness;
#[path = "costs/trace.rs"]
mod trace;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use harness::guest::{Net, addresses};
use harness::memory::{anonymous_memory, own_memory};
use harness::process::{Task, children, tasks};
use harness::vm::{self, Vm};
use harness::{eventually, guest_test};
use trace::{Calls, Trace};

/// What was measured, by its name: less is better.
type Figures = BTreeMap<&'static str, f64>;

const BASELINE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/costs.json");
/// So much worse than the baseline may a figure be.
const MARGIN: f64 = 0.05;
/// And resident memory: it comes in 64 KiB, by how the linker has placed what is in use.
const RESIDENT_MARGIN: f64 = 0.15;
/// Guests that each figure is taken from. It is the least: what disturbs one adds to it.
const GUESTS: usize = 3;
const PINGS: usize = 50;

guest_test!(costs_are_no_worse_than_the_baseline, || {
    let rounds = (0..GUESTS).map(|_| [running(), traced()]);
    let mut found = Figures::from([(
        "program: kB that are mapped",
        (loaded(&vm::binary()) / 1024.0).round(),
    )]);
    for (name, figure) in rounds.flatten().flatten() {
        let least = found.entry(name).or_insert(figure);
        *least = least.min(figure);
    }
    if std::env::var_os("MINIVMM_COSTS").is_some() {
        let text = serde_json::to_string_pretty(&found).unwrap();
        fs::write(BASELINE, text + "\n").unwrap();
    }
    let (table, worse) = compare(&found, &baseline());
    // Past the test's captured output: the figures are to be seen when it passes, too.
    std::io::stderr().write_all(table.as_bytes()).unwrap();
    let in_ci = std::env::var_os("CI").is_some();
    assert!(
        worse.is_empty() || !in_ci,
        "worse than the baseline: {worse:?}. Where that is meant, commit what `make \
         costs` writes, and say why"
    );
});

fn baseline() -> BTreeMap<String, f64> {
    let text = fs::read_to_string(BASELINE).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// A table of all figures, and the names of those that are worse than the margin allows.
fn compare(found: &Figures, baseline: &BTreeMap<String, f64>) -> (String, Vec<&'static str>) {
    let (mut table, mut worse) = (String::new(), Vec::new());
    writeln!(table, "{:<48}{:>10}{:>10}", "", "now", "baseline").unwrap();
    for (name, figure) in found {
        let before = baseline.get(*name).copied().unwrap_or(0.0);
        let margin = match name.contains("resident") {
            true => RESIDENT_MARGIN,
            false => MARGIN,
        };
        let note = if *figure > before * (1.0 + margin) {
            worse.push(*name);
            "WORSE"
        } else if *figure < before * (1.0 - margin) {
            "better: `make costs` keeps it so"
        } else {
            ""
        };
        writeln!(table, "{name:<48}{figure:>10.2}{before:>10.2}  {note}").unwrap();
    }
    (table, worse)
}

/// A guest with a NIC that serves, on a wire where nothing else speaks.
fn serve(net: &Net, tracer: &[&str]) -> Vm {
    net.silence();
    let mut command = net.command_under(tracer);
    let [ip, _] = addresses(2);
    let line = format!("guest.mode=echo guest.ip={ip}/24");
    command.args(["--macvtap", "lower", "--cmdline", &line]);
    // Looking for a free one costs the more the more VMs run.
    command.args(["--name", &format!("costs-{}", std::process::id())]);
    // Cargo sets it for tests, and the loader searches every directory there.
    command.env_remove("LD_LIBRARY_PATH");
    let mut vm = Vm::spawn(command);
    vm.wait_for("READY echo\n");
    // Both sides know each other's MAC address then.
    ping(net, &vm);
    let settled = || {
        let before = sleeps(&vm);
        sleep(Duration::from_millis(500));
        sleeps(&vm) == before
    };
    assert!(eventually(settled), "\n{}", vm.transcript());
    vm
}

/// Has a datagram answered, and waits until the monitor rests.
fn ping(net: &Net, vm: &Vm) {
    let [ip, _] = addresses(2);
    assert_eq!(net.datagram(&ip, b"ping"), b"ping", "\n{}", vm.transcript());
    let rests = || monitor(vm).iter().all(|task| task.state == 'S');
    assert!(eventually(rests), "\n{}", vm.transcript());
}

/// The monitor's threads but the vCPU's, whose guest polls.
fn monitor(vm: &Vm) -> Vec<Task> {
    // It is the child of its tracer, if it has one.
    let mut tasks = tasks(children(vm.pid()).first().copied().unwrap_or(vm.pid()));
    // KVM has one there too, of the kernel's.
    tasks.retain(|task| !task.name.starts_with("vcpu") && !task.name.starts_with("kvm"));
    tasks
}

/// How often the monitor's threads have gone to sleep.
fn sleeps(vm: &Vm) -> u64 {
    let counts = monitor(vm).into_iter().map(|task| task.voluntary_switches);
    counts.sum()
}

/// What a guest takes that runs.
fn running() -> Figures {
    let net = Net::new();
    let vm = serve(&net, &[]);
    let pid = vm.pid();
    let wakeups = |after: u64, before: u64| (after - before) as f64;
    let idle = (0..3).map(|_| {
        let before = sleeps(&vm);
        sleep(Duration::from_secs(1));
        wakeups(sleeps(&vm), before)
    });
    let figures = Figures::from([
        (
            "idle guest: wake-ups a second",
            idle.fold(f64::MAX, f64::min),
        ),
        (
            "ping: wake-ups",
            each_ping(&net, &vm, || sleeps(&vm), wakeups),
        ),
        (
            "running guest: resident kB beyond its own",
            own_memory(pid) as f64,
        ),
        (
            "running guest: anonymous kB beyond its own",
            anonymous_memory(pid) as f64,
        ),
        ("running guest: threads", monitor(&vm).len() as f64 + 1.0),
    ]);
    net.quit(2, vm);
    figures
}

/// What it asks of the kernel.
fn traced() -> Figures {
    let net = Net::new();
    let trace = Trace::new();
    let vm = serve(&net, &trace.command());
    let start = trace.read();
    let read = || trace.read();
    let runs = |after: Calls, before: Calls| (after.runs - before.runs) as f64;
    let calls = |after: Calls, before: Calls| {
        (after.of_pairs + after.others - before.of_pairs - before.others) as f64
    };
    let figures = Figures::from([
        ("start: system calls", start.others as f64),
        ("start: exits to the monitor", start.runs as f64),
        (
            "ping: exits to the monitor",
            each_ping(&net, &vm, read, runs),
        ),
        ("ping: system calls", each_ping(&net, &vm, read, calls)),
    ]);
    net.quit(2, vm);
    figures
}

/// By how much a count differs after a ping, at most but for one of ten: where threads run late,
/// one wake-up serves what else takes two, and where another frame comes there is one more.
fn each_ping<T>(
    net: &Net,
    vm: &Vm,
    count: impl Fn() -> T,
    difference: impl Fn(T, T) -> f64,
) -> f64 {
    let each = |_| {
        let before = count();
        ping(net, vm);
        difference(count(), before)
    };
    let mut all: Vec<f64> = (0..PINGS).map(each).collect();
    all.sort_by(f64::total_cmp);
    all[PINGS * 9 / 10]
}

/// The bytes that an ELF program has the kernel map.
fn loaded(program: &Path) -> f64 {
    let bytes = fs::read(program).unwrap();
    let number = |at: usize, width: usize| {
        let bytes = &bytes[at..at + width];
        bytes
            .iter()
            .rev()
            .fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte))
    };
    // e_phoff, e_phentsize and e_phnum; of each program header p_type and p_memsz.
    let (first, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    let headers = (0..count).map(|n| (first + n * size) as usize);
    let loads = headers.filter(|&at| number(at, 4) == 1);
    loads.map(|at| number(at + 40, 8)).sum::<u64>() as f64
}
