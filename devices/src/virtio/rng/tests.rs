use std::sync::atomic::Ordering;
use std::thread;

use super::*;
use crate::virtio::tests::{Buffer, Driver, Recorder, SIZE, WRITE};

/// Where requests' buffers lie.
const AT: u64 = 0x1_0000;

/// A driver, the thread's job without the thread, and what the device says.
struct Guest {
    driver: Driver,
    job: RngJob,
    recorder: Arc<Recorder>,
}

impl Guest {
    fn new(limit: RateLimit) -> Self {
        let (driver, recorder) = (Driver::new(), Arc::new(Recorder::default()));
        let limiter = Arc::new(Limiter::new(limit));
        let job = RngJob::new(queue(&driver), limiter, recorder.clone());
        Self {
            driver,
            job,
            recorder,
        }
    }

    /// The bytes of requests that one turn answers.
    fn request(&mut self, buffers: &[Buffer]) -> Vec<(u16, u32)> {
        self.driver.offer_chain(0, buffers);
        self.job.state = State::Ready;
        self.job.turn();
        self.driver.take_used()
    }
}

fn queue(driver: &Driver) -> ActiveQueue {
    ActiveQueue {
        queue: driver.queue(false),
        config: Driver::config(),
        kick: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
    }
}

const UNLIMITED: RateLimit = RateLimit {
    bits: None,
    frames: None,
    burst: Duration::ZERO,
};
/// One request passes, and then none for minutes.
const ONE_REQUEST: RateLimit = RateLimit {
    bits: Some(1),
    ..UNLIMITED
};

#[test]
fn request_is_filled_with_other_bytes_each_time() {
    let mut guest = Guest::new(LIMIT);
    let mut before = vec![0; 64];
    for round in 1..=3 {
        assert_eq!(guest.request(&[(AT, 64, WRITE)]), [(0, 64)]);
        let bytes = guest.driver.read(AT, 64);
        assert_ne!(bytes, before);
        assert_eq!(guest.recorder.interrupts.load(Ordering::SeqCst), round);
        assert_eq!(guest.job.state, State::Idle);
        before = bytes;
    }
    assert_eq!(guest.driver.read(AT + 64, 64), [0; 64]);
}

#[test]
fn request_of_many_bytes_or_pieces_gets_a_part() {
    let mut guest = Guest::new(UNLIMITED);
    let request = [(AT, 60 << 10, WRITE), (AT + (60 << 10), 60 << 10, WRITE)];
    assert_eq!(guest.request(&request), [(0, MAX_REQUEST as u32)]);
    assert_eq!(guest.driver.read(AT + MAX_REQUEST as u64, 16), [0; 16]);

    let table: Vec<Buffer> = (0..MAX_PIECES as u64)
        .map(|n| (AT + 8 * n, 8, WRITE))
        .collect();
    assert_eq!(guest.request(&table), [(0, 8 * MAX_PIECES as u32)]);
}

#[test]
fn request_without_room_gets_nothing_and_a_bad_one_is_given_back() {
    let mut guest = Guest::new(UNLIMITED);
    guest.driver.write(AT, b"as it was");
    assert_eq!(guest.request(&[(AT, 9, 0)]), [(0, 0)]);
    assert_eq!(guest.driver.read(AT, 9), b"as it was");
    assert_eq!(guest.request(&[(1 << 40, 9, WRITE)]), [(0, 0)]);
    assert_eq!(guest.request(&[(AT, 9, WRITE)]), [(0, 9)]);
}

#[test]
fn driver_that_asks_for_more_waits_and_its_notifications_wake_nobody() {
    let mut guest = Guest::new(ONE_REQUEST);
    for head in 0..4 {
        guest.driver.offer_chain(head, &[(AT, 64, WRITE)]);
    }
    let before = Instant::now();
    let turn = guest.job.turn();
    assert_eq!(guest.driver.take_used(), [(0, 64)]);
    assert!(!turn.more && turn.wake_at >= Some(before + MIN_WAIT));
    let (_, _, events) = guest.job.varying().unwrap();
    assert_eq!(events, EventSet::empty());
    // One that was there before counts no more than that.
    guest.job.kick.write(1).unwrap();
    guest.job.wake(KICK, EventSet::IN);
    assert_eq!(guest.job.turn().wake_at, turn.wake_at);
    assert_eq!(guest.driver.take_used(), []);
    guest.job.timeout();
    assert_eq!(guest.job.state, State::Ready);
}

