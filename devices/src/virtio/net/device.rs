//! The virtio device: what the driver sees of it, and its start and end.

use std::io;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use vmm_sys_util::eventfd::EventFd;

use super::backend::{Backend, HEADER_LEN};
use super::capture::Capture;
use super::config::{ConfigSpace, NetConfig};
use super::counters::{self, CtrlCounters, PairCounters, SharedCounters};
use super::ctrl::{self, Control, CtrlJob, CtrlQueue, Permissions};
use super::features::{Features, Offloads};
use super::filter::{Filter, Rules};
use super::handle::NetHandle;
use super::hooks::Hooks;
use super::observe::Observer;
use super::pair::Pair;
use super::rx::{RxLayout, RxQueue};
use super::tx::TxQueue;
use super::vhost::VhostPair;
use crate::bus::BoxError;
use crate::events::EventSink;
use crate::virtio::rate::{Limiter, RateLimit};
use crate::virtio::worker::Worker;
use crate::virtio::{Activation, ActiveQueue, Complaints, Interrupt, VirtioDevice};

/// Descriptors in each queue.
const QUEUE_SIZE: u16 = 256;

/// The most that a driver can be given: an IP packet of 65,535 bytes after an Ethernet header with
/// two VLAN tags. Larger ones, which a host with BIG TCP makes, are dropped.
pub(super) const LARGEST_FRAME: usize = HEADER_LEN + 14 + 2 * 4 + 65_535;

/// "Network controller, Ethernet".
const PCI_CLASS: u32 = 0x02_0000;

/// What a NIC does besides moving frames, and who moves them. Limits and captures are for NICs
/// without vhost-net: there the monitor sees no frame.
#[derive(Debug)]
pub struct NetOptions {
    /// The NIC's name in what is said of its guest.
    pub label: String,
    /// What the driver's commands may do on the host.
    pub permissions: Permissions,
    /// Bounds what the guest receives.
    pub rx_limit: Option<RateLimit>,
    /// Bounds what the guest sends.
    pub tx_limit: Option<RateLimit>,
    /// Records what passes.
    pub capture: Option<Capture>,
    /// The kernel's hold on each backend, in the same order; without, threads move the frames.
    pub vhost: Vec<VhostPair>,
    /// Takes the device's events.
    pub events: EventSink,
}

/// A network device with one or more queue pairs.
#[derive(Debug)]
pub struct Net<B> {
    /// The name in logs and of the threads.
    name: String,
    /// One for each queue pair.
    pub(super) backends: Vec<Arc<B>>,
    /// One for each queue pair, or none.
    vhost: Vec<VhostPair>,
    /// One for each queue pair, or none with vhost-net.
    pairs: Vec<Worker<Pair<B>>>,
    ctrl: Worker<CtrlJob<B>>,
    features: Features,
    queue_sizes: Vec<u16>,
    pub(super) config: Arc<ConfigSpace>,
    pub(super) filter: Arc<Filter>,
    observer: Arc<Observer>,
    permissions: Permissions,
    pub(super) rx_hooks: Hooks,
    pub(super) tx_hooks: Hooks,
    counters: Vec<SharedCounters>,
    ctrl_counters: Arc<Mutex<CtrlCounters>>,
    events: EventSink,
    /// While paused: of each pair, the frame that was received and waits for buffers.
    pub(super) frames: Vec<Option<Vec<u8>>>,
    complaints: Complaints,
    is_active: bool,
}

impl<B: Backend> Net<B> {
    /// A device named `name` with a queue pair for each of `backends`, of which there is at least
    /// one. Its threads are parked until the driver is ready.
    ///
    /// # Errors
    ///
    /// Fails when the process may not have so many threads or descriptors.
    pub fn new(
        name: String,
        config: NetConfig,
        backends: Vec<B>,
        options: NetOptions,
    ) -> io::Result<Self> {
        let pairs = backends.len();
        let capture = options.capture.map(Arc::new);
        let hooks = |limit: Option<RateLimit>| Hooks {
            limiter: limit.map(Limiter::new).map(Arc::new),
            capture: capture.clone(),
        };
        let threads = if options.vhost.is_empty() { pairs } else { 0 };
        let thread = |pair| match pair {
            0 => Worker::new(name.clone()),
            _ => Worker::new(format!("{name}.{pair}")),
        };
        let config = Arc::new(ConfigSpace::new(
            config,
            pairs as u16,
            options.events.clone(),
        ));
        let new = Self {
            features: Features::offered(
                pairs,
                backends[0].known_offloads(),
                backends[0].write_offloads(),
            ),
            backends: backends.into_iter().map(Arc::new).collect(),
            vhost: options.vhost,
            pairs: (0..threads).map(thread).collect::<io::Result<_>>()?,
            ctrl: Worker::new(format!("{name}.ctrl"))?,
            // The last is the control queue.
            queue_sizes: vec![QUEUE_SIZE; 2 * pairs + 1],
            filter: Arc::new(Filter::new(Arc::clone(&config), options.events.clone())),
            observer: Arc::new(Observer::new(options.label, Arc::clone(&config))?),
            config,
            permissions: options.permissions,
            rx_hooks: hooks(options.rx_limit),
            tx_hooks: hooks(options.tx_limit),
            counters: (0..pairs).map(|_| SharedCounters::default()).collect(),
            ctrl_counters: Arc::default(),
            events: options.events,
            frames: vec![None; pairs],
            complaints: Complaints::default(),
            is_active: false,
            name,
        };
        // A queue that nothing reads must not take a share of the frames.
        ctrl::use_pairs(&new.backends, 1);
        Ok(new)
    }

