//! A pair without its thread: what it waits for after each turn.

use vmm_sys_util::epoll::EventSet;

use super::*;
use crate::virtio::net::counters::SharedCounters;
use crate::virtio::net::pair::Pair;
use crate::virtio::worker::Job;

const BACKEND: u32 = 0;
const RX_KICK: u32 = 1;

struct Bench {
    pair: Pair<Wire>,
    far: UnixDatagram,
    rx: Driver,
    _tx: Driver,
}

impl Bench {
    fn new() -> Self {
        let (wire, far) = Wire::new();
        let (rx, tx) = (Driver::new(), Driver::new());
        let queues = (
            RxQueue::new(rx.queue(true), SINGLE, filter()),
            TxQueue::new(tx.queue(true), observer()),
        );
        let (kicks, recorder) = ([kick(), kick()], Arc::new(Recorder::default()));
        let counters = SharedCounters::default();
        let pair = Pair::new(Arc::new(wire), queues, kicks, recorder, 0, counters);
        Self {
            pair,
            far,
            rx,
            _tx: tx,
        }
    }

    /// The backend's events that are waited for.
    fn events(&self) -> EventSet {
        self.pair.varying().unwrap().2
    }

    fn offer(&mut self, head: u16) {
        self.rx.offer_chain(head, &[(0x4000, 2000, WRITE)]);
    }
}

#[test]
fn pair_with_buffers_waits_for_frames_alone() {
    let mut bench = Bench::new();
    bench.offer(0);
    let turn = bench.pair.turn();
    assert_eq!((turn.more, turn.wake_at), (false, None));
    assert_eq!(bench.events(), EventSet::IN);
}

#[test]
fn pair_without_buffers_waits_for_none_of_the_backends_events() {
    let mut bench = Bench::new();
    let turn = bench.pair.turn();
    assert_eq!((turn.more, turn.wake_at), (false, None));
    assert_eq!(bench.events(), EventSet::empty());
}

#[test]
fn pair_whose_buffers_ran_out_looks_by_the_clock_until_it_is_notified() {
    let mut bench = Bench::new();
    bench.offer(0);
    for _ in 0..2 {
        bench.far.send(&frame(99)).unwrap();
    }
    let turn = bench.pair.turn();
    assert!(!turn.more && turn.wake_at.is_some(), "{turn:?}");
    assert_eq!(bench.events(), EventSet::empty());
    // A frame more changes nothing, buffers do.
    bench.pair.wake(BACKEND, EventSet::IN);
    bench.offer(1);
    bench.pair.turn();
    assert_eq!(bench.rx.take_used(), [(0, 99)]);
    bench.pair.wake(RX_KICK, EventSet::IN);
    bench.pair.turn();
    assert_eq!(bench.rx.take_used(), [(1, 99)]);
}

#[test]
fn pair_whose_ring_stays_empty_stops_looking_by_the_clock() {
    let mut bench = Bench::new();
    bench.offer(0);
    for _ in 0..2 {
        bench.far.send(&frame(99)).unwrap();
    }
    let until = bench.pair.turn().wake_at.unwrap();
    eventually("the time", || Instant::now() >= until);
    bench.pair.timeout();
    let turn = bench.pair.turn();
    assert_eq!((turn.more, turn.wake_at), (false, None));
}

#[test]
fn pair_whose_backend_has_an_error_for_ever_sleeps() {
    let mut bench = Bench::new();
    bench.offer(0);
    bench.pair.turn();
    bench.pair.wake(BACKEND, EventSet::ERROR);
    bench.pair.turn();
    assert_eq!(bench.events(), EventSet::IN | EventSet::EDGE_TRIGGERED);
}
