//! What every virtio transport does alike: features, status, queues, and the device.

use std::error::Error;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Queue, QueueConfig};
use super::status::{Status, Step};
use super::{Activation, ActiveQueue, Complaints, Interrupt, VIRTIO_F_VERSION_1, VirtioDevice};

/// What a transport adds to [`Interrupt`].
pub(super) trait TransportInterrupt: Interrupt + 'static {
    /// Whether [`Interrupt::needs_reset`] has been called since the last reset.
    fn is_broken(&self) -> bool;
    /// What is pending.
    fn save(&self) -> Value;
    /// Has pending again what was.
    fn restore(&self, state: Value) -> serde_json::Result<()>;
    /// Forgets everything that is pending, for a reset.
    fn clear(&self);
}

/// What [`Core::save`] keeps.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    device_id: u32,
    device: Value,
    interrupt: Value,
    status: Status,
    driver_features: u64,
    queues: Vec<QueueConfig>,
    positions: Vec<Option<u16>>,
    /// The features that the device and the driver select, and the queue.
    selected: [u32; 3],
}

/// The part of a virtio device's state that the driver sees through whatever registers.
#[derive(Debug)]
pub(super) struct Core<I> {
    pub device: Box<dyn VirtioDevice>,
    pub interrupt: Arc<I>,
    pub kicks: Vec<Arc<EventFd>>,
    pub queues: Vec<QueueConfig>,
    /// Which 32 bits of the offered features the driver reads.
    pub device_features_sel: u32,
    /// Which 32 bits of its features it writes.
    pub driver_features_sel: u32,
    /// Which queue it sets up.
    pub queue_sel: u32,
    memory: Arc<GuestMemoryMmap>,
    status: Status,
    driver_features: u64,
    /// While the device is paused: where its queues stand.
    paused: Option<Vec<Option<u16>>>,
    complaints: Complaints,
}

