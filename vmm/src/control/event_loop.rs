//! The control thread: holds the run state, waits for the guest's end, and turns signals into the
//! power button.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use devices::irq::IrqLine;
use devices::virtio::balloon::BalloonHandle;
use devices::virtio::net::NetHandle;
use devices::virtio::vsock::VsockHandle;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::timerfd::TimerFd;

use super::exit::{Exit, ExitRequest};
use super::handle::Requests;
use super::reset::Resets;
use super::{GuestError, GuestState, RunState};
use crate::config::VmName;
use crate::disk::Disk;
use crate::events::{Event, EventHub};
use crate::kvm::vcpu::DeviceBuses;
use crate::kvm::vcpus::Vcpus;
use crate::signals::not_ignored;
use crate::stats::{BalloonStats, MemoryStats, Stats};

/// How long a guest takes to boot, about, and its drivers to start.
const SETTLED: Duration = Duration::from_secs(2);

// Event tokens; the signals' are their numbers.
const EXIT: u32 = 0;
const GRACE_OVER: u32 = u32::MAX;
const STOPPED: u32 = u32::MAX - 1;
const REQUEST: u32 = u32::MAX - 2;
const CONSOLE: u32 = u32::MAX - 3;

/// The signals that end the guest, from [`CaughtSignals::catch`] on.
#[derive(Debug)]
pub struct CaughtSignals {
    caught: Vec<(libc::c_int, UnixStream)>,
    /// How long the guest has to power off by itself after the first.
    grace: Duration,
}

impl CaughtSignals {
    /// Catches those of `signals` that are not ignored. After the first one the guest has `grace` to
    /// power off.
    pub fn catch(signals: &[libc::c_int], grace: Duration) -> io::Result<Self> {
        let catch = |signal| {
            let (caught, handler) = UnixStream::pair()?;
            signal_hook::low_level::pipe::register(signal, handler)?;
            caught.set_nonblocking(true)?;
            Ok((signal, caught))
        };
        let caught = not_ignored(signals).into_iter().map(catch);
        Ok(Self {
            caught: caught.collect::<io::Result<_>>()?,
            grace,
        })
    }
}

/// What other subscribers of the control thread's share with it.
pub type SharedControl = Rc<RefCell<Control>>;

/// What is done once the guest is paused. It is dropped instead when the guest ends or is resumed before.
pub type Paused = Box<dyn FnOnce() + Send>;

/// The control thread's state.
pub struct Control {
    /// If a reset does not end it. First, since what waits in `requests` is dropped only when no
    /// thread adds to it.
    pub resets: Option<Resets>,
    pub(super) exit: Arc<ExitRequest>,
    power_button: IrqLine,
    signals: CaughtSignals,
    requests: Requests,
    grace: TimerFd,
    /// The signal that has pressed the power button.
    pub(super) pressed_by: Option<libc::c_int>,
    pub(super) vcpus: Vcpus,
    devices: Arc<DeviceBuses>,
    /// The VM's, if it has one.
    pub name: Option<VmName>,
    /// In the order of the configuration.
    pub disks: Vec<Disk>,
    pub(super) events: Arc<EventHub>,
    /// In the order of the configuration.
    pub nics: Vec<Arc<NetHandle>>,
    /// The names of those on a user network.
    pub user_nets: Vec<String>,
    pub balloon: Option<BalloonHandle>,
    pub vsock: Option<VsockHandle>,
    /// The NICs announce themselves by QMP's announce-self until this is dropped.
    pub announcing: Option<Sender<()>>,
    /// When the vCPUs were started.
    started: Instant,
    is_paused: bool,
    /// Those that wait until all vCPUs have stopped.
    pausing: Vec<Paused>,
}

impl Control {
    /// Controls a guest that runs already: the first of `signals` presses its power button, the
    /// second ends it.
    pub fn new(
        vcpus: Vcpus,
        devices: Arc<DeviceBuses>,
        power_button: IrqLine,
        signals: CaughtSignals,
        requests: Requests,
        events: Arc<EventHub>,
    ) -> io::Result<Self> {
        Ok(Self {
            resets: None,
            exit: Arc::clone(&devices.exit),
            power_button,
            signals,
            requests,
            grace: TimerFd::new()?,
            pressed_by: None,
            vcpus,
            devices,
            name: None,
            disks: Vec::new(),
            events,
            nics: Vec::new(),
            user_nets: Vec::new(),
            balloon: None,
            vsock: None,
            announcing: None,
            started: Instant::now(),
            is_paused: false,
            pausing: Vec::new(),
        })
    }

