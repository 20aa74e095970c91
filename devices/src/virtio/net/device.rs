//! The virtio device: what the driver sees of it, and its start and end.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use vmm_sys_util::eventfd::EventFd;

use super::backend::{Backend, HEADER_LEN};
use super::capture::Capture;
use super::config::{ConfigSpace, NetConfig};
use super::counters::{self, PairCounters, SharedCounters};
use super::ctrl::{self, Control, CtrlQueue, CtrlWorker, Permissions};
use super::features::{Features, Offloads};
use super::filter::{Filter, Rules};
use super::hooks::Hooks;
use super::observe::Observer;
use super::rate::{Limiter, RateLimit};
use super::rx::{RxLayout, RxQueue};
use super::tx::TxQueue;
use super::vhost::VhostPair;
use super::worker::{Wakeups, Worker};
use crate::virtio::{Activation, ActiveQueue, Complaints, Interrupt, VirtioDevice};

/// Descriptors in each queue.
const QUEUE_SIZE: u16 = 256;

/// The most that a driver can be given: an IP packet of 65,535 bytes behind an Ethernet header with
/// two VLAN tags. Larger ones, which a host with BIG TCP makes, are dropped.
const LARGEST_FRAME: usize = HEADER_LEN + 14 + 2 * 4 + 65_535;

/// What a NIC does besides moving frames. Limits and captures are for NICs without vhost-net:
/// there the monitor sees no frame.
#[derive(Debug)]
pub struct NetOptions {
    /// Sees what the guest sends.
    pub observer: Arc<Observer>,
    /// What the driver's commands may do on the host.
    pub permissions: Permissions,
    /// Bounds what the guest receives.
    pub rx_limit: Option<RateLimit>,
    /// Bounds what the guest sends.
    pub tx_limit: Option<RateLimit>,
    /// Records what passes.
    pub capture: Option<Capture>,
}

/// A network device with one or more queue pairs.
#[derive(Debug)]
pub struct Net<B> {
    /// The name in logs and of the threads.
    name: String,
    /// One for each queue pair.
    pub(super) backends: Vec<Arc<B>>,
    /// One for each queue pair, or none: then threads of our own move the frames.
    vhost: Vec<VhostPair>,
    features: Features,
    queue_sizes: Vec<u16>,
    config: Arc<ConfigSpace>,
    filter: Arc<Filter>,
    services: Services,
    counters: Vec<SharedCounters>,
    complaints: Arc<Complaints>,
    is_active: bool,
    running: Vec<Running>,
}

/// What the threads of all pairs share.
#[derive(Clone, Debug)]
struct Services {
    observer: Arc<Observer>,
    permissions: Permissions,
    rx: Hooks,
    tx: Hooks,
}

/// A thread of the device.
#[derive(Debug)]
struct Running {
    stop: EventFd,
    thread: JoinHandle<()>,
}

impl<B: Backend> Net<B> {
    /// A device named `name` with a queue pair for each of `backends`, of which there is at least
    /// one.
    pub fn new(name: String, config: NetConfig, backends: Vec<B>, options: NetOptions) -> Self {
        let pairs = backends.len();
        let capture = options.capture.map(Arc::new);
        let hooks = |limit: Option<RateLimit>| Hooks {
            limiter: limit.map(Limiter::new).map(Arc::new),
            capture: capture.clone(),
        };
        let new = Self {
            name,
            features: Features::offered(pairs, backends[0].known_offloads()),
            backends: backends.into_iter().map(Arc::new).collect(),
            vhost: Vec::new(),
            // The last is the control queue.
            queue_sizes: vec![QUEUE_SIZE; 2 * pairs + 1],
            config: Arc::new(ConfigSpace::new(config, pairs as u16)),
            filter: Arc::default(),
            services: Services {
                observer: options.observer,
                permissions: options.permissions,
                rx: hooks(options.rx_limit),
                tx: hooks(options.tx_limit),
            },
            counters: (0..pairs).map(|_| SharedCounters::default()).collect(),
            complaints: Arc::default(),
            is_active: false,
            running: Vec::new(),
        };
        // A queue that nobody reads must not take a share of the frames.
        ctrl::use_pairs(&new.backends, 1);
        new
    }

    /// Lets the kernel move the frames: `pairs` are those of the backends, in the same order.
    pub fn with_vhost(mut self, pairs: Vec<VhostPair>) -> Self {
        self.vhost = pairs;
        self
    }

    /// The configuration space, for whoever watches the host's interface.
    pub fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    /// The counters of each pair, which live on when the device is on its bus.
    pub fn counters(&self) -> &[SharedCounters] {
        &self.counters
    }

