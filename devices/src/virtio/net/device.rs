//! The virtio device: what the driver sees of it, and its start and end.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use vmm_sys_util::eventfd::EventFd;

use super::backend::{Backend, HEADER_LEN};
use super::ctrl::{self, CtrlQueue};
use super::features::{Features, Offloads};
use super::link::LinkStatus;
use super::observe::Observer;
use super::rx::{RxLayout, RxQueue};
use super::tx::TxQueue;
use super::worker::{Wakeups, Worker};
use crate::virtio::{Activation, ActiveQueue, Interrupt, VirtioDevice, read_at};

/// Descriptors in each queue.
const QUEUE_SIZE: u16 = 256;

/// The most that a tap gives with segmentation offloads: an IP packet of 65,535 bytes behind an
/// Ethernet header with a VLAN tag, rounded up as the kernel's own virtio-net driver expects it.
const LARGEST_SEGMENT: usize = 65_550;
/// An Ethernet header with a VLAN tag.
const ETHERNET_HEADER_LEN: usize = 18;

/// What a network device tells its driver (`struct virtio_net_config`, virtio 1.2, 5.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The MAC address that the guest has to use.
    pub mac: [u8; 6],
    /// The largest IP packet that the link carries, in bytes.
    pub mtu: u16,
}

impl NetConfig {
    /// mac, status, max_virtqueue_pairs, mtu.
    fn to_bytes(self, status: u16, pairs: u16) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..6].copy_from_slice(&self.mac);
        bytes[6..8].copy_from_slice(&status.to_le_bytes());
        bytes[8..10].copy_from_slice(&pairs.to_le_bytes());
        bytes[10..].copy_from_slice(&self.mtu.to_le_bytes());
        bytes
    }
}

/// A network device with one or more queue pairs.
#[derive(Debug)]
pub struct Net<B> {
    /// The name in logs and of the threads.
    name: String,
    config: NetConfig,
    /// One for each queue pair.
    pub(super) backends: Vec<Arc<B>>,
    queue_sizes: Vec<u16>,
    link: Arc<LinkStatus>,
    observer: Arc<Observer>,
    running: Vec<Running>,
}

/// The thread of a pair.
#[derive(Debug)]
struct Running {
    stop: EventFd,
    thread: JoinHandle<()>,
}

impl<B: Backend> Net<B> {
    /// A device named `name` with a queue pair for each of `backends`, of which there is at least
    /// one. `observer` sees what its guest sends.
    pub fn new(name: String, config: NetConfig, backends: Vec<B>, observer: Arc<Observer>) -> Self {
        let ctrl = usize::from(backends.len() > 1);
        let queue_sizes = vec![QUEUE_SIZE; 2 * backends.len() + ctrl];
        let backends = backends.into_iter().map(Arc::new).collect();
        let link = Arc::default();
        let new = Self {
            name,
            config,
            backends,
            queue_sizes,
            link,
            observer,
            running: Vec::new(),
        };
        // A queue that nobody reads must not take a share of the frames.
        ctrl::use_pairs(&new.backends, 1);
        new
    }

    /// The link, for whoever watches the host's interface.
    pub fn link(&self) -> &Arc<LinkStatus> {
        &self.link
    }

    fn start(&mut self, activation: Activation) -> Result<(), Box<dyn Error + Send + Sync>> {
        let Activation {
            memory: _,
            features,
            mut queues,
            interrupt,
        } = activation;
        let features = Features::from_bits_truncate(features);
        let pairs = if features.contains(Features::MQ) {
            self.backends.len()
        } else {
            1
        };
        // The control queue's number depends on what was negotiated (5.1.2).
        let ctrl_index = 2 * pairs;
        let with_ctrl = features.contains(Features::CTRL_VQ);
        let mut ctrl = queues
            .get_mut(ctrl_index)
            .and_then(Option::take)
            .filter(|_| with_ctrl);
        self.set_offloads(features.offloads())?;
        let layout = RxLayout {
            mergeable: features.contains(Features::MRG_RXBUF),
            largest_frame: HEADER_LEN + self.largest_frame(features),
        };
        let mut queues = queues.into_iter().take(2 * pairs);
        for pair in 0..pairs {
            let (Some(Some(rx)), Some(Some(tx))) = (queues.next(), queues.next()) else {
                return Err("the driver left a queue disabled".into());
            };
            let ctrl = ctrl.take().map(|queue| (queue, ctrl_index as u16));
            let running = self.start_pair(pair, layout, [rx, tx], ctrl, &interrupt)?;
            self.running.push(running);
        }
        self.link.tell(Some(interrupt));
        log::debug!("{}: driver ready with {features:?}", self.name);
        Ok(())
    }

