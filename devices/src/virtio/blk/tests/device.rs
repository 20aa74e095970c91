//! The device: its configuration space, its threads, pausing and saving it.

use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::events::EventSink;
use crate::virtio::blk::features::Features;
use crate::virtio::blk::{Blk, BlkHandle, BlkOptions, IoChoice};
use crate::virtio::tests::Recorder;
use crate::virtio::{Activation, ActiveQueue, VirtioDevice};

/// A device whose driver is the test.
pub struct Guest {
    pub device: Blk,
    pub handle: Arc<BlkHandle>,
    pub drivers: Vec<Driver>,
    pub kicks: Vec<Arc<EventFd>>,
    features: Features,
    recorder: Arc<Recorder>,
}

pub fn options(queues: u16) -> BlkOptions {
    BlkOptions {
        label: "disk0".into(),
        readonly: false,
        serial: SERIAL,
        queues,
        limit: UNLIMITED,
        io: IoChoice::Auto,
        events: EventSink::default(),
    }
}

impl Guest {
    pub fn new(storage: Storage, options: BlkOptions) -> io::Result<Self> {
        let queues = options.queues;
        let device = Blk::new("disk0".into(), storage, options)?;
        Ok(Self {
            handle: device.handle(),
            features: Features::from_bits_truncate(device.features()) - Features::EVENT_IDX,
            device,
            drivers: (0..queues).map(|_| Driver::new()).collect(),
            kicks: (0..queues)
                .map(|_| Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()))
                .collect(),
            recorder: Arc::default(),
        })
    }

    fn fake(queues: u16) -> (Self, Arc<Fake>) {
        let fake = Fake::new();
        let guest = Self::new(Storage::Image(fake.clone()), options(queues));
        (guest.unwrap(), fake)
    }

    pub fn start(&mut self, positions: Option<&[Option<u16>]>) {
        let queue = |index: usize| {
            let mut queue = self.drivers[index].queue(false);
            if let Some(positions) = positions {
                queue.resume(positions[index]?);
            }
            Some(ActiveQueue {
                queue,
                config: Driver::config(),
                kick: Arc::clone(&self.kicks[index]),
            })
        };
        let activation = Activation {
            memory: Arc::clone(&self.drivers[0].memory),
            features: self.features.bits(),
            queues: (0..self.drivers.len()).map(queue).collect(),
            resumed: positions.is_some(),
            interrupt: self.recorder.clone(),
        };
        self.device.activate(activation).unwrap();
    }

    /// Makes a read of one sector available in this queue.
    fn offer(&mut self, queue: usize, sector: u64) {
        let driver = &mut self.drivers[queue];
        driver.write(HEADER, &header(IN, sector));
        driver.write(STATUS, &[0xff]);
        let buffers = [(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
        driver.offer_chain(0, &buffers);
        self.kicks[queue].write(1).unwrap();
    }

    /// Notifies the first queue, and waits until so many chains are used since the last call.
    pub fn finish(&mut self, count: u16) {
        self.kicks[0].write(1).unwrap();
        let (driver, mut left) = (&mut self.drivers[0], usize::from(count));
        eventually("used chains", || {
            left -= driver.take_used().len();
            left == 0
        });
    }

    /// Waits until one has been used there.
    fn wait(&mut self, queue: usize) {
        let driver = &mut self.drivers[queue];
        eventually("a used chain", || driver.take_used() == [(0, 513)]);
        assert_eq!(driver.read(STATUS, 1), [OK]);
    }

    fn config<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut data = [0; N];
        self.device.read_config(offset, &mut data);
        data
    }
}

pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn config_space_tells_what_the_disk_is() {
    let (guest, _fake) = Guest::fake(3);
    assert_eq!(guest.config(0), (SIZE / SECTOR).to_le_bytes());
    assert_eq!(guest.config(8), (1_u32 << 18).to_le_bytes());
    assert_eq!(guest.config(12), 254_u32.to_le_bytes());
    assert_eq!(guest.config(20), 512_u32.to_le_bytes());
    assert_eq!(guest.config(24), [3, 0, 8, 0, 0, 0, 0, 0]);
    assert_eq!(guest.config(32), [1, 0, 3, 0]);
    assert_eq!(guest.config(36), (1_u32 << 21).to_le_bytes());
    assert_eq!(guest.config(40), 16_u32.to_le_bytes());
    assert_eq!(guest.config(44), 8_u32.to_le_bytes());
    assert_eq!(guest.config(48), (1_u32 << 18).to_le_bytes());
    assert_eq!(guest.config(52), 1_u32.to_le_bytes());
    assert_eq!(guest.config(56), [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.config(usize::MAX), [0; 4]);
}

#[test]
fn queues_are_served_by_their_own_threads() {
    let (mut guest, _fake) = Guest::fake(2);
    guest.start(None);
    for queue in [1, 0, 1] {
        guest.offer(queue, 2);
        guest.wait(queue);
        assert_eq!(guest.drivers[queue].read(DATA, 512), bytes(1536)[1024..]);
    }
    eventually("interrupts", || {
        guest.recorder.interrupts.load(Ordering::SeqCst) == 3
    });
    guest.device.reset();
    assert_eq!(guest.handle.counters().reads, 3);
}

#[test]
fn invalid_index_asks_for_a_reset_and_the_next_driver_is_served() {
    let (mut guest, _fake) = Guest::fake(1);
    guest.start(None);
    guest.drivers[0].set_available(100);
    guest.kicks[0].write(1).unwrap();
    eventually("a wish for a reset", || {
        guest.recorder.needs_reset.load(Ordering::SeqCst)
    });
    guest.device.reset();
    guest.drivers[0] = Driver::new();
    guest.start(None);
    guest.offer(0, 0);
    guest.wait(0);
}

#[test]
fn driver_switches_the_write_cache() {
    let (mut guest, fake) = Guest::fake(1);
    guest.start(None);
    guest.device.write_config(32, &[0]);
    assert_eq!(guest.config(32), [0]);
    // What was written before is not flushed by the driver any more.
    assert_eq!(fake.calls(), ["flush"]);
    for (offset, data) in [
        (31, &[1][..]),
        (32, &[2]),
        (32, &[1, 0]),
        (33, &[1]),
        (0, &[1]),
    ] {
        guest.device.write_config(offset, data);
        assert_eq!(guest.config(32), [0], "{offset} {data:?}");
    }
    guest.device.write_config(32, &[1]);
    assert_eq!(guest.config(32), [1]);
    guest.device.write_config(32, &[0]);
    guest.device.reset();
    assert_eq!(guest.config(32), [1], "as a fresh device");
    guest.features -= Features::CONFIG_WCE;
    guest.start(None);
    guest.device.write_config(32, &[0]);
    assert_eq!(guest.config(32), [1], "it was not agreed on");
}

#[test]
fn disk_that_grows_tells_its_driver_once() {
    let (mut guest, fake) = Guest::fake(1);
    let changes = |guest: &Guest| guest.recorder.config_changes.load(Ordering::SeqCst);
    guest.start(None);
    guest.handle.grow(2 * SIZE).unwrap();
    guest.handle.grow(2 * SIZE).unwrap();
    assert_eq!(guest.config(0), (2 * SIZE / SECTOR).to_le_bytes());
    assert_eq!((changes(&guest), guest.device.config_generation()), (1, 1));
    fake.errno.store(libc::ENOSPC, Ordering::SeqCst);
    assert!(guest.handle.grow(3 * SIZE).is_err());
    assert_eq!(guest.handle.size(), 2 * SIZE);
    fake.errno.store(0, Ordering::SeqCst);
    let positions = guest.device.pause();
    guest.handle.grow(4 * SIZE).unwrap();
    assert_eq!(changes(&guest), 1, "it is paused");
    guest.start(Some(&positions));
    assert_eq!((changes(&guest), guest.device.config_generation()), (2, 2));
}

#[test]
fn pause_loses_nothing_and_does_nothing_twice() {
    let (mut guest, fake) = Guest::fake(1);
    guest.start(None);
    let mut positions = guest.device.pause();
    for sector in 0..50 {
        guest.offer(0, sector);
        guest.start(Some(&positions));
        if sector % 3 == 0 {
            guest.wait(0);
            positions = guest.device.pause();
        } else {
            positions = guest.device.pause();
            guest.start(Some(&positions));
            guest.wait(0);
            positions = guest.device.pause();
        }
    }
    let expected: Vec<_> = (0..50).map(|n| format!("read {} 512", n * 512)).collect();
    assert_eq!(fake.calls(), expected);
}

#[test]
fn device_that_was_saved_goes_on_elsewhere() {
    let (mut guest, fake) = Guest::fake(1);
    guest.start(None);
    guest.device.write_config(32, &[0]);
    guest.handle.grow(2 * SIZE).unwrap();
    guest.offer(0, 5);
    guest.wait(0);
    let positions = guest.device.pause();
    let state = guest.device.save().unwrap();
    let mut new = Guest::new(Storage::Image(fake.clone()), options(1)).unwrap();
    new.device.restore(state.clone()).unwrap();
    assert_eq!(new.device.save().unwrap(), state);
    new.drivers = std::mem::take(&mut guest.drivers);
    fake.calls();
    new.start(Some(&positions));
    assert_eq!(new.config(32), [0]);
    assert_eq!(new.device.config_generation(), 1);
    assert_eq!(new.recorder.config_changes.load(Ordering::SeqCst), 1);
    let driver = &mut new.drivers[0];
    driver.write(HEADER, &header(OUT, 0));
    driver.offer_chain(0, &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)]);
    new.kicks[0].write(1).unwrap();
    let driver = &mut new.drivers[0];
    eventually("a used chain", || driver.take_used() == [(0, 1)]);
    assert_eq!(fake.calls(), ["write 0 512", "flush"]);
    assert!(new.device.restore(serde_json::json!({})).is_err());
}

#[test]
fn reset_comes_while_requests_wait_for_their_rate() {
    let limit = RateLimit {
        bits: Some(8),
        ..UNLIMITED
    };
    let storage = Storage::Image(Fake::new());
    let mut guest = Guest::new(
        storage,
        BlkOptions {
            limit,
            ..options(1)
        },
    )
    .unwrap();
    guest.start(None);
    for sector in 0..3 {
        guest.offer(0, sector);
    }
    eventually("one request", || guest.drivers[0].used_index() == 1);
    let positions = guest.device.pause();
    assert_eq!(positions, [Some(1)]);
    guest.start(Some(&positions));
    guest.device.reset();
}
