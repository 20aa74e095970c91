//! The control thread: waits for the guest's end, and turns signals into the power button.

use std::io;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use devices::irq::IrqLine;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use vmm_sys_util::timerfd::TimerFd;

use crate::control::exit::{Exit, ExitRequest};
use crate::signals::not_ignored;

/// How long a guest has to power off by itself after its power button was pressed.
const GRACE: Duration = Duration::from_secs(10);

/// The signals that ask for an end.
const SIGNALS: [libc::c_int; 4] = [SIGTERM, SIGINT, SIGHUP, SIGQUIT];

// Event tokens below the signals' numbers, which begin at 1.
const EXIT: u32 = 0;
const GRACE_OVER: u32 = u32::MAX;

/// The control thread's state.
#[derive(Debug)]
pub struct Control {
    exit: Arc<ExitRequest>,
    power_button: IrqLine,
    signals: Vec<(libc::c_int, UnixStream)>,
    grace: TimerFd,
    /// The signal that has pressed the power button.
    pressed_by: Option<libc::c_int>,
}

impl Control {
    /// Catches the signals that are not ignored from now on. `power_button` is the line of the guest's button.
    ///
    /// # Errors
    ///
    /// Fails when the kernel refuses a handler, or has no file descriptor left.
    pub fn new(exit: Arc<ExitRequest>, power_button: IrqLine) -> io::Result<Self> {
        let mut signals = Vec::with_capacity(SIGNALS.len());
        for signal in not_ignored(&SIGNALS) {
            let (caught, handler) = UnixStream::pair()?;
            signal_hook::low_level::pipe::register(signal, handler)?;
            caught.set_nonblocking(true)?;
            signals.push((signal, caught));
        }
        let grace = TimerFd::new()?;
        Ok(Self {
            exit,
            power_button,
            signals,
            grace,
            pressed_by: None,
        })
    }

    /// Waits until an exit has been requested, and lets `others` have their events meanwhile.
    ///
    /// # Errors
    ///
    /// Fails when waiting itself does; the guest has to be ended then.
    pub fn run(self, others: Vec<Box<dyn MutEventSubscriber>>) -> io::Result<()> {
        let failed = |error| io::Error::other(format!("{error}"));
        let exit = Arc::clone(&self.exit);
        let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new().map_err(failed)?;
        events.add_subscriber(Box::new(self));
        for other in others {
            events.add_subscriber(other);
        }
        while exit.reason().is_none() {
            match events.run() {
                Ok(_) => {}
                Err(event_manager::Error::Epoll(errno)) if errno.errno() == libc::EINTR => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(())
    }

    /// The first signal presses the power button, the second ends the guest.
    fn signalled(&mut self, signal: libc::c_int) {
        if self.pressed_by.is_some() {
            self.exit.request(Exit::Signal(signal));
            return;
        }
        self.pressed_by = Some(signal);
        self.power_button.raise();
        if let Err(error) = self.grace.reset(GRACE, None) {
            self.exit.request(Exit::Signal(signal));
            log::warn!("no timer for the guest's time to power off, so it has none: {error}");
        }
        log::info!(
            "signal {signal}: pressing the guest's power button; a second one ends it at once"
        );
    }
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps) {
        let signals = self.signals.iter();
        let signals = signals.map(|(n, fd)| Events::with_data(fd, n.unsigned_abs(), EventSet::IN));
        let others = [
            Events::with_data(self.exit.event(), EXIT, EventSet::IN),
            Events::with_data(&self.grace, GRACE_OVER, EventSet::IN),
        ];
        for events in signals.chain(others) {
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
                let signal = self.pressed_by.unwrap_or(SIGTERM);
                self.exit.request(Exit::Signal(signal));
                log::warn!("the guest did not power off within {} s", GRACE.as_secs());
            }
            token => {
                let caught = self
                    .signals
                    .iter_mut()
                    .find(|(n, _)| n.unsigned_abs() == token);
                let Some((signal, stream)) = caught else {
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
