//! The guest's part of the kernel command line: `guest.key=value` words.
//!
//! | key | meaning | default |
//! | --- | --- | --- |
//! | `mode` | what to do, see [`Mode`]; with commas between them, several one after the other | `info` |
//! | `ip`, `ip6` | own addresses with prefix length; `ip` may be given twice | none |
//! | `peer` | the address of the other side | none |
//! | `mac` | an address to send from that is not the NIC's | the NIC's |
//! | `port` | the port of the other side | 9 or 19 |
//! | `count` | how many pings, rounds, interrupts, batches, processors or connections | 10 |
//! | `bytes` | how much a source sends, or a loaded file has | 1 MiB |
//! | `nic` | `drivers` (the virtio-drivers crate) or `own` (by hand, with offloads) | `drivers` |
//! | `index` | which NIC, disk or share of several | 0 |
//! | `end` | `off` or `halt`: how to end | `off` |
//! | `only` | a prefix of the hostile tests to run | all |
//! | `to` | where a flood or a ping-pong goes | an address that no link has |
//! | `size` | the length of its frames | 1514 |
//! | `ms` | how long it takes at most | 1000 |
//! | `pairs` | on how many queue pairs | 1 |
//! | `gap` | microseconds between two round trips of a ping-pong | 0 |
//! | `interrupts` | `on`: a flood's first receive queue may interrupt, and the socket device | `off` |
//! | `op` | what a load of a disk or share does, see [`Operation`] | `read` |
//! | `block` | the bytes of each of its requests | 4096 |
//! | `depth` | how many are on their way at a time | 1 |
//! | `order` | `random` or `sequential`: which blocks | `random` |
//! | `backend` | `user` or `vhost`: who the monitor lets move the frames | `user` |

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::str::FromStr;

use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

use crate::boot::CommandLine;

/// What the guest is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Print what the NICs say of themselves.
    Info,
    /// Serve: ICMP echo, UDP echo on port 7 (a datagram `quit` ends), TCP echo 7, sink 9, source
    /// 19.
    Echo,
    /// Ping the peer.
    Ping,
    /// Send a stream to the peer.
    TcpSource,
    /// Receive a stream from the peer.
    TcpSink,
    /// Ping the peer and count the NIC's interrupts.
    Interrupts,
    /// Serve as for echo on every NIC, send to the peer all the time, and report each change of a
    /// link.
    Link,
    /// Say so, as soon as possible.
    Hello,
    /// Send frames as fast as possible.
    Send,
    /// Count the frames of a flood.
    Receive,
    /// Send frames that come back, one after another.
    PingPong,
    /// Send such frames back, and sleep in between. Needs `interrupts=on`.
    Reflect,
    /// Try everything that a disk can do.
    Disk,
    /// Read or write a disk as fast as possible.
    DiskLoad,
    /// Write numbered blocks, in `count` batches, and say which of them are flushed.
    DiskJournal,
    /// Wait until a disk is larger.
    DiskGrow,
    /// Read and write files of a share.
    Share,
    /// Read a file of a share until that fails.
    ShareReads,
    /// Use the file `load` of a share as fast as possible.
    ShareLoad,
    /// Write and read a file of a share until that fails.
    ShareWrites,
    /// Serve by the socket device, see `vsock`.
    Vsock,
    /// Connect to the host by it.
    VsockConnect,
    /// Print what each of `count` processors says of itself.
    Cpuid,
    /// Do everything wrong with a NIC.
    Hostile,
    /// The same with a disk.
    HostileDisk,
    /// The same with the entropy device and the balloon.
    HostileMemory,
    /// The same with the socket device; a program that echoes listens on `port` of the host's.
    HostileVsock,
    /// Does to a share all that a driver must not.
    HostileShare,
    /// Reset the machine.
    Reset,
    /// End in a triple fault.
    TripleFault,
    /// Halt with interrupts off.
    Hlt,
    /// Raise an exception, to test the guest itself.
    Exception,
}

/// Which driver is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// The `virtio-drivers` crate.
    Crate,
    /// By hand, with every offload.
    Own,
}

/// What a load of a disk or a share does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// It reads.
    Read,
    /// It writes.
    Write,
    /// It looks a name up; of a share alone.
    Lookup,
    /// It asks for a file's attributes; of a share alone.
    Attributes,
}

/// Which blocks it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One after the other.
    Sequential,
    /// Any.
    Random,
}

/// The command line, read.
#[derive(Clone, Debug)]
pub struct Options {
    /// What to do, one after the other.
    pub modes: Vec<Mode>,
    /// Own addresses.
    pub addresses: Vec<IpCidr>,
    /// The other side.
    pub peer: Option<IpAddress>,
    /// The Ethernet address to send from, instead of the NIC's.
    pub mac: Option<EthernetAddress>,
    /// The other side's port.
    pub port: Option<u16>,
    /// How many times.
    pub count: u32,
    /// How much to send.
    pub bytes: u64,
    /// By which driver.
    pub driver: Driver,
    /// Which NIC.
    pub index: usize,
    /// Which hostile tests.
    pub only: String,
    /// Halt at the end, instead of powering off.
    pub halt: bool,
    /// The host's kernel moves the frames.
    pub vhost: bool,
    /// Where a flood goes.
    pub to: [u8; 6],
    /// The length of its frames.
    pub size: usize,
    /// How long it takes.
    pub ms: u64,
    /// On how many queue pairs.
    pub pairs: u16,
    /// Microseconds between round trips.
    pub gap: u64,
    /// Whether a flood may interrupt.
    pub interrupts: bool,
    /// What a load of a disk or a share does.
    pub operation: Operation,
    /// The bytes of each of its requests.
    pub block: usize,
    /// How many of them at a time.
    pub depth: u16,
    /// Which blocks.
    pub order: Order,
}

