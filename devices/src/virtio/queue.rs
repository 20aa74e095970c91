//! A virtqueue in use: guest-supplied descriptor chains become iovecs, or are bad.
//!
//! The rings themselves are walked by the `virtio-queue` crate. This module adds what a device
//! that passes guest memory to the kernel needs: every address is resolved once, against the
//! guest's memory, and nothing that a driver writes there is believed twice.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Error, Queue as Rings, QueueOwnedT, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    VolatileSlice,
};

use super::iovec::Iovecs;
use crate::bus::BoxError;

/// The most pieces that one readv or writev takes (UIO_MAXIOV); a longer chain is bad.
pub const MAX_SEGMENTS: usize = 1024;

/// How the driver set up a queue, register by register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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

/// The buffers of one or more chains, where they lie in guest memory.
#[derive(Debug, Default)]
pub struct Buffers {
    /// What the driver wrote for the device to read.
    pub readable: Iovecs,
    /// What the device writes for the driver to read.
    pub writable: Iovecs,
}

impl Buffers {
    /// Forgets all of them.
    pub fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
    }

    /// Forgets those of the chain that was popped last.
    pub fn drop_last(&mut self, chain: &Chain) {
        let readable = self.readable.len() - chain.readable.segments;
        self.readable.truncate(readable);
        let writable = self.writable.len() - chain.writable.segments;
        self.writable.truncate(writable);
    }
}

/// A descriptor chain whose buffers all lie in guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// The index that gives the chain back to the driver.
    pub head: u16,
    /// What the device reads of it.
    pub readable: Part,
    /// What the device writes of it.
    pub writable: Part,
}

/// The readable or the writable part of a chain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Bytes in all its buffers.
    pub len: usize,
    /// How many iovecs it has.
    pub segments: usize,
}

/// The next thing in the available ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// A chain.
    Chain(Chain),
    /// A chain that is not to be used. It has been completed with length 0 where it has a valid
    /// head.
    Bad,
    /// Nothing there.
    Empty,
    /// The avail index is invalid (an available index that jumped): it stays so until a reset.
    Broken,
}

/// A virtqueue whose rings lie in guest memory.
#[derive(Debug)]
pub struct Queue {
    rings: Rings,
    memory: Arc<GuestMemoryMmap>,
    /// Used elements that the driver does not see yet.
    unflushed: u16,
    /// The used index at the last look at whether the driver wants an interrupt.
    signalled: Wrapping<u16>,
}

// The split virtqueue's layout (virtio 1.2, 2.7.6 and 2.7.8), in bytes.
const AVAILABLE_HEADER_LEN: u64 = 4;
const AVAILABLE_ELEMENT_LEN: u64 = 2;
const USED_HEADER_LEN: u64 = 4;
const USED_ELEMENT_LEN: u64 = 8;
/// Offset of `idx` in either ring.
const INDEX_OFFSET: u64 = 2;

