//! The reset of a guest that goes on in the same process: everything is as at power-on then, but for
//! what is the host's (macvtaps, disks, the console's reader).
//!
//! The vCPUs stop at their barrier. A thread of its own then resets the devices and what KVM holds,
//! empties guest memory and loads the kernel again: the control thread goes on meanwhile. A pause
//! that is asked for takes effect before the guest runs, and an end at once.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::event_loop::Control;
use super::exit::{Exit, chain};
use super::handle::Handle;
use crate::builder::Error;
use crate::builder::load::Loader;
use crate::config::{Config, Reboot};
use crate::events::Event;
use crate::kvm::barrier::Barrier;
use crate::kvm::guest::{KvmGuest, PowerOn};
use crate::kvm::vcpu::DeviceBuses;
use crate::kvm::vcpus::leave_guest;
use crate::kvm::vm::VmError;
use crate::memory;

/// Resets that follow each other more closely are a guest's that does nothing else: the log would
/// get full of them.
const APART: Duration = Duration::from_secs(1);

/// By which a guest asks for its reset.
#[derive(Clone, Debug)]
pub struct ResetRequest {
    /// Where its vCPUs stop.
    barrier: Arc<Barrier>,
    control: Handle,
}

impl ResetRequest {
    /// Of a guest that does not end with its reset.
    pub fn of(config: &Config, barrier: &Arc<Barrier>, control: &Handle) -> Option<Self> {
        (config.reboot == Reboot::Restart).then(|| Self {
            barrier: Arc::clone(barrier),
            control: control.clone(),
        })
    }

    /// Asks for it, on the thread of the vCPU that does so: it does not run on in the guest.
    pub fn request(&self) {
        leave_guest();
        if self.barrier.reset() {
            self.control.post(|control| control.reset_by(true));
        }
    }
}

/// What a guest begins again from.
#[derive(Debug)]
pub struct Restart {
    loader: Loader,
    kvm: Arc<KvmGuest>,
    power_on: PowerOn,
    /// With its memory.
    devices: Arc<DeviceBuses>,
    /// The memory's pages are huge ones that the host has set aside.
    hugepages: bool,
}

impl Restart {
    /// Of a guest that does not end with its reset, before it runs.
    pub fn of(
        config: &Config,
        loader: Loader,
        kvm: &Arc<KvmGuest>,
        devices: &Arc<DeviceBuses>,
    ) -> Result<Option<Self>, VmError> {
        if config.reboot == Reboot::Exit {
            return Ok(None);
        }
        Ok(Some(Self {
            loader,
            power_on: kvm.power_on()?,
            kvm: Arc::clone(kvm),
            devices: Arc::clone(devices),
            hugepages: config.hugepages,
        }))
    }

    /// Resets the guest, whose vCPUs stand still. First what could write memory by itself, or
    /// interrupt.
    fn run(&mut self) -> Result<(), Error> {
        let memory = &self.devices.memory;
        self.devices.reset();
        self.kvm.reset(&self.power_on)?;
        memory::empty(memory, self.hugepages, &self.devices.exit);
        let boot = self.loader.load(memory)?;
        Ok(self.kvm.enter_at(&boot)?)
    }
}

/// The control thread's part of it.
#[derive(Debug)]
pub struct Resets {
    /// `None` while the thread has it.
    restart: Option<Restart>,
    thread: Option<JoinHandle<()>>,
    control: Handle,
    /// The guest has asked for the one that is under way.
    by_guest: bool,
    last: Option<Instant>,
}

impl Resets {
    /// Of a guest that begins again from `restart`.
    pub fn new(restart: Restart, control: Handle) -> Self {
        Self {
            restart: Some(restart),
            thread: None,
            control,
            by_guest: false,
            last: None,
        }
    }

    /// Whether a thread has the devices and vCPUs.
    pub fn is_under_way(&self) -> bool {
        self.restart.is_none()
    }
}

impl Drop for Resets {
    /// The devices are gone with the guest only when the thread is, too.
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Control {
    /// Presses the guest's reset button: it begins again, or ends where a reboot ends it. One that is
    /// paused stays so.
    pub fn reset(&mut self) {
        if self.resets.is_none() {
            self.exit.request(Exit::Reboot);
        } else if self.vcpus.barrier().reset() {
            self.reset_by(false);
        }
    }

    /// A reset has been asked for, and the barrier is closed.
    fn reset_by(&mut self, guest: bool) {
        // It was to power off, and has come to its end by another way.
        if self.pressed_by.is_some() {
            self.exit.request(Exit::Reboot);
        }
        if let Some(resets) = &mut self.resets {
            resets.by_guest = guest;
        }
        self.vcpus.kick();
    }

    /// All vCPUs have stopped for a reset, which may be under way.
    pub(super) fn start_reset(&mut self) {
        let Some(resets) = &mut self.resets else {
            return;
        };
        let Some(mut restart) = resets.restart.take() else {
            return;
        };
        let control = resets.control.clone();
        let work = move || {
            let result = catch_unwind(AssertUnwindSafe(|| restart.run()));
            let result = match result {
                Ok(result) => result.map_err(|error| chain(&error)),
                Err(_) => Err("the thread of the reset panicked".into()),
            };
            control.post(|control| control.reset_done(restart, result));
        };
        match thread::Builder::new().name("reset".into()).spawn(work) {
            Ok(thread) => resets.thread = Some(thread),
            Err(error) => self.exit.request(Exit::Failure(format!(
                "cannot start a thread for the guest's reset: {error}"
            ))),
        }
    }

    /// The thread has finished.
    fn reset_done(&mut self, restart: Restart, result: Result<(), String>) {
        let Some(resets) = &mut self.resets else {
            return;
        };
        resets.restart = Some(restart);
        resets.thread = None;
        if let Err(failure) = result {
            let what = format!("cannot restart the guest: {failure}");
            return self.exit.request(Exit::Failure(what));
        }
        let (guest, reason) = match resets.by_guest {
            true => (true, "guest-reset"),
            false => (false, "host-qmp-system-reset"),
        };
        let is_close = resets.last.is_some_and(|last| last.elapsed() < APART);
        if !is_close {
            log::info!("the guest restarts ({reason})");
        }
        resets.last = Some(Instant::now());
        self.events.publish(Event::Reset { guest, reason });
        if !self.vcpus.barrier().is_paused() {
            self.resume_devices();
        }
        // Where a pause was asked for, it is full again and signals that.
        self.vcpus.barrier().reset_done();
    }
}
