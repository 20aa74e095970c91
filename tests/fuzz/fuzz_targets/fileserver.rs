//! The file server of a share: any memory, any rings, requests that are nearly right, and a monitor
//! that says anything. Its directory is a file system of its own, which is small.
#![no_main]

use std::fs::{self, File};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use arbitrary::Arbitrary;
use fileserver::{Device, RECORD};
use fuzz::jail::{self, Jail};
use fuzz::vhost_user::{self, REQUEST, code};
use libfuzzer_sys::fuzz_target;
use virtiofsd::passthrough::{self, PassthroughFs};
use virtiofsd::soft_idmap::cmdline::IdMap;
use vmm_sys_util::eventfd::EventFd;

/// What is done in one run at most.
const MOST: usize = 64;
/// Descriptors of files. All but a few are spare, so the server closes files and opens them again.
const BUDGET: u64 = 40;
/// Bytes of guest memory.
const MEMORY: u64 = 0x1_0000;
/// Where the monitor has it.
const USER: u64 = 0x7000_0000;
/// Features of the device: version 1, protocol features, both of rings.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28;
/// Descriptors of a queue.
const SIZE: u16 = 16;
// Where a request and its reply are, and how long they are at most.
const ASKED: u64 = 0x4000;
const ANSWER: u64 = 0x6000;
const LONGEST: usize = 0x1000;
/// Bytes of `fuse_in_header` (include/uapi/linux/fuse.h).
const HEADER: usize = 40;

/// Where the parts of a queue are.
fn rings(queue: u64) -> [u64; 3] {
    [0, 0x200, 0x400].map(|part| queue * 0x800 + part)
}

/// A part of a request's body.
#[derive(Clone, Debug, Arbitrary)]
enum Part {
    /// A number that may be one of a node, a handle, a mode, or of bytes.
    Small(u8),
    Word(u32),
    Long(u64),
    Name(u8),
    Bytes(Vec<u8>),
}

impl Part {
    fn bytes(&self) -> Vec<u8> {
        let names: [&[u8]; 8] = [
            b"hello\0", b"sub\0", b"made\0", b"link\0", b"..\0", b"sub/x\0", b"\0", b"no end",
        ];
        match self {
            Self::Small(value) => u64::from(*value).to_le_bytes().to_vec(),
            Self::Word(value) => value.to_le_bytes().to_vec(),
            Self::Long(value) => value.to_le_bytes().to_vec(),
            Self::Name(n) => names[usize::from(n % 8)].to_vec(),
            Self::Bytes(bytes) => bytes.clone(),
        }
    }
}

/// A FUSE request.
#[derive(Clone, Debug, Arbitrary)]
struct Request {
    hiprio: bool,
    opcode: u8,
    node: u8,
    body: Vec<Part>,
    /// Another length than it has.
    len: Option<u32>,
    /// Where its descriptor is split in two.
    split: Option<u8>,
    room: u16,
}

