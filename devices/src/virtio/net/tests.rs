//! The data path over a socketpair instead of a tap.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::backend::{Backend, HEADER_LEN};
use super::config::ConfigSpace;
use super::ctrl::Permissions;
use super::features::{Features, Offloads};
use super::filter::{Filter, Rules};
use super::observe::Observer;
use super::pair::Stop;
use super::rx::{RxLayout, RxQueue};
use super::stream::Stream;
use super::tx::TxQueue;
use super::{Net, NetConfig, NetOptions};
use crate::events::tests::record;
use crate::events::{DeviceEvent, EventSink};
use crate::virtio::tests::{Driver, Recorder, SIZE, WRITE};
use crate::virtio::{Activation, ActiveQueue, VirtioDevice};

mod ctrl;
mod idle;
mod offer;
mod options;
mod pacing;
mod pairs;
mod pause;

/// One end of a socketpair; each datagram is a frame.
#[derive(Debug)]
struct Wire {
    socket: UnixDatagram,
    offloads: Mutex<Vec<Offloads>>,
    /// Errno that writing fails with, 0 for none.
    refuse: AtomicU32,
    enabled: AtomicBool,
    /// In how many pieces the last frame could have been read.
    offered: AtomicUsize,
    /// The last address that it was given.
    mac: Mutex<Option<[u8; 6]>>,
}

impl Wire {
    fn new() -> (Self, UnixDatagram) {
        let (socket, far) = UnixDatagram::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        far.set_nonblocking(true).unwrap();
        (
            Self {
                socket,
                offloads: Mutex::default(),
                refuse: AtomicU32::new(0),
                enabled: AtomicBool::new(true),
                offered: AtomicUsize::new(0),
                mac: Mutex::default(),
            },
            far,
        )
    }
}

impl AsRawFd for Wire {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn result(n: isize) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

impl Backend for Wire {
    unsafe fn read_frame(&self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        self.offered.store(iovecs.len(), Ordering::SeqCst);
        // SAFETY: the caller vouches for the iovecs.
        result(unsafe { libc::readv(self.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32) })
    }

    unsafe fn write_frame(&self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        match self.refuse.load(Ordering::SeqCst) {
            // SAFETY: the caller vouches for the iovecs.
            0 => result(unsafe {
                libc::writev(self.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32)
            }),
            errno => Err(io::Error::from_raw_os_error(errno as i32)),
        }
    }

    fn known_offloads(&self) -> Offloads {
        Offloads::all()
    }

    fn set_mac(&self, mac: [u8; 6]) -> io::Result<()> {
        *self.mac.lock().unwrap() = Some(mac);
        Ok(())
    }

    fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        self.enabled.store(enabled, Ordering::SeqCst);
        Ok(())
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.offloads.lock().unwrap().push(offloads);
        Ok(())
    }
}

/// Bytes that tell where they stand, but for the first two, by which nothing is left to the reader.
fn frame(len: usize) -> Vec<u8> {
    (0..len)
        .map(|n| if n < 2 { 0 } else { (n % 251) as u8 })
        .collect()
}

/// The frame as the driver gets it: the bytes 10 and 11 are num_buffers.
fn received(len: usize, buffers: u16) -> Vec<u8> {
    let mut frame = frame(len);
    frame[10..12].copy_from_slice(&buffers.to_le_bytes());
    frame
}

const MAC: [u8; 6] = [2, 3, 4, 5, 6, 7];

fn config() -> Arc<ConfigSpace> {
    let config = NetConfig {
        mac: MAC,
        mtu: 1500,
    };
    Arc::new(ConfigSpace::new(config, 3, EventSink::default()))
}

fn observer() -> Arc<Observer> {
    Arc::new(Observer::new("net0".into(), config()).unwrap())
}

fn filter() -> Arc<Filter> {
    Arc::new(Filter::new(config(), EventSink::default()))
}

fn options() -> NetOptions {
    NetOptions {
        label: "net0".into(),
        permissions: Permissions::default(),
        rx_limit: None,
        tx_limit: None,
        capture: None,
        vhost: Vec::new(),
        events: EventSink::default(),
    }
}

fn device(wires: Vec<Wire>, mtu: u16, options: NetOptions) -> Net<Wire> {
    Net::new("net0".into(), NetConfig { mac: MAC, mtu }, wires, options).unwrap()
}

