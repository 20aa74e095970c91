use std::sync::atomic::Ordering;
use std::thread;
use std::time::Instant;

use vm_memory::{FileOffset, GuestAddress};

use super::super::queue::Queue;
use super::super::tests::{Driver, END, REGION, Recorder, SIZE, WRITE};
use super::super::vhost_user::tests::{
    CHECK_DEVICE_STATE, Fault, GET_PROTOCOL_FEATURES, GET_VRING_BASE, REQUIRED,
    SET_DEVICE_STATE_FD, SET_VRING_NUM, serve,
};
use super::super::{Interrupt, QueueConfig, VIRTIO_F_VERSION_1};
use super::*;

const LONG: Duration = Duration::from_secs(60);
const FORGET: u32 = 2;
const READ: u32 = 15;
const DATA: u64 = 0x8000;
const REPLY: u64 = 0x9000;

/// Interrupts whose lines can be passed on.
#[derive(Debug)]
struct Lines {
    recorder: Recorder,
    line: EventFd,
}

impl Interrupt for Lines {
    fn queue(&self, index: u16) {
        self.recorder.queue(index);
    }
    fn call_eventfd(&self, _index: u16) -> &EventFd {
        &self.line
    }
    fn config(&self) {}
    fn needs_reset(&self) {
        self.recorder.needs_reset();
    }
}

/// A device, and a driver that uses its second queue.
struct Bench {
    fs: Fs,
    driver: Driver,
    kick: Arc<EventFd>,
    lines: Arc<Lines>,
}

impl Bench {
    fn new(fault: Option<(u32, Fault)>, limit: Duration) -> Self {
        let (socket, _) = serve(fault);
        let fs = {
            let connection = Connection {
                limit,
                ..Connection::to(socket)
            };
            Fs::new("share0", "src", connection, EventSink::default()).unwrap()
        };
        let ranges = [(0, REGION), (REGION, REGION)].map(|(at, len)| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(len).unwrap();
            (
                GuestAddress(at),
                len as usize,
                Some(FileOffset::new(file, 0)),
            )
        });
        let memory = GuestMemoryMmap::from_ranges_with_files(&ranges).unwrap();
        Self {
            fs,
            driver: Driver::on(Arc::new(memory)),
            kick: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
            lines: Arc::new(Lines {
                recorder: Recorder::default(),
                line: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            }),
        }
    }

    /// An empty queue elsewhere in memory.
    fn unused(&self) -> ActiveQueue {
        let config = QueueConfig {
            descriptors: 0x4_1000,
            available: 0x4_2000,
            used: 0x4_3000,
            ..Driver::config()
        };
        self.active(config)
    }

    fn active(&self, config: QueueConfig) -> ActiveQueue {
        let memory = Arc::clone(&self.driver.memory);
        ActiveQueue {
            queue: Queue::new(&config, SIZE, false, memory).unwrap(),
            config,
            kick: match config == Driver::config() {
                true => Arc::clone(&self.kick),
                false => Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
            },
        }
    }

    fn activate(&mut self, positions: Option<&[Option<u16>]>) -> Result<(), BoxError> {
        let mut queues = [self.unused(), self.active(Driver::config())];
        if let Some(positions) = positions {
            for (queue, position) in queues.iter_mut().zip(positions) {
                queue.queue.resume(position.unwrap());
            }
        }
        self.fs.activate(Activation {
            memory: Arc::clone(&self.driver.memory),
            features: VIRTIO_F_VERSION_1,
            queues: queues.into_iter().map(Some).collect(),
            resumed: positions.is_some(),
            interrupt: Arc::clone(&self.lines) as Arc<dyn Interrupt>,
        })
    }

    /// Offers a request with the number `unique`, with room for 100 bytes in its reply.
    fn offer(&mut self, head: u16, opcode: u32, unique: u64) {
        let mut header = 40_u32.to_le_bytes().to_vec();
        header.extend_from_slice(&opcode.to_le_bytes());
        header.extend_from_slice(&unique.to_le_bytes());
        let at = u64::from(head) * 0x100;
        self.driver.write(DATA + at, &header);
        // In pieces, and a reply too.
        let chain = [
            (DATA + at, 7, 0),
            (DATA + at + 7, 33, 0),
            (REPLY + at, 3, WRITE),
            (REPLY + at + 3, 97, WRITE),
        ];
        self.driver.offer_chain(head, &chain);
        self.kick.write(1).unwrap();
    }

    /// The error of the reply to a request.
    #[track_caller]
    fn error(&self, head: u16, unique: u64) -> i32 {
        let reply = self.driver.read(REPLY + u64::from(head) * 0x100, 16);
        assert_eq!(reply[..4], 16_u32.to_le_bytes());
        assert_eq!(reply[8..], unique.to_le_bytes());
        i32::from_le_bytes(reply[4..8].try_into().unwrap())
    }

    #[track_caller]
    fn wait_used(&mut self, count: usize) -> Vec<(u16, u32)> {
        let deadline = Instant::now() + LONG;
        let mut used = Vec::new();
        while used.len() < count {
            used.extend(self.driver.take_used());
            assert!(Instant::now() < deadline, "{used:?}");
            thread::yield_now();
        }
        used
    }
}

