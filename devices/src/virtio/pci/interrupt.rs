//! How a device on the PCI bus reaches its driver: a vector for each event, and the ISR status.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vmm_sys_util::eventfd::EventFd;

use super::super::Interrupt;
use super::super::transport::TransportInterrupt;
use crate::bus::{BoxError, check};
use crate::irq::IrqLine;

/// No interrupt for this event (virtio 1.2, 4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;

/// The vector that the driver has given an event.
#[derive(Debug)]
pub(super) struct Vector(AtomicU16);

impl Vector {
    fn none() -> Self {
        Self(AtomicU16::new(NO_VECTOR))
    }

    /// Its number, or [`NO_VECTOR`].
    pub fn get(&self) -> u16 {
        self.0.load(Ordering::Acquire)
    }

    fn set(&self, number: u16) {
        self.0.store(number, Ordering::Release);
    }
}

/// The vectors, and which event has which.
#[derive(Debug)]
pub struct PciInterrupt {
    pub(super) lines: Vec<IrqLine>,
    pub(super) config_vector: Vector,
    pub(super) queue_vectors: Vec<Vector>,
    /// What a kernel that interrupts by itself signals for queues without a vector.
    no_vector: IrqLine,
    /// What has happened since the driver last looked (4.1.4.5).
    status: AtomicU8,
    needs_reset: AtomicBool,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    config_vector: u16,
    queue_vectors: Vec<u16>,
    status: u8,
    /// Vectors that wait to be unmasked.
    pending: Vec<usize>,
}

/// ISR status: a queue has been used.
const USED_BUFFER: u8 = 1;
/// ISR status: the configuration has changed.
const CONFIG_CHANGE: u8 = 2;

impl PciInterrupt {
    /// Events without vectors, for a device with so many queues.
    ///
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub(super) fn new(lines: Vec<IrqLine>, queues: usize) -> io::Result<Self> {
        Ok(Self {
            lines,
            config_vector: Vector::none(),
            queue_vectors: (0..queues).map(|_| Vector::none()).collect(),
            no_vector: IrqLine::new()?,
            status: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
        })
    }

    /// Gives an event a vector; one that does not exist reads back as none (4.1.5.1.2.1).
    pub(super) fn assign(&self, event: &Vector, vector: u16) {
        let exists = usize::from(vector) < self.lines.len();
        event.set(if exists { vector } else { NO_VECTOR });
    }

    /// The ISR status, which reading clears.
    pub(super) fn take_status(&self) -> u8 {
        let used = self.no_vector.eventfd().read().map_or(0, |_| USED_BUFFER);
        self.status.swap(0, Ordering::SeqCst) | used
    }

    fn raise(&self, event: u8, vector: &Vector) {
        self.status.fetch_or(event, Ordering::SeqCst);
        if let Some(line) = self.line(vector) {
            line.raise();
        }
    }

    fn line(&self, vector: &Vector) -> Option<&IrqLine> {
        // NO_VECTOR is beyond all lines.
        self.lines.get(usize::from(vector.get()))
    }
}

impl Interrupt for PciInterrupt {
    fn queue(&self, index: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(index)) {
            self.raise(USED_BUFFER, vector);
        }
    }

    // A kernel that signals a vector leaves the ISR status alone, whose bit is needed only where
    // there is no vector (4.1.4.5.1).
    fn call_eventfd(&self, index: u16) -> &EventFd {
        let vector = self.queue_vectors.get(usize::from(index));
        let line = vector.and_then(|vector| self.line(vector));
        line.unwrap_or(&self.no_vector).eventfd()
    }

    fn config(&self) {
        self.raise(CONFIG_CHANGE, &self.config_vector);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.config();
    }
}

impl TransportInterrupt for PciInterrupt {
    fn is_broken(&self) -> &AtomicBool {
        &self.needs_reset
    }

    fn save(&self) -> Value {
        let used = if self.no_vector.is_raised() {
            USED_BUFFER
        } else {
            0
        };
        let lines = self.lines.iter().enumerate();
        json!(State {
            config_vector: self.config_vector.get(),
            queue_vectors: self.queue_vectors.iter().map(Vector::get).collect(),
            status: self.status.load(Ordering::SeqCst) | used,
            pending: lines
                .filter_map(|(n, line)| line.is_raised().then_some(n))
                .collect(),
        })
    }

    fn check(&self, state: &Value) -> Result<(), BoxError> {
        check::<State>(state)
    }

    fn restore(&self, state: Value) -> serde_json::Result<()> {
        let state: State = serde_json::from_value(state)?;
        self.clear();
        self.assign(&self.config_vector, state.config_vector);
        for (event, &vector) in self.queue_vectors.iter().zip(&state.queue_vectors) {
            self.assign(event, vector);
        }
        self.status.store(state.status, Ordering::SeqCst);
        let pending = state.pending.iter().filter_map(|&n| self.lines.get(n));
        pending.for_each(IrqLine::raise);
        Ok(())
    }

    fn clear(&self) {
        self.take_status();
        // What a masked vector holds back would otherwise interrupt the next driver (2.4.1).
        self.lines.iter().for_each(IrqLine::clear);
        self.config_vector.set(NO_VECTOR);
        for vector in &self.queue_vectors {
            vector.set(NO_VECTOR);
        }
    }
}