fn kick() -> Arc<EventFd> {
    Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())
}

fn queue(driver: &Driver, kick: &Arc<EventFd>) -> Option<ActiveQueue> {
    Some(ActiveQueue {
        queue: driver.queue(false),
        config: Driver::config(),
        kick: Arc::clone(kick),
    })
}

const MERGEABLE: RxLayout = RxLayout {
    mergeable: true,
    largest_frame: 2000,
};
const SINGLE: RxLayout = RxLayout {
    mergeable: false,
    largest_frame: 2000,
};

#[test]
fn tx_frame_leaves_as_it_was_laid_out() {
    let (wire, far) = Wire::new();
    let mut driver = Driver::new();
    let mut tx = TxQueue::new(driver.queue(false), observer());
    driver.write(0x4000, &frame(12));
    driver.write(0x5000, &frame(100));
    driver.offer_chain(0, &[(0x4000, 12, 0), (0x5000, 100, 0)]);
    assert_eq!(tx.send(&wire, 10), (Stop::Idle, true));
    let mut buffer = [0; 200];
    assert_eq!(far.recv(&mut buffer).unwrap(), 112);
    assert_eq!(buffer[..112], [frame(12), frame(100)].concat());
    assert_eq!(driver.take_used(), [(0, 0)]);
    assert_eq!((tx.counters.frames, tx.counters.bytes), (1, 112));
}

#[test]
fn tx_bad_chain_and_refused_frame_are_counted_and_the_rest_goes_on() {
    let (wire, far) = Wire::new();
    let mut driver = Driver::new();
    let mut tx = TxQueue::new(driver.queue(false), observer());
    driver.offer_chain(0, &[(0x4000, 60, WRITE)]);
    wire.refuse.store(libc::EINVAL as u32, Ordering::SeqCst);
    driver.offer_chain(1, &[(0x4000, 5, 0)]);
    tx.send(&wire, 10);
    wire.refuse.store(0, Ordering::SeqCst);
    driver.offer_chain(2, &[(0x4000, 60, 0)]);
    assert_eq!(tx.send(&wire, 10).0, Stop::Idle);
    assert_eq!(driver.take_used(), [(0, 0), (1, 0), (2, 0)]);
    let counters = tx.counters;
    assert_eq!(
        (counters.bad_chains, counters.refused, counters.frames),
        (1, 1, 1)
    );
    assert_eq!(far.recv(&mut [0; 100]).unwrap(), 60);
}

#[test]
fn tx_to_a_full_wire_keeps_the_frame_for_later() {
    let (wire, far) = Wire::new();
    let mut driver = Driver::new();
    let mut tx = TxQueue::new(driver.queue(false), observer());
    wire.refuse.store(libc::EAGAIN as u32, Ordering::SeqCst);
    driver.offer_chain(0, &[(0x4000, 60, 0)]);
    assert_eq!(tx.send(&wire, 10), (Stop::Full, false));
    assert_eq!(driver.take_used(), []);
    wire.refuse.store(0, Ordering::SeqCst);
    assert_eq!(tx.send(&wire, 10), (Stop::Idle, true));
    assert_eq!(driver.take_used(), [(0, 0)]);
    assert_eq!(far.recv(&mut [0; 100]).unwrap(), 60);
}

#[test]
fn tx_to_a_full_stream_writes_later_what_was_taken() {
    let (socket, mut far) = UnixStream::pair().unwrap();
    far.set_nonblocking(true).unwrap();
    let stream = Stream::new(socket).unwrap();
    let mut driver = Driver::new();
    let mut tx = TxQueue::new(driver.queue(false), observer());
    let mut frames = 0;
    let full = loop {
        driver.offer_chain(0, &[(0x4000, 60, 0)]);
        frames += 1;
        match tx.send(&stream, 10).0 {
            Stop::Idle => assert_eq!(driver.take_used(), [(0, 0)]),
            stop => break stop,
        }
    };
    assert_eq!(full, Stop::Full);
    let taken = driver.take_used().len();
    let mut bytes = Vec::new();
    let mut last = Stop::Full;
    while last == Stop::Full {
        let _ = far.read_to_end(&mut bytes);
        last = tx.send(&stream, 10).0;
    }
    assert_eq!((last, taken + driver.take_used().len()), (Stop::Idle, 1));
    let _ = far.read_to_end(&mut bytes);
    assert_eq!(bytes.len(), frames * (4 + 60 - HEADER_LEN));
}

