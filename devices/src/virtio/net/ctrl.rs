//! The control queue (virtio 1.2, 5.1.6.5): what the driver commands, and how much of it the host
//! can do. A command is answered with OK only where it has the effect that the driver expects.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_net as spec;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::backend::Backend;
use super::config::ConfigSpace;
use super::counters::CtrlCounters;
use super::features::Features;
use super::filter::Filter;
use super::pair::Stop;
use crate::lock;
use crate::virtio::Interrupt;
use crate::virtio::iovec::{gather, scatter};
use crate::virtio::queue::{Buffers, Next, Queue};
use crate::virtio::worker::{Job, Turn};

/// Bytes of a command that are looked at. The longest is a table of MAC addresses: one of more than
/// 1,300 is refused.
const COMMAND_LEN: usize = 8192;
/// Commands that one turn handles.
const BUDGET: usize = 64;
/// Bytes of a MAC address.
const MAC_LEN: usize = 6;

/// What a driver's commands may do on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Permissions {
    /// The macvtap's MAC address follows the driver's.
    pub change_mac: bool,
    /// The host delivers frames to any address (a macvtap in passthru mode), so that a driver
    /// that asks for them gets them.
    pub allow_promisc: bool,
}

/// Everything that commands act on.
#[derive(Debug)]
pub struct Control<B> {
    /// One for each pair that the driver has set up, from the first on without a gap.
    pub backends: Vec<Arc<B>>,
    /// Where the MAC address stands.
    pub config: Arc<ConfigSpace>,
    /// Which frames the driver wants.
    pub filter: Arc<Filter>,
    /// What the driver has agreed to.
    pub features: Features,
    /// What it may do.
    pub permissions: Permissions,
}

impl<B: Backend> Control<B> {
    /// Carries out one command; false when it is unknown, wrong, or has not all of its effect.
    pub fn execute(&self, command: &[u8]) -> bool {
        let Some((&[class, kind], operand)) = command.split_first_chunk() else {
            return false;
        };
        match (u32::from(class), u32::from(kind)) {
            (spec::VIRTIO_NET_CTRL_RX, kind) if self.has(Features::CTRL_RX) => {
                self.set_mode(kind, operand)
            }
            (spec::VIRTIO_NET_CTRL_MAC, spec::VIRTIO_NET_CTRL_MAC_TABLE_SET)
                if self.has(Features::CTRL_RX) =>
            {
                self.set_table(operand)
            }
            (spec::VIRTIO_NET_CTRL_MAC, spec::VIRTIO_NET_CTRL_MAC_ADDR_SET)
                if self.has(Features::CTRL_MAC_ADDR) =>
            {
                self.set_mac(operand)
            }
            (spec::VIRTIO_NET_CTRL_VLAN, kind) if self.has(Features::CTRL_VLAN) => {
                self.set_vlan(kind, operand)
            }
            (spec::VIRTIO_NET_CTRL_ANNOUNCE, spec::VIRTIO_NET_CTRL_ANNOUNCE_ACK)
                if self.has(Features::GUEST_ANNOUNCE) =>
            {
                self.config.announced();
                true
            }
            (spec::VIRTIO_NET_CTRL_MQ, spec::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET)
                if self.has(Features::MQ) =>
            {
                let pairs = operand.try_into().map(u16::from_le_bytes);
                pairs.is_ok_and(|pairs| self.set_pairs(pairs))
            }
            (spec::VIRTIO_NET_CTRL_GUEST_OFFLOADS, spec::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET)
                if self.has(Features::CTRL_GUEST_OFFLOADS) =>
            {
                self.set_offloads(operand)
            }
            _ => false,
        }
    }

    fn has(&self, feature: Features) -> bool {
        self.features.contains(feature)
    }

    fn set_pairs(&self, pairs: u16) -> bool {
        let done = use_pairs(&self.backends, pairs.into());
        if done {
            self.filter.change(|rules| rules.pairs = pairs);
        }
        done
    }

    /// A receive mode (5.1.6.5.1): one byte, 0 or 1. The host delivers all groups anyway.
    fn set_mode(&self, kind: u32, operand: &[u8]) -> bool {
        let &[value @ (0 | 1)] = operand else {
            return false;
        };
        let on = value == 1;
        match kind {
            spec::VIRTIO_NET_CTRL_RX_PROMISC => {
                self.filter.change_by_driver(|rules| rules.promiscuous = on);
                !on || self.permissions.allow_promisc
            }
            spec::VIRTIO_NET_CTRL_RX_ALLMULTI => {
                self.filter
                    .change_by_driver(|rules| rules.all_multicast = on);
                true
            }
            _ => false,
        }
    }

