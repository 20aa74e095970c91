//! What can be done with a network device once it is on its bus.

use std::sync::{Arc, Mutex};

use super::config::ConfigSpace;
use super::counters::{self, CtrlCounters, PairCounters, SharedCounters};
use super::filter::Filter;
use super::observe::Observer;
use super::rx_filter::RxFilterInfo;
use crate::lock;

/// A network device, for the control thread. Nothing here waits for the device's threads or its
/// driver.
#[derive(Debug)]
pub struct NetHandle {
    pub(super) name: String,
    pub(super) config: Arc<ConfigSpace>,
    pub(super) observer: Arc<Observer>,
    pub(super) filter: Arc<Filter>,
    pub(super) has_vhost: bool,
    pub(super) counters: Vec<SharedCounters>,
    pub(super) ctrl_counters: Arc<Mutex<CtrlCounters>>,
}

impl NetHandle {
    /// The NIC's name: `net0`, and so on.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// MAC address, MTU, and the link as the driver finds it.
    pub fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    /// Sees what the guest sends, and so its addresses.
    pub fn observer(&self) -> &Arc<Observer> {
        &self.observer
    }

    /// Which frames the driver takes. The next change of that is reported again.
    pub fn query_rx_filter(&self) -> RxFilterInfo {
        self.filter.query(&self.name)
    }

    /// The kernel moves the frames, and the pairs' counters stay at 0.
    pub fn has_vhost(&self) -> bool {
        self.has_vhost
    }

    /// What each queue pair has done.
    pub fn pairs(&self) -> Vec<PairCounters> {
        self.counters.iter().map(counters::read).collect()
    }

    /// What the control queue has done.
    pub fn ctrl(&self) -> CtrlCounters {
        *lock(&self.ctrl_counters)
    }
}
