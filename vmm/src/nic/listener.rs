//! Learns of a guest from its own frames where they do not pass through the monitor (vhost-net).

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use devices::virtio::net::observe::Observer;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use net::{FrameListener, HEARD_LEN};
use vmm_sys_util::timerfd::TimerFd;

/// Frames that are looked at before a pause: a guest can send any number.
const BUDGET: usize = 64;
const PAUSE: Duration = Duration::from_millis(100);

/// Shows what a listener hears to an observer, on the control thread.
#[derive(Debug)]
pub struct GuestListener {
    listener: FrameListener,
    observer: Arc<Observer>,
    /// Runs during a pause.
    pause: TimerFd,
}

impl GuestListener {
    /// Shows `observer` what `listener` hears.
    ///
    /// # Errors
    ///
    /// Fails when the process has no file descriptor left.
    pub fn new(listener: FrameListener, observer: Arc<Observer>) -> std::io::Result<Self> {
        Ok(Self {
            listener,
            observer,
            pause: TimerFd::new()?,
        })
    }

    fn socket(&self) -> Events {
        Events::new_raw(self.listener.as_fd().as_raw_fd(), EventSet::IN)
    }

    fn watch_socket(&self, ops: &mut EventOps) {
        if let Err(error) = ops.add(self.socket()) {
            log::warn!("the guest's addresses will not be learnt: {error}");
        }
    }
}

impl MutEventSubscriber for GuestListener {
    fn init(&mut self, ops: &mut EventOps) {
        self.watch_socket(ops);
        if let Err(error) = ops.add(Events::new(&self.pause, EventSet::IN)) {
            log::warn!("the guest's addresses will not be learnt: {error}");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.pause.as_raw_fd() {
            let _ = self.pause.wait();
            self.watch_socket(ops);
            return;
        }
        let mut buffer = [0; HEARD_LEN];
        for _ in 0..BUDGET {
            match self.listener.next(&mut buffer) {
                Ok(Some(frame)) => self.observer.see(frame),
                Ok(None) => return,
                // The link is down or gone, which its watch tells; there may be more later.
                Err(error) => {
                    log::debug!("cannot hear the guest's frames: {error}");
                    break;
                }
            }
        }
        let _ = ops.remove(self.socket());
        let _ = self.pause.reset(PAUSE, None);
    }
}
