//! Tests that cannot run here: reported on stderr, and a failure in CI.

#![allow(dead_code)] // Each test binary uses its own part of this module.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::sync::{Mutex, PoisonError};

/// Says that tests are left out, and what they need. Where `CI` is set this fails the test instead.
pub fn leave_out(reason: &str) {
    assert!(
        std::env::var_os("CI").is_none(),
        "{reason} (and in CI no test may be left out)"
    );
    not_tested(reason);
}

/// Says what this machine cannot show, once a process. It goes to stderr directly: what a test
/// prints is shown only when the test fails.
pub fn not_tested(reason: &str) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if said.insert(reason.to_owned()) {
        let _ = std::io::stderr().write_all(format!("\nNOT TESTED: {reason}\n").as_bytes());
    }
}

/// Whether there is a KVM for us; without one the test is left out.
pub fn has_kvm() -> bool {
    let usable = File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &usable {
        leave_out(&format!(
            "tests with a guest need /dev/kvm, which cannot be opened: {error}"
        ));
    }
    usable.is_ok()
}
