//! The devices of a minivmm guest.
//!
//! A device knows guest memory, eventfds and plain file descriptors. It does not know KVM, the
//! command line, or where in the address space it stands: the monitor puts it on a [`bus::Bus`],
//! and connects its eventfds to interrupts (irqfd) and register writes (ioeventfd).
//!
//! | module | what |
//! | --- | --- |
//! | [`bus`] | routes accesses to devices |
//! | [`disk`] | disk images: raw, qcow2, ephemeral; opening and locking |
//! | [`events`] | what devices report as it happens |
//! | [`irq`] | an interrupt line, seen from a device |
//! | [`pci`] | the host bridge, configuration space, MSI-X |
//! | [`serial`] | COM1, a 16550A |
//! | [`power`] | ACPI power-off and reset registers, the i8042's reset |
//! | [`virtio`] | the virtio transports and devices |
//!
//! # Threads
//!
//! Register accesses come on the vCPUs' threads, one at a time for each device. A network device has
//! a thread for each queue pair, unless vhost-net moves its frames, and one for the control queue,
//! which with vhost-net also waits for rings that the kernel finds invalid. They are made with the
//! device, run while a driver is ready and are parked otherwise ([`virtio::worker`]). A pair's thread
//! and the vCPUs share nothing but guest memory, eventfds and atomics: no lock is taken for a frame,
//! unless the NIC has a rate limit or a capture. Counters are published when a thread has nothing to
//! do, and every few milliseconds while it has. A block device has a thread for each queue, in the same way, and eight more for a raw image where
//! io_uring is refused or not wanted.

pub mod bus;
pub mod disk;
pub mod events;
pub mod irq;
pub mod pci;
pub mod power;
pub mod serial;
pub mod virtio;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks what another thread may have left by a panic: every holder leaves it usable.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
