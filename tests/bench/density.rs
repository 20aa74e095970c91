//! Many guests on one lower link: how long until each answers a ping, what each costs in memory, and
//! idle in CPU time, and how long until all are gone.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::PATIENCE;
use crate::harness::memory::{own_memory, proportional_memory};
use crate::harness::process::Killed;

use super::monitors::{self, Monitor};
use super::native::Effort;
use super::report::{Column, Table};
use super::traffic::Pinger;
use super::usage::Usage;
use super::wire::{Tap, Wire};

const COLUMNS: [Column; 9] = [
    ("all answer, ms", 0),
    ("start each, ms", 1),
    ("PSS each, MiB", 2),
    ("without the guest's", 2),
    ("idle, CPU us/s each", 1),
    ("wake-ups/s each", 2),
    ("worst ping, us", 0),
    ("all gone, ms", 0),
    ("end each, ms", 1),
];
/// What one of many is compared with: one of so many.
const FEW: usize = 10;
/// What a start leaves to be done is done then: minivmm gives memory back after 2 s.
const SETTLE: Duration = Duration::from_secs(3);
/// How long idle guests are looked at.
const IDLE: Duration = Duration::from_secs(2);

/// Measures each number of guests.
pub fn run(effort: Effort) -> Vec<Table> {
    let mut table = Table::new("guests on one lower link", &COLUMNS);
    let counts: &[usize] = if effort.quick {
        &[1, FEW]
    } else {
        &[1, FEW, 50, 100]
    };
    let monitors = monitors::all(false).into_iter();
    // The guest sleeps until a message wakes it: on the PCI bus.
    let monitors: Vec<Monitor> = monitors.filter(Monitor::has_messages).collect();
    for round in 0..effort.rounds {
        for monitor in &monitors {
            // QEMU is there to compare with: once, since its firmware takes long where KVM emulates
            // it, and with as many guests as there is memory for everywhere.
            let is_ours = monitor.is_ours();
            if !is_ours && round > 0 {
                continue;
            }
            for &count in counts.iter().filter(|&&count| is_ours || count <= FEW) {
                eprintln!("{}, {count} guests", monitor.name);
                table.add(&row(&monitor.name, count), &guests(monitor, count));
            }
        }
    }
    let of_few = |name: &str| {
        let monitor = name.rsplit_once(", ").map_or(name, |(monitor, _)| monitor);
        row(monitor, FEW)
    };
    for (name, column) in [("start, of 10", 1), ("PSS, of 10", 2), ("end, of 10", 8)] {
        table.add_ratio_to(name, column, of_few);
    }
    vec![table]
}

fn row(monitor: &str, count: usize) -> String {
    format!("{monitor}, {count}")
}

fn guests(monitor: &Monitor, count: usize) -> [Option<f64>; COLUMNS.len()] {
    let wire = Wire::new();
    let pinger = Pinger::new(&wire.far);
    let (taps, times): (Vec<Tap>, Vec<_>) = (0..count)
        .map(|_| {
            let start = Instant::now();
            (wire.macvtap(1), start.elapsed())
        })
        .unzip();
    // Those of minivmm's own making would be made one by one as well.
    let making: Duration = times.iter().sum();
    let start = Instant::now();
    let options = "mode=reflect interrupts=on size=60";
    let guests: Vec<Killed> = taps
        .iter()
        .map(|tap| spawn(monitor.command(Some(tap), options)))
        .collect();
    let mut waiting: Vec<&Tap> = taps.iter().collect();
    while !waiting.is_empty() {
        waiting.retain(|tap| pinger.ping(tap.mac, Duration::from_millis(5)).is_none());
        assert!(
            start.elapsed() < PATIENCE,
            "{} guests do not answer",
            waiting.len()
        );
    }
    let answer = (making + start.elapsed()).as_secs_f64() * 1000.0;
    thread::sleep(SETTLE);
    let pids: Vec<u32> = guests.iter().map(|guest| guest.id()).collect();
    let idle = idle(&pids);
    let each = |sum: f64| Some(sum / count as f64);
    let memory =
        |of: fn(u32) -> u64| each(pids.iter().map(|&pid| of(pid)).sum::<u64>() as f64 / 1024.0);
    let (whole, own) = (memory(proportional_memory), memory(own_memory));
    let worst = taps
        .iter()
        .map(|tap| pinger.ping(tap.mac, Duration::from_secs(1)));
    let worst = worst.flatten().max();
    let start = Instant::now();
    let mut guests = guests;
    guests.iter_mut().for_each(|guest| drop(guest.kill()));
    drop(guests);
    drop(taps);
    let gone = start.elapsed().as_secs_f64() * 1000.0;
    [
        Some(answer),
        each(answer),
        whole,
        own,
        each(idle.cpu * 1e6 / IDLE.as_secs_f64()),
        each(idle.wakeups as f64 / IDLE.as_secs_f64()),
        worst.map(|time| time.as_secs_f64() * 1e6),
        Some(gone),
        each(gone),
    ]
}

/// What processes use in [`IDLE`].
fn idle(pids: &[u32]) -> Usage {
    let usage = || -> Usage { pids.iter().map(|&pid| Usage::of_process(pid)).sum() };
    let before = usage();
    thread::sleep(IDLE);
    usage().since(before)
}

fn spawn(mut command: Command) -> Killed {
    command.stdout(Stdio::null()).stderr(Stdio::null());
    Killed(command.spawn().expect("the monitor starts"))
}