impl Queue {
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
        let mut rings = Rings::new(max_size)?;
        rings.try_set_size(config.size)?;
        rings.try_set_desc_table_address(GuestAddress(config.descriptors))?;
        rings.try_set_avail_ring_address(GuestAddress(config.available))?;
        rings.try_set_used_ring_address(GuestAddress(config.used))?;
        rings.set_event_idx(event_idx);
        rings.set_ready(config.ready);
        if !rings.is_valid(memory.as_ref()) {
            return Err(Error::QueueNotReady);
        }
        Ok(Self {
            rings,
            memory,
            unflushed: 0,
            signalled: Wrapping(0),
        })
    }

    /// A queue with the same descriptors and used ring in which the chains with these heads are
    /// available, whatever the driver's ring says: chains that another process has taken.
    ///
    /// # Errors
    ///
    /// As [`Queue::new`]; and where there is no memory for a ring.
    pub fn of_heads(
        config: &QueueConfig,
        max_size: u16,
        memory: &GuestMemoryMmap,
        heads: &[u16],
    ) -> Result<Self, BoxError> {
        // Another region, after the guest's own. The guest can reach it by its descriptors, as if it had
        // written its own ring.
        let at = (memory.last_addr().0 | 0xfff).checked_add(1);
        let at = at.ok_or("guest memory has no end")?;
        let len = AVAILABLE_HEADER_LEN as usize + 2 * usize::from(config.size) + 2;
        let region = GuestRegionMmap::from_range(GuestAddress(at), len.max(0x1000), None)?;
        let memory = Arc::new(memory.insert_region(Arc::new(region))?);
        memory.write_obj(
            (heads.len() as u16).to_le(),
            GuestAddress(at + INDEX_OFFSET),
        )?;
        for (head, slot) in heads.iter().zip(0..) {
            let slot = at + AVAILABLE_HEADER_LEN + slot * AVAILABLE_ELEMENT_LEN;
            memory.write_obj(head.to_le(), GuestAddress(slot))?;
        }
        let config = QueueConfig {
            available: at,
            ..*config
        };
        let mut queue = Self::new(&config, max_size, false, memory)?;
        queue.resume(0);
        Ok(queue)
    }

    /// Goes on where a queue with the same rings has stopped: at this index of the available ring,
    /// and where the used ring ends.
    pub fn resume(&mut self, next_avail: u16) {
        let used = self.rings.used_idx(self.memory.as_ref(), Ordering::Acquire);
        self.signalled = used.unwrap_or_default();
        self.rings.set_next_used(self.signalled.0);
        self.rings.set_next_avail(next_avail);
    }

    /// The index in the available ring of the chain that is popped next.
    pub fn next_avail(&self) -> u16 {
        self.rings.next_avail()
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.rings.size()
    }

    /// Takes the next chain from the available ring and appends its buffers to `buffers`. It takes
    /// no more than one, so that the caller can bound what it does for a driver that has any number
    /// of them.
    ///
    /// The iovecs point into guest memory and stay valid as long as the queue's `Arc` of it.
    pub fn pop(&mut self, buffers: &mut Buffers) -> Next {
        let chain = match self.rings.iter(self.memory.as_ref()) {
            Ok(mut available) => match available.next() {
                Some(chain) => chain,
                None => return Next::Empty,
            },
            Err(_) => return Next::Broken,
        };
        let mut popped = Chain {
            head: chain.head_index(),
            ..Chain::default()
        };
        if gather(&self.memory, chain, buffers, &mut popped).is_none() {
            buffers.drop_last(&popped);
            self.add_used(popped.head, 0);
            return Next::Bad;
        }
        Next::Chain(popped)
    }

    /// Whether the driver has made nothing available that has not been popped.
    pub fn is_empty(&self) -> bool {
        let available = self
            .rings
            .avail_idx(self.memory.as_ref(), Ordering::Acquire);
        available.is_ok_and(|index| index.0 == self.rings.next_avail())
    }

    /// Puts the chain that was popped last back, to be popped again.
    pub fn undo_pop(&mut self) {
        self.rings.go_to_previous_position();
    }

    /// Puts the chains with these heads back, all that have been popped and not used.
    pub fn put_back(&mut self, heads: &[u16]) {
        let size = self.rings.size();
        let first = self.rings.next_avail().wrapping_sub(heads.len() as u16);
        let available = |n: usize| {
            let slot = first.wrapping_add(n as u16) % size;
            let at = self.rings.avail_ring()
                + AVAILABLE_HEADER_LEN
                + u64::from(slot) * AVAILABLE_ELEMENT_LEN;
            self.memory.read_obj(GuestAddress(at)).map(u16::from_le)
        };
        if (0..)
            .zip(heads)
            .all(|(n, &head)| available(n).ok() == Some(head))
        {
            return self.rings.set_next_avail(first);
        }
        // Bad chains stood between them, and have been completed. So are these, without a byte.
        for &head in heads {
            self.push_used(head, 0);
        }
        self.flush_used();
    }

    /// Gives a chain back to the driver, with `len` bytes written into it.
    pub fn add_used(&mut self, head: u16, len: u32) {
        self.push_used(head, len);
        self.flush_used();
    }

    /// Lays a chain into the used ring where the driver does not see it before
    /// [`Queue::flush_used`]. The chains of one frame have to become visible together: a driver that
    /// polls gives up a frame whose later buffers are not there yet.
    pub fn push_used(&mut self, head: u16, len: u32) {
        // A head that the driver made up has nothing to give back.
        if head >= self.rings.size() {
            return;
        }
        let slot = u64::from(self.next_used().0 % self.rings.size());
        let at = self.rings.used_ring() + USED_HEADER_LEN + slot * USED_ELEMENT_LEN;
        // The ring was found inside guest memory when it was taken into use.
        // `id` and `len`, 32 bits each.
        let element = u64::from(head) | u64::from(len) << 32;
        let _ = self.memory.write_obj(element.to_le(), GuestAddress(at));
        self.unflushed += 1;
    }

    /// How much has been pushed that the driver does not see yet.
    pub fn unflushed(&self) -> u16 {
        self.unflushed
    }

    /// Shows the driver what has been pushed.
    pub fn flush_used(&mut self) {
        let next = self.next_used();
        self.unflushed = 0;
        self.rings.set_next_used(next.0);
        let index = GuestAddress(self.rings.used_ring() + INDEX_OFFSET);
        let _ = self.memory.store(next.0.to_le(), index, Ordering::Release);
    }

    fn next_used(&self) -> Wrapping<u16> {
        Wrapping(self.rings.next_used()) + Wrapping(self.unflushed)
    }

    /// Asks the driver not to notify while the device looks at the ring anyway.
    pub fn disable_notification(&mut self) {
        let _ = self.rings.disable_notification(self.memory.as_ref());
    }

    /// Asks the driver to notify again. True when buffers came in the meantime, for which no
    /// notification may come.
    pub fn enable_notification(&mut self) -> bool {
        self.rings
            .enable_notification(self.memory.as_ref())
            .unwrap_or(false)
    }

    /// Asks the driver to notify of the `count`th chain from here on, where it can be asked for one
    /// (EVENT_IDX). It may have made that one available just before: whoever asks looks again by
    /// the clock.
    pub fn enable_notification_at(&mut self, count: u16) {
        if self.rings.event_idx_enabled() {
            let index = self.next_avail().wrapping_add(count).wrapping_sub(1);
            let at = USED_HEADER_LEN + u64::from(self.size()) * USED_ELEMENT_LEN;
            let at = GuestAddress(self.rings.used_ring() + at);
            let _ = self.memory.store(index.to_le(), at, Ordering::Relaxed);
        }
    }

    /// Whether the driver wants an interrupt for what it was shown since the last call, if
    /// anything has.
    pub fn needs_notification(&mut self) -> bool {
        let new = Wrapping(self.rings.next_used());
        let old = std::mem::replace(&mut self.signalled, new);
        if new == old {
            return false;
        }
        // What was flushed has to be visible before the driver's wish is read (2.7.10.1).
        fence(Ordering::SeqCst);
        let available = self.rings.avail_ring();
        let load = |at| self.memory.load::<u16>(GuestAddress(at), Ordering::Relaxed);
        if !self.rings.event_idx_enabled() {
            let flags = load(available).map_or(0, u16::from_le);
            return u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0;
        }
        let at =
            available + AVAILABLE_HEADER_LEN + u64::from(self.rings.size()) * AVAILABLE_ELEMENT_LEN;
        let event = Wrapping(load(at).map_or(0, u16::from_le));
        new - event - Wrapping(1) < new - old
    }
}

