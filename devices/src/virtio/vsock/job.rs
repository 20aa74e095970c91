//! What the device's thread does: moves packets between the queues and the connections.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use vmm_sys_util::epoll::EventSet;

use super::connections::{Connections, Data, Outgoing};
use super::header::{self, Header};

use crate::disk::advance;
use crate::virtio::iovec::{Iovecs, gather, part, scatter, truncate};
use crate::virtio::queue::{Buffers, Chain, MAX_SEGMENTS, Next, Queue};
use crate::virtio::worker::{Job, Turn};
use crate::virtio::{ActiveQueue, Interrupt};

/// The queues, by their numbers: for the guest to receive and to send, and of events.
const RX: u32 = 0;
const TX: u32 = 1;
const EVENT: u32 = 2;
/// The token of the host's sockets.
const HOST: u32 = 3;
/// Packets of each direction in one turn.
const BUDGET: usize = 64;
/// Packets of the guest's that are used together.
const BATCH: u16 = 16;
/// The event that all connections are gone (virtio 1.2, 5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// The job of the device's thread.
#[derive(Debug)]
pub struct VsockJob {
    /// By [`RX`], [`TX`] and [`EVENT`], which another monitor may have kept.
    queues: Vec<ActiveQueue>,
    connections: Connections,
    host: RawFd,
    buffers: Buffers,
    room: Room,
    /// The host's sockets may have events.
    has_events: bool,
    interrupt: Arc<dyn Interrupt>,
    /// The driver is to hear that all connections are gone.
    must_reset: bool,
    /// A queue is invalid: only a reset helps.
    is_broken: bool,
}

/// Why a queue was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// Nothing is left to do until something happens.
    Idle,
    /// There may be more.
    Budget,
    /// The queue is invalid.
    Broken,
}

/// The next chain, alone in `buffers`, or why there is none.
fn next(queue: &mut Queue, buffers: &mut Buffers) -> Result<Chain, Stop> {
    for _ in 0..BUDGET {
        buffers.clear();
        match queue.pop(buffers) {
            Next::Chain(chain) => return Ok(chain),
            Next::Bad => {}
            Next::Empty if queue.enable_notification() => {}
            Next::Empty => return Err(Stop::Idle),
            Next::Broken => return Err(Stop::Broken),
        }
    }
    Err(Stop::Budget)
}

/// Buffers of the guest's, each for one packet.
#[derive(Debug, Default)]
struct Room {
    /// Their chains, and how much data fits each.
    heads: Vec<u16>,
    lens: Vec<usize>,
    /// Where their headers go, and where their data, one after the other.
    headers: Iovecs,
    data: Iovecs,
}

impl Room {
    fn clear(&mut self) {
        self.heads.clear();
        self.lens.clear();
        self.headers.clear();
        self.data.clear();
    }

    /// Adds the buffer of a chain that was popped. False where no data fit it.
    fn add(&mut self, chain: &Chain, iovecs: &[libc::iovec]) -> bool {
        let len = chain.writable.len.saturating_sub(header::LEN);
        if len > 0 {
            self.heads.push(chain.head);
            self.lens.push(len);
            part(iovecs, 0, header::LEN, &mut self.headers);
            part(iovecs, header::LEN, len, &mut self.data);
        }
        len > 0
    }

    /// Whether another buffer is of use for so much data.
    fn has_place(&self, most: usize) -> bool {
        self.lens.iter().sum::<usize>() < most && self.data.len() < MAX_SEGMENTS
    }

    /// Gives the driver buffer `index`, whose data are there, with their header.
    fn put(&self, index: usize, packet: Header, queue: &mut Queue) {
        // SAFETY: the iovecs are those of chains that `Queue::pop` resolved inside guest memory, which
        // the queue keeps mapped.
        unsafe { scatter(&self.headers, index * header::LEN, &packet.to_bytes()) };
        queue.push_used(self.heads[index], header::LEN as u32 + packet.len);
    }
}