    /// Waits until an exit has been requested, and lets `others` have their events meanwhile. The
    /// vCPUs have ended when it returns. `settled` is called when a guest has usually started, and
    /// some time after each event that this thread has had to do with.
    ///
    /// # Errors
    ///
    /// Fails when waiting itself does; the guest is ended then.
    pub fn run(
        control: SharedControl,
        others: Vec<Box<dyn MutEventSubscriber>>,
        settled: fn(),
    ) -> io::Result<()> {
        let failed = |error| io::Error::other(format!("{error}"));
        let (exit, hub) = {
            let control = control.borrow();
            (Arc::clone(&control.exit), Arc::clone(&control.events))
        };
        let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new().map_err(failed)?;
        events.add_subscriber(Box::new(control));
        for other in others {
            events.add_subscriber(other);
        }
        let mut settles = Some(Instant::now() + SETTLED);
        while exit.reason().is_none() {
            let left = settles.map(|at| at.saturating_duration_since(Instant::now()));
            // Rounded up, or it would be over too early and begin again.
            let timeout = left.map_or(-1, |left| left.as_millis() as i32 + 1);
            let count = match events.run_with_timeout(timeout) {
                Ok(count) => count,
                Err(event_manager::Error::Epoll(errno)) if errno.errno() == libc::EINTR => 0,
                Err(error) => return Err(failed(error)),
            };
            if settles.take_if(|at| Instant::now() >= *at).is_some() {
                settled();
            } else if count > 0 {
                settles.get_or_insert_with(|| Instant::now() + SETTLED);
            }
        }
        for event in exit.reason().into_iter().flat_map(Event::of_exit) {
            hub.publish(event);
        }
        if let Some(reason) = exit.reason() {
            hub.publish(Event::ending(reason));
        }
        Ok(())
    }

    /// Whether the guest runs. A reset that is under way changes nothing of it.
    pub fn state(&self) -> RunState {
        let is_paused = self.is_paused && self.vcpus.barrier().is_paused();
        match (self.exit.reason(), is_paused) {
            (Some(_), _) => RunState::Ended,
            (None, true) => RunState::Paused,
            (None, false) => RunState::Running,
        }
    }

    /// The threads of its vCPUs, in order.
    pub fn vcpu_threads(&self) -> Vec<i32> {
        self.vcpus.thread_ids()
    }

    /// Stops the guest. `done` is called once nothing of it runs: a vCPU may first have to wait for a
    /// reader of the console.
    pub fn pause(&mut self, done: Paused) {
        self.pausing.push(done);
        self.vcpus.pause();
    }

    fn vcpus_have_stopped(&mut self) {
        let barrier = self.vcpus.barrier();
        let _ = barrier.full().read();
        if barrier.is_resetting() && barrier.is_full() {
            self.start_reset();
        } else if barrier.is_full() {
            // And was not resumed meanwhile.
            if !std::mem::replace(&mut self.is_paused, true) {
                self.devices.pause();
                self.events.publish(Event::Stop);
            }
            self.pausing.drain(..).for_each(|done| done());
        }
    }

    /// Lets a guest that was paused, or is about to be, run on.
    pub fn resume(&mut self) {
        self.pausing.clear();
        // Or when the reset is done whose thread has the devices.
        if !self.resets.as_ref().is_some_and(Resets::is_under_way) {
            self.resume_devices();
        }
        self.vcpus.resume();
    }

    pub(super) fn resume_devices(&mut self) {
        if std::mem::take(&mut self.is_paused) {
            self.devices.resume();
            self.events.publish(Event::Resume);
        }
    }

    /// The state of a guest that is paused.
    ///
    /// # Errors
    ///
    /// Fails when it runs, a device cannot be saved, or KVM refuses something.
    pub fn save(&self) -> Result<GuestState, GuestError> {
        self.check_paused()?;
        Ok(GuestState {
            kvm: self.vcpus.guest().save()?,
            devices: self.devices.save()?,
        })
    }

    /// Gives a guest that is paused this state. Its memory has to be as it was then.
    ///
    /// # Errors
    ///
    /// Fails when it runs, or a device cannot have this state, with nothing changed; or the host refuses
    /// something, and the guest can only be ended or restored again.
    pub fn restore(&self, state: GuestState) -> Result<(), GuestError> {
        self.check_paused()?;
        self.devices.check(&state.devices)?;
        self.vcpus.guest().restore(&state.kvm)?;
        Ok(self.devices.restore(state.devices)?)
    }

