//! From the network to the guest: frames of the backend are read straight into the chains that
//! the driver has made available.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::backend::{Backend, HEADER_LEN};
use super::capture::Direction;
use super::checksum::{self, FLAGS, GSO_TYPE, NEEDS_CSUM};
use super::counters::RxCounters;
use super::filter::{Filter, Rules};
use super::hooks::Hooks;
use super::pair::Stop;
use crate::virtio::iovec::{self, scatter};
use crate::virtio::queue::{Buffers, Chain, MAX_SEGMENTS, Next, Queue};

/// Offset of `num_buffers` in `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).
const NUM_BUFFERS: usize = 10;

/// What is offered for a frame while none of the last [`MANY`] was longer. More takes the kernel longer
/// to look at than a frame of that size to copy.
const SHORT: usize = 2048;
/// Frames in a row that have to be short.
const MANY: u32 = 64;
/// Frames that are used together, but for the first, for which the driver may wait: its processor then
/// loses its copy of the index less often.
const BATCH: u16 = 8;
/// Iovecs of used chains that are kept before the others are moved to the front.
const KEPT: usize = 64;
/// Reads that may fail in one turn.
const MAX_ERRORS: u32 = 16;
/// As much of a frame as is looked at: both headers, with a VLAN tag.
const HEAD_LEN: usize = HEADER_LEN + ETHERNET_LEN + 2;
const ETHERNET_LEN: usize = 14;
/// The protocol that a VLAN tag has in its place (IEEE 802.1Q).
const VLAN: [u8; 2] = [0x81, 0];

/// How frames are laid into chains, as negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RxLayout {
    /// MRG_RXBUF: a frame may span several chains.
    pub mergeable: bool,
    /// The most bytes that a frame may have, with its header. More than that is always offered to
    /// the backend, which would cut a frame without a word; what is larger is dropped.
    pub largest_frame: usize,
}

/// A frame whose beginning lies in the chains.
#[derive(Debug)]
struct Spill {
    /// Of the whole frame.
    len: usize,
    /// Where the part in `spare` begins.
    at: usize,
}

/// The receive queue.
///
/// Chains are resolved once and kept until a frame has used them, so that a frame costs one
/// readv, however many chains are offered to it. A frame is copied only where it needed more than was
/// offered: the driver has fewer buffers than the largest frame takes, or this is the first long frame
/// after many short ones.
#[derive(Debug)]
pub struct RxQueue {
    queue: Queue,
    layout: RxLayout,
    /// Chains popped from the queue and not used yet.
    chains: VecDeque<Chain>,
    /// Their iovecs, from `first` on.
    buffers: Buffers,
    first: usize,
    /// Bytes in `chains`.
    capacity: usize,
    /// How many frames in a row were short.
    short: u32,
    /// How many frames there were before this turn.
    before: u64,
    /// The driver has made chains available since the ring was last found empty.
    supplied: bool,
    /// A frame that waits for more chains.
    spill: Option<Spill>,
    /// Its end.
    spare: Vec<u8>,
    /// What the driver wants to receive, and this queue's copy of it with its number.
    filter: Arc<Filter>,
    rules: (u32, Rules),
    /// What happens to each frame besides.
    pub hooks: Hooks,
    /// What has passed so far.
    pub counters: RxCounters,
}

impl RxQueue {
    /// Fills the chains of `queue` as `layout` says, with what `filter` lets pass.
    pub fn new(queue: Queue, layout: RxLayout, filter: Arc<Filter>) -> Self {
        Self {
            queue,
            layout,
            chains: VecDeque::new(),
            buffers: Buffers::default(),
            first: 0,
            capacity: 0,
            short: 0,
            before: 0,
            supplied: false,
            spill: None,
            spare: Vec::new(),
            filter,
            rules: (0, Rules::default()),
            hooks: Hooks::default(),
            counters: RxCounters::default(),
        }
    }

