//! Fifty macvtaps leave nothing in the process. Alone in its binary, as it counts the process's
//! descriptors.

#![allow(
    clippy::unwrap_used,
    reason = "all of this file is tests, and the lint spares #[test] functions alone"
)]

#[path = "../../tests/harness/netns.rs"]
mod netns;

use std::time::{Duration, Instant};

use net::{Macvtap, MacvtapSpec, Placement};
use netns::root_test;

root_test!(fifty_macvtaps_leak_no_descriptor_and_no_thread, || {
    let netns = netns::Netns::new();
    netns.wire("v0");
    let count = |what: &str| {
        std::fs::read_dir(format!("/proc/self/{what}"))
            .unwrap()
            .count()
    };
    let spec = MacvtapSpec::new("v0".parse().unwrap());
    let mut on_host = spec.clone();
    on_host.netns = Placement::Host;
    on_host.queues = 3;
    let no_such = MacvtapSpec::new("v1".parse().unwrap());
    let (before, after) = netns.enter(|| {
        let before = (count("fd"), count("task"));
        for _ in 0..50 {
            drop(Macvtap::open(&spec).unwrap());
            drop(Macvtap::open(&on_host).unwrap());
            Macvtap::open(&no_such).unwrap_err();
        }
        // A thread that has been joined may show for a moment.
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let after = (count("fd"), count("task"));
            if after == before || Instant::now() > deadline {
                return (before, after);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    assert_eq!(after, before);
});
