//! What comes out of the guest when its command has ended, by the copy of its agent.
//!
//! Nothing of the guest is trusted: each copy has bounds, all of them have a time, and the places on the host are found
//! before the guest starts, so that nothing that it has sent leads elsewhere.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use agent_copy::{Limits, Place};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::retry_on_intr;

use super::RunError;
use super::engine::Mode;
use crate::agent::{Agent, Bounds, copy_to_place, means_contents};
use crate::child::Arrivals;
use crate::config::CopyOut;
use crate::control::exit::chain;
use crate::printable::printable;
use crate::signals::ENDING;

/// The most of one copy.
const LIMITS: Limits = Limits {
    entries: 1 << 20,
    bytes: 16 << 30,
};
/// How long nothing of it may come natively.
const SILENCE: Duration = Duration::from_secs(30);
/// How long all of them may take natively.
const ALL: Duration = Duration::from_secs(600);

/// A file or directory of the guest's, and where it goes.
#[derive(Debug)]
pub struct Copy {
    guest: PathBuf,
    place: Place,
}

impl Copy {
    /// Finds its place on the host.
    ///
    /// # Errors
    ///
    /// [`RunError::CopyOut`].
    pub fn find(copy: &CopyOut) -> Result<Self, RunError> {
        let name = copy.guest.file_name();
        let name = name.filter(|_| !means_contents(&copy.guest));
        let place = Place::find(&copy.host, name);
        Ok(Self {
            guest: copy.guest.clone(),
            place: place.map_err(|error| RunError::CopyOut(copy.host.clone(), error))?,
        })
    }
}

/// What came of all copies.
#[derive(Debug, PartialEq, Eq)]
pub enum Copied {
    /// They have ended; why some of them failed.
    Ended(Vec<String>),
    /// This signal of the user's came before.
    Interrupted(i32),
}

/// Makes the copies. Paths that are relative begin at `directory`. A thread of its own does it, so that signals are heard
/// meanwhile; one that is interrupted ends with the VM.
///
/// # Errors
///
/// The host has no thread or pipe.
pub fn copy(
    copies: &Arc<[Copy]>,
    agent: Agent,
    directory: Vec<u8>,
    mode: Mode,
    signals: &mut Arrivals,
) -> io::Result<Copied> {
    let (done, is_done) = io::pipe()?;
    let copies = Arc::clone(copies);
    let bounds = Bounds {
        limits: LIMITS,
        silence: mode.scale(SILENCE),
        until: Instant::now() + mode.scale(ALL),
    };
    let all = move || {
        let failure = |copy: &Copy| {
            let copied = copy_to_place(&agent, &copy.guest, &directory, &copy.place, bounds);
            let why = chain(&copied.err()?);
            let text = format!("{:?} of the guest is not copied out: {why}", copy.guest);
            Some(printable(&text).into_owned())
        };
        let failures: Vec<_> = copies.iter().filter_map(failure).collect();
        drop(is_done);
        failures
    };
    let thread = thread::Builder::new().name("copy".into()).spawn(all)?;
    loop {
        let mut fds = [
            PollFd::new(&done, PollFlags::IN),
            PollFd::new(&*signals, PollFlags::IN),
        ];
        retry_on_intr(|| poll(&mut fds, None))?;
        if !fds[0].revents().is_empty() {
            break;
        }
        if let Some(signal) = signals.take().find(|signal| ENDING.contains(signal)) {
            return Ok(Copied::Interrupted(signal));
        }
    }
    let panicked = |_| vec!["the thread that copies out of the guest has panicked".into()];
    Ok(Copied::Ended(thread.join().unwrap_or_else(panicked)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn place_is_looked_for_before_the_guest_starts() {
        let directory = tempfile::tempdir().unwrap();
        let find = |guest: &str, host: &str| {
            Copy::find(&CopyOut {
                guest: guest.into(),
                host: directory.path().join(host),
            })
        };
        find("/var/log", "new").unwrap();
        find("out/.", "").unwrap();
        let error = find("/var/log", "missing/new").unwrap_err();
        assert!(error.to_string().contains("missing/new"), "{error}");
    }

    #[test]
    fn guest_that_has_gone_fails_each_copy() {
        let directory = tempfile::tempdir().unwrap();
        let out = |guest: &str| {
            Copy::find(&CopyOut {
                guest: guest.into(),
                host: directory.path().to_owned(),
            })
            .unwrap()
        };
        let copies: Arc<[Copy]> = [out("/a"), out("b\u{1b}")].into();
        let agent = Agent::at(&directory.path().join("no-such-socket"));
        let mut signals = Arrivals::new(&[libc::SIGUSR1]).unwrap();
        let copied = copy(&copies, agent, b"/".to_vec(), Mode::Kvm, &mut signals).unwrap();
        let Copied::Ended(failures) = copied else {
            panic!("{copied:?}")
        };
        assert_eq!(failures.len(), 2);
        assert!(failures[0].starts_with("\"/a\" of the guest is not copied out: cannot connect"));
        assert!(!failures[1].contains('\u{1b}'), "{failures:?}");
    }
}
