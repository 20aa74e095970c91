//! Sends a frame that comes back, again and again, and measures how long each takes. What else
//! comes meanwhile is received and counted: latency under load.

use alloc::format;
use alloc::vec::Vec;

use super::receive::is_from_sender;
use super::{PING, frame, with_rig};
use crate::cpu;
use crate::options::Options;
use crate::serial::println;

/// A frame that has not come back by then is lost.
const LOST_NS: u64 = 200_000_000;
/// The first round trips, which find cold caches, are not counted.
const WARM_UP: u32 = 20;

/// Sends `guest.count` pings of `guest.size`, each `guest.gap` microseconds after the last one came
/// back, for no longer than `guest.ms`.
pub fn run(options: &Options) {
    with_rig("ping-pong", options, |rig| {
        rig.prepare(&frame(options.to, rig.mac, PING, options.size));
        let is_ours = is_from_sender();
        println!("START ping-pong");
        let (lost_after, gap) = (cpu::ticks_in(LOST_NS), cpu::ticks_in(options.gap * 1000));
        let mut times: Vec<u64> = Vec::with_capacity(options.count as usize);
        let (mut lost, mut frames) = (0_u32, 0_u64);
        let start = cpu::ticks();
        let end = start + cpu::ticks_in(options.nanoseconds());
        for number in 1..=options.count.saturating_add(WARM_UP) {
            let sent = cpu::ticks();
            rig.send_number(number);
            let mut back = None;
            while back.is_none() && cpu::ticks() - sent < lost_after {
                rig.receive(0, |seen| {
                    frames += u64::from(is_ours(seen.source));
                    if seen.kind == PING && seen.number == number {
                        back = Some(cpu::ticks() - sent);
                    }
                });
            }
            let next = cpu::ticks() + gap;
            while cpu::ticks() < next {
                rig.receive(0, |seen| frames += u64::from(is_ours(seen.source)));
            }
            match back {
                Some(time) if number > WARM_UP => times.push(time),
                Some(_) => {}
                None => lost += 1,
            }
            if cpu::ticks() > end {
                break;
            }
        }
        let ns = cpu::ns_of(cpu::ticks() - start);
        times.sort_unstable();
        let at = |share: usize| {
            let place = (times.len() * share / 1000).min(times.len().saturating_sub(1));
            cpu::ns_of(times.get(place).copied().unwrap_or(0))
        };
        let [p50, p99, p999, max] = [500, 990, 999, 1000].map(at);
        Ok(format!(
            "pings={} lost={lost} p50_ns={p50} p99_ns={p99} p999_ns={p999} max_ns={max} \
             frames={frames} ns={ns} kicks={}",
            times.len(),
            rig.kicks
        ))
    });
}
