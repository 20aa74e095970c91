//! A request on its way: its chain, where its data lies, and what became of it.

use super::disk::Disk;
use super::request::{Parts, Request, Status, bytes};
use crate::virtio::Segments;
use crate::virtio::iovec::scatter;
use crate::virtio::queue::{Buffers, Chain, Next, Queue};

/// Iovecs for which room is kept between requests.
const KEPT: usize = 64;

/// A request that has been taken from the available ring and is not used yet, or room for one. It
/// lies in one place while it passes from hand to hand.
///
/// Its iovecs are those of a chain that `Queue::pop` resolved inside guest memory. They stay valid as
/// long as the queue, and no request outlives it: whoever has one under way waits for it before the
/// queue is dropped.
#[derive(Debug, Default)]
pub(super) struct Pending(Box<Body>);

#[derive(Debug, Default)]
struct Body {
    chain: Chain,
    buffers: Buffers,
    parts: Parts,
    request: Request,
    moved: u64,
    writeback: bool,
}

impl Pending {
    /// Takes the next chain of `queue`. What it asks for is not looked at.
    pub fn pop(&mut self, queue: &mut Queue) -> Next {
        let next = queue.pop(&mut self.0.buffers);
        if let Next::Chain(chain) = next {
            self.0.chain = chain;
        }
        next
    }

    /// Cuts the chain into its parts; false if it has not all that a request has.
    pub fn split(&mut self) -> bool {
        let parts = Parts::split(&mut self.0.buffers);
        let is_whole = parts.is_some();
        self.0.parts = parts.unwrap_or_default();
        is_whole
    }

    /// Finds out what it asks of `disk`, unless that is nothing that could be done.
    ///
    /// # Errors
    ///
    /// Returns what is to be said of it.
    pub fn parse(&mut self, disk: &Disk) -> Result<(), Status> {
        let body = &mut *self.0;
        let (image, readonly) = (disk.image(), disk.is_readonly());
        body.request = body.parts.request(&body.buffers, image, readonly)?;
        body.writeback = disk.is_writeback();
        body.moved = match &body.request {
            Request::Read { .. } => bytes(body.parts.wanted(&body.buffers)),
            Request::Write { .. } => bytes(body.parts.sent(&body.buffers)),
            _ => 0,
        };
        Ok(())
    }

    /// What the disk is to do.
    pub fn request(&self) -> &Request {
        &self.0.request
    }

    /// Bytes that it moves from or to the image.
    pub fn moved(&self) -> u64 {
        self.0.moved
    }

    /// Whether it wrote what is not durable yet, and has to be, since the driver has switched the write
    /// cache off meanwhile.
    pub fn wants_flush(&self, disk: &Disk) -> bool {
        let transfers = matches!(self.0.request, Request::Write { .. });
        transfers && self.0.writeback && !disk.is_writeback()
    }

    /// What the driver sends with it.
    pub fn sent(&self) -> Segments<'_> {
        // SAFETY: they lie in guest memory, to which there are no references, for as long as a
        // request lives.
        unsafe { Segments::new(self.0.parts.sent(&self.0.buffers)) }
    }

    /// Where the driver wants what it asks for.
    pub fn wanted(&self) -> Segments<'_> {
        // SAFETY: as in `sent`.
        unsafe { Segments::new(self.0.parts.wanted(&self.0.buffers)) }
    }

    /// Tells the driver how it ended, if it has a place for that: [`Pending::split`] has been called.
    pub fn tell(&self, status: Status) {
        if let Some(buffer) = self.0.buffers.writable.last() {
            // SAFETY: the iovec is one of a chain that `Queue::pop` resolved inside guest memory,
            // which the queue keeps mapped.
            unsafe { scatter(std::slice::from_ref(buffer), 0, &[status as u8]) };
        }
    }

    /// Its chain.
    pub fn chain(&self) -> Chain {
        self.0.chain
    }

    /// Room for another one; none where this one has made it large.
    pub fn recycle(mut self) -> Option<Self> {
        let buffers = &mut self.0.buffers;
        let is_small = buffers.readable.capacity() + buffers.writable.capacity() <= KEPT;
        buffers.clear();
        is_small.then_some(self)
    }
}
