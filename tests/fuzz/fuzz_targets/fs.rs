//! The file system device: any memory, any rings, and a server that says anything, with any record of
//! requests in flight, and then is gone.
#![no_main]

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::Arbitrary;
use devices::events::EventSink;
use devices::virtio::fs::{Connection, Fs, QUEUES};
use devices::virtio::worker::Job;
use devices::virtio::{Activation, Interrupt, VirtioDevice};
use fuzz::vhost_user::{self, REPLY, code};
use fuzz::{Queue, memory_of_files};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// How long the server has. All that it ever says is there at once.
const LIMIT: Duration = Duration::from_millis(5);
/// VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES and both features of rings.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28;
// Protocol features (docs/interop/vhost-user.rst of QEMU).
const MQ: u64 = 1 << 0;
const REPLY_ACK: u64 = 1 << 3;
const INFLIGHT_SHMFD: u64 = 1 << 12;
const RESET_DEVICE: u64 = 1 << 13;
/// Bytes of a record at most, which is more than the device reads of one.
const MAX_RECORD: usize = 0x9000;

/// How a reply differs from what a server would say.
#[derive(Debug, Arbitrary)]
enum Reply {
    Usual,
    /// Another number.
    Says(u64),
    /// The reply to another request, or none.
    Wrong {
        code: u8,
        flags: u8,
        len: u8,
    },
    /// Anything.
    Bytes(Vec<u8>),
}

/// What comes with a reply.
#[derive(Debug, Arbitrary)]
enum Files {
    None,
    Record,
    Null,
    Three,
}

/// A server's record.
#[derive(Debug, Arbitrary)]
struct Record {
    bytes: Vec<u8>,
    len: u16,
}

impl Record {
    fn file(&self) -> File {
        let file = fuzz::memfd(usize::from(self.len) % MAX_RECORD);
        fuzz::fill(&file, &self.bytes, usize::from(self.len) % MAX_RECORD);
        file
    }
}

#[derive(Debug, Arbitrary)]
struct Input {
    queues: [Queue; 2],
    bytes: Vec<u8>,
    replies: Vec<(Reply, Files)>,
    record: Record,
    /// The server was started with the record, and not asked for it.
    has_record: bool,
    /// The device is paused once before the server is gone.
    pauses: bool,
    /// What the driver writes after that.
    writes: Vec<(u16, u64)>,
}

impl Input {
    fn protocol(&self) -> u64 {
        match self.replies.get(1) {
            Some((Reply::Says(features), _)) => *features,
            _ => MQ | REPLY_ACK | INFLIGHT_SHMFD | RESET_DEVICE,
        }
    }

    /// The requests that have a reply, with the usual one, until the device is to be reset.
    fn requests(&self, memory: &GuestMemoryMmap) -> Vec<(u32, Vec<u8>)> {
        let number = |value: u64| value.to_le_bytes().to_vec();
        let protocol = self.protocol();
        let is_asked = protocol & INFLIGHT_SHMFD != 0 && !self.has_record;
        let mut requests = vec![
            (code::GET_FEATURES, number(FEATURES)),
            (code::GET_PROTOCOL_FEATURES, number(protocol)),
        ];
        if protocol & MQ != 0 {
            requests.push((code::GET_QUEUE_NUM, number(QUEUES.into())));
        }
        if is_asked {
            // Size and offset, queues, and descriptors of each.
            let place = [number(MAX_RECORD as u64), number(0), number(2 | 1024 << 16)];
            requests.push((code::GET_INFLIGHT_FD, place.concat()));
        }
        for _ in 0..=usize::from(self.pauses) {
            let once = [code::SET_FEATURES, code::SET_MEM_TABLE];
            let passed = is_asked.then_some(code::SET_INFLIGHT_FD);
            let acknowledged = once.into_iter().chain(passed);
            let of_queues = [code::QUEUE_SET_UP, code::QUEUE_SET_UP].concat();
            let acknowledged = acknowledged.chain(of_queues);
            let acknowledged = acknowledged.chain([code::SET_VRING_ENABLE; 2]);
            requests.extend(acknowledged.map(|code| (code, number(0))));
            for (index, queue) in (0..).zip(&self.queues) {
                let used = GuestAddress(queue.config().used + 2);
                let used = memory.read_obj::<u16>(used).unwrap_or_default();
                let reply = number(index | u64::from(used) << 32);
                requests.push((code::GET_VRING_BASE, reply));
            }
        }
        requests.push((code::RESET_DEVICE, number(0)));
        requests
    }

    /// Says all that the server has to say, and hangs up.
    fn say(&self, socket: &UnixStream, memory: &GuestMemoryMmap) {
        let (record, null) = (self.record.file(), fuzz::null());
        let mut replies = self.replies.iter();
        for (code, usual) in self.requests(memory) {
            let (reply, files) = replies
                .next()
                .map_or((&Reply::Usual, None), |(reply, files)| (reply, Some(files)));
            let bytes = match reply {
                Reply::Usual => vhost_user::message(code, REPLY, &usual),
                Reply::Says(value) => vhost_user::message(code, REPLY, &value.to_le_bytes()),
                Reply::Wrong { code, flags, len } => {
                    let body = vec![*code; usize::from(*len)];
                    vhost_user::message(u32::from(*code), u32::from(*flags), &body)
                }
                Reply::Bytes(bytes) => bytes.clone(),
            };
            let record: RawFd = record.as_raw_fd();
            let fds = match files {
                Some(Files::Null) => vec![null.as_raw_fd()],
                Some(Files::Three) => vec![record; 3],
                Some(Files::Record) => vec![record],
                _ if code == code::GET_INFLIGHT_FD => vec![record],
                _ => Vec::new(),
            };
            vhost_user::send(socket, &bytes, &fds);
        }
        let _ = socket.shutdown(Shutdown::Write);
    }
}

/// An interrupt for a server.
#[derive(Debug)]
struct Line(EventFd);

impl Interrupt for Line {
    fn queue(&self, _index: u16) {}
    fn call_eventfd(&self, _index: u16) -> &EventFd {
        &self.0
    }
    fn config(&self) {}
    fn needs_reset(&self) {}
}

fuzz_target!(|input: Input| {
    let memory = memory_of_files(&input.bytes);
    let (ours, its) = UnixStream::pair().expect("sockets can be had");
    input.say(&its, &memory);
    let connection = Connection {
        limit: LIMIT,
        inflight: input.has_record.then(|| input.record.file()),
        ..Connection::to(ours)
    };
    let Ok(mut device) = Fs::new("share0", "src", connection, EventSink::default()) else {
        return;
    };
    let interrupt = EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd can be had");
    let interrupt: Arc<dyn Interrupt> = Arc::new(Line(interrupt));
    let activation = || Activation {
        features: FEATURES,
        queues: input.queues.iter().map(|q| q.active(&memory)).collect(),
        resumed: false,
        interrupt: Arc::clone(&interrupt),
        memory: Arc::clone(&memory),
    };
    if input.pauses {
        let _ = device.job(activation());
        device.pause();
    }
    for _ in 0..2 {
        if let Ok(mut job) = device.job(activation()) {
            // The server hangs up, and the driver notifies.
            for (_, token, events) in job.wakeups() {
                job.wake(token, events);
            }
            job.turn();
            for (at, value) in &input.writes {
                let _ = memory.write_obj(*value, GuestAddress(u64::from(*at)));
            }
            for _ in 0..3 {
                job.turn();
            }
        }
        device.reset();
    }
});
