//! Sends frames of one size as fast as the device takes them.

use alloc::format;

use super::{FLOOD, frame, with_rig};
use crate::cpu;
use crate::options::Options;

/// For so long after the end the device may take what is queued.
const DRAIN_NS: u64 = 2_000_000_000;

/// Floods for `guest.ms` on each of `guest.pairs`.
pub fn run(options: &Options) {
    with_rig("send", options, |rig| {
        rig.prepare(&frame(options.to, rig.mac, FLOOD, options.size));
        let start = cpu::ticks();
        let end = start + cpu::ticks_in(options.nanoseconds());
        let mut frames = 0;
        while cpu::ticks() < end {
            for pair in 0..rig.pairs.len() {
                frames += rig.send(pair);
            }
        }
        let limit = cpu::ticks() + cpu::ticks_in(DRAIN_NS);
        while rig.unsent() > 0 && cpu::ticks() < limit {}
        let ns = cpu::ns_of(cpu::ticks() - start);
        let (kicks, unsent) = (rig.kicks, rig.unsent() as u64);
        let (frames, size) = (frames - unsent, options.size as u64);
        Ok(format!(
            "frames={frames} bytes={} ns={ns} kicks={kicks} unsent={unsent}",
            frames * size
        ))
    });
}
