//! The virtio device: what the driver sees of it, and its start and end.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::config::{ConfigSpace, ConfigState, Layout, WRITEBACK};
use super::counters::{BlkCounters, SharedCounters};
use super::disk::{Disk, SERIAL_LEN};
use super::engine::{Engine, engines};
use super::features::Features;
use super::handle::BlkHandle;
use super::job::BlkJob;
use super::queue::BlkQueue;
use super::request::Request;
use crate::bus::{BoxError, check};
use crate::disk::Storage;
use crate::events::EventSink;
use crate::virtio::rate::{Levels, RateLimit};
use crate::virtio::worker::Worker;
use crate::virtio::{Activation, VirtioDevice};

/// Descriptors in each queue.
const QUEUE_SIZE: u16 = 256;
/// Pieces of data in a request that fills a queue: header and status are two more.
pub(super) const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// "Mass storage controller, SCSI", which is what tools know virtio-blk as.
const PCI_CLASS: u32 = 0x01_0000;

/// How requests reach the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoChoice {
    /// What the host's page cache answers, the queue's own thread; all else io_uring, or where the
    /// kernel refuses that, a pool of threads.
    #[default]
    Auto,
    /// All by io_uring.
    Uring,
    /// As without a choice, and never io_uring.
    Threads,
}

/// What a disk is besides its image.
#[derive(Clone, Debug)]
pub struct BlkOptions {
    /// The disk's name in what is said of its guest.
    pub label: String,
    /// The guest cannot write it.
    pub readonly: bool,
    /// What the guest reads as its serial number, filled up with zeros.
    pub serial: [u8; SERIAL_LEN],
    /// How many queues it has, at least one. Each has a thread.
    pub queues: u16,
    /// Bounds what all queues together move; each request counts as a frame.
    pub limit: RateLimit,
    /// How requests reach the host, for raw images. Others are used by the queues' threads.
    pub io: IoChoice,
    /// Takes the device's events.
    pub events: EventSink,
}

/// A block device.
#[derive(Debug)]
pub struct Blk {
    /// The name in logs and of the threads.
    name: String,
    disk: Arc<Disk>,
    config: Arc<ConfigSpace>,
    /// While its thread is parked, the engine of each queue that has one.
    engines: Vec<Option<Box<dyn Engine>>>,
    /// One for each queue.
    workers: Vec<Worker<BlkJob>>,
    counters: Vec<SharedCounters>,
    features: Features,
    /// What the driver took; none while there is none.
    negotiated: Option<Features>,
    queue_sizes: Vec<u16>,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    config: ConfigState,
    limit: Levels,
}

impl Blk {
    /// A device named `name` on this image. Its threads are parked until the driver is ready.
    ///
    /// # Errors
    ///
    /// Fails when the process may not have so many threads or descriptors, or the kernel refuses the
    /// io_uring that was asked for.
    pub fn new(name: String, storage: Storage, options: BlkOptions) -> io::Result<Self> {
        let BlkOptions {
            label,
            readonly,
            serial,
            queues,
            limit,
            io,
            events,
        } = options;
        let thread = |queue| match queue {
            0 => Worker::new(name.clone()),
            _ => Worker::new(format!("{name}.{queue}")),
        };
        let cached = io != IoChoice::Uring;
        let disk = Arc::new(
            Disk::new(label, storage, readonly, serial, limit, cached).with_events(events),
        );
        let layout = Layout {
            blocks: disk.image().blocks(),
            queues,
            seg_max: SEG_MAX,
        };
        Ok(Self {
            config: Arc::new(ConfigSpace::new(layout, disk.image().size())),
            engines: engines(&name, &disk, queues, io)?,
            disk,
            workers: (0..queues).map(thread).collect::<io::Result<_>>()?,
            counters: (0..queues).map(|_| SharedCounters::default()).collect(),
            features: Features::offered(queues, readonly),
            negotiated: None,
            queue_sizes: vec![QUEUE_SIZE; queues.into()],
            name,
        })
    }

