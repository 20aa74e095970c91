//! A worker that can do nothing sleeps, whatever waits for it: measured as the CPU time of its thread.

use std::thread::JoinHandle;

use super::*;
use crate::virtio::net::counters::{self, SharedCounters};
use crate::virtio::net::hooks::Hooks;
use crate::virtio::net::rate::{Limiter, RateLimit};
use crate::virtio::net::worker::{Wakeups, Worker};

/// How long a worker is watched. One that spins uses nearly all of it.
const WATCHED: Duration = Duration::from_millis(400);
const IDLE: Duration = Duration::from_millis(100);

/// The CPU time of the calling thread.
fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the clock's reading goes into a timespec of our own.
    let got = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(got, 0, "{}", io::Error::last_os_error());
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// A worker on a thread of ours, with the driver's side of its queues and the far end of its wire.
struct Watched {
    far: UnixDatagram,
    /// Frames that it took.
    sent: u64,
    rx: Driver,
    kicks: [Arc<EventFd>; 2],
    stop: EventFd,
    counters: SharedCounters,
    /// Returns the CPU time that it took.
    thread: JoinHandle<Duration>,
}

impl Watched {
    /// `prepare` gets the wire and the queues' drivers before the worker starts; `limit` holds what is received.
    fn start(limit: Option<RateLimit>, prepare: impl FnOnce(&Wire, [&mut Driver; 2])) -> Self {
        let (wire, far) = Wire::new();
        let (mut rx, mut tx) = (Driver::new(), Driver::new());
        prepare(&wire, [&mut rx, &mut tx]);
        let rings = [rx.ring(false), tx.ring(false)];
        let (kicks, stop) = ([kick(), kick()], EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let wakeups = Wakeups {
            rx_kick: Arc::clone(&kicks[0]),
            tx_kick: Arc::clone(&kicks[1]),
            stop: stop.try_clone().unwrap(),
        };
        let counters = SharedCounters::default();
        let published = Arc::clone(&counters);
        let thread = thread::spawn(move || {
            // The driver's side of the sending queue lives as long as the worker.
            let _tx = tx;
            let hooks = Hooks {
                limiter: limit.map(|limit| Arc::new(Limiter::new(limit))),
                capture: None,
            };
            let [rx, tx] = rings;
            let queues = (
                RxQueue::new(rx, SINGLE).with_hooks(hooks),
                TxQueue::new(tx, observer()),
            );
            let recorder = Arc::new(Recorder::default());
            let worker = Worker::new(Arc::new(wire), queues, wakeups, recorder, 0, published);
            worker.unwrap().run().unwrap();
            cpu_time()
        });
        Self {
            far,
            sent: 0,
            rx,
            kicks,
            stop,
            counters,
            thread,
        }
    }

    /// Sends frames until the wire is full.
    fn flood(&mut self) {
        while self.far.send(&frame(99)).is_ok() {
            self.sent += 1;
        }
    }

    /// Fills the wire, waits, and asserts that the worker slept but for the arrival of each frame.
    #[track_caller]
    fn assert_idle(mut self) {
        self.flood();
        thread::sleep(WATCHED);
        self.stop.write(1).unwrap();
        let used = self.thread.join().unwrap();
        let counters = counters::read(&self.counters);
        assert!(used < IDLE, "{used:?} of {WATCHED:?}, {counters}");
        let sent = self.sent;
        assert!(counters.wakeups < sent + 50, "{sent} sent, {counters}");
    }
}

#[test]
fn worker_without_receive_buffers_sleeps_though_frames_wait() {
    Watched::start(None, |_, _| {}).assert_idle();
}

#[test]
fn worker_whose_buffers_ran_out_sleeps_until_there_are_more() {
    let offer = |_: &Wire, [rx, _]: [&mut Driver; 2]| {
        rx.offer_chain(0, &[(0x4000, 2000, WRITE)]);
    };
    let mut watched = Watched::start(None, offer);
    watched.flood();
    eventually("the first frame", || watched.rx.take_used() == [(0, 99)]);
    // Asleep, it still hears the driver.
    thread::sleep(Duration::from_millis(50));
    watched.rx.offer_chain(1, &[(0x4000, 2000, WRITE)]);
    watched.kicks[0].write(1).unwrap();
    eventually("the second frame", || watched.rx.take_used() == [(1, 99)]);
    watched.assert_idle();
}

#[test]
fn worker_held_by_a_rate_limit_sleeps_though_frames_wait() {
    let limit = RateLimit {
        bits: None,
        frames: Some(1),
        burst: Duration::from_millis(1),
    };
    let offer = |_: &Wire, [rx, _]: [&mut Driver; 2]| {
        for head in 0..4 {
            rx.offer_chain(head, &[(0x4000, 2000, WRITE)]);
        }
    };
    Watched::start(Some(limit), offer).assert_idle();
}

#[test]
fn worker_whose_wire_is_full_sleeps_with_the_frame() {
    let offer = |wire: &Wire, [_, tx]: [&mut Driver; 2]| {
        wire.refuse.store(libc::EAGAIN as u32, Ordering::SeqCst);
        tx.offer_chain(0, &[(0x4000, 77, 0)]);
    };
    Watched::start(None, offer).assert_idle();
}

#[test]
fn worker_with_a_broken_ring_sleeps() {
    let offer = |_: &Wire, [rx, _]: [&mut Driver; 2]| {
        rx.set_available(SIZE + 1);
    };
    Watched::start(None, offer).assert_idle();
}