impl Request {
    fn new(opcode: u8, node: u8, body: &[Part]) -> Self {
        Self {
            hiprio: false,
            opcode,
            node,
            body: body.to_vec(),
            len: None,
            split: None,
            room: 0x1000,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let body: Vec<_> = self.body.iter().flat_map(Part::bytes).collect();
        let len = self.len.unwrap_or((HEADER + body.len()) as u32);
        let head = [len, self.opcode.into()].map(u32::to_le_bytes).concat();
        // Which one it is, and of which node; then who asks for it: root.
        let numbers = [1, u64::from(self.node)].map(u64::to_le_bytes).concat();
        let mut bytes = [head, numbers, vec![0; 16], body].concat();
        bytes.truncate(LONGEST);
        bytes
    }

    /// Writes it into guest memory as the driver's number `n` of its queue.
    fn offer(&self, n: u16, memory: &File) {
        let bytes = self.bytes();
        write(memory, ASKED, &bytes);
        let [descriptors, available, _] = rings(self.hiprio.into());
        let split = self.split.map_or(HEADER, usize::from).min(bytes.len());
        let parts = [
            (ASKED, split, 1_u64),
            (ASKED + split as u64, bytes.len() - split, 1),
            (ANSWER, usize::from(self.room) % (2 * LONGEST), 2),
        ];
        for (index, (at, len, flags)) in (0..).zip(parts) {
            let rest = len as u64 | flags << 32 | (index + 1) << 48;
            let descriptor = [at, rest].map(u64::to_le_bytes).concat();
            write(memory, descriptors + 16 * index, &descriptor);
        }
        let slot = available + 4 + 2 * u64::from(n % SIZE);
        write(memory, slot, &[0; 2]);
        write(memory, available + 2, &(n + 1).to_le_bytes());
    }
}

/// What brings the guest to where it has a file and a directory open.
fn opening() -> Vec<Request> {
    let init = [7, 31, 0x2_0000, 0].map(Part::Word);
    let nothing = [Part::Small(0)];
    vec![
        Request::new(26, 0, &init),
        Request::new(1, 1, &[Part::Name(0)]),
        Request::new(1, 1, &[Part::Name(1)]),
        // To be read and written.
        Request::new(14, 2, &[Part::Small(2)]),
        Request::new(27, 1, &nothing),
    ]
}

/// What the guest or the monitor does.
#[derive(Clone, Debug, Arbitrary)]
enum Action {
    Request(Request),
    /// Writes guest memory, and notifies.
    Memory(u16, u64),
    /// Says this to the server, with descriptors.
    Message(u8, u8, Vec<u8>, Files),
    /// Sets the queues up again.
    Restart,
    /// Says a part of something, and no more.
    Part(Vec<u8>),
}

#[derive(Clone, Copy, Debug, Arbitrary)]
enum Files {
    None,
    Event,
    Memory,
    Three,
}

#[derive(Debug, Arbitrary)]
struct Input {
    bytes: Vec<u8>,
    /// Whether the guest does as [`opening`] first.
    opens: bool,
    actions: Vec<Action>,
}

fn write(memory: &File, at: u64, bytes: &[u8]) {
    let room = MEMORY.saturating_sub(at).min(bytes.len() as u64);
    let written = memory.write_all_at(&bytes[..room as usize], at);
    written.expect("memory can be written");
}

/// A device, and its monitor and guest.
struct Bench {
    device: Device<PassthroughFs>,
    handle: Box<dyn FnMut() -> bool>,
    monitor: UnixStream,
    memory: File,
    event: EventFd,
    offered: [u16; 2],
}

impl Bench {
    fn new(bytes: &[u8], descriptors: File) -> Self {
        let squash = IdMap::SquashGuest {
            from_guest: 0,
            to_host: 0,
            count: u32::MAX,
        };
        let config = passthrough::Config {
            entry_timeout: Duration::from_secs(1),
            attr_timeout: Duration::from_secs(1),
            proc_sfd_rawfd: Some(descriptors),
            guest_fd_limit: BUDGET,
            uid_map: Some(vec![squash.clone()]),
            gid_map: Some(vec![squash]),
            ..Default::default()
        };
        let files = PassthroughFs::new(config).expect("it can be served");
        let record = fuzz::memfd(RECORD).into();
        let device = Device::new(files, BUDGET, [1, 1], record).expect("queues can be had");
        let (monitor, its) = UnixStream::pair().expect("sockets can be had");
        let mut handle = device.messages(its);
        let memory = fuzz::memfd(MEMORY as usize);
        fuzz::fill(&memory, bytes, MEMORY as usize);
        Self {
            device,
            handle: Box::new(move || handle().is_ok()),
            monitor,
            memory,
            event: EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd can be had"),
            offered: [0; 2],
        }
    }

    /// Whether the server goes on after this message.
    fn say(&mut self, code: u32, flags: u32, body: &[u8], fds: &[i32]) -> bool {
        let message = vhost_user::message(code, flags, body);
        vhost_user::send(&self.monitor, &message, fds);
        (self.handle)()
    }