    fn start(&mut self, activation: Activation) -> Result<(), Box<dyn Error + Send + Sync>> {
        let Activation {
            features: bits,
            mut queues,
            interrupt,
            ..
        } = activation;
        let features = Features::from_bits_truncate(bits);
        let pairs = if features.contains(Features::MQ) {
            self.backends.len()
        } else {
            1
        };
        // The control queue's number depends on what was negotiated (5.1.2).
        let ctrl_index = 2 * pairs;
        let ctrl = queues
            .get_mut(ctrl_index)
            .and_then(Option::take)
            .filter(|_| features.contains(Features::CTRL_VQ));
        self.set_offloads(features.offloads())?;
        let rules = Rules::new(self.config.mac(), features);
        self.filter.change(|filter| *filter = rules);

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
        if ctrl.is_some() || !self.vhost.is_empty() {
            let backends = self.backends[..in_a_row].to_vec();
            self.start_ctrl(ctrl, ctrl_index as u16, features, backends, &interrupt)?;
        }
        let announces = features.contains(Features::GUEST_ANNOUNCE | Features::CTRL_VQ);
        self.config.attach(interrupt, announces);
        log::debug!("{}: driver ready with {features:?}", self.name);
        Ok(())
    }

    fn start_pair(
        &mut self,
        pair: usize,
        features: Features,
        [rx, tx]: [ActiveQueue; 2],
        interrupt: &Arc<dyn Interrupt>,
    ) -> io::Result<()> {
        let layout = RxLayout {
            mergeable: features.contains(Features::MRG_RXBUF),
            largest_frame: LARGEST_FRAME,
        };
        let stop = stop_eventfd()?;
        let wakeups = Wakeups {
            rx_kick: rx.kick,
            tx_kick: tx.kick,
            stop: stop.try_clone()?,
        };
        let services = self.services.clone();
        let (backend, filter) = (Arc::clone(&self.backends[pair]), Arc::clone(&self.filter));
        let (to_driver, published) = (Arc::clone(interrupt), Arc::clone(&self.counters[pair]));
        let name = match pair {
            0 => self.name.clone(),
            _ => format!("{}.{pair}", self.name),
        };
        self.spawn(name, stop, interrupt, move || {
            // The queues hold pointers into guest memory, so they live on this thread alone.
            let rx = RxQueue::new(rx.ring, layout)
                .with_filter(filter)
                .with_hooks(services.rx);
            let tx = TxQueue::new(tx.ring, services.observer).with_hooks(services.tx);
            let pair = pair as u16;
            Worker::new(backend, (rx, tx), wakeups, to_driver, pair, published)?.run()
        })
    }

    fn start_ctrl(
        &mut self,
        queue: Option<ActiveQueue>,
        index: u16,
        features: Features,
        backends: Vec<Arc<B>>,
        interrupt: &Arc<dyn Interrupt>,
    ) -> io::Result<()> {
        let stop = stop_eventfd()?;
        let worker_stop = Arc::new(stop.try_clone()?);
        let to_driver = Arc::clone(interrupt);
        let errors = self.vhost.iter().map(|pair| pair.error().try_clone());
        let errors = errors.collect::<io::Result<Vec<_>>>()?;
        let control = Control {
            backends,
            config: Arc::clone(&self.config),
            filter: Arc::clone(&self.filter),
            observer: Arc::clone(&self.services.observer),
            features,
            permissions: self.services.permissions,
        };
        let name = format!("{}.ctrl", self.name);
        self.spawn(name, stop, interrupt, move || {
            let queue = queue
                .map(|ActiveQueue { ring, kick, .. }| (CtrlQueue::new(ring, control), index, kick));
            CtrlWorker::new(queue, worker_stop, errors, to_driver).run()
        })
    }

    /// Starts a thread of the device. Without it the driver has to begin again, and is told.
    pub(super) fn spawn(
        &mut self,
        name: String,
        stop: EventFd,
        interrupt: &Arc<dyn Interrupt>,
        body: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let (interrupt, complaints) = (Arc::clone(interrupt), Arc::clone(&self.complaints));
        let thread = thread::Builder::new().name(name.clone()).spawn(move || {
            if let Err(error) = body() {
                if complaints.may_warn() {
                    log::warn!("{name} stopped: {error}");
                }
                interrupt.needs_reset();
            }
        })?;
        self.running.push(Running { stop, thread });
        Ok(())
    }

    /// Tells the backend. An interface that is gone has nothing to offload, and its NIC lives on
    /// without a link.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        match self.backends[0].set_offloads(offloads) {
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(()),
            result => result,
        }
    }
}

impl<B> Net<B> {
    /// Stops everything that moves frames or touches guest memory.
    fn stop(&mut self) {
        self.vhost.iter_mut().for_each(VhostPair::stop);
        for Running { stop, .. } in &self.running {
            let _ = stop.write(1);
        }
        for Running { thread, .. } in self.running.drain(..) {
            if thread.join().is_err() {
                log::error!("{}: a thread panicked", self.name);
            }
        }
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

fn stop_eventfd() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

impl<B: Backend> VirtioDevice for Net<B> {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
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

    fn activate(&mut self, activation: Activation) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.is_active = true;
        self.start(activation).inspect_err(|_| self.stop())
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
        let own_mac = self.config.detach();
        if !std::mem::take(&mut self.is_active) {
            return;
        }
        self.stop();
        ctrl::use_pairs(&self.backends, 1);
        // Nobody may need to segment or checksum for a driver that is gone.
        if let Err(error) = self.set_offloads(Offloads::empty()) {
            log::debug!("{}: cannot clear the offloads: {error}", self.name);
        }
        let Some(mac) = own_mac else { return };
        self.services.observer.set_mac(mac);
        if let Err(error) = self.backends[0].set_mac(mac)
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
