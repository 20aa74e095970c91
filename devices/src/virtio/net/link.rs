//! The state of the link, as the guest sees it: set by whoever watches the host's interface.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;

use crate::virtio::Interrupt;

/// Whether a network card has a link. It begins with one.
#[derive(Debug, Default)]
pub struct LinkStatus {
    /// How often the link went down or came up: odd while it is down. Also the configuration
    /// space's generation, since nothing else in it changes.
    changes: AtomicU32,
    /// How to tell the driver, while there is one.
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl LinkStatus {
    /// Takes the link down or brings it up, and tells the driver when that is a change.
    pub fn set_up(&self, up: bool) {
        // The lock also keeps two changes apart.
        let interrupt = self
            .interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if up == self.is_up() {
            return;
        }
        self.changes.fetch_add(1, Ordering::SeqCst);
        if let Some(interrupt) = interrupt.as_ref() {
            interrupt.config();
        }
    }

    /// Whether there is a link.
    pub fn is_up(&self) -> bool {
        self.changes.load(Ordering::SeqCst).is_multiple_of(2)
    }

    /// The generation of the configuration space.
    pub(super) fn generation(&self) -> u32 {
        self.changes.load(Ordering::SeqCst)
    }

    /// The `status` field (virtio 1.2, 5.1.4).
    pub(super) fn bits(&self) -> u16 {
        if self.is_up() {
            VIRTIO_NET_S_LINK_UP as u16
        } else {
            0
        }
    }

    /// Says whom to tell from now on.
    pub(super) fn tell(&self, interrupt: Option<Arc<dyn Interrupt>>) {
        *self
            .interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = interrupt;
    }
}
