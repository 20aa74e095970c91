//! The start of a guest, and how long each stage of it took.

use std::process;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use net::{MacAddr, TapInfo};
use serde::Serialize;

use super::{Event, EventHub, lock};
use crate::config::VmName;

/// A guest that has been started.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Started {
    /// Its name, if it has one.
    pub name: Option<VmName>,
    /// The process that runs it.
    pub pid: u32,
    /// Its NICs, in order.
    pub nics: Vec<StartedNic>,
    /// When each stage was over.
    pub stages: Stages,
}

/// A NIC of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct StartedNic {
    /// `net0`, and so on.
    pub nic: String,
    /// Its MAC address.
    pub mac: String,
    /// The macvtap's name; a user network has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// The name of the interface under it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lower: Option<String>,
}

/// When each stage was over, in microseconds from the beginning of the program. NICs, kernel and
/// machine are made side by side. Those that QEMU does without saying so are missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Stages {
    /// The files are open.
    pub opened: u64,
    /// The guest's memory is mapped.
    #[serde(skip_serializing_if = "is_zero")]
    pub memory: u64,
    /// The macvtaps are made, and all else that the host gives.
    pub network: u64,
    /// KVM has the virtual machine and its vCPUs.
    #[serde(skip_serializing_if = "is_zero")]
    pub machine: u64,
    /// The kernel lies in memory.
    #[serde(skip_serializing_if = "is_zero")]
    pub kernel: u64,
    /// The devices stand on their buses.
    #[serde(skip_serializing_if = "is_zero")]
    pub devices: u64,
    /// The vCPUs run.
    pub vcpus: u64,
}

// As serde wants it.
fn is_zero(time: &u64) -> bool {
    *time == 0
}

impl StartedNic {
    /// The NIC of this name on a macvtap.
    pub fn new(nic: &str, tap: &TapInfo) -> Self {
        Self {
            nic: nic.to_owned(),
            mac: tap.mac.to_string(),
            tap: Some(tap.name.clone()),
            lower: Some(tap.lower.clone()),
        }
    }

    /// The NIC of this name and MAC address on a user network.
    pub fn of_user_net(nic: &str, mac: MacAddr) -> Self {
        Self {
            nic: nic.to_owned(),
            mac: mac.to_string(),
            tap: None,
            lower: None,
        }
    }
}

/// A start that is under way.
#[derive(Debug)]
pub struct Start {
    began: Instant,
    /// Where what happens is published.
    pub events: Arc<EventHub>,
    stages: Mutex<Stages>,
}

impl Start {
    /// A start that has begun then.
    pub fn new(began: Instant) -> Self {
        Self {
            began,
            events: Arc::default(),
            stages: Mutex::default(),
        }
    }

    /// A stage is over; any thread may say so.
    pub fn note(&self, stage: impl FnOnce(&mut Stages) -> &mut u64) {
        let now = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        *stage(&mut lock(&self.stages)) = now;
    }

    /// All are over: publishes that the guest of this name and with these NICs runs.
    pub fn publish(&self, name: Option<VmName>, nics: Vec<StartedNic>) {
        let started = Started {
            name,
            pid: process::id(),
            nics,
            stages: *lock(&self.stages),
        };
        self.events.publish(Event::Started(started));
    }
}