#[test]
fn tx_stops_at_its_budget() {
    let (wire, _far) = Wire::new();
    let mut driver = Driver::new();
    let mut tx = TxQueue::new(driver.queue(false), observer());
    for head in 0..4 {
        driver.offer_chain(head, &[(0x4000, 60, 0)]);
    }
    assert_eq!(tx.send(&wire, 3).0, Stop::Budget);
    assert_eq!(driver.take_used().len(), 3);
    assert_eq!(tx.send(&wire, 3).0, Stop::Idle);
}

#[test]
fn broken_ring_is_told() {
    let (wire, _far) = Wire::new();
    let driver = Driver::new();
    driver.set_available(SIZE + 1);
    assert_eq!(
        TxQueue::new(driver.queue(false), observer())
            .send(&wire, 10)
            .0,
        Stop::Broken
    );
    let mut rx = RxQueue::new(driver.queue(false), MERGEABLE, filter());
    assert_eq!(rx.receive(&wire, 10).0, Stop::Broken);
}

#[test]
fn rx_without_buffers_starves_and_leaves_the_frame() {
    let (wire, far) = Wire::new();
    let mut driver = Driver::new();
    let mut rx = RxQueue::new(driver.queue(false), SINGLE, filter());
    far.send(&frame(100)).unwrap();
    assert_eq!(rx.receive(&wire, 10), (Stop::Starved, false));
    driver.offer_chain(0, &[(0x4000, 2000, WRITE)]);
    driver.offer_chain(1, &[(0x6000, 2000, WRITE)]);
    assert_eq!(rx.receive(&wire, 10), (Stop::Idle, true));
    assert_eq!(driver.take_used(), [(0, 100)]);
    assert_eq!(driver.read(0x4000, 100), received(100, 1));
}

#[test]
fn rx_ring_that_ran_empty_is_looked_at_again_before_each_buffer_is_notified_of() {
    let (wire, far) = Wire::new();
    let mut driver = Driver::new();
    let mut rx = RxQueue::new(driver.queue(true), SINGLE, filter());
    for head in 0..2 {
        driver.offer_chain(head, &[(0x4000, 2000, WRITE)]);
        far.send(&frame(100)).unwrap();
    }
    assert_eq!(rx.receive(&wire, 10), (Stop::Empty, true));
    assert_eq!(driver.available_event(), 2 + SIZE / 4 * 3 - 1);
    assert_eq!(rx.receive(&wire, 10), (Stop::Starved, false));
    assert_eq!(driver.available_event(), 2);
    assert_eq!(rx.counters.starved, 1);
}

#[test]
fn rx_frame_over_several_chains_says_how_many() {
    let (wire, far) = Wire::new();
    let mut driver = Driver::new();
    let mut rx = RxQueue::new(driver.queue(false), MERGEABLE, filter());
    for head in 0..10 {
        driver.offer_chain(head, &[(0x4000 + 0x100 * u64::from(head), 256, WRITE)]);
    }
    far.send(&frame(600)).unwrap();
    far.send(&frame(256)).unwrap();
    assert_eq!(rx.receive(&wire, 10), (Stop::Idle, true));
    assert_eq!(driver.take_used(), [(0, 256), (1, 256), (2, 88), (3, 256)]);
    assert_eq!(driver.read(0x4000, 600), received(600, 3));
    assert_eq!(driver.read(0x4300, 256), received(256, 1));
}

#[test]
fn rx_frame_larger_than_what_is_offered_waits_for_the_rest_of_its_buffers() {
    let (wire, far) = Wire::new();
    let mut driver = Driver::new();
    let mut rx = RxQueue::new(driver.queue(false), MERGEABLE, filter());
    driver.offer_chain(0, &[(0x4000, 100, WRITE)]);
    driver.offer_chain(1, &[(0x4064, 100, WRITE)]);
    far.send(&frame(350)).unwrap();
    far.send(&frame(70)).unwrap();
    assert_eq!(rx.receive(&wire, 10), (Stop::Empty, false));
    assert_eq!(
        driver.take_used(),
        [],
        "nothing before the whole frame is there"
    );
    driver.offer_chain(2, &[(0x40c8, 100, WRITE)]);
    assert_eq!(rx.receive(&wire, 10), (Stop::Empty, false));
    driver.offer_chain(3, &[(0x412c, 100, WRITE)]);
    driver.offer_chain(4, &[(0x8000, 100, WRITE)]);
    assert_eq!(rx.receive(&wire, 10), (Stop::Empty, true));
    assert_eq!(
        driver.take_used(),
        [(0, 100), (1, 100), (2, 100), (3, 50), (4, 70)]
    );
    assert_eq!(driver.read(0x4000, 350), received(350, 4));
    assert_eq!(driver.read(0x8000, 70), received(70, 1));
}