impl VsockJob {
    /// Serves `connections`, whose sockets have events while `host` is readable. With `must_reset` the
    /// driver hears first that those which it knows of are gone.
    pub fn new(
        queues: Vec<ActiveQueue>,
        connections: Connections,
        host: RawFd,
        interrupt: Arc<dyn Interrupt>,
        must_reset: bool,
    ) -> Self {
        Self {
            queues,
            connections,
            host,
            buffers: Buffers::default(),
            room: Room::default(),
            has_events: true,
            interrupt,
            must_reset,
            is_broken: false,
        }
    }

    /// Where the queues stand, the connections, and whether the driver has yet to hear of a reset.
    pub(super) fn park(self) -> (Vec<Option<u16>>, Connections, bool) {
        let positions = self.queues.iter();
        let positions = positions.map(|queue| Some(queue.queue.next_avail()));
        (positions.collect(), self.connections, self.must_reset)
    }

    /// Gives up what would have taken too long if so much time had passed.
    #[cfg(test)]
    pub(super) fn expire(&mut self, passed: std::time::Duration) {
        self.connections.expire(Instant::now() + passed);
    }

    /// Takes packets of the guest's.
    fn receive(&mut self) -> Stop {
        let queue = &mut self.queues[TX as usize].queue;
        queue.disable_notification();
        for _ in 0..BUDGET {
            // It goes on when the driver has taken some.
            if self.connections.is_clogged() {
                return Stop::Idle;
            }
            let chain = match next(queue, &mut self.buffers) {
                Ok(chain) => chain,
                Err(stop) => return stop,
            };
            let data = &mut *self.buffers.readable;
            let mut bytes = [0; header::LEN];
            // SAFETY: the iovecs are those of a chain that `Queue::pop` resolved inside guest memory,
            // which the queue keeps mapped.
            let read = unsafe { gather(data, 0, &mut bytes) };
            let packet = Header::from_bytes(&bytes);
            if read == bytes.len() && packet.len as usize <= chain.readable.len - header::LEN {
                advance(data, header::LEN);
                truncate(data, packet.len as usize);
                // SAFETY: as above.
                unsafe { self.connections.handle(&packet, data) };
            }
            queue.push_used(chain.head, 0);
            if queue.unflushed() >= BATCH {
                queue.flush_used();
            }
        }
        Stop::Budget
    }

    /// Sends packets to the guest.
    fn send(&mut self) -> Stop {
        let mut sent = 0;
        while sent < BUDGET {
            if !self.connections.has_packets() {
                return Stop::Idle;
            }
            let queue = &mut self.queues[RX as usize].queue;
            let chain = match next(queue, &mut self.buffers) {
                Ok(chain) => chain,
                Err(stop) => return stop,
            };
            sent += 1;
            self.room.clear();
            if !self.room.add(&chain, &self.buffers.writable) {
                queue.push_used(chain.head, 0);
                continue;
            }
            match self.connections.next() {
                Some(Outgoing::Packet(packet)) => self.room.put(0, packet, queue),
                Some(Outgoing::Data(data)) => sent += self.send_data(&data).saturating_sub(1),
                None => {
                    queue.undo_pop();
                    return Stop::Idle;
                }
            }
        }
        Stop::Budget
    }

