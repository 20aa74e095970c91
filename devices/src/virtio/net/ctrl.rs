//! The control queue (virtio 1.2, 5.1.6.5): what the driver commands, and how much of it the host
//! can do. A command is answered with OK only where it has the effect that the driver expects.

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_net as spec;
use vmm_sys_util::eventfd::EventFd;

use super::backend::Backend;
use super::config::ConfigSpace;
use super::features::Features;
use super::filter::Filter;
use super::observe::Observer;
use super::worker;
use crate::virtio::Interrupt;
use crate::virtio::queue::{Next, Ring};

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
    /// What watches for frames from another address than the NIC's.
    pub observer: Arc<Observer>,
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
                pairs.is_ok_and(|pairs| use_pairs(&self.backends, pairs.into()))
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

    /// A receive mode (5.1.6.5.1): one byte, 0 or 1. The host delivers all groups anyway.
    fn set_mode(&self, kind: u32, operand: &[u8]) -> bool {
        let &[value @ (0 | 1)] = operand else {
            return false;
        };
        let on = value == 1;
        match kind {
            spec::VIRTIO_NET_CTRL_RX_PROMISC => {
                self.filter.change(|rules| rules.promiscuous = on);
                !on || self.permissions.allow_promisc
            }
            spec::VIRTIO_NET_CTRL_RX_ALLMULTI => {
                self.filter.change(|rules| rules.all_multicast = on);
                true
            }
            _ => false,
        }
    }

    /// The MAC filter table (5.1.6.5.2): addresses, then groups, each list behind its length in
    /// 32 bits. The host delivers to other addresses than the NIC's only where it delivers to any.
    fn set_table(&self, operand: &[u8]) -> bool {
        let Some((unicast, rest)) = mac_list(operand) else {
            return false;
        };
        let Some((multicast, [])) = mac_list(rest) else {
            return false;
        };
        self.filter
            .change(|rules| rules.set_table(&unicast, &multicast));
        let own = self.config.mac();
        self.permissions.allow_promisc || unicast.iter().all(|&mac| mac == own)
    }

    fn set_mac(&self, operand: &[u8]) -> bool {
        let Ok(mac) = <[u8; MAC_LEN]>::try_from(operand) else {
            return false;
        };
        if mac == self.config.mac() {
            return true;
        }
        let is_usable = mac[0] & 1 == 0 && mac != [0; MAC_LEN];
        if !is_usable || !self.permissions.change_mac {
            log::debug!("the driver may not have the MAC address {mac:02x?}");
            return false;
        }
        match self.backends[0].set_mac(mac) {
            Ok(()) => {
                self.config.set_mac(mac);
                self.filter.change(|rules| rules.own = mac);
                self.observer.set_mac(mac);
                true
            }
            Err(error) => {
                log::debug!("the tap does not take the MAC address {mac:02x?}: {error}");
                false
            }
        }
    }

    /// The VLAN filter (5.1.6.5.3): an id in 16 bits.
    fn set_vlan(&self, kind: u32, operand: &[u8]) -> bool {
        let wanted = match kind {
            spec::VIRTIO_NET_CTRL_VLAN_ADD => true,
            spec::VIRTIO_NET_CTRL_VLAN_DEL => false,
            _ => return false,
        };
        let id = operand.try_into().map(u16::from_le_bytes);
        id.is_ok_and(|id| self.filter.change(|rules| rules.set_vlan(id, wanted)))
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
    ring: Ring,
    control: Control<B>,
}

impl<B: Backend> CtrlQueue<B> {
    /// Does what `ring` says.
    pub fn new(ring: Ring, control: Control<B>) -> Self {
        Self { ring, control }
    }

    /// Carries out up to `budget` commands of those that wait; whatever else a driver can repeat for
    /// ever costs budget too. Says why it stopped, and whether to interrupt the driver.
    pub fn handle(&mut self, budget: usize) -> (CtrlStop, bool) {
        let stop = self.drain(budget);
        (stop, self.ring.needs_interrupt())
    }