/// The sizes that a frame can have.
const SIZES: core::ops::RangeInclusive<usize> = 60..=65_535;

impl Options {
    /// Reads the words that begin with `guest.`; an unknown one is an error, in words.
    pub fn parse(line: &CommandLine) -> Result<Self, String> {
        let mut options = Self {
            modes: vec![Mode::Info],
            addresses: Vec::new(),
            peer: None,
            mac: None,
            port: None,
            count: 10,
            bytes: 1 << 20,
            driver: Driver::Crate,
            index: 0,
            only: String::new(),
            halt: false,
            vhost: false,
            to: [0x02, 0, 0, 0, 0x0b, 0x02],
            size: 1514,
            ms: 1000,
            pairs: 1,
            gap: 0,
            interrupts: false,
            operation: Operation::Read,
            block: 4096,
            depth: 1,
            order: Order::Random,
        };
        for word in line.text().split_ascii_whitespace() {
            if let Some(option) = word.strip_prefix("guest.") {
                let (key, value) = option
                    .split_once('=')
                    .ok_or_else(|| format!("no value: {word}"))?;
                options
                    .set(key, value)
                    .ok_or_else(|| format!("not understood: {word}"))?;
            }
        }
        Ok(options)
    }

    /// How long a flood takes.
    pub fn nanoseconds(&self) -> u64 {
        self.ms.saturating_mul(1_000_000)
    }

    /// The peer, or the reason why there is none.
    pub fn peer(&self) -> Result<IpAddress, &'static str> {
        self.peer.ok_or("guest.peer is missing")
    }

    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "mode" => self.modes = value.split(',').map(mode).collect::<Option<_>>()?,
            "ip" | "ip6" => self.addresses.push(number(value)?),
            "peer" => self.peer = Some(number(value)?),
            "mac" => self.mac = Some(number(value)?),
            "port" => self.port = Some(number(value)?),
            "count" => self.count = number(value)?,
            "bytes" => self.bytes = number(value)?,
            "nic" => self.driver = driver(value)?,
            "index" => self.index = number(value)?,
            "end" => self.halt = ends_by_halt(value)?,
            "only" => self.only = value.to_string(),
            "to" => self.to = number::<EthernetAddress>(value)?.0,
            "size" => self.size = number(value).filter(|size| SIZES.contains(size))?,
            "ms" => self.ms = number(value)?,
            "pairs" => self.pairs = number(value).filter(|&pairs| pairs > 0)?,
            "gap" => self.gap = number(value)?,
            "interrupts" => self.interrupts = is_on(value)?,
            "op" => self.operation = operation(value)?,
            "block" => self.block = number(value).filter(is_block)?,
            "depth" => self.depth = number(value).filter(|&depth| depth > 0)?,
            "order" => self.order = order(value)?,
            "backend" => self.vhost = is_vhost(value)?,
            _ => return None,
        }
        Some(())
    }
}

fn number<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

fn ends_by_halt(text: &str) -> Option<bool> {
    match text {
        "off" => Some(false),
        "halt" => Some(true),
        _ => None,
    }
}

fn is_on(text: &str) -> Option<bool> {
    match text {
        "off" => Some(false),
        "on" => Some(true),
        _ => None,
    }
}

fn is_vhost(text: &str) -> Option<bool> {
    match text {
        "user" => Some(false),
        "vhost" => Some(true),
        _ => None,
    }
}

fn operation(text: &str) -> Option<Operation> {
    match text {
        "read" => Some(Operation::Read),
        "write" => Some(Operation::Write),
        "lookup" => Some(Operation::Lookup),
        "getattr" => Some(Operation::Attributes),
        _ => None,
    }
}

fn order(text: &str) -> Option<Order> {
    match text {
        "sequential" => Some(Order::Sequential),
        "random" => Some(Order::Random),
        _ => None,
    }
}

/// Whole sectors, at least one.
fn is_block(bytes: &usize) -> bool {
    *bytes > 0 && bytes.is_multiple_of(crate::virtio::blk::SECTOR)
}

fn driver(text: &str) -> Option<Driver> {
    match text {
        "drivers" => Some(Driver::Crate),
        "own" => Some(Driver::Own),
        _ => None,
    }
}

fn mode(text: &str) -> Option<Mode> {
    Some(match text {
        "info" => Mode::Info,
        "echo" => Mode::Echo,
        "ping" => Mode::Ping,
        "tcp-source" => Mode::TcpSource,
        "tcp-sink" => Mode::TcpSink,
        "interrupts" => Mode::Interrupts,
        "link" => Mode::Link,
        "hello" => Mode::Hello,
        "send" => Mode::Send,
        "receive" => Mode::Receive,
        "ping-pong" => Mode::PingPong,
        "reflect" => Mode::Reflect,
        "disk" => Mode::Disk,
        "disk-load" => Mode::DiskLoad,
        "disk-journal" => Mode::DiskJournal,
        "disk-grow" => Mode::DiskGrow,
        "share" => Mode::Share,
        "share-reads" => Mode::ShareReads,
        "share-load" => Mode::ShareLoad,
        "share-writes" => Mode::ShareWrites,
        "vsock" => Mode::Vsock,
        "vsock-connect" => Mode::VsockConnect,
        "cpuid" => Mode::Cpuid,
        "hostile" => Mode::Hostile,
        "hostile-disk" => Mode::HostileDisk,
        "hostile-memory" => Mode::HostileMemory,
        "hostile-vsock" => Mode::HostileVsock,
        "hostile-share" => Mode::HostileShare,
        "reset" => Mode::Reset,
        "triple-fault" => Mode::TripleFault,
        "hlt" => Mode::Hlt,
        "exception" => Mode::Exception,
        _ => return None,
    })
}
