//! What a NIC does besides moving frames: filter, limit, record, count.

use super::*;
use crate::virtio::net::capture::Capture;
use crate::virtio::net::hooks::Hooks;
use crate::virtio::rate::{Limiter, RateLimit};

/// A frame to `to`, with the protocol and what follows, behind an empty header.
fn ethernet(to: [u8; 6], rest: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; HEADER_LEN];
    frame.extend(to);
    frame.extend([2; 6]);
    frame.extend(rest);
    frame.resize(72, 0);
    frame
}

#[test]
fn rx_frame_that_the_driver_does_not_want_takes_no_buffer() {
    let (wire, far) = Wire::new();
    let mut driver = Driver::new();
    let filter = filter();
    filter.change(|rules| {
        *rules = Rules::new(Features::CTRL_VLAN);
        rules.set_table(&[], &[]);
    });
    let mut rx = RxQueue::new(driver.queue(false), MERGEABLE, Arc::clone(&filter));
    driver.offer_chain(0, &[(0x4000, 20, WRITE), (0x5000, 2000, WRITE)]);
    let group = [1, 0, 0x5e, 0, 0, 1];
    far.send(&ethernet(group, &[8, 0])).unwrap();
    far.send(&ethernet(MAC, &[0x81, 0, 0, 5])).unwrap();
    assert_eq!(rx.receive(&wire, 10).0, Stop::Idle);
    assert_eq!(rx.counters.filtered, 2);
    far.send(&ethernet(MAC, &[8, 0])).unwrap();
    assert_eq!(rx.receive(&wire, 10), (Stop::Empty, true));
    assert_eq!(driver.take_used(), [(0, 72)]);
    // The driver changes its mind.
    filter.change(|rules| rules.set_table(&[], &[group]));
    driver.offer_chain(1, &[(0x4000, 2000, WRITE)]);
    far.send(&ethernet(group, &[8, 0])).unwrap();
    rx.receive(&wire, 10);
    assert_eq!(driver.take_used(), [(1, 72)]);
}

#[test]
fn rx_header_carries_only_what_the_driver_has_negotiated() {
    let (wire, far) = Wire::new();
    let mut driver = Driver::new();
    let filter = filter();
    let mut rx = RxQueue::new(driver.queue(false), MERGEABLE, Arc::clone(&filter));
    for head in (0..SIZE).step_by(2) {
        driver.offer_chain(head, &[(0x4000, 1, WRITE), (0x4001, 200, WRITE)]);
    }
    let taken = |driver: &mut Driver| {
        let taken = driver.take_used().len() == 1;
        taken.then(|| driver.read(0x4000, 2))
    };
    let (plain, csum) = (Features::empty(), Features::GUEST_CSUM);
    let tso = csum | Features::GUEST_TSO4;
    for (features, header, wanted) in [
        (plain, [0, 0], Some(vec![0, 0])),
        (plain, [2, 0], Some(vec![0, 0])),
        (plain, [1, 0], None),
        (plain, [1, 1], None),
        (csum, [3, 0], Some(vec![3, 0])),
        (csum, [1, 1], None),
        (tso, [1, 1], Some(vec![1, 1])),
        (tso, [5, 1], Some(vec![1, 1])),
    ] {
        filter.change(|rules| *rules = Rules::new(features));
        let mut sent = ethernet(MAC, &[8, 0]);
        sent[..2].copy_from_slice(&header);
        far.send(&sent).unwrap();
        rx.receive(&wire, 10);
        assert_eq!(taken(&mut driver), wanted, "{features:?} {header:?}");
    }
    assert_eq!(rx.counters.filtered, 3);
}

const ONE_AT_ONCE: RateLimit = RateLimit {
    bits: None,
    frames: Some(20),
    burst: Duration::from_millis(1),
};

#[test]
fn limited_queues_hold_frames_back_and_let_them_pass_later() {
    let options = NetOptions {
        rx_limit: Some(ONE_AT_ONCE),
        tx_limit: Some(ONE_AT_ONCE),
        ..options()
    };
    let mut running = Running::with(Features::empty(), options);
    let start = Instant::now();
    for head in 0..4 {
        running.tx.offer_chain(head, &[(0x4000, 77, 0)]);
        running.rx.offer_chain(head, &[(0x4000, 2000, WRITE)]);
        running.far.send(&frame(99)).unwrap();
    }
    running.kicks[0].write(1).unwrap();
    running.kicks[1].write(1).unwrap();
    let (mut sent, mut received) = (0, 0);
    eventually("all frames both ways", || {
        sent += usize::from(running.far.recv(&mut [0; 100]).is_ok());
        received += running.rx.take_used().len();
        (sent, received) == (4, 4)
    });
    // One at once, then one each 50 ms.
    assert!(
        start.elapsed() >= Duration::from_millis(140),
        "{:?}",
        start.elapsed()
    );
    let handle = running.device.handle();
    running.device.reset();
    let counters = handle.pairs()[0];
    assert!(
        counters.rx.limited >= 3 && counters.tx.limited >= 3,
        "{counters}"
    );
    assert!(counters.wakeups < 60, "it must not spin: {counters}");
}

#[test]
fn tx_held_back_takes_nothing_from_the_ring() {
    let (wire, _far) = Wire::new();
    let mut driver = Driver::new();
    let hooks = Hooks {
        limiter: Some(Arc::new(Limiter::new(ONE_AT_ONCE))),
        capture: None,
    };
    let mut tx = TxQueue::new(driver.queue(false), observer());
    tx.hooks = hooks;
    for head in 0..2 {
        driver.offer_chain(head, &[(0x4000, 60, 0)]);
    }
    assert!(matches!(tx.send(&wire, 10).0, Stop::Limited(_)));
    assert_eq!(driver.take_used(), [(0, 0)]);
}

#[test]
fn capture_has_what_passed_both_ways() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let capture = Capture::start(file.reopen().unwrap(), "net0").unwrap();
    let options = NetOptions {
        capture: Some(capture),
        ..options()
    };
    let mut running = Running::with(Features::empty(), options);
    running.rx.offer_chain(0, &[(0x4000, 2000, WRITE)]);
    running.kicks[0].write(1).unwrap();
    running.far.send(&frame(99)).unwrap();
    eventually("a frame for the guest", || {
        !running.rx.take_used().is_empty()
    });
    running.tx.offer_chain(0, &[(0x4000, 77, 0)]);
    running.tx.write(0x4000, &frame(77));
    running.kicks[1].write(1).unwrap();
    eventually("a frame from the guest", || {
        running.far.recv(&mut [0; 100]).is_ok()
    });
    drop(running);
    let bytes = std::fs::read(file.path()).unwrap();
    for len in [99, 77] {
        let wanted = &frame(len)[HEADER_LEN..];
        assert!(
            bytes.windows(wanted.len()).any(|window| window == wanted),
            "{len}"
        );
    }
}

#[test]
fn counters_go_on_over_a_reset() {
    let mut running = Running::start(Features::empty());
    let handle = running.device.handle();
    for round in 1..3 {
        running.tx.offer_chain(0, &[(0x4000, 77, 0)]);
        running.kicks[1].write(1).unwrap();
        eventually("a frame from the guest", || {
            running.far.recv(&mut [0; 100]).is_ok()
        });
        running.device.reset();
        let counters = handle.pairs()[0];
        assert_eq!((counters.tx.frames, counters.tx.bytes), (round, 77 * round));
        assert!(counters.tx_kicks >= 1 && counters.wakeups >= round);
        if round == 1 {
            running.restart(Features::empty());
        }
    }
}
