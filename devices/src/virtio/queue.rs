//! A virtqueue in use: guest-supplied descriptor chains become iovecs, or are told apart as bad.
//!
//! The rings themselves are walked by the `virtio-queue` crate. This module adds what a device
//! that hands guest memory to the kernel needs: every address is resolved once, against the
//! guest's memory, and nothing that a driver writes there is believed twice.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// The most pieces that one readv or writev takes (UIO_MAXIOV); a longer chain is bad.
pub const MAX_SEGMENTS: usize = 1024;

/// How the driver set up a queue, register by register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueConfig {
    /// Number of descriptors.
    pub size: u16,
    /// The driver has enabled the queue.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
}

/// Who reads and who writes the buffers of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device reads what the driver wrote.
    FromDriver,
    /// The device writes for the driver to read.
    ToDriver,
}

/// A descriptor chain whose buffers all lie in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain {
    /// The index that gives the chain back to the driver.
    pub head: u16,
    /// Bytes in all its buffers.
    pub len: usize,
    /// How many iovecs it has.
    pub segments: usize,
}

/// The next thing in the available ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next<T> {
    /// A chain, as the caller reads it.
    Chain(T),
    /// A chain that is not to be used. It has been completed with length 0 where it has a valid
    /// head.
    Bad,
    /// Nothing there.
    Empty,
    /// The avail index is invalid (an available index that jumped): it stays so until a reset.
    Broken,
}

/// A question of the driver's that wants an answer of one byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The index that gives the chain back to the driver.
    head: u16,
    /// What the driver wrote.
    pub question: Vec<u8>,
    /// Where the answer goes.
    answer: GuestAddress,
}

/// A virtqueue whose rings lie in guest memory.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    memory: Arc<GuestMemoryMmap>,
    /// Used elements that the driver does not see yet.
    unflushed: u16,
    /// The used index at the last look at the driver's wish to be interrupted.
    signalled: Wrapping<u16>,
}

// The split virtqueue's layout (virtio 1.2, 2.7.6 and 2.7.8), in bytes.
const AVAILABLE_HEADER_LEN: u64 = 4;
const AVAILABLE_ELEMENT_LEN: u64 = 2;
const USED_HEADER_LEN: u64 = 4;
const USED_ELEMENT_LEN: u64 = 8;
/// Offset of `idx` in either ring.
const INDEX_OFFSET: u64 = 2;

