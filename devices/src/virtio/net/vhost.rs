//! vhost-net: the kernel moves the frames of a queue pair itself, between the rings in guest memory
//! and the tap, with no thread of the monitor in between. It is kicked by the ioeventfds and
//! interrupts by the irqfds directly.
//!
//! The monitor does not see the frames, so that a driver without GUEST_CSUM finds what the kernel says of each: that
//! it has checked the checksum (VIRTIO_NET_HDR_F_DATA_VALID).

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;

use vhost::net::VhostNet;
use vhost::vhost_kern::VhostKernBackend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::{virtio_net, virtio_ring};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use super::tap::Tap;
use crate::virtio::{ActiveQueue, Interrupt, VIRTIO_F_VERSION_1};

/// What could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("vhost-net cannot {what}")]
pub struct VhostError {
    what: &'static str,
    #[source]
    source: io::Error,
}

fn failed_to(what: &'static str) -> impl Fn(vhost::Error) -> VhostError {
    move |error| {
        // The crate's texts carry their causes; what counts is the kernel's answer.
        let source = match error {
            vhost::Error::VhostOpen(error) | vhost::Error::IoctlError(error) => error,
            other => io::Error::other(other),
        };
        VhostError { what, source }
    }
}

/// Features whose handling is the kernel's: the others concern the tap or the control queue.
const OURS: u64 = VIRTIO_F_VERSION_1
    | 1 << virtio_net::VIRTIO_NET_F_MRG_RXBUF
    | 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC
    | 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// Queues of a pair.
const QUEUES: usize = 2;

/// A queue pair of the kernel's. Dropping it ends what it does.
pub struct VhostPair {
    net: vhost::vhost_kern::net::Net<Arc<GuestMemoryMmap>>,
    tap: File,
    /// Signalled when the kernel cannot make sense of a ring.
    error: Arc<EventFd>,
    /// The kernel may have the queues. It refuses to give back what it never had.
    started: bool,
}

impl VhostPair {
    /// Opens `/dev/vhost-net` for the queue of `tap`.
    ///
    /// # Errors
    ///
    /// Fails where there is no vhost-net or no right to it, or its kernel is too old.
    pub fn open(tap: &Tap, memory: Arc<GuestMemoryMmap>) -> Result<Self, VhostError> {
        let net = vhost::vhost_kern::net::Net::new(memory).map_err(failed_to("be opened"))?;
        let offered = net.get_features().map_err(failed_to("tell its features"))?;
        if offered & OURS != OURS {
            return Err(VhostError {
                what: "do what a NIC needs",
                source: io::Error::other(format!("it offers the features {offered:#x} only")),
            });
        }
        net.set_owner().map_err(failed_to("be taken into use"))?;
        let own = |what| move |source| VhostError { what, source };
        Ok(Self {
            net,
            tap: tap.try_clone().map_err(own("have a descriptor"))?,
            error: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map(Arc::new)
                .map_err(own("have an eventfd"))?,
            started: false,
        })
    }

    /// Signalled when the kernel cannot make sense of a ring.
    pub fn error(&self) -> &Arc<EventFd> {
        &self.error
    }

    /// Hands the kernel the two queues of a pair, the first of which has the number `first`.
    ///
    /// # Errors
    ///
    /// Says what the kernel refused.
    pub fn start(
        &mut self,
        features: u64,
        queues: [&ActiveQueue; QUEUES],
        first: u16,
        interrupt: &dyn Interrupt,
    ) -> Result<(), VhostError> {
        self.net
            .set_features(features & OURS)
            .map_err(failed_to("take the features"))?;
        self.net
            .set_mem_table(&regions(self.net.mem()))
            .map_err(failed_to("take the guest's memory"))?;
        let _ = self.error.read();
        for (index, queue) in queues.into_iter().enumerate() {
            self.set_up(index, queue, interrupt.call_eventfd(first + index as u16))?;
        }
        self.started = true;
        for (index, queue) in queues.into_iter().enumerate() {
            self.net
                .set_backend(index, Some(&self.tap))
                .map_err(failed_to("take the tap"))?;
            // A notification may have come while the queue was paused.
            let _ = queue.kick.write(1);
        }
        Ok(())
    }

    fn set_up(&self, index: usize, queue: &ActiveQueue, line: &EventFd) -> Result<(), VhostError> {
        let (net, config) = (&self.net, &queue.config);
        let data = VringConfigData {
            queue_max_size: config.size,
            queue_size: config.size,
            flags: 0,
            desc_table_addr: config.descriptors,
            used_ring_addr: config.used,
            avail_ring_addr: config.available,
            log_addr: None,
        };
        net.set_vring_num(index, config.size)
            .map_err(failed_to("take the size of a queue"))?;
        net.set_vring_base(index, queue.queue.next_avail())
            .map_err(failed_to("take the beginning of a queue"))?;
        net.set_vring_addr(index, &data)
            .map_err(failed_to("take the addresses of a queue"))?;
        self.set_interrupt(index, line)?;
        net.set_vring_err(index, &self.error)
            .map_err(failed_to("take the error eventfd of a queue"))?;
        net.set_vring_kick(index, &queue.kick)
            .map_err(failed_to("take the notifications of a queue"))
    }

    /// Lets a running queue, the number `queue` of the device, interrupt by another line.
    ///
    /// # Errors
    ///
    /// Says what the kernel refused.
    pub fn change_interrupt(&self, queue: usize, line: &EventFd) -> Result<(), VhostError> {
        if self.started {
            self.set_interrupt(queue % QUEUES, line)?;
        }
        Ok(())
    }

    fn set_interrupt(&self, index: usize, line: &EventFd) -> Result<(), VhostError> {
        self.net
            .set_vring_call(index, line)
            .map_err(failed_to("take the interrupt of a queue"))
    }

    /// Takes the queues back, and says where each stands. Guest memory is not touched once this has
    /// returned.
    pub fn stop(&mut self) -> [Option<u16>; QUEUES] {
        if !std::mem::take(&mut self.started) {
            return [None; QUEUES];
        }
        [0, 1].map(|index| {
            let stopped = self.net.set_backend(index, None);
            stopped
                .and_then(|()| self.net.get_vring_base(index))
                .inspect_err(|error| log::error!("vhost-net does not let go of a queue: {error}"))
                .map_or(None, |base| Some(base as u16))
        })
    }
}

/// Guest memory as vhost takes it.
fn regions(memory: &GuestMemoryMmap) -> Vec<VhostUserMemoryRegionInfo> {
    let region = |region: &GuestRegionMmap| VhostUserMemoryRegionInfo {
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
        ..Default::default()
    };
    memory.iter().map(region).collect()
}

impl fmt::Debug for VhostPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostPair").finish_non_exhaustive()
    }
}
