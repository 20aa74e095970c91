//! Chains that are no requests.

use super::*;
use crate::virtio::tests::{END, SIZE as QUEUE};

#[test]
fn chain_without_room_for_a_status_does_nothing_and_comes_back_empty() {
    let (mut bench, fake) = Bench::fake();
    bench.driver.write(HEADER, &header(OUT, 0));
    for buffers in [
        vec![(HEADER, 16, 0)],
        vec![(HEADER, 16, 0), (DATA, 512, 0)],
        vec![(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 0, WRITE)],
        vec![(HEADER, 5, 0)],
    ] {
        assert_eq!(bench.offer(&buffers), 0, "{buffers:?}");
    }
    assert_eq!(fake.calls(), [""; 0]);
    assert_eq!(bench.counters().bad_chains, 4);
}

#[test]
fn chain_without_a_whole_header_is_an_error() {
    let (mut bench, fake) = Bench::fake();
    for buffers in [
        vec![(STATUS, 1, WRITE)],
        vec![(HEADER, 15, 0), (STATUS, 1, WRITE)],
        vec![(HEADER, 0, 0), (STATUS, 1, WRITE)],
    ] {
        bench.driver.write(STATUS, &[0xff]);
        assert_eq!(bench.offer(&buffers), 1);
        assert_eq!(bench.driver.read(STATUS, 1), [IOERR], "{buffers:?}");
    }
    assert_eq!(fake.calls(), [""; 0]);
}

#[test]
fn buffers_outside_memory_come_back_empty() {
    let (mut bench, fake) = Bench::fake();
    bench.driver.write(HEADER, &header(IN, 0));
    for buffers in [
        vec![(HEADER, 16, 0), (END, 512, WRITE), (STATUS, 1, WRITE)],
        vec![(HEADER, 16, 0), (END - 256, 512, WRITE), (STATUS, 1, WRITE)],
        vec![(u64::MAX, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)],
        vec![(HEADER, 16, 0), (DATA, u32::MAX, WRITE), (STATUS, 1, WRITE)],
    ] {
        assert_eq!(bench.offer(&buffers), 0, "{buffers:?}");
    }
    assert_eq!(fake.calls(), [""; 0]);
    assert_eq!(bench.counters().bad_chains, 4);
    assert_eq!(bench.request(IN, 0, &[], 512), OK);
}

#[test]
fn queue_stops_at_its_budget_and_at_an_index_that_jumped() {
    let (mut bench, _fake) = Bench::fake();
    bench.driver.write(HEADER, &header(IN, 0));
    let buffers = [(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
    for _ in 0..4 {
        bench.driver.offer_chain(0, &buffers);
    }
    assert_eq!(bench.queue.handle(3), (Stop::Budget, true));
    assert_eq!(bench.driver.take_used().len(), 3);
    assert_eq!(bench.queue.handle(3), (Stop::Idle, true));
    bench.driver.set_available(5 + QUEUE);
    assert_eq!(bench.queue.handle(3), (Stop::Broken, false));
}

#[test]
fn answer_of_the_driver_is_waited_for_no_longer_than_said() {
    let (mut bench, _fake) = Bench::fake();
    assert!(!bench.queue.linger(Duration::from_millis(1)));
    bench.driver.write(HEADER, &header(IN, 0));
    let buffers = [(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
    bench.driver.offer_chain(0, &buffers);
    assert!(bench.queue.linger(Duration::from_secs(3600)));
    // An index that jumped is something to look at too.
    bench.driver.set_available(5 + QUEUE);
    assert!(bench.queue.linger(Duration::from_secs(3600)));
}
