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
    let bench = match Bench::new(options, boot) {
        Ok(bench) => bench,
        Err(why) => return report::fail("hostile", why),
    };
    println!("READY hostile");
    let mut runner = Runner {
        bench: &bench,
        only: &options.only,
        rounds: options.count,
        done: 0,
    };
    runner.attack("none", |_| Ok(()));
    chains::run(&mut runner);
    queues::run(&mut runner);
    pairs::run(&mut runner);
    registers::run(&mut runner);
    life::run(&mut runner);
    frames::run(&mut runner);
    report::ok("hostile", format_args!("attacks={}", runner.done));
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

impl<S: Subject> Runner<'_, S> {
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
