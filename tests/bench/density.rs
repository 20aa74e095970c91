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

const COLUMNS: [Column; 8] = [
    ("all answer, ms", 0),
    ("ms each", 1),
    ("PSS each, MiB", 2),
    ("without the guest's", 2),
    ("idle, CPU us/s each", 1),
    ("wake-ups/s each", 2),
    ("worst ping, us", 0),
    ("all gone, ms", 0),
];
/// How long idle guests are looked at.
const IDLE: Duration = Duration::from_secs(2);

/// Measures each number of guests once.
pub fn run(effort: Effort) -> Vec<Table> {
    let mut table = Table::new("guests on one lower link", &COLUMNS);
    let counts: &[usize] = if effort.quick {
        &[1, 10]
    } else {
        &[1, 10, 50, 100]
    };
    let monitors = monitors::all(false).into_iter();
    // The guest sleeps until a message wakes it: on the PCI bus.
    for monitor in monitors.filter(Monitor::has_messages) {
        for &count in counts {
            // QEMU is there to compare with, at what its memory allows everywhere.
            if monitor.is_ours() || count <= 10 {
                eprintln!("{}, {count} guests", monitor.name);
                let row = format!("{}, {count}", monitor.name);
                table.add(&row, &guests(&monitor, count));
            }
        }
    }
    vec![table]
}

fn guests(monitor: &Monitor, count: usize) -> [Option<f64>; 8] {
    let wire = Wire::new();
    let pinger = Pinger::new(&wire);
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
    let pids: Vec<u32> = guests.iter().map(|guest| guest.id()).collect();
    let usage = || {
        pids.iter()
            .map(|&pid| Usage::of_process(pid))
            .sum::<Usage>()
    };
    let before = usage();
    thread::sleep(IDLE);
    let idle = usage().since(before);
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
    ]
}

fn spawn(mut command: Command) -> Killed {
    command.stdout(Stdio::null()).stderr(Stdio::null());
    Killed(command.spawn().expect("the monitor starts"))
}