impl Ring {
    /// Takes a queue into use.
    ///
    /// # Errors
    ///
    /// Fails when the size is not a power of two of at most `max_size`, an address is not aligned
    /// (virtio 1.2, 2.7), or a ring lies outside guest memory.
    pub fn new(
        config: &QueueConfig,
        max_size: u16,
        event_idx: bool,
        memory: Arc<GuestMemoryMmap>,
    ) -> Result<Self, Error> {
        let mut queue = Queue::new(max_size)?;
        queue.try_set_size(config.size)?;
        queue.try_set_desc_table_address(GuestAddress(config.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(config.available))?;
        queue.try_set_used_ring_address(GuestAddress(config.used))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(config.ready);
        if !queue.is_valid(memory.as_ref()) {
            return Err(Error::QueueNotReady);
        }
        Ok(Self {
            queue,
            memory,
            unflushed: 0,
            signalled: Wrapping(0),
        })
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next chain from the available ring and appends its buffers to `iovecs`.
    ///
    /// The iovecs point into guest memory and stay valid as long as the ring's `Arc` of it.
    pub fn next(&mut self, direction: Direction, iovecs: &mut Vec<libc::iovec>) -> Next<Chain> {
        let first = iovecs.len();
        self.take(|memory, chain| {
            let head = chain.head_index();
            let Some(len) = gather(memory, chain, direction, iovecs) else {
                iovecs.truncate(first);
                return None;
            };
            Some(Chain {
                head,
                len,
                segments: iovecs.len() - first,
            })
        })
    }

    /// Takes the next request from a queue whose chains hold a question and room for an answer of
    /// one byte (a control queue), and looks at up to `limit` bytes of the question.
    pub fn next_request(&mut self, limit: usize) -> Next<Request> {
        self.take(|memory, chain| request(memory, chain, limit))
    }

    /// Takes the next chain from the available ring and reads it. One that `read` refuses is given
    /// back at once. It takes no more than one, so that the caller can bound what it does for a
    /// driver that has any number of them.
    fn take<T>(
        &mut self,
        read: impl FnOnce(&GuestMemoryMmap, DescriptorChain<&GuestMemoryMmap>) -> Option<T>,
    ) -> Next<T> {
        let chain = match self.queue.iter(self.memory.as_ref()) {
            Ok(mut available) => match available.next() {
                Some(chain) => chain,
                None => return Next::Empty,
            },
            Err(_) => return Next::Broken,
        };
        let head = chain.head_index();
        match read(&self.memory, chain) {
            Some(read) => Next::Chain(read),
            None => {
                self.add_used(head, 0);
                Next::Bad
            }
        }
    }

    /// Answers a request with one byte.
    pub fn answer(&mut self, request: &Request, answer: u8) {
        let written = self.memory.write_obj(answer, request.answer).is_ok();
        self.add_used(request.head, written.into());
    }

    /// Puts the chain that [`Ring::next`] returned last back, to be returned again.
    pub fn undo_next(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back to the driver, with `len` bytes written into it.
    pub fn add_used(&mut self, head: u16, len: u32) {
        self.push_used(head, len);
        self.flush_used();
    }

    /// Lays a chain into the used ring where the driver does not see it before
    /// [`Ring::flush_used`]. The chains of one frame have to become visible together: a driver that
    /// polls gives up a frame whose later buffers are not there yet.
    pub fn push_used(&mut self, head: u16, len: u32) {
        // A head that the driver made up has nothing to give back.
        if head >= self.queue.size() {
            return;
        }
        let slot = u64::from(self.next_used().0 % self.queue.size());
        let at = self.queue.used_ring() + USED_HEADER_LEN + slot * USED_ELEMENT_LEN;
        // The ring was found inside guest memory when it was taken into use.
        // `id` and `len`, 32 bits each.
        let element = u64::from(head) | u64::from(len) << 32;
        let _ = self.memory.write_obj(element.to_le(), GuestAddress(at));
        self.unflushed += 1;
    }

    /// Shows the driver what has been staged.
    pub fn flush_used(&mut self) {
        let next = self.next_used();
        self.unflushed = 0;
        self.queue.set_next_used(next.0);
        let index = GuestAddress(self.queue.used_ring() + INDEX_OFFSET);
        let _ = self.memory.store(next.0.to_le(), index, Ordering::Release);
    }

    fn next_used(&self) -> Wrapping<u16> {
        Wrapping(self.queue.next_used()) + Wrapping(self.unflushed)
    }

    /// Asks the driver not to notify while the device looks at the ring anyway.
    pub fn disable_notification(&mut self) {
        let _ = self.queue.disable_notification(self.memory.as_ref());
    }

    /// Asks the driver to notify again. True when buffers came in the meantime, for which no
    /// notification may come.
    pub fn enable_notification(&mut self) -> bool {
        self.queue
            .enable_notification(self.memory.as_ref())
            .unwrap_or(false)
    }

    /// Whether the driver wants an interrupt for what has been published since the last call, if
    /// anything has.
    pub fn needs_interrupt(&mut self) -> bool {
        let new = Wrapping(self.queue.next_used());
        let old = std::mem::replace(&mut self.signalled, new);
        if new == old {
            return false;
        }
        // What was published has to be visible before the driver's wish is read (2.7.10.1).
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        let load = |at| self.memory.load::<u16>(GuestAddress(at), Ordering::Relaxed);
        if !self.queue.event_idx_enabled() {
            let flags = load(available).map_or(0, u16::from_le);
            return u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0;
        }
        let at =
            available + AVAILABLE_HEADER_LEN + u64::from(self.queue.size()) * AVAILABLE_ELEMENT_LEN;
        let event = Wrapping(load(at).map_or(0, u16::from_le));
        new - event - Wrapping(1) < new - old
    }
}

/// Appends the chain's buffers; `None` when the chain is cut, empty, of more than [`MAX_SEGMENTS`]
/// descriptors or pieces, outside guest memory, or has a buffer of the other direction.
fn gather(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    direction: Direction,
    iovecs: &mut Vec<libc::iovec>,
) -> Option<usize> {
    let limit = iovecs.len() + MAX_SEGMENTS;
    let mut len = 0usize;
    let whole = walk(chain, |descriptor| {
        if descriptor.is_write_only() != (direction == Direction::ToDriver) {
            return None;
        }
        let size = descriptor.len() as usize;
        for slice in GuestMemoryBackend::get_slices(memory, descriptor.addr(), size) {
            let slice = slice.ok()?;
            if iovecs.len() == limit {
                return None;
            }
            iovecs.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
        len = len.checked_add(size)?;
        Some(())
    });
    whole.filter(|()| len > 0).map(|()| len)
}

/// Reads a request; `None` when the chain is cut, of more than [`MAX_SEGMENTS`] descriptors,
/// outside guest memory, or has no room for the answer.
fn request(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    limit: usize,
) -> Option<Request> {
    let head = chain.head_index();
    let (mut question, mut answer) = (Vec::new(), None);
    walk(chain, |descriptor| {
        if descriptor.is_write_only() {
            answer = answer.or((descriptor.len() > 0).then_some(descriptor.addr()));
            return Some(());
        }
        let at = question.len();
        question.resize(limit.min(at + descriptor.len() as usize), 0);
        let buffer = descriptor.addr();
        memory.read_slice(&mut question[at..], buffer).ok()
    })?;
    Some(Request {
        head,
        question,
        answer: answer?,
    })
}

/// Shows each descriptor of a chain to `visit`; `None` when that says so, or the chain is cut or
/// has more than [`MAX_SEGMENTS`]. A table of empty descriptors would otherwise keep the device busy
/// for next to nothing.
fn walk(
    chain: DescriptorChain<&GuestMemoryMmap>,
    mut visit: impl FnMut(Descriptor) -> Option<()>,
) -> Option<()> {
    // The iterator just ends where a chain is broken: what tells is whether more was promised.
    let mut promised = true;
    for descriptor in chain.take(MAX_SEGMENTS) {
        visit(descriptor)?;
        promised = descriptor.has_next();
    }
    (!promised).then_some(())
}

#[cfg(test)]
mod tests;
