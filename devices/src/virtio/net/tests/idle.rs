//! A worker that can do nothing sleeps, whatever waits for it: measured as the CPU time of its thread.

use vmm_sys_util::epoll::EventSet;

use super::*;
use crate::virtio::net::counters::{self, SharedCounters};
use crate::virtio::net::hooks::Hooks;
use crate::virtio::net::pair::Pair;
use crate::virtio::rate::{Limiter, RateLimit};
use crate::virtio::worker::{Job, Turn, Worker};

/// How long a worker is watched. One that spins uses nearly all of it.
const WATCHED: Duration = Duration::from_millis(400);
const IDLE: Duration = Duration::from_millis(100);

/// A pair that notes the CPU time of its thread at the end of each turn.
struct Timed {
    pair: Pair<Wire>,
    used: Arc<Mutex<Duration>>,
}

impl Job for Timed {
    fn wakeups(&self) -> Vec<(RawFd, u32, EventSet)> {
        self.pair.wakeups()
    }

    fn wake(&mut self, token: u32, events: EventSet) {
        self.pair.wake(token, events);
    }

    fn timeout(&mut self) {
        self.pair.timeout();
    }

    fn turn(&mut self) -> Turn {
        let turn = self.pair.turn();
        *self.used.lock().unwrap() = cpu_time();
        turn
    }
}

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

/// A worker, with the driver's side of its queues and the far end of its wire.
struct Watched {
    far: UnixDatagram,
    /// Frames that it took.
    sent: u64,
    rx: Driver,
    _tx: Driver,
    kicks: [Arc<EventFd>; 2],
    counters: SharedCounters,
    used: Arc<Mutex<Duration>>,
    worker: Worker<Timed>,
}

impl Watched {
    /// `prepare` gets the wire and the queues' drivers before the worker starts; `limit` holds what
    /// is received.
    fn start(limit: Option<RateLimit>, prepare: impl FnOnce(&Wire, [&mut Driver; 2])) -> Self {
        let (wire, far) = Wire::new();
        let (mut rx, mut tx) = (Driver::new(), Driver::new());
        prepare(&wire, [&mut rx, &mut tx]);
        let hooks = Hooks {
            limiter: limit.map(|limit| Arc::new(Limiter::new(limit))),
            capture: None,
        };
        let mut queues = (
            RxQueue::new(rx.queue(false), SINGLE, filter()),
            TxQueue::new(tx.queue(false), observer()),
        );
        queues.0.hooks = hooks;
        let (kicks, recorder) = ([kick(), kick()], Arc::new(Recorder::default()));
        let (counters, used) = (SharedCounters::default(), Arc::default());
        let pair = Pair::new(
            Arc::new(wire),
            queues,
            kicks.clone(),
            recorder.clone(),
            0,
            Arc::clone(&counters),
        );
        let job = Timed {
            pair,
            used: Arc::clone(&used),
        };
        let mut worker = Worker::new("net0".into()).unwrap();
        worker.start(job, recorder).unwrap();
        Self {
            far,
            sent: 0,
            rx,
            _tx: tx,
            kicks,
            counters,
            used,
            worker,
        }
    }

    /// Sends frames until the wire is full.
    fn flood(&mut self) {
        let full = loop {
            match self.far.send(&frame(99)) {
                Ok(_) => self.sent += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock, "{full}");
        assert!(self.sent > 0, "the wire was full already");
    }

    /// Waits until the worker has put a frame into this chain.
    #[track_caller]
    fn receive(&mut self, head: u16) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let used = self.rx.take_used();
            if used == [(head, 99)] {
                return;
            }
            let counters = counters::read(&self.counters);
            assert!(used.is_empty(), "{used:?}, {counters}");
            let sent = self.sent;
            assert!(Instant::now() < deadline, "{sent} sent, {counters}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Fills the wire, waits, and asserts that the worker slept but for the arrival of each frame.
    #[track_caller]
    fn assert_idle(mut self) {
        self.flood();
        thread::sleep(WATCHED);
        self.worker.stop();
        self.worker.join().unwrap();
        let used = *self.used.lock().unwrap();
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
    watched.receive(0);
    // Asleep, it still hears the driver.
    thread::sleep(Duration::from_millis(50));
    watched.rx.offer_chain(1, &[(0x4000, 2000, WRITE)]);
    watched.kicks[0].write(1).unwrap();
    watched.receive(1);
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