impl<I: TransportInterrupt> Core<I> {
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
        interrupt: I,
    ) -> io::Result<Self> {
        let kick = |_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Arc::new);
        let kicks = device
            .queue_sizes()
            .iter()
            .map(kick)
            .collect::<io::Result<Vec<_>>>()?;
        let queues = fresh_queues(device.as_ref());
        Ok(Self {
            device,
            interrupt: Arc::new(interrupt),
            kicks,
            queues,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            memory,
            status: Status::empty(),
            driver_features: 0,
            paused: None,
            complaints: Complaints::default(),
        })
    }

    /// The status field as the driver reads it.
    pub fn status(&self) -> Status {
        if self.interrupt.is_broken() {
            self.status | Status::DEVICE_NEEDS_RESET
        } else {
            self.status
        }
    }

    /// The selected 32 bits of the offered features.
    pub fn device_features(&self) -> u32 {
        half(self.offered_features(), self.device_features_sel)
    }

    /// The selected 32 bits of the driver's features.
    pub fn driver_features(&self) -> u32 {
        half(self.driver_features, self.driver_features_sel)
    }

    /// Takes the selected 32 bits of the driver's features.
    pub fn set_driver_features(&mut self, value: u32) {
        if self.status.contains(Status::FEATURES_OK) {
            return;
        }
        match self.driver_features_sel {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            // Bits above 63 are not offered; taking one makes FEATURES_OK fail below.
            _ if value != 0 => self.driver_features = u64::MAX,
            _ => {}
        }
    }

    /// The size limit of a queue; 0 where there is none.
    pub fn queue_size_max(&self, queue: usize) -> u16 {
        self.device.queue_sizes().get(queue).copied().unwrap_or(0)
    }

    /// The selected queue, if the driver may still set it up: it exists, and neither is it enabled
    /// nor does the device run.
    pub fn queue_in_setup(&mut self) -> Option<&mut QueueConfig> {
        let running = self.status.contains(Status::DRIVER_OK);
        self.queues
            .get_mut(self.queue_sel as usize)
            .filter(|queue| !queue.ready && !running)
    }

    /// Enables the selected queue, or disables it again.
    pub fn set_queue_ready(&mut self, ready: bool) {
        let running = self.status.contains(Status::DRIVER_OK);
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else {
            return;
        };
        if !running {
            queue.ready = ready;
        } else if queue.ready && !ready {
            // A queue in use can only be stopped, by a 0 that the driver may read back (4.2.2.2).
            queue.ready = false;
            // A device works with all its queues or none: what follows is its reset.
            self.device.reset();
        }
    }

    /// Stops the device where it may not touch memory any more. The driver finds DRIVER_OK gone, and
    /// has to reset it.
    pub fn halt(&mut self) {
        if self.status.contains(Status::DRIVER_OK) {
            self.device.reset();
            self.status -= Status::DRIVER_OK;
        }
    }

    /// The driver notifies a queue by a register write that no ioeventfd has caught.
    pub fn notify(&self, queue: usize) {
        if let Some(kick) = self.kicks.get(queue) {
            let _ = kick.write(1);
        }
    }

    /// The driver writes the status field.
    pub fn set_status(&mut self, value: u8) {
        match self.status().written(value) {
            Step::Set(status) => self.status = status,
            Step::CheckFeatures(status) => {
                let known = self.driver_features & !self.offered_features() == 0;
                let modern = self.driver_features & VIRTIO_F_VERSION_1 != 0;
                self.status = if known && modern {
                    status
                } else {
                    status - Status::FEATURES_OK
                };
            }
            Step::Activate(status) => {
                self.status = status;
                if let Err(error) = self.activate() {
                    self.complain(&error.to_string());
                    self.interrupt.needs_reset();
                }
            }
            Step::Reset => self.reset(),
            Step::Refuse => log::debug!("virtio status {:?}: refused {value:#x}", self.status),
        }
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | VIRTIO_F_VERSION_1
    }

    fn activate(&mut self) -> Result<(), Box<dyn Error + Send + Sync>> {
        let queues = (0..self.queues.len()).map(|index| self.queue(index));
        let activation = self.activation(queues.collect::<Result<_, _>>()?);
        self.device.activate(activation)
    }

    fn activation(&self, queues: Vec<Option<ActiveQueue>>) -> Activation {
        Activation {
            memory: Arc::clone(&self.memory),
            features: self.driver_features,
            queues,
            interrupt: Arc::clone(&self.interrupt) as Arc<dyn Interrupt>,
        }
    }

    /// A queue as the driver has set it up, if it has.
    fn queue(&self, index: usize) -> Result<Option<ActiveQueue>, virtio_queue::Error> {
        let config = self.queues[index];
        if !config.ready {
            return Ok(None);
        }
        let event_idx = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let (max_size, memory) = (self.queue_size_max(index), Arc::clone(&self.memory));
        Ok(Some(ActiveQueue {
            queue: Queue::new(&config, max_size, event_idx, memory)?,
            config,
            kick: Arc::clone(&self.kicks[index]),
        }))
    }

    /// Pauses the device.
    pub fn pause(&mut self) {
        if self.paused.is_none() {
            self.paused = Some(self.device.pause());
        }
    }

    /// Has the device go on, if it was active.
    pub fn resume(&mut self) {
        let positions = self.paused.take().unwrap_or_default();
        if positions.iter().any(Option::is_some)
            && let Err(error) = self.resume_from(&positions)
        {
            self.complain(&error.to_string());
            self.interrupt.needs_reset();
        }
    }

    fn resume_from(
        &mut self,
        positions: &[Option<u16>],
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        let mut queues = Vec::with_capacity(positions.len());
        for (index, position) in positions.iter().enumerate() {
            let mut active = position.map_or(Ok(None), |_| self.queue(index))?;
            if let (Some(active), &Some(position)) = (&mut active, position) {
                active.queue.resume(position);
            }
            queues.push(active);
        }
        let activation = self.activation(queues);
        self.device.resume(activation)
    }

    /// What another device needs to take the place of this one, which is paused.
    pub fn save(&self) -> Value {
        json!(State {
            device_id: self.device.device_id(),
            device: self.device.save(),
            interrupt: self.interrupt.save(),
            status: self.status,
            driver_features: self.driver_features,
            queues: self.queues.clone(),
            positions: self.paused.clone().unwrap_or_default(),
            selected: [
                self.device_features_sel,
                self.driver_features_sel,
                self.queue_sel,
            ],
        })
    }

    /// Makes this device, which has not run or is paused, the one that was saved, paused.
    ///
    /// # Errors
    ///
    /// Fails when it was of another kind, or its state is not taken.
    pub fn restore(&mut self, state: Value) -> Result<(), Box<dyn Error + Send + Sync>> {
        let state: State = serde_json::from_value(state)?;
        let queues = self.queues.len();
        if state.device_id != self.device.device_id()
            || state.queues.len() != queues
            || state.positions.len() > queues
        {
            return Err("it is another device".into());
        }
        let lacking = state.driver_features & !self.offered_features();
        if state.status.contains(Status::FEATURES_OK) && lacking != 0 {
            return Err(
                format!("its driver has features that are not offered: {lacking:#x}").into(),
            );
        }
        self.device.restore(state.device)?;
        self.interrupt.restore(state.interrupt)?;
        self.status = state.status;
        self.driver_features = state.driver_features;
        self.queues = state.queues;
        self.paused = Some(state.positions);
        [
            self.device_features_sel,
            self.driver_features_sel,
            self.queue_sel,
        ] = state.selected;
        Ok(())
    }

    /// Warns of what a driver did wrong.
    fn complain(&self, what: &str) {
        if self.complaints.may_warn() {
            log::warn!(
                "virtio device {} cannot start: {what}",
                self.device.device_id()
            );
        }
    }

    fn reset(&mut self) {
        self.device.reset();
        self.queues = fresh_queues(self.device.as_ref());
        self.status = Status::empty();
        self.driver_features = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        self.paused = self.paused.take().map(|_| Vec::new());
        self.interrupt.clear();
    }
}

fn fresh_queues(device: &dyn VirtioDevice) -> Vec<QueueConfig> {
    let fresh = |&size: &u16| QueueConfig {
        size,
        ..QueueConfig::default()
    };
    device.queue_sizes().iter().map(fresh).collect()
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// Replaces the lower half of an address or a set of features.
pub(super) fn set_low(value: &mut u64, low: u32) {
    *value = (*value & !0xffff_ffff) | u64::from(low);
}

/// Replaces the upper half.
pub(super) fn set_high(value: &mut u64, high: u32) {
    *value = (*value & 0xffff_ffff) | (u64::from(high) << 32);
}
