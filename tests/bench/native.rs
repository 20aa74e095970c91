//! The data path, by the freestanding guest: minivmm beside QEMU and beside a loop on the bare
//! macvtap, in turns.

use std::thread;
use std::time::{Duration, Instant};

use crate::harness::vm::Vm;

use super::bare::{self, Counted};
use super::monitors::{self, Monitor};
use super::report::{Column, Table};
use super::traffic::{BURST, FarEnd, Load};
use super::usage::Usage;
use super::wire::{Tap, Wire};

/// The sizes of frames; the last one is cut by the receiving end.
pub const SIZES: [usize; 4] = [60, 512, 1514, 65_000];
/// The name of the limit's row.
pub const BARE: &str = "bare macvtap";

/// Which way a flood goes, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Way {
    /// The guest sends.
    Send,
    /// The guest receives.
    Receive,
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// How often each is.
    pub rounds: usize,
    /// How long a flood takes.
    pub flood: Duration,
    /// How many round trips are timed.
    pub pings: usize,
    /// Only what matters most.
    pub quick: bool,
}

const FLOOD_COLUMNS: [Column; 6] = [
    ("kframes/s", 0),
    ("Gbit/s", 2),
    ("kframes/CPU s", 0),
    ("wake-ups/kframe", 2),
    ("kicks/kframe", 2),
    ("lost %", 1),
];

/// Measures both ways with every size.
pub fn run(effort: Effort) -> Vec<Table> {
    let wire = Wire::new();
    let monitors = monitors::all(effort.quick);
    let mut tables = Vec::new();
    for flood in FLOODS
        .iter()
        .filter(|flood| flood.is_quick || !effort.quick)
    {
        tables.push(flood.compare(&wire, &monitors, effort));
    }
    tables
}

/// A flood of frames of one size.
#[derive(Clone, Copy, Debug)]
struct Flood {
    way: Way,
    size: usize,
    pairs: u16,
    /// See [`Load`].
    burst: usize,
    waits: bool,
    is_quick: bool,
}

const fn flood(way: Way, size: usize) -> Flood {
    Flood {
        way,
        size,
        pairs: 1,
        burst: 1,
        waits: false,
        is_quick: true,
    }
}

/// One that the quick run leaves out.
const fn in_full(flood: Flood) -> Flood {
    Flood {
        is_quick: false,
        ..flood
    }
}

const fn in_bursts(size: usize) -> Flood {
    in_full(Flood {
        burst: BURST,
        ..flood(Way::Receive, size)
    })
}

const fn from_one_that_waits(size: usize) -> Flood {
    Flood {
        waits: true,
        ..flood(Way::Receive, size)
    }
}

const fn by_two_pairs(way: Way, size: usize) -> Flood {
    in_full(Flood {
        pairs: 2,
        ..flood(way, size)
    })
}

const FLOODS: [Flood; 16] = [
    flood(Way::Send, SIZES[0]),
    in_full(flood(Way::Send, SIZES[1])),
    flood(Way::Send, SIZES[2]),
    flood(Way::Send, SIZES[3]),
    by_two_pairs(Way::Send, 1514),
    by_two_pairs(Way::Send, 65_000),
    flood(Way::Receive, SIZES[0]),
    in_full(flood(Way::Receive, SIZES[1])),
    flood(Way::Receive, SIZES[2]),
    flood(Way::Receive, SIZES[3]),
    in_bursts(60),
    in_bursts(1514),
    from_one_that_waits(1514),
    in_full(from_one_that_waits(65_000)),
    by_two_pairs(Way::Receive, 1514),
    by_two_pairs(Way::Receive, 65_000),
];

impl Flood {
    /// One table: the limit and every monitor once a round.
    fn compare(&self, wire: &Wire, monitors: &[Monitor], effort: Effort) -> Table {
        let verb = match self.way {
            Way::Send => "sends",
            Way::Receive => "receives",
        };
        let pairs = if self.pairs > 1 {
            ", 2 queue pairs"
        } else {
            ""
        };
        let bursts = if self.burst > 1 { ", in bursts" } else { "" };
        let waits = if self.waits {
            ", from one that waits"
        } else {
            ""
        };
        let title = format!("guest {verb} {} B{pairs}{bursts}{waits}", self.size);
        eprintln!("{title}");
        let mut table = Table::new(title, &FLOOD_COLUMNS);
        for _ in 0..effort.rounds {
            if self.pairs == 1 {
                table.add(BARE, &self.bare(wire, effort.flood));
            }
            for monitor in monitors {
                table.add(&monitor.name, &self.guest(wire, monitor, effort.flood));
            }
        }
        if self.pairs == 1 {
            table.add_ratio("of bare", 0, BARE);
        }
        table.add_ratio("of QEMU", 0, "QEMU");
        table
    }

