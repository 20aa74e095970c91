//! Interrupt lines, seen from a device.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// An edge-triggered interrupt line: writing its eventfd raises one edge.
///
/// The monitor registers the eventfd with the hypervisor (irqfd), so that no thread has to wake up
/// to deliver the interrupt.
#[derive(Clone, Debug)]
pub struct IrqLine(Arc<EventFd>);

impl IrqLine {
    /// A line of its own, not yet connected to anything.
    ///
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub fn new() -> io::Result<Self> {
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(|eventfd| Self(Arc::new(eventfd)))
    }

    /// The eventfd to register as irqfd.
    pub fn eventfd(&self) -> &EventFd {
        &self.0
    }

    /// Whether an edge waits in the eventfd: nothing is connected that would have taken it.
    pub fn is_raised(&self) -> bool {
        let mut poll = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: the pointer is to one pollfd, and that is the count; a timeout of 0 returns at
        // once.
        unsafe { libc::poll(&mut poll, 1, 0) == 1 }
    }

    /// Forgets an edge that waits.
    pub fn clear(&self) {
        // EAGAIN: there is none.
        let _ = self.0.read();
    }

    /// Raises one edge.
    pub fn raise(&self) {
        // EAGAIN (the counter is full) means that an edge is pending anyway.
        let _ = self.0.write(1);
    }
}

impl vm_superio::Trigger for IrqLine {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.raise();
        Ok(())
    }
}
