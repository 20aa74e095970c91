//! virtio: devices that know no transport, and the transport that carries them.
//!
//! A device implements [`VirtioDevice`]; a transport ([`mmio`] or [`pci`]) owns it, speaks the
//! registers of virtio 1.2 chapter 4 with the guest and gives the device its queues when the driver
//! is ready. A device that works by threads of its own has [`worker`]s.

pub mod balloon;
pub mod blk;
pub mod fs;
pub(crate) mod iovec;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rate;
pub mod rng;
pub mod served;
pub mod status;
#[cfg(test)]
mod tests;
mod transport;
pub mod vhost_user;
pub mod vsock;
pub mod worker;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

pub use iovec::Segments;
pub use queue::{Queue, QueueConfig};

use crate::bus::BoxError;
use crate::events::EventSink;

/// VIRTIO_F_VERSION_1: the device follows virtio 1.0 or later, and so must the driver.
pub const VIRTIO_F_VERSION_1: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
/// What [`Queue`] can do for every device (virtio 1.2, 6).
pub const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// A virtio device, whatever its transport.
///
/// Every method is called with the transport's lock held, on the thread of the vCPU that touched
/// a register.
pub trait VirtioDevice: Send + fmt::Debug {
    /// The device's number (virtio 1.2, chapter 5).
    fn device_id(&self) -> u32;
    /// Base class, subclass and programming interface by which tools show it on a PCI bus: those of
    /// a device that fits in no class, if it does not say.
    fn pci_class(&self) -> u32 {
        0xff_0000
    }
    /// Takes the device's events, if anything does.
    fn events(&self) -> Option<&EventSink> {
        None
    }
    /// The largest size of each queue, in descriptors: a power of two.
    fn queue_sizes(&self) -> &[u16];
    /// The features that the device offers.
    fn features(&self) -> u64;
    /// Fills `data` from the device's configuration space; what lies past its end reads as 0.
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// The driver writes the configuration space; a device may have nothing there to be written.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}
    /// Changes whenever the configuration space has changed, so that a driver can tell that what
    /// it read belongs together (virtio 1.2, 2.5.1).
    fn config_generation(&self) -> u32 {
        0
    }
    /// Take the queues and start: the driver is ready, or a pause is over ([`Activation::resumed`]).
    ///
    /// # Errors
    ///
    /// A device that cannot start says why; the transport then sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<(), BoxError>;
    /// The driver has given a queue another interrupt. Matters to a device whose queues are in the
    /// kernel's, which got [`Interrupt::call_eventfd`] when the device was activated.
    fn interrupt_changed(&mut self, _queue: u16, _line: &EventFd) {}
    /// Stop until the next activation, and lose nothing: neither guest memory nor the host's side is
    /// touched once this has returned. Returns where each queue in use stands, its next index in the
    /// available ring; nothing where the device is not active.
    fn pause(&mut self) -> Vec<Option<u16>>;
    /// What another device needs to take the place of this one, which is paused, besides what the
    /// transport keeps.
    ///
    /// # Errors
    ///
    /// Says why there is no such state.
    fn save(&self) -> Result<Value, BoxError> {
        Ok(Value::Null)
    }
    /// As [`BusDevice::check`](crate::bus::BusDevice::check).
    ///
    /// # Errors
    ///
    /// Says what does not fit.
    fn check(&self, _state: &Value) -> Result<(), BoxError> {
        Ok(())
    }
    /// Become the device that [`VirtioDevice::save`] was called on, paused. Called on a device that
    /// has not run or is paused.
    ///
    /// # Errors
    ///
    /// As [`VirtioDevice::check`], or says what the host refuses.
    fn restore(&mut self, _state: Value) -> Result<(), BoxError> {
        Ok(())
    }
    /// The driver wants nothing more: stop, and forget the queues. Guest memory is not touched
    /// once this has returned. Also called on a device that is not active.
    fn reset(&mut self);
}

/// What a device of this number is called where its driver's doings are logged.
fn kind(device_id: u32) -> String {
    use virtio_bindings::virtio_ids as ids;
    match device_id {
        ids::VIRTIO_ID_NET => "NIC".into(),
        ids::VIRTIO_ID_BLOCK => "disk".into(),
        ids::VIRTIO_ID_RNG => "entropy device".into(),
        ids::VIRTIO_ID_BALLOON => "balloon".into(),
        ids::VIRTIO_ID_FS => "share".into(),
        ids::VIRTIO_ID_VSOCK => "socket device".into(),
        id => format!("virtio device {id}"),
    }
}

/// Everything that a device gets when its driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// The guest's memory.
    pub memory: Arc<GuestMemoryMmap>,
    /// The features that both sides agreed on.
    pub features: u64,
    /// The queues, in order; `None` where the driver left one disabled.
    pub queues: Vec<Option<ActiveQueue>>,
    /// The device goes on after a pause, or where the one that was saved had been paused: the queues
    /// are those that were in use then, as they stood.
    pub resumed: bool,
    /// How to reach the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// A queue that the driver has set up.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Its chains.
    pub queue: Queue,
    /// Where its rings are, for a kernel that walks them itself.
    pub config: QueueConfig,
    /// Readable when the driver notified the device (QueueNotify).
    pub kick: Arc<EventFd>,
}

/// How a device reaches its driver.
pub trait Interrupt: Send + Sync + fmt::Debug {
    /// Buffers of this queue have been used.
    fn queue(&self, index: u16);
    /// The eventfd that does the same as [`Interrupt::queue`], for a kernel that interrupts by
    /// itself. [`VirtioDevice::interrupt_changed`] has another one.
    fn call_eventfd(&self, index: u16) -> &EventFd;
    /// The configuration space has changed.
    fn config(&self);
    /// The device met something that only a reset cures: sets DEVICE_NEEDS_RESET and notifies
    /// (virtio 1.2, 2.1.2).
    fn needs_reset(&self);
}

/// Bounds the warnings that one device may cause in the log: a driver could cause them in a loop.
#[derive(Debug, Default)]
pub(crate) struct Complaints(AtomicU32);

impl Complaints {
    const MAX: u32 = 5;

    /// Whether one more may be given.
    pub fn may_warn(&self) -> bool {
        let count = |given| (given < Self::MAX).then_some(given + 1);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, count)
            .is_ok()
    }
}

/// Copies from `source` at `offset` into `data`, and zeros from where `source` ends.
pub fn read_at(source: &[u8], offset: usize, data: &mut [u8]) {
    let available = source.get(offset..).unwrap_or_default();
    let copied = available.len().min(data.len());
    let (head, tail) = data.split_at_mut(copied);
    head.copy_from_slice(&available[..copied]);
    tail.fill(0);
}
