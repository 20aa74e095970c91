//! A device for the guest of another monitor, by vhost-user.
//!
//! That monitor, the front end, has the transport. It passes guest memory, where the rings are, and eventfds by which the
//! driver and the device notify each other (docs/interop/vhost-user.rst of QEMU); some queues it may serve itself. The
//! device runs while all of its queues that the front end has started are enabled, and is paused by the first that
//! stops.

use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
    VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Queue, QueueConfig};
use super::{Activation, ActiveQueue, Interrupt, VIRTIO_F_VERSION_1, VirtioDevice};
use crate::lock;

/// A device that is served, until the front end closes its socket or this is dropped.
#[derive(Debug)]
pub struct Served {
    /// A second descriptor of the socket that the thread reads.
    socket: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    /// Serves a device on a thread of this name. The front end on the other end of `socket` leaves it that many queues, the
    /// first ones.
    ///
    /// # Errors
    ///
    /// Fails when the process may not have another thread or descriptor.
    pub fn start(
        name: &str,
        device: Box<dyn VirtioDevice>,
        queues: usize,
        socket: UnixStream,
    ) -> io::Result<Self> {
        let (handle, closed) = (socket.try_clone()?, socket.try_clone()?);
        let backend = Arc::new(Mutex::new(Backend::new(device, queues)?));
        let mut requests = BackendReqHandler::from_stream(socket, Arc::clone(&backend));
        let label = name.to_owned();
        let serve = move || {
            let error = loop {
                if let Err(error) = requests.handle_request() {
                    break error;
                }
            };
            // The memory that it uses is another process's, and may be gone.
            lock(&backend).device.reset();
            // A front end that waits for an answer gets none.
            let _ = closed.shutdown(Shutdown::Both);
            match error {
                Error::Disconnected | Error::SocketBroken(_) | Error::PartialMessage => {}
                error => log::warn!("{label}: the guest has lost the device: {error}"),
            }
        };
        let thread = thread::Builder::new().name(name.to_owned()).spawn(serve)?;
        Ok(Self {
            socket: handle,
            thread: Some(thread),
        })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A queue as the front end has set it up.
#[derive(Debug, Default)]
struct Ring {
    config: QueueConfig,
    /// Where it goes on in the available ring.
    next_avail: u16,
    /// There while it is started.
    kick: Option<Arc<EventFd>>,
    enabled: bool,
}

/// Guest memory as the front end has mapped it.
#[derive(Clone, Copy, Debug)]
struct Mapped {
    /// An address in the front end's process.
    address: u64,
    len: u64,
    guest_address: u64,
}

/// The eventfds by which the driver is notified; the front end changes them at any time.
#[derive(Debug)]
struct Calls {
    of_queues: Mutex<Vec<Option<EventFd>>>,
    /// For a kernel that would interrupt by itself: no such device is served.
    unused: EventFd,
}

impl Interrupt for Calls {
    fn queue(&self, index: u16) {
        if let Some(Some(call)) = lock(&self.of_queues).get(usize::from(index)) {
            let _ = call.write(1);
        }
    }

    fn call_eventfd(&self, _index: u16) -> &EventFd {
        &self.unused
    }

    fn config(&self) {}

    fn needs_reset(&self) {
        log::warn!("the guest's driver does not get on: its device needs a reset");
    }
}

/// What the requests change.
#[derive(Debug)]
struct Backend {
    device: Box<dyn VirtioDevice>,
    features: u64,
    /// Where the front end has mapped guest memory.
    mapped: Vec<Mapped>,
    memory: Arc<GuestMemoryMmap>,
    rings: Vec<Ring>,
    calls: Arc<Calls>,
    active: bool,
}

impl Backend {
    fn new(device: Box<dyn VirtioDevice>, queues: usize) -> io::Result<Self> {
        let mut rings = Vec::new();
        rings.resize_with(queues, Ring::default);
        let mut calls = Vec::new();
        calls.resize_with(queues, || None);
        Ok(Self {
            device,
            features: 0,
            mapped: Vec::new(),
            memory: Arc::default(),
            rings,
            calls: Arc::new(Calls {
                of_queues: Mutex::new(calls),
                unused: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            }),
            active: false,
        })
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        let ring = self.rings.get_mut(index as usize);
        ring.ok_or(Error::InvalidParam)
    }

    /// Where guest memory is that the front end has mapped at this address.
    fn guest_address(&self, address: u64) -> Result<u64> {
        let offset = |region: &Mapped| address.checked_sub(region.address);
        let within = |region: &&Mapped| offset(region).is_some_and(|offset| offset < region.len);
        let region = self.mapped.iter().find(within);
        let found = region.and_then(|region| Some(region.guest_address + offset(region)?));
        found.ok_or(Error::InvalidParam)
    }

    /// Pauses the device, whose queues then know where they stand.
    fn stop(&mut self) {
        if std::mem::take(&mut self.active) {
            let positions = self.device.pause();
            for (ring, position) in self.rings.iter_mut().zip(positions) {
                ring.next_avail = position.unwrap_or(ring.next_avail);
            }
        }
    }

    /// Starts the device if all of its queues are.
    fn start(&mut self) -> Result<()> {
        let is_ready = |ring: &Ring| ring.enabled && ring.kick.is_some();
        if self.active || !self.rings.iter().all(is_ready) {
            return Ok(());
        }
        // A driver that begins has taken nothing of its queues yet. One that has not either, and goes on, loses nothing.
        let resumed = self.rings.iter().any(|ring| ring.next_avail != 0);
        if !resumed {
            self.device.reset();
        }
        let queues = self.rings.iter();
        let queues = queues.map(|ring| self.queue(ring, resumed).map(Some));
        let mut queues = queues.collect::<Result<Vec<_>>>()?;
        queues.resize_with(self.device.queue_sizes().len(), || None);
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            features: self.features,
            queues,
            resumed,
            interrupt: self.calls.clone(),
        };
        let activated = self.device.activate(activation);
        activated.map_err(|error| Error::ReqHandlerError(io::Error::other(error)))?;
        self.active = true;
        Ok(())
    }

    fn queue(&self, ring: &Ring, resumed: bool) -> Result<ActiveQueue> {
        let event_idx = self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let config = QueueConfig {
            ready: true,
            ..ring.config
        };
        let queue = Queue::new(&config, config.size, event_idx, Arc::clone(&self.memory));
        let mut queue = queue.map_err(|_| Error::InvalidParam)?;
        if resumed {
            queue.resume(ring.next_avail);
        }
        let kick = ring.kick.clone();
        Ok(ActiveQueue {
            queue,
            config,
            kick: kick.ok_or(Error::InvalidParam)?,
        })
    }
}

/// An eventfd of the front end's, which does not block.
fn eventfd(file: File) -> Result<EventFd> {
    // SAFETY: the descriptor is the file's, which gives it up.
    let eventfd = unsafe { EventFd::from_raw_fd(file.into_raw_fd()) };
    let fd = eventfd.as_raw_fd();
    // SAFETY: it takes a number, and only changes flags of an open descriptor.
    match unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_RDWR | libc::O_NONBLOCK) } {
        0 => Ok(eventfd),
        _ => Err(Error::ReqHandlerError(io::Error::last_os_error())),
    }
}

