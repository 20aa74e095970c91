//! What every virtio transport does alike: features, status, queues, and the device.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Queue, QueueConfig};
use super::status::{Status, Step};
use super::{
    Activation, ActiveQueue, Complaints, Interrupt, VIRTIO_F_VERSION_1, VirtioDevice, kind,
};
use crate::bus::{BoxError, BusDevice};
use crate::events::{DeviceEvent, Throttle};

/// What distinguishes a transport: the registers by which a driver reaches a device.
pub trait Registers: Send + fmt::Debug + Sized {
    /// How a device reaches its driver.
    type Interrupt: TransportInterrupt;
    /// As [`BusDevice::read`].
    fn read(transport: &mut Transport<Self>, offset: u64, data: &mut [u8]);
    /// As [`BusDevice::write`].
    fn write(transport: &mut Transport<Self>, offset: u64, data: &[u8]);
    /// Has them hold what they did at power-on.
    fn reset(&mut self) {}
    /// What these registers hold that the rest of the transport does not.
    fn save(&self) -> Value {
        Value::Null
    }
    /// As [`BusDevice::check`].
    ///
    /// # Errors
    ///
    /// Says what does not fit.
    fn check(&self, _state: &Value) -> Result<(), BoxError> {
        Ok(())
    }
    /// Has them hold again what they held.
    ///
    /// # Errors
    ///
    /// As [`Registers::check`].
    fn restore(&mut self, _state: Value) -> Result<(), BoxError> {
        Ok(())
    }
}

/// What a transport adds to [`Interrupt`].
pub trait TransportInterrupt: Interrupt + 'static {
    /// [`Interrupt::needs_reset`] has been called since the last reset.
    fn is_broken(&self) -> &AtomicBool;
    /// What is pending.
    fn save(&self) -> Value;
    /// As [`BusDevice::check`].
    ///
    /// # Errors
    ///
    /// Fails when the state is another transport's.
    fn check(&self, state: &Value) -> Result<(), BoxError>;
    /// Has pending again what was.
    ///
    /// # Errors
    ///
    /// As [`TransportInterrupt::check`].
    fn restore(&self, state: Value) -> serde_json::Result<()>;
    /// Forgets everything that is pending, for a reset.
    fn clear(&self);
}

/// What [`Transport`] saves.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    device_id: u32,
    device: Value,
    registers: Value,
    interrupt: Value,
    is_broken: bool,
    status: Status,
    driver_features: u64,
    queues: Vec<QueueConfig>,
    positions: Vec<Option<u16>>,
    /// The features that the device and the driver select, and the queue.
    selected: [u32; 3],
}

/// A virtio device on a bus, with the part of its state that the driver sees through whatever
/// registers.
#[derive(Debug)]
pub struct Transport<R: Registers> {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) registers: R,
    pub(super) interrupt: Arc<R::Interrupt>,
    pub(super) queues: Vec<QueueConfig>,
    /// Which 32 bits of the offered features the driver reads.
    pub(super) device_features_sel: u32,
    /// Which 32 bits of its features it writes.
    pub(super) driver_features_sel: u32,
    /// Which queue it sets up.
    pub(super) queue_sel: u32,
    kicks: Vec<Arc<EventFd>>,
    memory: Arc<GuestMemoryMmap>,
    status: Status,
    driver_features: u64,
    /// While the device is paused: where its queues stand.
    paused: Option<Vec<Option<u16>>>,
    complaints: Complaints,
    /// Bounds how often it is reported that the driver is ready.
    reports: Throttle,
}