    /// The configuration space, for whoever watches the host's interface.
    pub fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    /// What others hold of the device when it is on its bus.
    pub fn handle(&self) -> Arc<NetHandle> {
        Arc::new(NetHandle {
            name: self.name.clone(),
            config: Arc::clone(&self.config),
            observer: Arc::clone(&self.observer),
            filter: Arc::clone(&self.filter),
            has_vhost: !self.vhost.is_empty(),
            counters: self.counters.clone(),
            ctrl_counters: Arc::clone(&self.ctrl_counters),
        })
    }

    fn start(&mut self, activation: Activation) -> Result<(), BoxError> {
        let Activation {
            features: bits,
            mut queues,
            interrupt,
            resumed,
            ..
        } = activation;
        let features = Features::from_bits_truncate(bits);
        let pairs = match features.contains(Features::MQ) {
            true => self.backends.len(),
            false => 1,
        };
        // The control queue's number depends on what was negotiated (5.1.2).
        let ctrl_index = 2 * pairs;
        let ctrl = queues
            .get_mut(ctrl_index)
            .and_then(Option::take)
            .filter(|_| features.contains(Features::CTRL_VQ));
        if !resumed {
            self.set_offloads(features.offloads())?;
            let rules = Rules::new(features);
            self.filter.change(|filter| *filter = rules);
        }
        let queues = take_pairs(queues, pairs)?;
        let in_a_row = queues.iter().take_while(|pair| pair.is_some()).count();
        for (pair, queues) in queues.into_iter().enumerate() {
            let Some([rx, tx]) = queues else { continue };
            match self.vhost.get_mut(pair) {
                Some(vhost) => {
                    vhost.start(bits, [&rx, &tx], 2 * pair as u16, interrupt.as_ref())?;
                }
                None => self.start_pair(pair, features, [rx, tx], &interrupt)?,
            }
        }
        let ctrl = ctrl.map(|queue| (queue, ctrl_index as u16));
        self.start_ctrl(ctrl, features, in_a_row, &interrupt)?;
        let announces = features.contains(Features::GUEST_ANNOUNCE | Features::CTRL_VQ);
        self.config.attach(interrupt, announces, resumed);
        log::debug!("{}: driver ready with {features:?}", self.name);
        Ok(())
    }

    fn start_pair(
        &mut self,
        index: usize,
        features: Features,
        [rx, tx]: [ActiveQueue; 2],
        interrupt: &Arc<dyn Interrupt>,
    ) -> io::Result<()> {
        let layout = RxLayout {
            mergeable: features.contains(Features::MRG_RXBUF),
            largest_frame: LARGEST_FRAME,
        };
        let kicks = [rx.kick, tx.kick];
        let mut rx = RxQueue::new(rx.queue, layout, Arc::clone(&self.filter))
            .with_frame(self.frames[index].take());
        rx.hooks = self.rx_hooks.clone();
        let mut tx = TxQueue::new(tx.queue, Arc::clone(&self.observer));
        tx.hooks = self.tx_hooks.clone();
        let backend = Arc::clone(&self.backends[index]);
        let (to_driver, counters) = (Arc::clone(interrupt), Arc::clone(&self.counters[index]));
        let pair = Pair::new(backend, (rx, tx), kicks, to_driver, index as u16, counters);
        self.pairs[index].start(pair, Arc::clone(interrupt))
    }

    /// Starts the control queue, if the driver has one, and waits for errors of vhost-net. Commands
    /// act on the first `pairs` pairs.
    fn start_ctrl(
        &mut self,
        queue: Option<(ActiveQueue, u16)>,
        features: Features,
        pairs: usize,
        interrupt: &Arc<dyn Interrupt>,
    ) -> io::Result<()> {
        let errors: Vec<_> = self.vhost.iter().map(|v| Arc::clone(v.error())).collect();
        if queue.is_none() && errors.is_empty() {
            return Ok(());
        }
        let control = Control {
            backends: self.backends[..pairs].to_vec(),
            config: Arc::clone(&self.config),
            filter: Arc::clone(&self.filter),
            features,
            permissions: self.permissions,
        };
        let queue =
            queue.map(|(ctrl, index)| (CtrlQueue::new(ctrl.queue, control), index, ctrl.kick));
        let job = CtrlJob::new(
            queue,
            errors,
            Arc::clone(interrupt),
            Arc::clone(&self.ctrl_counters),
        );
        self.ctrl.start(job, Arc::clone(interrupt))
    }

