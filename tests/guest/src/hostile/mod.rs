//! Everything that a driver must not do, done by hand. After each attack the device must work again
//! after a reset: of a NIC an ARP request and its answer prove that.
//!
//! | file | attacks |
//! | --- | --- |
//! | `rig.rs` | (none: the bench, and a NIC brought up by hand) |
//! | `chains.rs` | descriptor chains and the available ring |
//! | `queues.rs` | sizes and addresses of queues |
//! | `pairs.rs` | queue pairs that are not all there |
//! | `registers.rs` | each register with each width |
//! | `pci/` | what there is on the PCI bus only |
//! | `life.rs` | status bits, features, notifications, resets |
//! | `disk.rs` | a disk, whatever way |
//! | `memory.rs` | the entropy device and the balloon |
//! | `vsock.rs` | the socket device |
//! | `share.rs` | a share, whatever way |
//! | `frames.rs` | headers and lengths of frames to send |

mod chains;
pub mod disk;
mod frames;
mod life;
pub mod memory;
mod pairs;
mod pci;
mod queues;
mod registers;
mod rig;
pub mod share;
pub mod vsock;

use alloc::format;
use alloc::string::String;
use core::fmt::Display;

use crate::boot::Boot;
use crate::cpu;
use crate::options::Options;
use crate::report;
use crate::serial::println;
use rig::Bench;
use smoltcp::time::Duration;

/// Why an attack failed.
type Failure = String;

/// Runs every attack whose name begins with `guest.only`.
pub fn run(options: &Options, boot: &Boot) {
    let attacks = [
        chains::run,
        queues::run,
        pairs::run,
        registers::run,
        life::run,
        frames::run,
    ];
    run_on("hostile", options, Bench::new(options, boot), &attacks);
}

/// Runs attacks on what there is, and sums up by the mode's name.
fn run_on<S: Subject>(
    mode: &str,
    options: &Options,
    bench: Result<S, impl Display>,
    attacks: &[fn(&mut Runner<'_, S>)],
) {
    let bench = match bench {
        Ok(bench) => bench,
        Err(why) => return report::fail(mode, why),
    };
    println!("READY {mode}");
    let mut runner = Runner::new(&bench, options);
    runner.attack("none", |_| Ok(()));
    attacks.iter().for_each(|attack| attack(&mut runner));
    report::ok(mode, format_args!("attacks={}", runner.done));
}

/// Gives the device time to notice what was done to it.
fn settle() {
    let end = cpu::now() + Duration::from_millis(3);
    while cpu::now() < end {}
}

/// What is attacked.
trait Subject {
    /// Resets it, and has it do its work.
    fn prove(&self) -> Result<(), Failure>;
}

/// Runs attacks and the proof after each.
struct Runner<'a, S = Bench> {
    bench: &'a S,
    only: &'a str,
    /// How often to do what is done again and again.
    rounds: u32,
    done: u32,
}

impl<'a, S: Subject> Runner<'a, S> {
    /// Runs those whose name begins with `guest.only`.
    fn new(bench: &'a S, options: &'a Options) -> Self {
        Self {
            bench,
            only: &options.only,
            rounds: options.count,
            done: 0,
        }
    }

    /// Runs one attack, and reports one line.
    fn attack(&mut self, name: &str, attack: impl FnOnce(&S) -> Result<(), Failure>) {
        if !name.starts_with(self.only) {
            return;
        }
        self.done += 1;
        let result = attack(self.bench);
        let result = result.and_then(|()| {
            self.bench
                .prove()
                .map_err(|why| format!("afterwards: {why}"))
        });
        match result {
            Ok(()) => report::ok(name, ""),
            Err(why) => report::fail(name, why),
        }
    }
}