impl<R: Registers> Transport<R> {
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub(super) fn with_registers(
        registers: R,
        interrupt: R::Interrupt,
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
    ) -> io::Result<Self> {
        let kick = |_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Arc::new);
        let kicks = device.queue_sizes().iter().map(kick);
        Ok(Self {
            kicks: kicks.collect::<io::Result<_>>()?,
            queues: fresh_queues(device.as_ref()),
            device,
            registers,
            interrupt: Arc::new(interrupt),
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            memory,
            status: Status::empty(),
            driver_features: 0,
            paused: None,
            complaints: Complaints::default(),
            reports: Throttle::default(),
        })
    }

    /// The eventfd of each queue, to be signalled when the driver notifies it by the register that
    /// its transport has for that.
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// The status field as the driver reads it.
    pub(super) fn status(&self) -> Status {
        if self.interrupt.is_broken().load(Ordering::SeqCst) {
            self.status | Status::DEVICE_NEEDS_RESET
        } else {
            self.status
        }
    }

    /// The selected 32 bits of the offered features.
    pub(super) fn device_features(&self) -> u32 {
        half(self.offered_features(), self.device_features_sel)
    }

    /// The selected 32 bits of the driver's features.
    pub(super) fn driver_features(&self) -> u32 {
        half(self.driver_features, self.driver_features_sel)
    }

    /// Takes the selected 32 bits of the driver's features.
    pub(super) fn set_driver_features(&mut self, value: u32) {
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
    pub(super) fn queue_size_max(&self, queue: usize) -> u16 {
        self.device.queue_sizes().get(queue).copied().unwrap_or(0)
    }

    /// The selected queue, if the driver may still set it up: it exists, and neither is it enabled
    /// nor does the device run.
    pub(super) fn queue_in_setup(&mut self) -> Option<&mut QueueConfig> {
        let running = self.status.contains(Status::DRIVER_OK);
        self.queues
            .get_mut(self.queue_sel as usize)
            .filter(|queue| !queue.ready && !running)
    }

    /// Enables the selected queue, or disables it again.
    pub(super) fn set_queue_ready(&mut self, ready: bool) {
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
    pub(super) fn halt(&mut self) {
        if self.status.contains(Status::DRIVER_OK) {
            self.device.reset();
            self.status -= Status::DRIVER_OK;
        }
    }

    /// The driver notifies a queue by a register write that no ioeventfd has caught.
    pub(super) fn notify(&self, queue: usize) {
        if let Some(kick) = self.kicks.get(queue) {
            let _ = kick.write(1);
        }
    }

    /// The driver writes the status field.
    pub(super) fn set_status(&mut self, value: u8) {
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
                self.start(None);
            }
            Step::Reset => self.reset_device(),
            Step::Refuse => log::debug!("virtio status {:?}: refused {value:#x}", self.status),
        }
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | VIRTIO_F_VERSION_1
    }

    /// Starts the device: with fresh queues, or where they stood when it was paused.
    fn start(&mut self, paused: Option<Vec<Option<u16>>>) {
        let resumed = paused.is_some();
        if let Err(error) = self.activate(paused) {
            if self.complaints.may_warn() {
                let id = self.device.device_id();
                log::warn!("the {} cannot start: {error}", kind(id));
            }
            self.interrupt.needs_reset();
        } else if let Some(events) = self.device.events().filter(|_| !resumed)
            && self.reports.may_pass(Instant::now())
        {
            events.report(DeviceEvent::DriverReady);
        }
    }

    fn activate(&mut self, paused: Option<Vec<Option<u16>>>) -> Result<(), BoxError> {
        let resumed = paused.is_some();
        let queues = (0..self.queues.len()).map(|index| self.queue(index));
        let mut queues = queues.collect::<Result<Vec<_>, _>>()?;
        if let Some(positions) = paused {
            let positions = positions.into_iter().chain(std::iter::repeat(None));
            for (queue, position) in queues.iter_mut().zip(positions) {
                match (queue.as_mut(), position) {
                    (Some(active), Some(position)) => active.queue.resume(position),
                    _ => *queue = None,
                }
            }
        }
        self.device.activate(Activation {
            memory: Arc::clone(&self.memory),
            features: self.driver_features,
            queues,
            resumed,
            interrupt: Arc::clone(&self.interrupt) as Arc<dyn Interrupt>,
        })
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

    /// The reset of virtio 1.2, 2.4: the driver's, which the bus does not notice.
    fn reset_device(&mut self) {
        self.device.reset();
        self.queues = fresh_queues(self.device.as_ref());
        self.status = Status::empty();
        self.driver_features = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        self.paused = self.paused.take().map(|_| Vec::new());
        self.interrupt.clear();
        self.interrupt.is_broken().store(false, Ordering::SeqCst);
    }
}

impl<R: Registers> BusDevice for Transport<R> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        R::read(self, offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        R::write(self, offset, data);
    }

    fn pause(&mut self) {
        if self.paused.is_none() {
            self.paused = Some(self.device.pause());
        }
    }

    /// Has the device go on, if it was active.
    fn resume(&mut self) {
        let was_active = |positions: &Vec<Option<u16>>| positions.iter().any(Option::is_some);
        if let Some(positions) = self.paused.take().filter(was_active) {
            self.start(Some(positions));
        }
    }

    fn reset(&mut self) {
        // Its vectors first: what the device signals until it stops is then forgotten with the rest.
        self.registers.reset();
        self.reset_device();
        for kick in &self.kicks {
            let _ = kick.read();
        }
    }

    fn save(&self) -> Result<Value, BoxError> {
        Ok(json!(State {
            device_id: self.device.device_id(),
            device: self.device.save()?,
            registers: self.registers.save(),
            interrupt: self.interrupt.save(),
            is_broken: self.interrupt.is_broken().load(Ordering::SeqCst),
            status: self.status,
            driver_features: self.driver_features,
            queues: self.queues.clone(),
            positions: self.paused.clone().unwrap_or_default(),
            selected: [
                self.device_features_sel,
                self.driver_features_sel,
                self.queue_sel,
            ],
        }))
    }

    fn check(&self, state: &Value) -> Result<(), BoxError> {
        let state = State::deserialize(state)?;
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
        self.device.check(&state.device)?;
        self.interrupt.check(&state.interrupt)?;
        self.registers.check(&state.registers)
    }

    fn restore(&mut self, state: Value) -> Result<(), BoxError> {
        self.check(&state)?;
        let state: State = serde_json::from_value(state)?;
        self.device.restore(state.device)?;
        self.interrupt.restore(state.interrupt)?;
        let is_broken = self.interrupt.is_broken();
        is_broken.store(state.is_broken, Ordering::SeqCst);
        self.status = state.status;
        self.driver_features = state.driver_features;
        self.queues = state.queues;
        self.paused = Some(state.positions);
        [
            self.device_features_sel,
            self.driver_features_sel,
            self.queue_sel,
        ] = state.selected;
        self.registers.restore(state.registers)
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
