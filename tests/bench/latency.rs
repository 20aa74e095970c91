//! Round trips of a frame that the far end sends back, on an idle wire and under load.

use std::time::Duration;

use super::bare;
use super::monitors::{self, Monitor};
use super::native::{BARE, Effort, wait_for_line};
use super::report::{Column, Table};
use super::traffic::{FarEnd, Load};
use super::wire::Wire;

const COLUMNS: [Column; 5] = [
    ("p50, us", 1),
    ("p99, us", 0),
    ("p99.9, us", 0),
    ("lost %", 1),
    ("load, kframes/s", 0),
];
/// The length of the frame.
const PING: usize = 60;
/// No run takes longer.
const LIMIT: Duration = Duration::from_secs(4);

/// What goes on besides, and how long the guest waits between two round trips.
struct Case {
    title: &'static str,
    gap: Duration,
    load: Option<Load>,
    is_quick: bool,
}

const fn load(size: usize, rate: Option<u32>) -> Option<Load> {
    Some(Load {
        size,
        rate,
        burst: 1,
        waits: false,
    })
}

const CASES: [Case; 5] = [
    Case {
        title: "ping-pong without a pause",
        gap: Duration::ZERO,
        load: None,
        is_quick: false,
    },
    Case {
        title: "ping-pong, idle: one in 500 us",
        gap: Duration::from_micros(500),
        load: None,
        is_quick: true,
    },
    Case {
        title: "ping-pong, the guest receives 50,000 frames of 60 B a second",
        gap: Duration::from_micros(500),
        load: load(60, Some(50_000)),
        is_quick: false,
    },
    Case {
        title: "ping-pong, the guest is flooded with frames of 60 B",
        gap: Duration::from_micros(500),
        load: load(60, None),
        is_quick: true,
    },
    Case {
        title: "ping-pong, the guest is flooded with frames of 1514 B",
        gap: Duration::from_micros(500),
        load: load(1514, None),
        is_quick: false,
    },
];

/// Measures all cases.
pub fn run(effort: Effort) -> Vec<Table> {
    let wire = Wire::new();
    let monitors = monitors::all(effort.quick);
    let cases = CASES.iter().filter(|case| case.is_quick || !effort.quick);
    let mut tables = Vec::new();
    for case in cases {
        eprintln!("{}", case.title);
        let mut table = Table::new(case.title, &COLUMNS);
        for _ in 0..effort.rounds {
            table.add(BARE, &bare_times(&wire, case, effort.pings));
            for monitor in &monitors {
                table.add(&monitor.name, &times(&wire, monitor, case, effort.pings));
            }
        }
        table.add_ratio("p50 of QEMU", 0, "QEMU");
        table.add_ratio("p99 of QEMU", 1, "QEMU");
        tables.push(table);
    }
    tables
}

fn bare_times(wire: &Wire, case: &Case, pings: usize) -> [Option<f64>; 5] {
    let tap = wire.macvtap(1);
    let _far = FarEnd::start(&wire.far, tap.mac, case.load, LIMIT * 2);
    let trips = bare::ping_pong(&tap, PING, pings, case.gap, LIMIT);
    let at = |share: usize| {
        let place = (trips.times.len() * share / 1000).min(trips.times.len().saturating_sub(1));
        trips.times.get(place).map(|time| time.as_secs_f64() * 1e6)
    };
    let lost = 100.0 * (1.0 - trips.times.len() as f64 / trips.sent as f64);
    let load = trips.frames as f64 / 1000.0 / trips.time.as_secs_f64();
    [at(500), at(990), at(999), Some(lost), Some(load)]
}

fn times(wire: &Wire, monitor: &Monitor, case: &Case, pings: usize) -> [Option<f64>; 5] {
    let tap = wire.macvtap(1);
    let (gap, ms) = (case.gap.as_micros(), LIMIT.as_millis());
    let options = format!("mode=ping-pong size={PING} count={pings} gap={gap} ms={ms}");
    let _far = FarEnd::start(&wire.far, tap.mac, case.load, Duration::from_secs(30));
    let mut vm = monitor.start(Some(&tap), &options);
    let line = wait_for_line(&mut vm, "OK ");
    let [answered, lost, ns] = ["pings", "lost", "ns"].map(|key| line.number(key));
    let us = |key: &str| Some(line.number(key) / 1000.0);
    [
        us("p50_ns"),
        us("p99_ns"),
        us("p999_ns"),
        Some(100.0 * lost / (answered + lost)),
        Some(line.number("frames") * 1e6 / ns),
    ]
}