    /// Goes on with a frame that [`RxQueue::park`] has returned.
    pub fn with_frame(mut self, frame: Option<Vec<u8>>) -> Self {
        self.spill = frame.as_ref().map(|frame| Spill {
            len: frame.len(),
            at: 0,
        });
        self.spare = frame.unwrap_or_default();
        self
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Puts back what was popped and not used. Returns where the queue stands, and the frame that
    /// waits for more chains.
    pub fn park(mut self) -> (u16, Option<Vec<u8>>) {
        let frame = self.spill.take().map(|Spill { len, at }| {
            let mut frame = vec![0; at];
            // SAFETY: the iovecs are those of chains that lie in guest memory, which the queue
            // keeps mapped.
            unsafe { iovec::gather(&self.buffers.writable[self.first..], 0, &mut frame) };
            frame.extend_from_slice(&self.spare[..len - at]);
            frame
        });
        let heads: Vec<_> = self.chains.iter().map(|chain| chain.head).collect();
        self.queue.put_back(&heads);
        (self.queue.next_avail(), frame)
    }

    /// Receives up to `budget` frames. Says why it stopped, and whether to interrupt the driver.
    pub fn receive(&mut self, backend: &impl Backend, budget: usize) -> (Stop, bool) {
        self.queue.disable_notification();
        self.filter.refresh(&mut self.rules.0, &mut self.rules.1);
        self.before = self.counters.frames;
        let stop = self.fill(backend, budget);
        self.queue.flush_used();
        (stop, self.queue.needs_notification())
    }

    fn fill(&mut self, backend: &impl Backend, budget: usize) -> Stop {
        let (mut left, mut errors) = (budget, 0);
        while left > 0 {
            left -= 1;
            if let Some(stop) = self.gather(&mut left) {
                return stop;
            }
            if let Some(Spill { len, at }) = self.spill.take() {
                self.finish_spill(len, at);
                continue;
            }
            if let Some(until) = self.hooks.held_until() {
                self.counters.limited += 1;
                return Stop::Limited(until);
            }
            match self.read(backend) {
                // Not a frame; a tap never does this.
                Ok(len) if len < HEADER_LEN => self.counters.errors += 1,
                Ok(len) if self.is_too_large(len) => self.counters.too_large += 1,
                Ok(len) if !self.is_wanted(len) => self.counters.filtered += 1,
                Ok(len) if len <= self.capacity => self.deliver(len),
                Ok(len) => {
                    self.spill = Some(Spill {
                        len,
                        at: self.capacity,
                    })
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Stop::Idle,
                Err(error) => {
                    if self.counters.errors == 0 {
                        log::warn!("cannot receive from the network: {error}");
                    }
                    self.counters.errors += 1;
                    // One frame may be at fault, or the interface is gone: then there is nothing
                    // to do before its descriptor says more.
                    errors += 1;
                    if errors == MAX_ERRORS {
                        return Stop::Idle;
                    }
                }
            }
        }
        Stop::Budget
    }

    /// Whether a frame of `len` bytes may be cut, or needs more than the one chain that it may have.
    fn is_too_large(&self, len: usize) -> bool {
        len > self.layout.largest_frame || !self.layout.mergeable && len > self.capacity
    }

    /// Whether the driver takes the frame of `len` bytes that has just been read. A checksum that
    /// it would trip over is completed on the way, and flags that it has not negotiated are taken
    /// out.
    fn is_wanted(&mut self, len: usize) -> bool {
        let iovecs = &self.buffers.writable[self.first..];
        let mut head = [0; HEAD_LEN];
        // SAFETY: the iovecs are those of chains that lie in guest memory, which the queue keeps
        // mapped.
        let seen = unsafe { iovec::gather(iovecs, 0, &mut head[..len.min(HEAD_LEN)]) };
        if checksum::needs_csum(&head) && len <= self.capacity {
            // SAFETY: as above.
            if unsafe { checksum::complete_dhcp(iovecs, len) } {
                self.counters.dhcp_checksums += 1;
                head[FLAGS] &= !NEEDS_CSUM;
            }
        }
        let rules = &self.rules.1;
        let Some(flags) = rules.offloads.admit(head[FLAGS], head[GSO_TYPE]) else {
            return false;
        };
        if flags != head[FLAGS] {
            // SAFETY: as above.
            unsafe { scatter(iovecs, FLAGS, &[flags]) };
        }
        if seen < HEADER_LEN + ETHERNET_LEN {
            return true;
        }
        !rules.may_drop() || {
            let [.., a, b, c, d] = head;
            let tag = ([a, b] == VLAN).then_some(u16::from_be_bytes([c, d]));
            let to = std::array::from_fn(|n| head[HEADER_LEN + n]);
            rules.pass(self.filter.own(), to, tag)
        }
    }

    /// Takes chains from the ring until the next frame should fit, or the one that waits; fewer will
    /// do when there are no more. Says why it has none.
    fn gather(&mut self, left: &mut usize) -> Option<Stop> {
        while !self.enough() {
            match self.queue.pop(&mut self.buffers) {
                Next::Chain(chain)
                    if chain.readable.segments == 0 && chain.writable.len >= HEADER_LEN =>
                {
                    self.capacity += chain.writable.len;
                    self.chains.push_back(chain);
                    self.supplied = true;
                    continue;
                }
                Next::Chain(chain) => {
                    self.buffers.drop_last(&chain);
                    self.queue.add_used(chain.head, 0);
                    self.counters.bad_chains += 1;
                }
                Next::Bad => self.counters.bad_chains += 1,
                Next::Broken => return Some(Stop::Broken),
                Next::Empty if self.spill.is_none() && !self.chains.is_empty() => return None,
                Next::Empty if std::mem::take(&mut self.supplied) => {
                    let most = self.queue.size() - self.queue.size() / 4;
                    self.queue.enable_notification_at(most);
                    return Some(Stop::Empty);
                }
                // Buffers that came while notifications were off are found by going round again.
                Next::Empty if self.queue.enable_notification() => {
                    self.queue.disable_notification()
                }
                Next::Empty => {
                    self.counters.starved += 1;
                    return Some(Stop::Starved);
                }
            }
            // What a driver can repeat for ever costs budget.
            if *left == 0 {
                return Some(Stop::Budget);
            }
            *left -= 1;
        }
        None
    }

    fn enough(&self) -> bool {
        let wanted = match (&self.spill, self.layout.mergeable) {
            (Some(spill), _) => spill.len,
            (None, true) if self.short < MANY => self.layout.largest_frame,
            (None, true) => self.layout.largest_frame.min(SHORT),
            (None, false) => return !self.chains.is_empty(),
        };
        self.capacity >= wanted || self.ring_is_spent()
    }

    /// All that the driver can ever offer at once, or all that one readv takes, is here.
    fn ring_is_spent(&self) -> bool {
        self.chains.len() >= usize::from(self.queue.size())
            || self.buffers.writable.len() - self.first >= MAX_SEGMENTS
    }

    /// Reads a frame into the chains, or into one where they are not mergeable. What they might not
    /// hold goes on in `spare`, so that a frame is never cut.
    fn read(&mut self, backend: &impl Backend) -> io::Result<usize> {
        let chains = self.buffers.writable.len();
        let segments = match self.chains.front() {
            Some(chain) if !self.layout.mergeable => chain.writable.segments,
            _ => (chains - self.first).min(MAX_SEGMENTS),
        };
        let mut end = self.first + segments;
        if self.capacity <= self.layout.largest_frame && segments < MAX_SEGMENTS {
            if self.spare.len() < self.layout.largest_frame {
                // Not resized: pages of zeros that are not written to take no memory.
                self.spare = vec![0; self.layout.largest_frame];
            }
            self.buffers.writable.push(libc::iovec {
                iov_base: self.spare.as_mut_ptr().cast(),
                iov_len: self.spare.len(),
            });
            end += 1;
        }
        // SAFETY: the iovecs are those of chains that `Queue::pop` resolved inside guest memory,
        // which the queue keeps mapped, and at most one of `spare`, which stays as it is meanwhile.
        let result = unsafe { backend.read_frame(&self.buffers.writable[self.first..end]) };
        self.buffers.writable.truncate(chains);
        result
    }

    /// Moves the end of a frame from `spare` to where the driver looks for it, now that there are
    /// chains for it; or drops the frame, when the driver's whole ring cannot hold it.
    fn finish_spill(&mut self, len: usize, at: usize) {
        if self.capacity < len {
            self.counters.too_large += 1;
            return;
        }
        let end = &self.spare[..len - at];
        // SAFETY: the iovecs are those of chains that lie in guest memory, which the queue keeps
        // mapped.
        unsafe { scatter(&self.buffers.writable[self.first..], at, end) };
        self.deliver(len);
    }

    /// Gives the driver the chains that a frame of `len` bytes has filled.
    fn deliver(&mut self, len: usize) {
        let header = self.first;
        let (mut left, mut count) = (len, 0);
        // At least one chain, since a frame was read into it.
        while let Some(chain) = self.chains.pop_front() {
            let written = left.min(chain.writable.len);
            self.queue.push_used(chain.head, written as u32);
            self.first += chain.writable.segments;
            self.capacity -= chain.writable.len;
            left -= written;
            count += 1;
            if left == 0 {
                break;
            }
        }
        // The tap leaves num_buffers out, and a driver may have split the header anywhere.
        let iovecs = &self.buffers.writable[header..];
        // SAFETY: the iovecs are those of chains that lie in guest memory, which the queue keeps
        // mapped.
        unsafe { scatter(iovecs, NUM_BUFFERS, &u16::to_le_bytes(count)) };
        // SAFETY: as above. The driver does not have them yet.
        unsafe { self.hooks.passed(Direction::Received, iovecs, len) };
        let is_first = self.counters.frames == self.before;
        if is_first || self.queue.unflushed() >= BATCH {
            self.queue.flush_used();
        }
        self.short = match len {
            0..=SHORT => self.short.saturating_add(1),
            _ => 0,
        };
        self.counters.frames += 1;
        self.counters.chains += u64::from(count);
        self.counters.bytes += len as u64;
        if self.first == self.buffers.writable.len() {
            self.buffers.writable.clear();
            self.first = 0;
        } else if self.first >= KEPT {
            self.buffers.writable.drain(..self.first);
            self.first = 0;
        }
    }
}