#[test]
fn rx_frame_larger_than_the_whole_ring_is_dropped_and_the_rest_goes_on() {
    let (wire, far) = Wire::new();
    let mut driver = Driver::new();
    let mut rx = RxQueue::new(driver.queue(false), MERGEABLE, filter());
    for head in 0..SIZE {
        driver.offer_chain(head, &[(0x4000 + 100 * u64::from(head), 100, WRITE)]);
    }
    far.send(&frame(100 * usize::from(SIZE) + 1)).unwrap();
    far.send(&frame(150)).unwrap();
    assert_eq!(rx.receive(&wire, 10), (Stop::Idle, true));
    assert_eq!(driver.take_used(), [(0, 100), (1, 50)]);
    assert_eq!(driver.read(0x4000, 150), received(150, 2));
    assert_eq!(rx.counters.too_large, 1);
}

#[test]
fn rx_frame_larger_than_its_only_chain_is_dropped_and_not_cut() {
    let (wire, far) = Wire::new();
    let mut driver = Driver::new();
    let mut rx = RxQueue::new(driver.queue(false), SINGLE, filter());
    driver.offer_chain(0, &[(0x4000, 100, WRITE)]);
    driver.offer_chain(1, &[(0x5000, 100, WRITE)]);
    for len in [101, 1900, 100] {
        far.send(&frame(len)).unwrap();
    }
    assert_eq!(rx.receive(&wire, 10), (Stop::Idle, true));
    assert_eq!(driver.take_used(), [(0, 100)]);
    assert_eq!(driver.read(0x4000, 100), received(100, 1));
    assert_eq!(rx.counters.too_large, 2);
}

#[test]
fn rx_frame_larger_than_any_is_dropped_and_not_cut() {
    for (layout, len) in [(MERGEABLE, 2000), (MERGEABLE, 1000), (SINGLE, 2040)] {
        let (wire, far) = Wire::new();
        let mut driver = Driver::new();
        let mut rx = RxQueue::new(driver.queue(false), layout, filter());
        for head in 0..3 {
            driver.offer_chain(head, &[(0x4000 + 0x1000 * u64::from(head), len, WRITE)]);
        }
        far.send(&frame(2001)).unwrap();
        far.send(&frame(2500)).unwrap();
        far.send(&frame(100)).unwrap();
        rx.receive(&wire, 10);
        assert_eq!(driver.take_used(), [(0, 100)], "{layout:?} {len}");
        assert_eq!(driver.read(0x4000, 100), received(100, 1));
        assert_eq!(rx.counters.too_large, 2);
    }
}

#[test]
fn rx_header_split_between_descriptors_is_completed() {
    for split in [1, 10, 11, 12] {
        let (wire, far) = Wire::new();
        let mut driver = Driver::new();
        let mut rx = RxQueue::new(driver.queue(false), SINGLE, filter());
        driver.offer_chain(0, &[(0x4000, split, WRITE), (0x5000, 2000, WRITE)]);
        far.send(&frame(100)).unwrap();
        rx.receive(&wire, 1);
        let split = split as usize;
        let whole = [driver.read(0x4000, split), driver.read(0x5000, 100 - split)].concat();
        assert_eq!(whole, received(100, 1), "{split}");
    }
}

#[test]
fn rx_chain_without_room_for_a_header_is_bad() {
    let (wire, far) = Wire::new();
    let mut driver = Driver::new();
    let mut rx = RxQueue::new(driver.queue(false), SINGLE, filter());
    driver.offer_chain(0, &[(0x4000, HEADER_LEN as u32 - 1, WRITE)]);
    driver.offer_chain(1, &[(0x4000, 500, 0)]);
    driver.offer_chain(2, &[(0x5000, 500, WRITE)]);
    far.send(&frame(60)).unwrap();
    rx.receive(&wire, 10);
    assert_eq!(driver.take_used(), [(0, 0), (1, 0), (2, 60)]);
    assert_eq!(rx.counters.bad_chains, 2);
}