    /// Sets the backend's offloads. An interface that is gone has nothing to offload, and its NIC lives on
    /// without a link.
    pub(super) fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        match self.backends[0].set_offloads(offloads) {
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(()),
            result => result,
        }
    }
}

impl<B> Net<B> {
    /// Stops everything that moves frames or touches guest memory. Returns where the queues stand.
    fn stop(&mut self) -> Vec<Option<u16>> {
        let mut positions = vec![None; self.queue_sizes.len()];
        self.pairs.iter().for_each(Worker::stop);
        self.ctrl.stop();
        for (pair, vhost) in positions.chunks_mut(2).zip(&mut self.vhost) {
            pair.copy_from_slice(&vhost.stop());
        }
        for (index, worker) in self.pairs.iter_mut().enumerate() {
            if let Some(([rx, tx], frame)) = worker.join().map(Pair::park) {
                positions[2 * index] = Some(rx);
                positions[2 * index + 1] = Some(tx);
                self.frames[index] = frame;
            }
        }
        if let Some((index, position)) = self.ctrl.join().and_then(|ctrl| ctrl.position()) {
            positions[usize::from(index)] = Some(position);
        }
        positions
    }
}

/// The queues of each of `pairs` pairs; `None` for a pair that the driver does without, as it may
/// with any but the first (virtio 1.2, 5.1.5).
///
/// # Errors
///
/// Half a pair is refused: a queue that the driver fills for nothing would be harder to find.
fn take_pairs(
    queues: Vec<Option<ActiveQueue>>,
    pairs: usize,
) -> Result<Vec<Option<[ActiveQueue; 2]>>, String> {
    let mut queues = queues.into_iter();
    let mut next = || queues.next().flatten();
    (0..pairs)
        .map(|pair| match (next(), next()) {
            (Some(rx), Some(tx)) => Ok(Some([rx, tx])),
            (None, None) if pair > 0 => Ok(None),
            _ => Err(format!(
                "the driver has not set up both queues of pair {pair}"
            )),
        })
        .collect()
}

impl<B: Backend> VirtioDevice for Net<B> {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn pci_class(&self) -> u32 {
        PCI_CLASS
    }

    fn events(&self) -> Option<&EventSink> {
        Some(&self.events)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features.bits()
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.config.generation()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), BoxError> {
        self.is_active = true;
        let started = self.start(activation);
        started.inspect_err(|_| drop(self.stop()))
    }

    fn pause(&mut self) -> Vec<Option<u16>> {
        self.config.pause();
        self.stop()
    }

    fn save(&self) -> Result<Value, BoxError> {
        Ok(self.save_state())
    }

    fn check(&self, state: &Value) -> Result<(), BoxError> {
        self.saved_state(state).map(drop)
    }

    fn restore(&mut self, state: Value) -> Result<(), BoxError> {
        let state = self.saved_state(&state)?;
        // A reset has something to undo.
        self.is_active = true;
        Ok(self.restore_state(state)?)
    }

    fn interrupt_changed(&mut self, queue: u16, line: &EventFd) {
        if let Some(pair) = self.vhost.get(usize::from(queue / 2))
            && let Err(error) = pair.change_interrupt(queue.into(), line)
            && self.complaints.may_warn()
        {
            let name = &self.name;
            log::warn!("{name}: the interrupt of queue {queue} stays as it was: {error}");
        }
    }

    fn reset(&mut self) {
        self.config.detach();
        if !std::mem::take(&mut self.is_active) {
            return;
        }
        self.stop();
        self.frames.fill(None);
        ctrl::use_pairs(&self.backends, 1);
        // A driver that is gone segments and checksums nothing.
        if let Err(error) = self.set_offloads(Offloads::empty()) {
            log::debug!("{}: cannot clear the offloads: {error}", self.name);
        }
        if let Err(error) = self.config.reset_mac(self.backends[0].as_ref())
            && self.complaints.may_warn()
        {
            let name = &self.name;
            log::warn!("{name}: cannot give the tap its own MAC address back: {error}");
        }
    }
}

impl<B> Drop for Net<B> {
    fn drop(&mut self) {
        self.stop();
        for (pair, counters) in self.counters.iter().enumerate() {
            let counters = counters::read(counters);
            if counters != PairCounters::default() {
                log::info!("{} queue pair {pair}: {counters}", self.name);
            }
        }
    }
}
