//! How long tests wait for what.

use std::thread;
use std::time::{Duration, Instant};

/// How long a test waits for what has to come: only what hangs takes so long, on a busy machine too.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// An end within this time came at once: it is shorter than the 10 s that a guest gets after its
/// power button was pressed.
pub const AT_ONCE: Duration = Duration::from_secs(8);

/// Waits until something holds; whether it came to that.
pub fn eventually(mut holds: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        let (held, waited) = (holds(), start.elapsed());
        if held || waited > PATIENCE {
            return held;
        }
        thread::sleep(Duration::from_millis(20));
    }
}