    /// Reads data into the buffer that there is, and further ones if it may need them: one packet in
    /// each. Returns how many packets.
    fn send_data(&mut self, data: &Data) -> usize {
        let (queue, room) = (&mut self.queues[RX as usize].queue, &mut self.room);
        while data.is_streaming && room.has_place(data.most) {
            self.buffers.clear();
            let Next::Chain(chain) = queue.pop(&mut self.buffers) else {
                break;
            };
            if !room.add(&chain, &self.buffers.writable) {
                queue.push_used(chain.head, 0);
                break;
            }
        }
        truncate(&mut room.data, data.most);
        room.data.truncate(MAX_SEGMENTS);
        // SAFETY: the iovecs are those of chains that `Queue::pop` resolved inside guest memory, which
        // the queue keeps mapped.
        let (mut left, header) = unsafe { self.connections.read(data, &room.data) };
        let mut packets = 0;
        while left > 0 {
            let len = left.min(room.lens[packets]);
            let packet = Header {
                len: len as u32,
                ..header
            };
            room.put(packets, packet, queue);
            left -= len;
            packets += 1;
        }
        queue.put_back(&room.heads[packets..]);
        packets
    }

    /// Says that all connections are gone.
    fn announce(&mut self) -> Stop {
        let Some(ActiveQueue { queue, .. }) = self.queues.get_mut(EVENT as usize) else {
            return Stop::Idle;
        };
        for _ in 0..BUDGET {
            let chain = match next(queue, &mut self.buffers) {
                Ok(chain) => chain,
                Err(stop) => return stop,
            };
            let fits = chain.writable.len >= TRANSPORT_RESET.len();
            let len = if fits { TRANSPORT_RESET.len() } else { 0 };
            // SAFETY: the iovecs are those of a chain that `Queue::pop` resolved inside guest memory,
            // which the queue keeps mapped.
            unsafe { scatter(&self.buffers.writable, 0, &TRANSPORT_RESET[..len]) };
            queue.add_used(chain.head, len as u32);
            if fits {
                self.must_reset = false;
                return Stop::Idle;
            }
        }
        Stop::Budget
    }

    /// One turn of everything. Whether there is more to do.
    fn serve(&mut self) -> bool {
        if std::mem::take(&mut self.has_events)
            && let Err(error) = self.connections.look()
            && error.kind() != io::ErrorKind::Interrupted
        {
            log::error!("cannot look at the connections of vsock: {error}");
        }
        self.connections.accept();
        let mut stops = [Stop::Idle; 3];
        if self.must_reset {
            stops[EVENT as usize] = self.announce();
        }
        stops[TX as usize] = self.receive();
        let was_clogged = self.connections.is_clogged();
        stops[RX as usize] = self.send();
        let is_free_again = was_clogged && !self.connections.is_clogged();
        for (index, queue) in (0..).zip(&mut self.queues) {
            queue.queue.flush_used();
            if queue.queue.needs_notification() {
                self.interrupt.queue(index);
            }
        }
        if stops.contains(&Stop::Broken) {
            self.is_broken = true;
            self.connections.close();
            self.interrupt.needs_reset();
            return false;
        }
        is_free_again || stops.contains(&Stop::Budget) || self.connections.has_more()
    }
}

impl Job for VsockJob {
    fn wakeups(&self) -> Vec<(RawFd, u32, EventSet)> {
        let kick =
            |(index, queue): (u32, &ActiveQueue)| (queue.kick.as_raw_fd(), index, EventSet::IN);
        let mut wakeups: Vec<_> = (0..).zip(&self.queues).map(kick).collect();
        wakeups.push((self.host, HOST, EventSet::IN));
        wakeups
    }

    /// A driver that has lost a queue has no use for what comes from the host.
    fn varying(&self) -> Option<(RawFd, u32, EventSet)> {
        let events = match self.is_broken {
            true => EventSet::empty(),
            false => EventSet::IN,
        };
        Some((self.host, HOST, events))
    }

    fn wake(&mut self, token: u32, _events: EventSet) {
        match self.queues.get(token as usize) {
            Some(queue) => drop(queue.kick.read()),
            None => self.has_events = true,
        }
    }

    fn timeout(&mut self) {
        self.connections.expire(Instant::now());
    }

    fn turn(&mut self) -> Turn {
        let more = !self.is_broken && self.serve();
        Turn {
            more,
            wake_at: self.connections.tick,
        }
    }
}
