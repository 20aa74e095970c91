//! The control queue (virtio 1.2, 5.1.6.5): how many queue pairs the driver uses.

use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use super::backend::Backend;
use crate::virtio::Ring;

/// Bytes of a command that are looked at: class, command and the longest operand.
const COMMAND_LEN: usize = 4;
/// Commands that one turn handles.
const BUDGET: usize = 64;

/// The control queue of a device with several queue pairs.
#[derive(Debug)]
pub struct CtrlQueue<B> {
    ring: Ring,
    /// One for each pair.
    backends: Vec<Arc<B>>,
}

impl<B: Backend> CtrlQueue<B> {
    /// Does what `ring` says to `backends`.
    pub fn new(ring: Ring, backends: Vec<Arc<B>>) -> Self {
        Self { ring, backends }
    }

    /// Carries out the commands that wait. Says whether there may be more, and whether to
    /// interrupt the driver.
    pub fn handle(&mut self) -> (bool, bool) {
        for _ in 0..BUDGET {
            let Some((head, command, answer)) = self.ring.next_request(COMMAND_LEN) else {
                if self.ring.enable_notification() {
                    continue;
                }
                return (false, self.ring.needs_interrupt());
            };
            let done = self.execute(&command);
            let status = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            self.ring.answer(head, answer, status as u8);
        }
        (true, self.ring.needs_interrupt())
    }

    /// Carries out one command; false when it is unknown, wrong, or has no effect.
    fn execute(&mut self, command: &[u8]) -> bool {
        match *command {
            [class, kind, low, high]
                if u32::from(class) == VIRTIO_NET_CTRL_MQ
                    && u32::from(kind) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET =>
            {
                use_pairs(&self.backends, u16::from_le_bytes([low, high]).into())
            }
            _ => false,
        }
    }
}

/// Lets the first `pairs` take what is received, and no other. False when there are not so many,
/// or the host does not follow.
pub fn use_pairs<B: Backend>(backends: &[Arc<B>], pairs: usize) -> bool {
    if !(1..=backends.len()).contains(&pairs) {
        return false;
    }
    let mut done = true;
    for (index, backend) in backends.iter().enumerate() {
        if let Err(error) = backend.set_enabled(index < pairs) {
            log::debug!("cannot change queue {index} of a tap: {error}");
            done = false;
        }
    }
    done
}