#[test]
fn rx_many_frames_in_and_out_of_order_of_buffers_arrive_whole() {
    let (wire, far) = Wire::new();
    let mut driver = Driver::new();
    let mut rx = RxQueue::new(driver.queue(true), MERGEABLE, filter());
    for head in 0..SIZE {
        driver.offer_chain(head, &[(0x4000 + 0x400 * u64::from(head), 0x400, WRITE)]);
    }
    for n in 0..500 {
        let len = 60 + n * 7 % 1800;
        far.send(&frame(len)).unwrap();
        rx.receive(&wire, 4);
        let used = driver.take_used();
        let total: u32 = used.iter().map(|&(_, len)| len).sum();
        assert_eq!(total as usize, len, "frame {n}");
        let bytes: Vec<u8> = used
            .iter()
            .flat_map(|&(head, len)| driver.read(0x4000 + 0x400 * u64::from(head), len as usize))
            .collect();
        assert_eq!(bytes, received(len, used.len() as u16), "frame {n}");
        for (head, _) in used {
            driver.offer(head);
        }
    }
    assert_eq!(rx.counters.frames, 500);
}

struct Running {
    device: Net<Wire>,
    far: UnixDatagram,
    rx: Driver,
    tx: Driver,
    kicks: [Arc<EventFd>; 2],
    recorder: Arc<Recorder>,
}

impl Running {
    fn start(features: Features) -> Self {
        Self::with(features, options())
    }

    fn with(features: Features, options: NetOptions) -> Self {
        let (wire, far) = Wire::new();
        let mut running = Self {
            device: device(vec![wire], 1500, options),
            far,
            rx: Driver::new(),
            tx: Driver::new(),
            kicks: [(); 2].map(|()| kick()),
            recorder: Arc::default(),
        };
        running.restart(features);
        running
    }

