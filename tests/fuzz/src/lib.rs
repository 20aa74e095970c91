//! What the targets share: a guest's memory full of the fuzzer's bytes, a network that is the
//! fuzzer's too, and a NIC between the two.

pub mod image;
pub mod jail;
pub mod vhost_user;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use devices::bus::BusDevice;
use devices::events::EventSink;
use devices::virtio::net::backend::Backend;
use devices::virtio::net::config::ConfigSpace;
use devices::virtio::net::ctrl::Permissions;
use devices::virtio::net::features::Offloads;
use devices::virtio::net::filter::Filter;
use devices::virtio::net::observe::Observer;
use devices::virtio::net::{Net, NetConfig, NetOptions};
use devices::virtio::{ActiveQueue, Interrupt, QueueConfig};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// Two regions that touch, and nothing after them.
const REGION: usize = 0x8000;

/// Where the regions are.
const PLACES: [u64; 2] = [0, REGION as u64];

/// `bytes` over and over, `len` in all.
fn repeated(bytes: &[u8], len: usize) -> Vec<u8> {
    let mut filled = match bytes.len() {
        0 => vec![0; len],
        count => bytes.repeat(len.div_ceil(count)),
    };
    filled.truncate(len);
    filled
}

/// Guest memory that begins with `bytes`, over and over.
pub fn memory(bytes: &[u8]) -> Arc<GuestMemoryMmap> {
    let ranges = PLACES.map(|at| (GuestAddress(at), REGION));
    let memory = GuestMemoryMmap::from_ranges(&ranges).expect("64 KiB can be mapped");
    // At once: a call for each few bytes would take most of a run's time.
    if !bytes.is_empty() {
        memory
            .write_slice(&repeated(bytes, 2 * REGION), GuestAddress(0))
            .expect("it is inside");
    }
    Arc::new(memory)
}

/// The same that other processes can map.
pub fn memory_of_files(bytes: &[u8]) -> Arc<GuestMemoryMmap> {
    let file = Arc::new(memfd(2 * REGION));
    fill(&file, bytes, 2 * REGION);
    let ranges = PLACES.map(|at| {
        let place = FileOffset::from_arc(Arc::clone(&file), at);
        (GuestAddress(at), REGION, Some(place))
    });
    let memory = GuestMemoryMmap::from_ranges_with_files(&ranges);
    Arc::new(memory.expect("64 KiB can be mapped"))
}

/// A file in memory.
pub fn memfd(len: usize) -> File {
    // SAFETY: the name is a string that ends with a zero.
    let fd = unsafe { libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "a file can be had");
    // SAFETY: the kernel has just made this descriptor, and nothing else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len as u64).expect("it can have a length");
    file
}

/// Fills the first `len` bytes of a file with `bytes`, over and over.
pub fn fill(file: &File, bytes: &[u8], len: usize) {
    let filled = repeated(bytes, len);
    file.write_all_at(&filled, 0).expect("it can be written");
}

/// A file that is none.
pub fn null() -> File {
    File::open("/dev/null").expect("it can be opened")
}

/// A queue of the fuzzer's making.
#[derive(Debug, Arbitrary)]
pub struct Queue {
    size: u8,
    descriptors: u16,
    available: u16,
    used: u16,
    event_idx: bool,
}

impl Queue {
    /// As a driver would set it up.
    pub fn config(&self) -> QueueConfig {
        QueueConfig {
            size: 1 << (self.size % 9),
            ready: true,
            descriptors: u64::from(self.descriptors & !15),
            available: u64::from(self.available & !1),
            used: u64::from(self.used & !3),
        }
    }

    /// The queue, if it is one that a transport would hand to a device.
    pub fn get(&self, memory: &Arc<GuestMemoryMmap>) -> Option<devices::virtio::Queue> {
        let memory = Arc::clone(memory);
        devices::virtio::Queue::new(&self.config(), 256, self.event_idx, memory).ok()
    }

    /// The same as a device gets it with its driver.
    pub fn active(&self, memory: &Arc<GuestMemoryMmap>) -> Option<ActiveQueue> {
        Some(ActiveQueue {
            queue: self.get(memory)?,
            config: self.config(),
            kick: Arc::new(EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd can be had")),
        })
    }
}

/// A network that has these frames to give, and takes any.
#[derive(Debug)]
pub struct Script {
    /// Readable and writable for ever, as far as an event loop is concerned.
    event: EventFd,
    frames: Mutex<Vec<Vec<u8>>>,
}

impl Script {
    /// The frames come last one first.
    pub fn new(frames: Vec<Vec<u8>>) -> Self {
        Self {
            event: EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd can be had"),
            frames: Mutex::new(frames),
        }
    }
}

impl AsRawFd for Script {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl Backend for Script {
    unsafe fn read_frame(&self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        let frame = self.frames.lock().expect("no holder panics").pop();
        let frame = frame.ok_or(io::ErrorKind::WouldBlock)?;
        let mut rest = &frame[..];
        for iovec in iovecs {
            let here = iovec.iov_len.min(rest.len());
            // SAFETY: the caller vouches for the iovecs, and `here` is at most the length of this
            // one.
            unsafe { std::ptr::copy_nonoverlapping(rest.as_ptr(), iovec.iov_base.cast(), here) };
            rest = &rest[here..];
        }
        Ok(frame.len() - rest.len())
    }