/// Appends the chain's buffers to `buffers` and says in `popped` how many; `None` when the chain is
/// cut, empty, outside guest memory, or of more than [`MAX_SEGMENTS`] descriptors or pieces: a table
/// of empty descriptors would otherwise keep the device busy for next to nothing.
fn gather(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    buffers: &mut Buffers,
    popped: &mut Chain,
) -> Option<()> {
    // The iterator just ends where a chain is broken: what counts is whether more was promised.
    let mut promised = true;
    for descriptor in chain.take(MAX_SEGMENTS) {
        let (part, iovecs) = match descriptor.is_write_only() {
            true => (&mut popped.writable, &mut buffers.writable),
            false => (&mut popped.readable, &mut buffers.readable),
        };
        let size = descriptor.len() as usize;
        let mut push = |slice: VolatileSlice<'_>| {
            let has_room = part.segments < MAX_SEGMENTS;
            if has_room {
                part.segments += 1;
                iovecs.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
            has_room.then_some(())
        };
        // Nearly every buffer lies in one region, which is found out sooner than where its parts lie.
        let region = memory.to_region_addr(descriptor.addr());
        let whole = region.and_then(|(region, at)| region.get_slice(at, size).ok());
        match whole {
            Some(slice) if size > 0 => push(slice)?,
            _ => {
                for slice in GuestMemoryBackend::get_slices(memory, descriptor.addr(), size) {
                    push(slice.ok()?)?;
                }
            }
        }
        part.len = part.len.checked_add(size)?;
        promised = descriptor.has_next();
    }
    let is_empty = popped.readable.len == 0 && popped.writable.len == 0;
    (!promised && !is_empty).then_some(())
}

#[cfg(test)]
mod tests;