    /// The guest's memory in bytes.
    pub fn memory_size(&self) -> u64 {
        let memory = self.devices.memory.iter();
        memory.map(GuestMemoryRegion::len).sum()
    }

    /// What is counted of the guest.
    pub fn stats(&self) -> Stats {
        let console = self.devices.console.as_ref();
        Stats {
            uptime_us: u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX),
            vcpus: self.vcpus.guest().exits(),
            memory: MemoryStats::of_process(self.memory_size()),
            balloon: self.balloon.as_ref().map(BalloonStats::from),
            vsock: self.vsock.as_ref().map(VsockHandle::counters),
            console_bytes: console.map(|console| console.transcript().end()),
            nics: self.nics.iter().map(|nic| (&**nic).into()).collect(),
            disks: self
                .disks
                .iter()
                .map(|disk| (&*disk.handle).into())
                .collect(),
        }
    }

    fn check_paused(&self) -> Result<(), GuestError> {
        let is_ours = self.is_paused && !self.vcpus.barrier().is_resetting();
        is_ours.then_some(()).ok_or(GuestError::NotPaused)
    }

    /// Ends the guest at once.
    pub fn end(&self) {
        self.exit.request(Exit::Quit);
    }

    /// How long the guest has to power off by itself.
    pub fn grace(&self) -> Duration {
        self.signals.grace
    }

    /// Presses the guest's power button.
    pub fn press_power_button(&self) {
        self.power_button.raise();
        self.events.publish(Event::Powerdown);
    }

    /// The first signal presses the power button, the second ends the guest.
    fn signalled(&mut self, signal: libc::c_int) {
        if self.pressed_by.is_some() {
            self.exit.request(Exit::Signal(signal));
            return;
        }
        if self.vcpus.barrier().is_resetting() {
            // It has shut down, and has nothing to lose.
            self.exit.request(Exit::Reboot);
            return;
        }
        self.pressed_by = Some(signal);
        self.press_power_button();
        if let Err(error) = self.grace.reset(self.signals.grace, None) {
            self.exit.request(Exit::Signal(signal));
            log::warn!("no timer for the guest's time to power off, so it has none: {error}");
        }
        log::info!(
            "signal {signal}: pressing the guest's power button; a second one ends it at once"
        );
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("Control")
            .field("state", &state)
            .finish_non_exhaustive()
    }
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps) {
        let signals = self.signals.caught.iter();
        let signals = signals.map(|(n, fd)| Events::with_data(fd, n.unsigned_abs(), EventSet::IN));
        let others = [
            Events::with_data(self.exit.event(), EXIT, EventSet::IN),
            Events::with_data(&self.grace, GRACE_OVER, EventSet::IN),
            Events::with_data(self.vcpus.barrier().full(), STOPPED, EventSet::IN),
            Events::with_data(self.requests.event(), REQUEST, EventSet::IN),
        ];
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let console = self.devices.console.as_deref();
        let console = console.map(|console| Events::with_data(console, CONSOLE, edge));
        for events in signals.chain(others).chain(console) {
            if let Err(error) = ops.add(events) {
                self.exit.request(Exit::Failure(format!(
                    "cannot watch a file descriptor: {error}"
                )));
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match events.data() {
            EXIT => {}
            GRACE_OVER => {
                // A guest that is paused cannot power off, and is ended too.
                if let Some(signal) = self.pressed_by {
                    self.exit.request(Exit::Signal(signal));
                    let grace = self.signals.grace.as_secs();
                    log::warn!("the guest did not power off within {grace} s");
                }
            }
            STOPPED => self.vcpus_have_stopped(),
            CONSOLE => {
                if self
                    .devices
                    .console
                    .as_ref()
                    .is_some_and(|console| console.is_late())
                {
                    self.vcpus.kick();
                }
            }
            REQUEST => {
                for request in self.requests.take() {
                    request(self);
                }
            }
            token => {
                let mut caught = self.signals.caught.iter_mut();
                let Some((signal, stream)) = caught.find(|(n, _)| n.unsigned_abs() == token) else {
                    return;
                };
                let signal = *signal;
                // One byte a signal; two that came together count as two.
                let mut bytes = [0; 16];
                for _ in 0..stream.read(&mut bytes).unwrap_or(0) {
                    self.signalled(signal);
                }
            }
        }
    }
}