#[test]
fn request_that_gets_nothing_has_its_share_too() {
    let limit = RateLimit {
        frames: Some(1),
        burst: Duration::from_secs(3600),
        ..UNLIMITED
    };
    for buffer in [(1 << 40, 64, WRITE), (AT, 64, 0)] {
        let mut guest = Guest::new(limit);
        guest.request(&[buffer]);
        let level = serde_json::to_value(guest.job.limiter.save()).unwrap();
        assert!(level["frames"].as_i64() < Some(3600), "{level}");
    }
}

#[test]
fn invalid_avail_index_asks_for_a_reset() {
    let mut guest = Guest::new(LIMIT);
    guest.driver.set_available(SIZE + 1);
    assert_eq!(guest.job.turn(), Turn::default());
    assert!(guest.recorder.needs_reset.load(Ordering::SeqCst));
    assert_eq!(guest.job.state, State::Broken);
}

/// Starts the device for the driver, where its queue stands.
fn activate(device: &mut Rng, driver: &Driver, position: Option<u16>) -> Arc<EventFd> {
    let mut queue = queue(driver);
    if let Some(position) = position {
        queue.queue.resume(position);
    }
    let kick = Arc::clone(&queue.kick);
    let activation = Activation {
        memory: Arc::clone(&driver.memory),
        features: 0,
        queues: vec![Some(queue)],
        resumed: position.is_some(),
        interrupt: Arc::new(Recorder::default()),
    };
    device.activate(activation).unwrap();
    kick
}

fn eventually_used(driver: &mut Driver, head: u16) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let used = driver.take_used();
        if !used.is_empty() {
            return assert_eq!(used, [(head, 64)]);
        }
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn requests_of_a_paused_guest_are_answered_after_it_here_or_elsewhere() {
    let (mut device, mut driver) = (
        Rng::new("rng", EventSink::default()).unwrap(),
        Driver::new(),
    );
    driver.offer_chain(0, &[(AT, 64, WRITE)]);
    let kick = activate(&mut device, &driver, None);
    eventually_used(&mut driver, 0);
    driver.offer_chain(1, &[(AT, 64, WRITE)]);
    kick.write(1).unwrap();
    eventually_used(&mut driver, 1);
    let mut position = device.pause();
    assert_eq!(position, [Some(2)]);
    for head in 2..4 {
        driver.offer_chain(head, &[(AT, 64, WRITE)]);
        assert_eq!(driver.take_used(), []);
        let mut other = Rng::new("rng", EventSink::default()).unwrap();
        other.restore(device.save().unwrap()).unwrap();
        device = other;
        activate(&mut device, &driver, position[0]);
        eventually_used(&mut driver, head);
        position = device.pause();
    }
    assert_eq!((position, device.pause()), (vec![Some(4)], vec![None]));
}

#[test]
fn driver_gets_no_new_share_by_a_reset() {
    let mut device = Rng::new("rng", EventSink::default()).unwrap();
    device.limiter = Arc::new(Limiter::new(ONE_REQUEST));
    for expected in [Some(64), None] {
        let mut driver = Driver::new();
        driver.offer_chain(0, &[(AT, 64, WRITE)]);
        activate(&mut device, &driver, None);
        if expected.is_some() {
            eventually_used(&mut driver, 0);
        }
        device.reset();
        assert_eq!(driver.take_used(), []);
    }
    let saved = device.save().unwrap();
    let mut other = Rng::new("rng", EventSink::default()).unwrap();
    other.limiter = Arc::new(Limiter::new(ONE_REQUEST));
    other.restore(saved).unwrap();
    assert!(other.limiter.admit(Instant::now()).is_err());
}

#[test]
fn driver_without_a_queue_is_refused() {
    let mut device = Rng::new("rng", EventSink::default()).unwrap();
    let activation = Activation {
        memory: Driver::new().memory,
        features: 0,
        queues: vec![None],
        resumed: false,
        interrupt: Arc::new(Recorder::default()),
    };
    assert!(device.activate(activation).is_err());
}
