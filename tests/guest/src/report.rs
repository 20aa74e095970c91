//! Results, as lines that a test reads.

use core::fmt::Display;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::serial::println;

static FAILURES: AtomicU32 = AtomicU32::new(0);

/// Prints `OK name detail`.
pub fn ok(name: &str, detail: impl Display) {
    println!("OK {name} {detail}");
}

/// Prints `FAIL name why`, and counts it.
pub fn fail(name: &str, why: impl Display) {
    FAILURES.fetch_add(1, Ordering::Relaxed);
    println!("FAIL {name} {why}");
}

/// Prints the last line.
pub fn end() {
    println!("END failures={}", FAILURES.load(Ordering::Relaxed));
}
