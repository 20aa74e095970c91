//! How a guest ends: the first reason that any thread gives.

use std::error::Error;
use std::fmt;
use std::io;
use std::sync::OnceLock;

use vmm_sys_util::eventfd::EventFd;

use crate::kvm::crash::Crash;

/// Why the guest no longer runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It powered off.
    PowerOff,
    /// It asked for a reset.
    Reboot,
    /// Its kernel panicked, and asked for a reset.
    Panic,
    /// Ended by QMP's `quit`, or by the program that runs it.
    Quit,
    /// Ended from the terminal (Ctrl-A x).
    Terminal,
    /// A signal came, and the guest did not power off in time.
    Signal(i32),
    /// KVM cannot run it on.
    Crash(Crash),
    /// QEMU cannot run it on.
    InternalError,
    /// The monitor cannot go on.
    Failure(String),
}

impl Exit {
    /// The exit status of the process.
    pub fn code(&self) -> u8 {
        match self {
            Self::PowerOff | Self::Reboot | Self::Quit | Self::Terminal => 0,
            Self::Failure(_) => 1,
            Self::Crash(_) | Self::InternalError => 3,
            Self::Panic => 4,
            // Signal numbers go up to 64.
            Self::Signal(number) => 128u8.saturating_add(*number as u8),
        }
    }

    /// Why, in one word for programs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::PowerOff => "power-off",
            Self::Reboot => "reboot",
            Self::Panic => "panic",
            Self::Quit | Self::Terminal => "quit",
            Self::Signal(_) => "signal",
            Self::Crash(_) | Self::InternalError => "crash",
            Self::Failure(_) => "failure",
        }
    }

    /// Says in the log how the guest ended.
    pub fn log(&self) {
        match self {
            Self::PowerOff | Self::Reboot | Self::Quit | Self::Terminal => log::info!("{self}"),
            _ => log::error!("{self}"),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => write!(f, "the guest powered off"),
            Self::Reboot => write!(f, "the guest asked for a reboot"),
            Self::Panic => write!(f, "the guest's kernel panicked"),
            Self::Quit | Self::Terminal => write!(f, "ended on request"),
            Self::Signal(number) => write!(f, "ended by signal {number}"),
            Self::Crash(what) => write!(f, "the guest crashed: {what}"),
            Self::InternalError => write!(f, "the guest crashed: QEMU calls it an internal error"),
            Self::Failure(what) => write!(f, "{what}"),
        }
    }
}

/// The error and its causes, in one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// The place where any thread may end the guest. The first reason is the one that counts.
#[derive(Debug)]
pub struct ExitRequest {
    reason: OnceLock<Exit>,
    event: EventFd,
}

impl ExitRequest {
    /// No reason yet.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self {
            reason: OnceLock::new(),
            event,
        })
    }

    /// Ends the guest.
    pub fn request(&self, reason: Exit) {
        // Where it is set already, the first reason counts.
        let _ = self.reason.set(reason);
        let _ = self.event.write(1);
    }

    /// The reason, once there is one.
    pub fn reason(&self) -> Option<&Exit> {
        self.reason.get()
    }

    /// Readable once there is a reason.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_request_keeps_the_first_reason() {
        let exit = ExitRequest::new().unwrap();
        assert_eq!(exit.reason(), None);
        exit.request(Exit::PowerOff);
        exit.request(Exit::Signal(15));
        assert_eq!(exit.reason(), Some(&Exit::PowerOff));
        assert!(exit.event().read().is_ok());
    }

    #[test]
    fn exit_codes_are_those_of_the_manual() {
        for (exit, code) in [
            (Exit::PowerOff, 0),
            (Exit::Reboot, 0),
            (Exit::Quit, 0),
            (Exit::Terminal, 0),
            (Exit::Failure(String::new()), 1),
            (Exit::InternalError, 3),
            (Exit::Panic, 4),
            (Exit::Signal(libc::SIGINT), 130),
            (Exit::Signal(libc::SIGTERM), 143),
        ] {
            assert_eq!(exit.code(), code, "{exit:?}");
        }
    }
}