#[test]
fn tag_and_queues_are_in_the_configuration() {
    let bench = Bench::new(None, LONG);
    let mut config = [0xff; 44];
    bench.fs.read_config(0, &mut config);
    assert_eq!(&config[..4], b"src\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn requests_of_a_server_that_ends_get_errors_and_later_ones_too() {
    // It ends when its queues are stopped: here, by a pause.
    let mut bench = Bench::new(Some((GET_VRING_BASE, Fault::Ends)), LONG);
    bench.activate(None).unwrap();
    bench.offer(4, READ, 70);
    bench.offer(0, FORGET, 71);
    let positions = bench.fs.pause();
    assert!(positions.iter().all(Option::is_some), "{positions:?}");
    assert_eq!(bench.driver.take_used(), []);
    bench.activate(Some(&positions)).unwrap();
    let mut used = bench.wait_used(2);
    used.sort_unstable();
    assert_eq!(used, [(0, 0), (4, 16)]);
    assert_eq!(bench.error(4, 70), -libc::EIO);
    bench.offer(8, READ, 72);
    assert_eq!(bench.wait_used(1), [(8, 16)]);
    assert_eq!(bench.error(8, 72), -libc::EIO);
    let interrupts = &bench.lines.recorder.interrupts;
    assert!(interrupts.load(Ordering::SeqCst) > 0);
}

#[test]
fn driver_of_a_server_that_is_gone_gets_errors_from_the_beginning() {
    let mut bench = Bench::new(Some((SET_VRING_NUM, Fault::Ends)), LONG);
    for round in 0..2 {
        bench.activate(None).unwrap();
        bench.offer(0, READ, round);
        assert_eq!(bench.wait_used(1), [(0, 16)]);
        assert_eq!(bench.error(0, round), -libc::EIO);
        bench.fs.reset();
        bench.driver = fresh(&bench.driver);
    }
}

/// The driver after a reset: its rings are as at first.
fn fresh(driver: &Driver) -> Driver {
    driver.write(0x2000, &[0; 0x2000]);
    Driver::on(Arc::clone(&driver.memory))
}

#[test]
fn server_that_hangs_is_cut_off_when_it_is_needed() {
    let limit = Duration::from_millis(50);
    let mut bench = Bench::new(Some((GET_VRING_BASE, Fault::Hangs)), limit);
    bench.activate(None).unwrap();
    bench.offer(0, READ, 1);
    let positions = bench.fs.pause();
    bench.activate(Some(&positions)).unwrap();
    assert_eq!(bench.wait_used(1), [(0, 16)]);
}

#[test]
fn queue_that_the_server_refuses_needs_a_reset_and_the_server_lives() {
    let mut bench = Bench::new(Some((SET_VRING_NUM, Fault::Says(1))), LONG);
    let error = bench.activate(None).unwrap_err();
    let text = "the vhost-user server does not take the size of a queue";
    assert_eq!(error.to_string(), text);
    assert!(lock(&bench.fs.server).stop(&bench.driver.memory).is_some());
}

#[test]
fn share_is_saved_and_restored_paused() {
    let mut bench = Bench::new(None, LONG);
    bench.activate(None).unwrap();
    let positions = bench.fs.pause();
    let state = bench.fs.save().unwrap();
    assert_eq!(state, json!({"tag": "src", "server": ""}));
    let mut other = Bench::new(None, LONG);
    other.fs.restore(state).unwrap();
    other.activate(Some(&positions)).unwrap();
}

#[test]
fn state_that_the_server_keeps_or_refuses_or_another_shares_is_an_error() {
    let own = json!({"tag": "src", "server": "\u{1}\u{80}\u{ff}"});
    for (request, reply, cause) in [
        (
            GET_PROTOCOL_FEATURES,
            REQUIRED.bits(),
            "the vhost-user server does not pass on what the guest has open (DEVICE_STATE)",
        ),
        (SET_DEVICE_STATE_FD, 0x101, "it refuses that (0x101)"),
        // Descriptors of its own it does not get rid of.
        (SET_DEVICE_STATE_FD, 0, "it refuses that (0x0)"),
        (CHECK_DEVICE_STATE, 1, "it has failed (1)"),
    ] {
        let mut bench = Bench::new(Some((request, Fault::Says(reply))), LONG);
        let restored = bench.fs.restore(own.clone()).unwrap_err();
        for error in [bench.fs.save().unwrap_err(), restored] {
            assert_eq!(
                error.to_string(),
                "the share src cannot go on in another guest"
            );
            let mut error: &dyn std::error::Error = error.as_ref();
            while let Some(source) = error.source() {
                error = source;
            }
            assert_eq!(error.to_string(), cause);
        }
        // It serves on.
        bench.activate(None).unwrap();
        assert!(bench.fs.pause().iter().all(Option::is_some));
    }
    let bench = Bench::new(None, LONG);
    let error = bench.fs.check(&json!({"tag": "other", "server": ""}));
    assert_eq!(
        error.unwrap_err().to_string(),
        "it was the share other, and is src here"
    );
    assert!(bench.fs.check(&Value::Null).is_err());
}

#[test]
fn server_that_ends_while_it_is_saved_is_gone() {
    let mut bench = Bench::new(Some((SET_DEVICE_STATE_FD, Fault::Ends)), LONG);
    bench.activate(None).unwrap();
    let positions = bench.fs.pause();
    bench.fs.save().unwrap_err();
    assert!(
        bench
            .fs
            .check(&json!({"tag": "src", "server": ""}))
            .is_err()
    );
    bench.activate(Some(&positions)).unwrap();
    bench.offer(0, READ, 1);
    assert_eq!(bench.wait_used(1), [(0, 16)]);
}

#[test]
fn reset_of_a_paused_device_is_one_of_the_server_too() {
    let mut bench = Bench::new(None, LONG);
    bench.activate(None).unwrap();
    bench.fs.pause();
    assert!(bench.fs.is_used);
    bench.fs.reset();
    assert!(!bench.fs.is_used);
}

#[test]
fn rings_that_make_no_sense_need_a_reset() {
    let mut bench = Bench::new(Some((GET_VRING_BASE, Fault::Ends)), LONG);
    bench.activate(None).unwrap();
    let positions = bench.fs.pause();
    bench.driver.set_available(SIZE + 1);
    bench.activate(Some(&positions)).unwrap();
    let needs_reset = &bench.lines.recorder.needs_reset;
    let deadline = Instant::now() + LONG;
    while !needs_reset.load(Ordering::SeqCst) {
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
}

#[test]
fn chain_that_overwrites_what_was_found_out_harms_its_own_guest_alone() {
    let mut bench = Bench::new(Some((GET_VRING_BASE, Fault::Ends)), LONG);
    bench.activate(None).unwrap();
    bench.offer(0, READ, 1);
    // The reply goes where the heads are that were found, after guest memory.
    let chain = [(DATA, 40, 0), (END, 100, WRITE)];
    bench.driver.offer_chain(4, &chain);
    let positions = bench.fs.pause();
    bench.activate(Some(&positions)).unwrap();
    bench.wait_used(1);
    bench.offer(8, READ, 2);
    assert_eq!(bench.wait_used(1), [(8, 16)]);
}