    /// What the control thread holds of the device when it is on its bus.
    pub fn handle(&self) -> Arc<BlkHandle> {
        Arc::new(BlkHandle {
            name: self.name.clone(),
            disk: Arc::clone(&self.disk),
            config: Arc::clone(&self.config),
            counters: self.counters.clone(),
        })
    }

    fn start(&mut self, activation: Activation) -> Result<(), BoxError> {
        let Activation {
            features,
            queues,
            interrupt,
            resumed,
            ..
        } = activation;
        let features = Features::from_bits_truncate(features);
        self.negotiated = Some(features);
        self.disk
            .set_writeback(features.writeback(self.config.writeback()));
        for (index, active) in queues.into_iter().enumerate() {
            let Some(active) = active else { continue };
            let queue = BlkQueue::new(active.queue, Arc::clone(&self.disk))
                .with_engine(self.engines[index].take());
            let (to_driver, counters) = (Arc::clone(&interrupt), Arc::clone(&self.counters[index]));
            let job = BlkJob::new(queue, index as u16, active.kick, to_driver, counters);
            self.workers[index].start(job, Arc::clone(&interrupt))?;
            if resumed {
                // Of what the pause waited for, the driver does not know yet.
                interrupt.queue(index as u16);
            }
        }
        self.config.attach(interrupt, resumed);
        log::debug!("{}: driver ready with {features:?}", self.name);
        Ok(())
    }

    /// Stops everything that touches the image or guest memory. Returns where the queues stand.
    fn stop(&mut self) -> Vec<Option<u16>> {
        self.config.detach();
        self.workers.iter().for_each(Worker::stop);
        let jobs = self.workers.iter_mut().map(Worker::join);
        let jobs = jobs.zip(&mut self.engines);
        let positions = jobs.map(|(job, engine)| {
            let (position, parked) = job.map(BlkJob::park)?;
            *engine = parked;
            Some(position)
        });
        positions.collect()
    }
}

impl VirtioDevice for Blk {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn pci_class(&self) -> u32 {
        PCI_CLASS
    }

    fn events(&self) -> Option<&EventSink> {
        Some(self.disk.events())
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

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let &[wanted @ (0 | 1)] = data else { return };
        let negotiated = self.negotiated.unwrap_or(Features::CONFIG_WCE);
        if offset != WRITEBACK || !negotiated.contains(Features::CONFIG_WCE) {
            return;
        }
        let on = wanted == 1;
        self.config.set_writeback(on);
        self.disk.set_writeback(on);
        // From now on the driver relies on what it has written, before too, without a flush.
        if !on && let Err(error) = self.disk.image().flush() {
            self.disk.complain(&Request::Flush, &error);
        }
    }

    fn config_generation(&self) -> u32 {
        self.config.generation()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), BoxError> {
        let started = self.start(activation);
        started.inspect_err(|_| drop(self.stop()))
    }

    fn pause(&mut self) -> Vec<Option<u16>> {
        self.stop()
    }

    fn save(&self) -> Result<Value, BoxError> {
        Ok(json!(State {
            config: self.config.save(),
            limit: self.disk.limiter.save(),
        }))
    }

    fn check(&self, state: &Value) -> Result<(), BoxError> {
        check::<State>(state)
    }

    fn restore(&mut self, state: Value) -> Result<(), BoxError> {
        let state: State = serde_json::from_value(state)?;
        self.config.restore(&state.config);
        self.disk.limiter.restore(state.limit);
        Ok(())
    }

    fn reset(&mut self) {
        self.stop();
        self.negotiated = None;
        self.config.set_writeback(true);
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        self.stop();
        let counters = self.handle().counters();
        if counters != BlkCounters::default() {
            log::info!("{}: {counters}", self.name);
        }
    }
}
