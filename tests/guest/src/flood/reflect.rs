//! Sends every ping back, and sleeps in between: an idle guest.

use super::{PING, frame, with_rig};
use crate::options::Options;

/// Reflects for ever.
pub fn run(options: &Options) {
    with_rig("reflect", options, |rig| {
        rig.prepare(&frame(options.to, rig.mac, PING, options.size));
        loop {
            let mut number = None;
            let taken = rig.receive(0, |seen| {
                if seen.kind == PING {
                    number = Some(seen.number);
                }
            });
            if let Some(number) = number {
                rig.send_number(number);
            }
            if taken == 0 {
                rig.sleep()?;
            }
        }
    });
}