    /// A driver with fresh rings.
    fn restart(&mut self, features: Features) {
        (self.rx, self.tx) = (Driver::new(), Driver::new());
        let activation = Activation {
            memory: Arc::clone(&self.rx.memory),
            features: features.bits(),
            queues: vec![
                queue(&self.rx, &self.kicks[0]),
                queue(&self.tx, &self.kicks[1]),
            ],
            resumed: false,
            interrupt: self.recorder.clone(),
        };
        self.device.activate(activation).unwrap();
    }
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn device_moves_frames_both_ways_until_it_is_reset() {
    let mut running = Running::start(Features::empty());
    running.rx.offer_chain(0, &[(0x4000, 2000, WRITE)]);
    running.kicks[0].write(1).unwrap();
    running.far.send(&frame(99)).unwrap();
    eventually("a frame for the guest", || {
        running.rx.take_used() == [(0, 99)]
    });
    running.tx.offer_chain(0, &[(0x4000, 77, 0)]);
    running.kicks[1].write(1).unwrap();
    eventually("a frame from the guest", || {
        running.far.recv(&mut [0; 100]).is_ok_and(|n| n == 77)
    });
    eventually("interrupts", || {
        running.recorder.interrupts.load(Ordering::SeqCst) >= 2
    });
    running.device.reset();
    running.rx.offer_chain(1, &[(0x4000, 2000, WRITE)]);
    running.kicks[0].write(1).unwrap();
    running.far.send(&frame(99)).unwrap();
    thread::sleep(Duration::from_millis(20));
    assert_eq!(
        running.rx.take_used(),
        [],
        "guest memory is left alone after a reset"
    );
}

#[test]
fn device_with_a_broken_ring_asks_for_a_reset_and_ends_at_it() {
    let mut running = Running::start(Features::empty());
    running.tx.set_available(SIZE + 1);
    running.kicks[1].write(1).unwrap();
    let needs_reset = || running.recorder.needs_reset.load(Ordering::SeqCst);
    eventually("DEVICE_NEEDS_RESET", needs_reset);
    running.device.reset();
}

#[test]
fn device_sets_the_offloads_of_its_driver_and_clears_them_at_reset() {
    let features = Features::GUEST_CSUM | Features::GUEST_TSO4;
    let mut running = Running::start(features);
    running.device.reset();
    running.device.reset();
    let wire = &running.device.backends[0];
    let offloads = wire.offloads.lock().unwrap().clone();
    assert_eq!(
        offloads,
        [Offloads::CSUM | Offloads::TSO4, Offloads::empty()]
    );
}

#[test]
fn driver_that_comes_and_goes_opens_no_descriptor() {
    // Those of the other tests come and go meanwhile: this thread gets a table of its own, and the
    // device's threads share it.
    // SAFETY: CLONE_FILES takes no pointer, and touches no memory.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_FILES) }, 0);
    let open = || std::fs::read_dir("/proc/thread-self/fd").unwrap().count();
    let threads = || {
        std::fs::read_dir("/proc/self/task").unwrap().map(|task| {
            std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default()
        })
    };
    let (wire, _far) = Wire::new();
    let config = NetConfig {
        mac: MAC,
        mtu: 1500,
    };
    let mut device = Net::new("once".into(), config, vec![wire], options()).unwrap();
    let (rx, tx) = (Driver::new(), Driver::new());
    let kicks = [(); 2].map(|()| kick());
    let before = open();
    for _ in 0..10 {
        let activation = Activation {
            memory: Arc::clone(&rx.memory),
            features: 0,
            queues: vec![queue(&rx, &kicks[0]), queue(&tx, &kicks[1])],
            resumed: false,
            interrupt: Arc::new(Recorder::default()),
        };
        device.activate(activation).unwrap();
        assert_eq!(open(), before);
        device.reset();
        assert_eq!(open(), before);
        // A thread names itself.
        eventually("two threads", || {
            threads().filter(|name| name.starts_with("once")).count() == 2
        });
    }
}

#[test]
fn config_space_tells_mac_link_and_mtu() {
    let (wire, _far) = Wire::new();
    let device = device(vec![wire], 9000, options());
    let mut bytes = [0xff; 14];
    device.read_config(0, &mut bytes);
    assert_eq!(bytes, [2, 3, 4, 5, 6, 7, 1, 0, 1, 0, 0x28, 0x23, 0, 0]);
}

#[test]
fn link_change_shows_in_the_config_space_and_interrupts_once() {
    let running = Running::start(Features::empty());
    let status = || {
        let mut bytes = [0; 2];
        running.device.read_config(6, &mut bytes);
        bytes
    };
    let changes = || running.recorder.config_changes.load(Ordering::SeqCst);
    let link = Arc::clone(running.device.config());
    assert_eq!(
        (status(), changes(), running.device.config_generation()),
        ([1, 0], 0, 0)
    );
    for (up, bytes, count) in [(true, 1, 0), (false, 0, 1), (false, 0, 1), (true, 1, 2)] {
        link.set_carrier(up);
        assert_eq!((status(), changes()), ([bytes, 0], count));
        assert_eq!(running.device.config_generation(), count);
    }
}

#[test]
fn link_is_up_while_both_the_host_and_the_operator_have_it_up() {
    let (events, seen) = record();
    let config = NetConfig {
        mac: MAC,
        mtu: 1500,
    };
    let config = ConfigSpace::new(config, 1, events);
    type Set = fn(&ConfigSpace, bool) -> bool;
    let (carrier, operator): (Set, Set) =
        (ConfigSpace::set_carrier, ConfigSpace::set_operator_link);
    for (set, on, is_change, is_up) in [
        (operator, true, false, true),
        (operator, false, true, false),
        (carrier, false, false, false),
        (operator, true, false, false),
        (carrier, true, true, true),
        (carrier, false, true, false),
        (operator, false, false, false),
        (carrier, true, false, false),
        (operator, true, true, true),
    ] {
        assert_eq!(set(&config, on), is_change);
        assert_eq!(config.is_up(), is_up);
    }
    let changes = [false, true, false, true].map(DeviceEvent::Link);
    assert_eq!(*seen.lock().unwrap(), changes);
}

#[test]
fn link_change_without_a_driver_is_seen_by_the_next_one() {
    let (wire, _far) = Wire::new();
    let device = device(vec![wire], 1500, options());
    device.config().set_carrier(false);
    let mut bytes = [0; 2];
    device.read_config(6, &mut bytes);
    assert_eq!(bytes, [0, 0]);
}
