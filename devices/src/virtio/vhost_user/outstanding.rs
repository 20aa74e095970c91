//! Which chains a driver waits for whose server is dead.
//!
//! The rings say how many those are. Which of them the server had taken, it writes into a record as it
//! does so ("Inflight I/O tracking" in the specification). The others are the last that the driver has
//! made available, since a server takes them in order.
//!
//! Without a record it is a guess from the rings, which is right for a server that uses the chains in
//! the order in which they came. With another one, a chain may be missed that the driver has made more
//! chains available after than the ring has places.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::virtio::QueueConfig;

/// The record of a server of the chains in flight, as the specification lays it out for split queues.
/// It is read and not mapped: the file is the server's, which may cut it off.
#[derive(Debug)]
pub struct Inflight {
    file: File,
    offset: u64,
    queue_size: u16,
}

// Of a queue's part of it, in bytes.
const HEADER_LEN: usize = 16;
const STATE_LEN: usize = 16;
const LAST_BATCH_HEAD: usize = 12;
const USED_INDEX: usize = 14;
/// In a chain's state: the next of its batch. Its first byte is 1 while it is in flight.
const NEXT: usize = 6;
/// What the parts are aligned to.
const ALIGNMENT: u64 = 64;

impl Inflight {
    /// The record in a file that a server was started with, for queues of at most `queue_size`.
    pub fn new(file: File, queue_size: u16) -> Self {
        Self::at(file, 0, queue_size)
    }

    /// The same that begins at `offset`.
    pub(super) fn at(file: File, offset: u64, queue_size: u16) -> Self {
        Self {
            file,
            offset,
            queue_size,
        }
    }

    /// Bytes of a record for so many queues.
    pub fn len(queues: u16, queue_size: u16) -> u64 {
        let part = HEADER_LEN + usize::from(queue_size) * STATE_LEN;
        u64::from(queues) * (part as u64).next_multiple_of(ALIGNMENT)
    }

    /// The heads in flight of the queue `index`, of which the driver has seen `used` chains used.
    fn heads(&self, index: u16, used: u16) -> Option<Vec<u16>> {
        let mut part = vec![0; HEADER_LEN + usize::from(self.queue_size) * STATE_LEN];
        let at = self.offset.checked_add(Self::len(index, self.queue_size))?;
        self.file.read_exact_at(&mut part, at).ok()?;
        let word = |at: usize| u16::from_ne_bytes([part[at], part[at + 1]]);
        let state = |head: u16| HEADER_LEN + usize::from(head) * STATE_LEN;
        let size = self.queue_size;
        let mut heads: Vec<_> = (0..size).filter(|&head| part[state(head)] == 1).collect();
        // The server died between showing the driver the last ones and noting it.
        let shown = used.wrapping_sub(word(USED_INDEX));
        let mut head = word(LAST_BATCH_HEAD);
        for _ in 0..shown.min(size) {
            if head >= size {
                break;
            }
            heads.retain(|&other| other != head);
            head = word(state(head) + NEXT);
        }
        Some(heads)
    }
}

impl AsRawFd for Inflight {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// What the driver waits for in one queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outstanding {
    /// Chains that have been taken from the available ring.
    pub heads: Vec<u16>,
    /// Where those begin there that have not.
    pub next_avail: u16,
}

// The split virtqueue's layout (virtio 1.2, 2.7.6 and 2.7.8), in bytes.
const INDEX_OFFSET: u64 = 2;
const RING_OFFSET: u64 = 4;

impl Outstanding {
    /// Finds it out for the queue `index`, from the server's record if there is one. `None` where the
    /// driver's indices make no sense.
    pub fn find(
        memory: &GuestMemoryMmap,
        index: u16,
        config: &QueueConfig,
        inflight: Option<&Inflight>,
    ) -> Option<Self> {
        let rings = Rings { memory, config };
        let used = used_index(memory, config.used)?;
        let available = rings.word(config.available + INDEX_OFFSET)?;
        let count = available.wrapping_sub(used);
        if count > config.size {
            return None;
        }
        let recorded = inflight.and_then(|inflight| inflight.heads(index, used));
        let fits = |heads: &Vec<u16>| {
            let in_table = heads.iter().all(|&head| head < config.size);
            in_table && heads.len() <= usize::from(count)
        };
        Some(match recorded.filter(fits) {
            Some(heads) => Self {
                next_avail: used.wrapping_add(heads.len() as u16),
                heads,
            },
            None => Self {
                heads: rings.guess(available, used),
                next_avail: available,
            },
        })
    }
}

/// The used index of the ring at this address.
pub(super) fn used_index(memory: &GuestMemoryMmap, used: u64) -> Option<u16> {
    let at = GuestAddress(used.checked_add(INDEX_OFFSET)?);
    let index = memory.load::<u16>(at, Ordering::Acquire);
    index.ok().map(u16::from_le)
}

/// The rings of a queue, which a driver may write what it likes to.
struct Rings<'a> {
    memory: &'a GuestMemoryMmap,
    config: &'a QueueConfig,
}

impl Rings<'_> {
    fn word(&self, at: u64) -> Option<u16> {
        let word = self.memory.load::<u16>(GuestAddress(at), Ordering::Acquire);
        word.ok().map(u16::from_le)
    }

    /// The heads that have been made available more recently than used: no more than there are
    /// outstanding, and first those for which that was by the most.
    fn guess(&self, available: u16, used: u16) -> Vec<u16> {
        let (size, config) = (self.config.size, self.config);
        let slot = |index: u16, len: u64| RING_OFFSET + u64::from(index % size) * len;
        // How long ago, in entries of its ring, each head was there last.
        let last = |end: u16, at: &dyn Fn(u16) -> u64| {
            let mut last = HashMap::<u16, u16>::new();
            for age in 1..=size {
                let index = end.wrapping_sub(age);
                if let Some(head) = self.word(at(index)).filter(|&head| head < size) {
                    last.entry(head).or_insert(age);
                }
            }
            last
        };
        let offered = last(available, &|index| config.available + slot(index, 2));
        let done = last(used, &|index| config.used + slot(index, 8));
        let outstanding = available.wrapping_sub(used);
        // By how many entries it was offered later than used. Where a fresh ring has zeros still, head 0
        // seems to stand in both at the same place.
        let lead = |head, age| {
            let done = done.get(head).copied();
            let done = done.map_or(i32::from(u16::MAX), i32::from);
            i32::from(outstanding) - i32::from(age) + done
        };
        let leads = offered.iter().map(|(head, &age)| (lead(head, age), *head));
        let mut heads: Vec<_> = leads.filter(|&(lead, _)| lead > 0).collect();
        heads.sort_unstable_by(|one, other| other.cmp(one));
        heads.truncate(outstanding.into());
        heads.into_iter().map(|(_, head)| head).collect()
    }
}

#[cfg(test)]
mod tests;