    /// Passes memory and queues as minivmm does.
    fn start(&mut self) -> bool {
        let number = |value: u64| value.to_le_bytes().to_vec();
        let (memory, event) = (self.memory.as_raw_fd(), self.event.as_raw_fd());
        let half = MEMORY / 2;
        let region = |at: u64| [at, half, USER + at, at].map(number).concat();
        let table = [number(2), region(0), region(half)].concat();
        let mut messages = vec![
            (code::SET_OWNER, Vec::new(), vec![]),
            (code::GET_FEATURES, Vec::new(), vec![]),
            (code::GET_PROTOCOL_FEATURES, Vec::new(), vec![]),
            // REPLY_ACK, MQ and RESET_DEVICE.
            (code::SET_PROTOCOL_FEATURES, number(0x2009), vec![]),
            (code::SET_FEATURES, number(FEATURES), vec![]),
            (code::SET_MEM_TABLE, table, vec![memory; 2]),
        ];
        for queue in 0..2 {
            let state = |value: u64| number(queue | value << 32);
            let [descriptors, available, used] = rings(queue).map(|at| number(USER + at));
            let none = number(0);
            let addresses = [number(queue), descriptors, used, available, none].concat();
            write(&self.memory, rings(queue)[1], &[0; 4]);
            write(&self.memory, rings(queue)[2], &[0; 4]);
            messages.extend([
                (code::SET_VRING_NUM, state(SIZE.into()), vec![]),
                (code::SET_VRING_BASE, state(0), vec![]),
                (code::SET_VRING_ADDR, addresses, vec![]),
                (code::SET_VRING_CALL, number(queue), vec![event]),
                (code::SET_VRING_KICK, number(queue), vec![event]),
                (code::SET_VRING_ENABLE, state(1), vec![]),
            ]);
        }
        self.offered = [0; 2];
        let mut messages = messages.into_iter();
        messages.all(|(code, body, fds)| self.say(code, REQUEST, &body, &fds))
    }

    fn serve(&mut self) {
        for queue in 0..2 {
            let mut served = 0;
            while served < MOST && self.device.serve_one(queue) {
                served += 1;
            }
        }
    }

    /// Whether the server goes on.
    fn act(&mut self, action: &Action) -> bool {
        match action {
            Action::Request(request) => {
                let offered = &mut self.offered[usize::from(request.hiprio)];
                request.offer(*offered, &self.memory);
                *offered += 1;
            }
            Action::Memory(at, value) => write(&self.memory, (*at).into(), &value.to_le_bytes()),
            Action::Message(code, flags, body, files) => {
                let (event, memory) = (self.event.as_raw_fd(), self.memory.as_raw_fd());
                let fds = match files {
                    Files::None => vec![],
                    Files::Event => vec![event],
                    Files::Memory => vec![memory],
                    Files::Three => vec![memory; 3],
                };
                return self.say((*code).into(), REQUEST | u32::from(*flags), body, &fds);
            }
            Action::Restart => {
                return self.say(code::RESET_DEVICE, REQUEST, &[], &[]) && self.start();
            }
            Action::Part(bytes) => {
                vhost_user::send(&self.monitor, bytes, &[]);
                let _ = self.monitor.shutdown(Shutdown::Write);
                while (self.handle)() {}
                return false;
            }
        }
        self.serve();
        true
    }
}

static JAIL: OnceLock<Mutex<Jail>> = OnceLock::new();

fuzz_target!(
    init: {
        let jail = Jail::new().expect("user namespaces are permitted");
        let set = JAIL.set(Mutex::new(jail));
        set.expect("this runs once");
    },
    |input: Input| {
        let jail = JAIL.wait().lock().expect("no holder panics");
        jail.run(move |descriptors| {
            jail::clear();
            fs::write("/hello", "of the host").expect("there is room");
            fs::create_dir("/sub").expect("there is room");
            let mut bench = Bench::new(&input.bytes, descriptors);
            let mut goes_on = bench.start();
            assert!(goes_on, "the server takes what minivmm says");
            let opening = opening().into_iter().map(Action::Request);
            let opening = opening.filter(|_| input.opens);
            let mut actions = opening.chain(input.actions).take(MOST);
            while let Some(action) = actions.next().filter(|_| goes_on) {
                goes_on = bench.act(&action);
            }
        });
    }
);
