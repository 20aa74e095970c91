//! A guest that runs beside the program that has started it.

use std::panic::resume_unwind;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crate::builder::{self, Error};
use crate::config::Config;
use crate::control::exit::Exit;
use crate::control::handle::Handle;
use crate::control::{GuestError, GuestState, RunState};
use crate::instance::{Instance, Serves};
use crate::nic::Inherited;
use crate::nic::registry::Runs;
use crate::stats::Stats;

/// A running guest. Dropping it ends the guest.
#[derive(Debug)]
pub struct Guest {
    control: Handle,
    /// None once [`Guest::wait`] has taken it.
    thread: Option<JoinHandle<Result<Exit, Error>>>,
}

impl Guest {
    /// Boots a guest. Its NICs are made in the calling thread's network namespace. Signals are left
    /// to the calling program.
    ///
    /// # Errors
    ///
    /// Says why there is no guest. What was taken from the host has been given back.
    pub fn start(mut config: Config) -> Result<Self, Error> {
        let began = Instant::now();
        let (sender, started) = mpsc::channel();
        let run = move || {
            let started = |handle| {
                // The receiver waits for it.
                let _ = sender.send(handle);
                Ok(())
            };
            let name = config.name.as_ref();
            let runs = Runs::kernel(&config.kernel);
            let serves = Serves {
                runs: &runs,
                qmp: &config.qmp,
                vsock: config.vsock.as_ref(),
                runner: None,
            };
            let claim = |name| Instance::claim(Some(name), &serves);
            let instance = name.map(claim).transpose()?;
            instance
                .iter()
                .for_each(|instance| instance.enter(&mut config));
            // The memory of the program that this is a part of is not ours to give back.
            builder::run(began, config, Inherited::default(), &[], started, || ())
        };
        let thread = thread::Builder::new().name("control".into()).spawn(run);
        let thread = thread.map_err(|error| Error::Host("start the control thread", error))?;
        match started.recv() {
            Ok(control) => Ok(Self {
                control,
                thread: Some(thread),
            }),
            Err(_) => match join(thread) {
                Err(error) => Err(error),
                Ok(_) => Err(Error::Ended),
            },
        }
    }

    /// Whether it runs.
    pub fn state(&self) -> RunState {
        let state = self.control.ask(|control| control.state());
        state.unwrap_or(RunState::Ended)
    }

    /// What is counted of it, while it runs.
    ///
    /// # Errors
    ///
    /// Fails when the guest has ended.
    pub fn stats(&self) -> Result<Stats, GuestError> {
        let stats = self.control.ask(|control| control.stats());
        stats.ok_or(GuestError::Ended)
    }

    /// Presses its power button. A guest that takes notice powers off, in its own time, and a paused
    /// one once it is resumed.
    pub fn press_power_button(&self) {
        self.control.ask(|control| control.press_power_button());
    }

    /// Presses its reset button: with [`Reboot::Restart`](crate::config::Reboot) it begins again, and
    /// else it ends with [`Exit::Reboot`]. One that is paused stays so.
    pub fn reset(&self) {
        self.control.ask(|control| control.reset());
    }

    /// Stops its vCPUs, then its devices. Nothing of the guest runs when this returns, and no frame
    /// is lost that has room in the host's queue. A vCPU whose output waits for a reader of the
    /// console stops when that reads.
    ///
    /// # Errors
    ///
    /// Fails when the guest has ended, or is resumed meanwhile.
    pub fn pause(&self) -> Result<(), GuestError> {
        let done = self.control.start(|control, done| {
            control.pause(Box::new(move || {
                // The receiver waits for it.
                let _ = done.send(());
            }));
        });
        done.ok_or_else(|| match self.state() {
            RunState::Ended => GuestError::Ended,
            _ => GuestError::NotPaused,
        })
    }

    /// Lets a paused guest run on.
    ///
    /// # Errors
    ///
    /// Fails when the guest has ended.
    pub fn resume(&self) -> Result<(), GuestError> {
        let done = self.control.ask(|control| control.resume());
        done.ok_or(GuestError::Ended)
    }

    /// Reads the state of a paused guest, apart from its memory.
    ///
    /// # Errors
    ///
    /// Fails when the guest is not paused, a device cannot be saved (a share of a server that keeps its state
    /// to itself, or has ended), or KVM refuses something.
    pub fn save(&self) -> Result<GuestState, GuestError> {
        let saved = self.control.ask(|control| control.save());
        saved.unwrap_or(Err(GuestError::Ended))
    }

    /// Writes what [`Guest::save`] has read into the same guest, or into one of the same
    /// configuration whose NICs' drivers have not started yet. It is paused, and its memory is as it
    /// was then.
    ///
    /// # Errors
    ///
    /// Fails when the guest is not paused, or a device cannot have this state, with nothing changed; or the
    /// host refuses something, and the guest can only be ended or restored again.
    pub fn restore(&self, state: GuestState) -> Result<(), GuestError> {
        let restored = self.control.ask(|control| control.restore(state));
        restored.unwrap_or(Err(GuestError::Ended))
    }

    /// Makes a disk larger, counted from 0 in the order of the configuration. Its driver gets to know; what
    /// is new reads as zeros. Where the file has grown already, this is how the guest gets to know.
    ///
    /// # Errors
    ///
    /// Fails when the guest has ended or has no such disk, and when the host or the image's format
    /// refuses the size.
    pub fn resize_disk(&self, disk: usize, bytes: u64) -> Result<(), GuestError> {
        // By this thread: a file system may take its time.
        let handle = self
            .control
            .ask(move |control| Some(Arc::clone(&control.disks.get(disk)?.handle)));
        let handle = handle.ok_or(GuestError::Ended)?;
        let grown = handle.ok_or(GuestError::NoDisk(disk))?.grow(bytes);
        grown.map_err(|source| GuestError::Resize(disk, bytes, source))
    }

    /// Ends it at once, as by pulling its plug.
    pub fn end(&self) {
        self.control.ask(|control| control.end());
    }

    /// Waits for its end. What was taken from the host has been given back then.
    ///
    /// # Errors
    ///
    /// Says what kept the guest from running on, if it was not the guest itself.
    pub fn wait(mut self) -> Result<Exit, Error> {
        self.thread.take().map_or(Err(Error::Ended), join)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.end();
            let _ = thread.join();
        }
    }
}

fn join(thread: JoinHandle<Result<Exit, Error>>) -> Result<Exit, Error> {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}