    fn drain(&mut self, budget: usize) -> CtrlStop {
        for _ in 0..budget {
            let request = match self.ring.next_request(COMMAND_LEN) {
                Next::Chain(request) => request,
                Next::Bad => continue,
                Next::Empty if self.ring.enable_notification() => continue,
                Next::Empty => return CtrlStop::Empty,
                Next::Broken => return CtrlStop::Broken,
            };
            let status = if self.control.execute(&request.question) {
                spec::VIRTIO_NET_OK
            } else {
                spec::VIRTIO_NET_ERR
            };
            self.ring.answer(&request, status as u8);
        }
        CtrlStop::Budget
    }
}

/// Why [`CtrlQueue::handle`] stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CtrlStop {
    /// The queue is empty; the driver will notify.
    Empty,
    /// The budget is used up.
    Budget,
    /// The avail index is invalid.
    Broken,
}

/// The thread of the control queue, which also hears of rings that vhost-net cannot make sense of.
#[derive(Debug)]
pub struct CtrlWorker<B> {
    /// With its number and what signals it; a driver may do without.
    queue: Option<(CtrlQueue<B>, u16, Arc<EventFd>)>,
    stop: Arc<EventFd>,
    errors: Vec<EventFd>,
    interrupt: Arc<dyn Interrupt>,
    ready: bool,
    broken: bool,
    stopped: bool,
}

const KICK: u32 = 0;
const STOP: u32 = 1;
const ERROR: u32 = 2;

impl<B: Backend> CtrlWorker<B> {
    /// Handles the queue, of the number beside it, whenever the eventfd beside it is signalled,
    /// until `stop` is. Asks for a reset when one of `errors` is.
    pub fn new(
        queue: Option<(CtrlQueue<B>, u16, Arc<EventFd>)>,
        stop: Arc<EventFd>,
        errors: Vec<EventFd>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        Self {
            queue,
            stop,
            errors,
            interrupt,
            // The driver may have kicked before there was a worker.
            ready: true,
            broken: false,
            stopped: false,
        }
    }

    /// Returns when it is stopped.
    ///
    /// # Errors
    ///
    /// Fails when the process has no file descriptor left for the epoll instance.
    pub fn run(self) -> io::Result<()> {
        worker::run(self, |worker| {
            if worker.stopped {
                return None;
            }
            if std::mem::take(&mut worker.ready)
                && let Some((queue, index, _)) = &mut worker.queue
            {
                let (stop, interrupt) = queue.handle(BUDGET);
                if interrupt {
                    worker.interrupt.queue(*index);
                }
                match stop {
                    CtrlStop::Empty => {}
                    CtrlStop::Budget => worker.ready = true,
                    CtrlStop::Broken => {
                        worker.broken = true;
                        worker.interrupt.needs_reset();
                    }
                }
            }
            Some(worker.ready)
        })
    }
}

impl<B: Backend> MutEventSubscriber for CtrlWorker<B> {
    fn init(&mut self, ops: &mut EventOps) {
        let kick = |(_, _, kick): &(_, _, Arc<EventFd>)| {
            Events::with_data(kick.as_ref(), KICK, EventSet::IN)
        };
        let kick = self.queue.as_ref().map(kick);
        let stop = Events::with_data(self.stop.as_ref(), STOP, EventSet::IN);
        let error = |fd| Events::with_data(fd, ERROR, EventSet::IN | EventSet::EDGE_TRIGGERED);
        let errors = self.errors.iter().map(error);
        for events in kick.into_iter().chain([stop]).chain(errors) {
            if let Err(error) = ops.add(events) {
                log::error!("network device: cannot watch a file descriptor: {error}");
                self.interrupt.needs_reset();
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match events.data() {
            KICK => {
                let kicked = self.queue.iter().any(|(.., kick)| kick.read().is_ok());
                self.ready |= kicked && !self.broken;
            }
            STOP => self.stopped = true,
            _ => {
                log::debug!("network device: vhost-net cannot make sense of a ring");
                self.interrupt.needs_reset();
            }
        }
    }
}
