//! A request on its way: its chain, where its data lies, and what became of it.

use super::request::{Parts, Request, Status, bytes};
use crate::virtio::Segments;
use crate::virtio::iovec::scatter;
use crate::virtio::queue::{Buffers, Chain};

/// A request that has been taken from the available ring and is not used yet.
///
/// Its iovecs are those of a chain that `Queue::pop` resolved inside guest memory. They stay valid as
/// long as the queue, and no request outlives it: whoever has one under way waits for it before the
/// queue is dropped.
#[derive(Debug)]
pub(super) struct Pending {
    chain: Chain,
    buffers: Buffers,
    parts: Parts,
    /// What the disk is to do.
    pub request: Request,
    /// Bytes that it moves from or to the image.
    pub moved: u64,
}

impl Pending {
    /// The request of this chain, which lies in `buffers`.
    pub fn new(chain: Chain, buffers: Buffers, parts: Parts, request: Request) -> Self {
        let moved = match &request {
            Request::Read { .. } => bytes(parts.wanted(&buffers)),
            Request::Write { .. } => bytes(parts.sent(&buffers)),
            _ => 0,
        };
        Self {
            chain,
            buffers,
            parts,
            request,
            moved,
        }
    }

    /// What the driver sends with it.
    pub fn sent(&self) -> Segments<'_> {
        // SAFETY: they lie in guest memory, to which there are no references, for as long as a
        // request lives.
        unsafe { Segments::new(self.parts.sent(&self.buffers)) }
    }

    /// Where the driver wants what it asks for.
    pub fn wanted(&self) -> Segments<'_> {
        // SAFETY: as in `sent`.
        unsafe { Segments::new(self.parts.wanted(&self.buffers)) }
    }

    /// Takes it apart again: it has not been begun.
    pub fn into_buffers(self) -> Buffers {
        self.buffers
    }

    /// Tells the driver how it ended. Returns the chain, and buffers for another one.
    pub fn finish(self, status: Status) -> (Chain, Buffers) {
        tell(&self.buffers, status);
        (self.chain, self.buffers)
    }
}

/// Writes the status of a chain where [`Parts::split`] has left its place, if it has one.
pub(super) fn tell(buffers: &Buffers, status: Status) {
    if let Some(buffer) = buffers.writable.last() {
        // SAFETY: the iovec is one of a chain that `Queue::pop` resolved inside guest memory, which
        // the queue keeps mapped.
        unsafe { scatter(std::slice::from_ref(buffer), 0, &[status as u8]) };
    }
}