    /// The MAC filter table (5.1.6.5.2): addresses, then groups, each list after its length in
    /// 32 bits. The host delivers to other addresses than the NIC's only where it delivers to any.
    fn set_table(&self, operand: &[u8]) -> bool {
        let Some((unicast, rest)) = mac_list(operand) else {
            return false;
        };
        let Some((multicast, [])) = mac_list(rest) else {
            return false;
        };
        self.filter
            .change_by_driver(|rules| rules.set_table(&unicast, &multicast));
        let own = self.config.mac();
        self.permissions.allow_promisc || unicast.iter().all(|&mac| mac == own)
    }

    fn set_mac(&self, operand: &[u8]) -> bool {
        let Ok(mac) = <[u8; MAC_LEN]>::try_from(operand) else {
            return false;
        };
        let is_usable = mac[0] & 1 == 0 && mac != [0; MAC_LEN];
        let may_have = is_usable && self.permissions.change_mac || mac == self.config.mac();
        if !may_have {
            log::debug!("the driver may not have the MAC address {mac:02x?}");
            return false;
        }
        let is_new = mac != self.config.mac();
        let set = self.config.set_mac(mac, self.backends[0].as_ref());
        if let Err(error) = &set {
            log::debug!("the tap does not take the MAC address {mac:02x?}: {error}");
        } else if is_new {
            self.filter.report();
        }
        set.is_ok()
    }

    /// The VLAN filter (5.1.6.5.3): an id in 16 bits.
    fn set_vlan(&self, kind: u32, operand: &[u8]) -> bool {
        let wanted = match kind {
            spec::VIRTIO_NET_CTRL_VLAN_ADD => true,
            spec::VIRTIO_NET_CTRL_VLAN_DEL => false,
            _ => return false,
        };
        let id = operand.try_into().map(u16::from_le_bytes);
        id.is_ok_and(|id| {
            self.filter
                .change_by_driver(|rules| rules.set_vlan(id, wanted))
        })
    }

    /// What the driver takes from now on (5.1.6.5.6): feature bits, of those that it agreed to.
    fn set_offloads(&self, operand: &[u8]) -> bool {
        let Ok(bits) = operand.try_into().map(u64::from_le_bytes) else {
            return false;
        };
        let may = self.features & Features::GUEST_OFFLOADS;
        let Some(wanted) = Features::from_bits(bits).filter(|&wanted| may.contains(wanted)) else {
            return false;
        };
        let offloads = wanted.offloads();
        match self.backends[0].set_offloads(offloads) {
            Ok(()) => {
                self.filter.change(|rules| rules.offloads = offloads);
                true
            }
            Err(error) => {
                log::debug!("the tap does not take {wanted:?}: {error}");
                false
            }
        }
    }
}