    unsafe fn write_frame(&self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        let mut sum = 0;
        for iovec in iovecs {
            // SAFETY: the caller vouches for the iovecs.
            let bytes =
                unsafe { std::slice::from_raw_parts(iovec.iov_base.cast::<u8>(), iovec.iov_len) };
            // The sanitizer is to see each byte read.
            sum += bytes.iter().map(|&byte| usize::from(byte)).sum::<usize>();
        }
        match sum % 7 {
            0 => Err(io::Error::from_raw_os_error(libc::EINVAL)),
            _ => Ok(iovecs.iter().map(|iovec| iovec.iov_len).sum()),
        }
    }

    fn known_offloads(&self) -> Offloads {
        Offloads::all()
    }

    fn set_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_enabled(&self, _enabled: bool) -> io::Result<()> {
        Ok(())
    }

    fn set_mac(&self, _mac: [u8; 6]) -> io::Result<()> {
        Ok(())
    }
}

/// The NIC's MAC address.
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

const CONFIG: NetConfig = NetConfig {
    mac: MAC,
    mtu: 1500,
};

/// What a NIC with three queue pairs shows its driver.
pub fn config() -> Arc<ConfigSpace> {
    Arc::new(ConfigSpace::new(CONFIG, 3, EventSink::default()))
}

/// Watches the guest.
pub fn observer() -> Arc<Observer> {
    Arc::new(Observer::new("net0".into(), config()).expect("an eventfd can be had"))
}

/// Lets everything pass.
pub fn filter() -> Arc<Filter> {
    Arc::new(Filter::new(config(), EventSink::default()))
}

/// A NIC with two queue pairs.
pub fn nic(frames: Vec<Vec<u8>>) -> Net<Script> {
    let options = NetOptions {
        label: "net0".into(),
        permissions: Permissions {
            change_mac: true,
            allow_promisc: true,
        },
        rx_limit: None,
        tx_limit: None,
        capture: None,
        vhost: Vec::new(),
        events: EventSink::default(),
    };
    let backends = vec![Script::new(frames), Script::new(Vec::new())];
    Net::new("net0".into(), CONFIG, backends, options).expect("threads can be had")
}

/// Interrupts without a receiver.
#[derive(Debug)]
pub struct Deaf;

impl Interrupt for Deaf {
    fn queue(&self, _index: u16) {}
    fn call_eventfd(&self, _index: u16) -> &EventFd {
        unreachable!("no fuzz target passes queues to the kernel")
    }
    fn config(&self) {}
    fn needs_reset(&self) {}
}

/// What a guest does to a device and to its own memory.
#[derive(Debug, Arbitrary)]
pub enum Access {
    /// Reads so many bytes of a register.
    Read(u16, u8),
    /// Writes a register.
    Write(u16, Value),
    /// Writes its memory.
    Memory(u16, u64),
}

/// A value of each width that a guest can write.
#[derive(Debug, Arbitrary)]
pub enum Value {
    Byte(u8),
    Word(u16),
    Double(u32),
    Quad(u64),
}

impl Value {
    /// As the bus passes it on.
    pub fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Byte(value) => value.to_le_bytes().to_vec(),
            Self::Word(value) => value.to_le_bytes().to_vec(),
            Self::Double(value) => value.to_le_bytes().to_vec(),
            Self::Quad(value) => value.to_le_bytes().to_vec(),
        }
    }
}

impl Access {
    /// Does it.
    pub fn make(&self, device: &mut dyn BusDevice, memory: &GuestMemoryMmap) {
        match self {
            Self::Read(offset, len) => {
                let mut data = [0; 8];
                device.read(u64::from(*offset), &mut data[..usize::from(len % 8) + 1]);
            }
            Self::Write(offset, value) => device.write(u64::from(*offset), &value.bytes()),
            Self::Memory(at, value) => {
                let _ = memory.write_obj(*value, GuestAddress(u64::from(*at)));
            }
        }
    }
}