    fn start_pair(
        &self,
        pair: usize,
        layout: RxLayout,
        [rx, tx]: [ActiveQueue; 2],
        ctrl: Option<(ActiveQueue, u16)>,
        interrupt: &Arc<dyn Interrupt>,
    ) -> io::Result<Running> {
        let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let wakeups = Wakeups {
            rx_kick: rx.kick,
            tx_kick: tx.kick,
            ctrl_kick: ctrl.as_ref().map(|(queue, _)| Arc::clone(&queue.kick)),
            stop: stop.try_clone()?,
        };
        let name = if pair == 0 {
            self.name.clone()
        } else {
            format!("{}.{pair}", self.name)
        };
        let (backends, observer) = (self.backends.clone(), Arc::clone(&self.observer));
        let interrupt = Arc::clone(interrupt);
        let thread = thread::Builder::new().name(name.clone()).spawn(move || {
            // The queues hold pointers into guest memory, so they live on this thread alone.
            let (rx, tx) = (
                RxQueue::new(rx.ring, layout),
                TxQueue::new(tx.ring, observer),
            );
            let backend = Arc::clone(&backends[pair]);
            let mut worker = Worker::new(backend, rx, tx, wakeups, interrupt, pair as u16);
            if let Some((queue, index)) = ctrl {
                worker = worker.with_ctrl(CtrlQueue::new(queue.ring, backends), index);
            }
            match worker.run() {
                Ok((rx, tx)) => log::debug!("{name}: {rx:?} {tx:?}"),
                Err(error) => log::error!("{name} stopped: {error}"),
            }
        })?;
        Ok(Running { stop, thread })
    }

    fn stop(&mut self) {
        for Running { stop, .. } in &self.running {
            let _ = stop.write(1);
        }
        for Running { thread, .. } in self.running.drain(..) {
            if thread.join().is_err() {
                log::error!("{}: a thread panicked", self.name);
            }
        }
    }

    /// Tells the backend. An interface that is gone has nothing to offload, and its card lives on
    /// without a link.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        match self.backends[0].set_offloads(offloads) {
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(()),
            result => result,
        }
    }

    fn largest_frame(&self, features: Features) -> usize {
        if features
            .offloads()
            .intersects(Offloads::TSO4 | Offloads::TSO6)
        {
            LARGEST_SEGMENT
        } else {
            usize::from(self.config.mtu) + ETHERNET_HEADER_LEN
        }
    }
}

impl<B: Backend> VirtioDevice for Net<B> {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let mut features = Features::all();
        if self.backends.len() == 1 {
            features -= Features::MQ | Features::CTRL_VQ;
        }
        features.bits()
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_at(
            &self
                .config
                .to_bytes(self.link.bits(), self.backends.len() as u16),
            offset,
            data,
        );
    }

    fn config_generation(&self) -> u32 {
        self.link.generation()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.start(activation).inspect_err(|_| self.stop())
    }

    fn reset(&mut self) {
        self.link.tell(None);
        if self.running.is_empty() {
            return;
        }
        self.stop();
        ctrl::use_pairs(&self.backends, 1);
        // Nobody may need to segment or checksum for a driver that is gone.
        if let Err(error) = self.set_offloads(Offloads::empty()) {
            log::debug!("{}: cannot clear the offloads: {error}", self.name);
        }
    }
}

impl<B> Drop for Net<B> {
    fn drop(&mut self) {
        for Running { stop, .. } in &self.running {
            let _ = stop.write(1);
        }
        for Running { thread, .. } in self.running.drain(..) {
            let _ = thread.join();
        }
    }
}