/// A list of MAC addresses and what follows it.
fn mac_list(bytes: &[u8]) -> Option<(Vec<[u8; MAC_LEN]>, &[u8])> {
    let (&count, rest) = bytes.split_first_chunk()?;
    let len = usize::try_from(u32::from_le_bytes(count))
        .ok()?
        .checked_mul(MAC_LEN)?;
    let (list, rest) = rest.split_at_checked(len)?;
    let (macs, _) = list.as_chunks();
    Some((macs.to_vec(), rest))
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

/// The control queue of a NIC.
#[derive(Debug)]
pub struct CtrlQueue<B> {
    queue: Queue,
    buffers: Buffers,
    control: Control<B>,
    /// What it has done so far.
    pub counters: CtrlCounters,
}

impl<B: Backend> CtrlQueue<B> {
    /// Does what `queue` says.
    pub fn new(queue: Queue, control: Control<B>) -> Self {
        Self {
            queue,
            buffers: Buffers::default(),
            control,
            counters: CtrlCounters::default(),
        }
    }

    /// Carries out up to `budget` commands of those that wait; whatever else a driver can repeat for
    /// ever costs budget too. Says why it stopped, and whether to interrupt the driver.
    pub fn handle(&mut self, budget: usize) -> (Stop, bool) {
        let stop = self.drain(budget);
        (stop, self.queue.needs_notification())
    }

    fn drain(&mut self, budget: usize) -> Stop {
        for _ in 0..budget {
            self.buffers.clear();
            let chain = match self.queue.pop(&mut self.buffers) {
                Next::Chain(chain) => chain,
                Next::Bad => {
                    self.counters.bad_chains += 1;
                    continue;
                }
                Next::Empty if self.queue.enable_notification() => continue,
                Next::Empty => return Stop::Idle,
                Next::Broken => return Stop::Broken,
            };
            // Without room for the status it is no command.
            let status_len = chain.writable.len.min(1);
            if status_len == 0 {
                self.counters.bad_chains += 1;
            } else {
                let status = self.execute(chain.readable.len.min(COMMAND_LEN));
                // SAFETY: the iovecs are those of a chain that `Queue::pop` resolved inside guest
                // memory, which the queue keeps mapped.
                unsafe { scatter(&self.buffers.writable, 0, &[status]) };
            }
            self.queue.add_used(chain.head, status_len as u32);
        }
        Stop::Budget
    }

    /// Carries out the command of `len` bytes in the buffers and returns its status.
    fn execute(&mut self, len: usize) -> u8 {
        let mut command = vec![0; len];
        // SAFETY: the iovecs are those of a chain that `Queue::pop` resolved inside guest memory,
        // which the queue keeps mapped.
        unsafe { gather(&self.buffers.readable, 0, &mut command) };
        self.counters.commands += 1;
        if self.control.execute(&command) {
            return spec::VIRTIO_NET_OK as u8;
        }
        self.counters.refused += 1;
        spec::VIRTIO_NET_ERR as u8
    }
}

/// What the thread of the control queue does, which also waits for vhost-net to find an invalid
/// ring.
#[derive(Debug)]
pub struct CtrlJob<B> {
    /// With its number and what signals it; a driver may do without.
    queue: Option<(CtrlQueue<B>, u16, Arc<EventFd>)>,
    errors: Vec<Arc<EventFd>>,
    interrupt: Arc<dyn Interrupt>,
    ready: bool,
    broken: bool,
    published: Arc<Mutex<CtrlCounters>>,
}

impl<B> CtrlJob<B> {
    /// Handles the queue, of the number beside it, when the eventfd beside it is signalled. Asks
    /// for a reset when one of `errors` is. It publishes its counters, and counts on from what it finds
    /// there.
    pub fn new(
        mut queue: Option<(CtrlQueue<B>, u16, Arc<EventFd>)>,
        errors: Vec<Arc<EventFd>>,
        interrupt: Arc<dyn Interrupt>,
        published: Arc<Mutex<CtrlCounters>>,
    ) -> Self {
        if let Some((queue, ..)) = &mut queue {
            queue.counters = *lock(&published);
        }
        Self {
            queue,
            errors,
            interrupt,
            ready: true,
            broken: false,
            published,
        }
    }

    /// The number of the queue, and where it stands.
    pub fn position(&self) -> Option<(u16, u16)> {
        let (queue, index, _) = self.queue.as_ref()?;
        Some((*index, queue.queue.next_avail()))
    }
}

const KICK: u32 = 0;
const ERROR: u32 = 1;

impl<B: Backend> Job for CtrlJob<B> {
    fn wakeups(&self) -> Vec<(RawFd, u32, EventSet)> {
        let kick = self.queue.iter();
        let kick = kick.map(|(.., kick)| (kick.as_raw_fd(), KICK, EventSet::IN));
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let errors = self.errors.iter().map(|fd| (fd.as_raw_fd(), ERROR, edge));
        kick.chain(errors).collect()
    }

    fn wake(&mut self, token: u32, _events: EventSet) {
        match &mut self.queue {
            Some((queue, _, kick)) if token == KICK => {
                queue.counters.kicks += 1;
                self.ready |= kick.read().is_ok() && !self.broken;
            }
            _ => {
                log::debug!("network device: vhost-net finds a ring invalid");
                self.interrupt.needs_reset();
            }
        }
    }

    fn turn(&mut self) -> Turn {
        if std::mem::take(&mut self.ready)
            && let Some((queue, index, _)) = &mut self.queue
        {
            let (stop, notify) = queue.handle(BUDGET);
            if notify {
                queue.counters.interrupts += 1;
                self.interrupt.queue(*index);
            }
            *lock(&self.published) = queue.counters;
            self.ready = stop == Stop::Budget;
            self.broken = stop == Stop::Broken;
            if self.broken {
                self.interrupt.needs_reset();
            }
        }
        Turn {
            more: self.ready,
            wake_at: None,
        }
    }
}