    fn sender(&self, wire: &Wire, tap: &Tap, time: Duration) -> FarEnd {
        let load = Load {
            size: self.size,
            rate: None,
            burst: self.burst,
            waits: self.waits,
        };
        FarEnd::start(&wire.far, tap.mac, Some(load), time * 4)
    }

    fn bare(&self, wire: &Wire, time: Duration) -> [Option<f64>; 6] {
        let tap = wire.macvtap(1);
        let counted = match self.way {
            Way::Send => bare::send(&tap, self.size, time),
            Way::Receive => {
                let _far = self.sender(wire, &tap, time);
                bare::receive(&tap, time)
            }
        };
        figures(counted, None, None)
    }

    fn guest(&self, wire: &Wire, monitor: &Monitor, time: Duration) -> [Option<f64>; 6] {
        let tap = wire.macvtap(self.pairs);
        let mode = match self.way {
            Way::Send => "send",
            Way::Receive => "receive",
        };
        let (size, pairs, ms) = (self.size, self.pairs, time.as_millis());
        let options = format!("mode={mode} size={size} ms={ms} pairs={pairs}");
        let mut vm = monitor.start(Some(&tap), &options);
        wait_for_line(&mut vm, "READY ");
        let arrived = wire.arrived();
        let far = (self.way == Way::Receive).then(|| self.sender(wire, &tap, time));
        if far.is_some() {
            // QEMU 7.2 gets nothing now and then on two queue pairs.
            if !has_begun(&vm, time * 4) {
                eprintln!("{}: no frame has come", monitor.name);
                return [None; 6];
            }
            wait_for_line(&mut vm, "START ");
        }
        let usage = Usage::of_workers(vm.pid());
        let line = wait_for_line(&mut vm, "OK ");
        let usage = Usage::of_workers(vm.pid()).since(usage);
        drop(far);
        let number = |key| line.number(key);
        let sent = number("frames");
        // What the guest sent counts if it has arrived.
        let (frames, lost) = match self.way {
            Way::Send => {
                let arrived = (wire.arrived() - arrived) as f64;
                (
                    arrived.min(sent),
                    Some(100.0 * (1.0 - (arrived / sent).min(1.0))),
                )
            }
            Way::Receive => (sent, None),
        };
        let counted = Counted {
            frames: frames as u64,
            bytes: number("bytes") as u64,
            time: Duration::from_nanos(number("ns") as u64),
            usage,
        };
        figures(counted, Some(number("kicks")), lost)
    }
}

/// Whether a guest gets a flood's first frame in time.
fn has_begun(vm: &Vm, limit: Duration) -> bool {
    let start = Instant::now();
    while !vm.console().contains("START ") {
        if start.elapsed() > limit {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    true
}

fn figures(counted: Counted, kicks: Option<f64>, lost: Option<f64>) -> [Option<f64>; 6] {
    let seconds = counted.time.as_secs_f64();
    let thousands = counted.frames as f64 / 1000.0;
    [
        Some(thousands / seconds),
        Some(counted.bytes as f64 * 8e-9 / seconds),
        Some(thousands / counted.usage.cpu),
        Some(counted.usage.wakeups as f64 / thousands),
        kicks.map(|kicks| kicks / thousands),
        lost,
    ]
}

/// The line by which a guest reports, as `key=value` words.
#[derive(Debug)]
pub struct Line(String);

impl Line {
    /// A number in it.
    pub fn number(&self, key: &str) -> f64 {
        let mut words = self.0.split_whitespace();
        let value = words.find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok());
        value.unwrap_or_else(|| panic!("no {key} in {:?}", self.0))
    }
}

/// Waits until the guest writes a line that begins so; a failure of its ends it all.
pub fn wait_for_line(vm: &mut Vm, start: &str) -> Line {
    loop {
        let line = vm.wait_for("\n");
        assert!(!line.starts_with("FAIL "), "{}", vm.transcript());
        if line.starts_with(start) {
            return Line(line);
        }
    }
}