/// A region of guest memory in this process.
fn map(region: &VhostUserMemoryRegion, file: File) -> Result<GuestRegionMmap> {
    let place = FileOffset::new(file, region.mmap_offset);
    let size = usize::try_from(region.memory_size).map_err(|_| Error::InvalidParam)?;
    let mapped =
        GuestRegionMmap::from_range(GuestAddress(region.guest_phys_addr), size, Some(place));
    mapped.map_err(|error| Error::ReqHandlerError(io::Error::other(error)))
}

/// A request that the features rule out that are offered here.
fn not_offered<T>() -> Result<T> {
    Err(Error::InvalidOperation("it is not offered"))
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.stop();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        not_offered()
    }

    fn get_features(&mut self) -> Result<u64> {
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        Ok(self.device.features() | VIRTIO_F_VERSION_1 | protocol)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(Error::FeatureMismatch);
        }
        self.stop();
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.features = features & !protocol;
        if features & protocol == 0 {
            // Such a front end cannot enable them.
            self.rings.iter_mut().for_each(|ring| ring.enabled = true);
        }
        self.start()
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.stop();
        let mapped = regions.iter().zip(files);
        let mapped = mapped.map(|(region, file)| map(region, file));
        let mut mapped = mapped.collect::<Result<Vec<_>>>()?;
        mapped.sort_by_key(|region| region.start_addr());
        let memory = GuestMemoryMmap::from_regions(mapped);
        let memory = memory.map_err(|error| Error::ReqHandlerError(io::Error::other(error)))?;
        self.memory = Arc::new(memory);
        let regions = regions.iter().map(|region| Mapped {
            address: region.user_addr,
            len: region.memory_size,
            guest_address: region.guest_phys_addr,
        });
        self.mapped = regions.collect();
        self.start()?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        self.ring(index)?.config.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let descriptors = self.guest_address(descriptors)?;
        let (available, used) = (self.guest_address(available)?, self.guest_address(used)?);
        let ring = self.ring(index)?;
        ring.config = QueueConfig {
            descriptors,
            available,
            used,
            ..ring.config
        };
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.ring(index)?.next_avail = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.stop();
        let ring = self.ring(index)?;
        ring.kick = None;
        Ok(VhostUserVringState::new(index, ring.next_avail.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let kick = fd.ok_or(Error::InvalidParam)?;
        self.stop();
        self.ring(index.into())?.kick = Some(Arc::new(eventfd(kick)?));
        self.start()
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let call = fd.map(eventfd).transpose()?;
        let mut calls = lock(&self.calls.of_queues);
        let place = calls.get_mut(usize::from(index));
        *place.ok_or(Error::InvalidParam)? = call;
        Ok(())
    }

    fn set_vring_err(&mut self, _index: u8, _fd: Option<File>) -> Result<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        if !enable {
            self.stop();
        }
        self.ring(index)?.enabled = enable;
        self.start()
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let mut config = vec![0; size as usize];
        self.device.read_config(offset as usize, &mut config);
        Ok(config)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.device.write_config(offset as usize, buf);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        not_offered()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        not_offered()
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        not_offered()
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        not_offered()
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        not_offered()
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        not_offered()
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        not_offered()
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        not_offered()
    }

    fn check_device_state(&mut self) -> Result<()> {
        not_offered()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_offered()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        not_offered()
    }
}

#[cfg(test)]
mod tests;
