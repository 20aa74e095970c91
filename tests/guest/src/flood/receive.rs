//! Counts what a sender floods it with.

use alloc::format;

use super::{SENDER, with_rig};
use crate::cpu;
use crate::options::Options;
use crate::serial::println;

/// Receives for `guest.ms` from the first frame of the flood on.
pub fn run(options: &Options) {
    with_rig("receive", options, |rig| {
        let is_ours = is_from_sender();
        let limit = cpu::ticks() + cpu::ticks_in(cpu::PATIENCE.total_micros() * 1000);
        let mut first = 0;
        while first == 0 {
            for pair in 0..rig.pairs.len() {
                rig.receive(pair, |seen| first += u64::from(is_ours(seen.source)));
            }
            if cpu::ticks() > limit {
                return Err("no frame comes");
            }
        }
        println!("START receive");
        let (kicks, interrupts) = (rig.kicks, rig.interrupts());
        let start = cpu::ticks();
        let end = start + cpu::ticks_in(options.nanoseconds());
        let (mut frames, mut bytes) = (0_u64, 0_u64);
        while cpu::ticks() < end {
            let mut taken = 0;
            for pair in 0..rig.pairs.len() {
                taken += rig.receive(pair, |seen| {
                    frames += u64::from(is_ours(seen.source));
                    bytes += seen.length as u64;
                });
            }
            if taken == 0 {
                rig.wait(end);
            }
        }
        let ns = cpu::ns_of(cpu::ticks() - start);
        let (kicks, interrupts) = (rig.kicks - kicks, rig.interrupts() - interrupts);
        Ok(format!(
            "frames={frames} bytes={bytes} ns={ns} kicks={kicks} interrupts={interrupts}"
        ))
    });
}

/// Whether a frame's source address ends as [`SENDER`]'s.
pub fn is_from_sender() -> impl Fn(u32) -> bool {
    let wanted = u32::from_le_bytes([SENDER[2], SENDER[3], SENDER[4], SENDER[5]]);
    move |source| source == wanted
}
