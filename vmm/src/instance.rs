//! The place of a VM on its host, by which other programs find it: a directory `vms/NAME` in the first of
//! [`RecordDirectory::own`] where it can be made. What is in it is the user's alone.
//!
//! | file | what it is |
//! | --- | --- |
//! | `vms/.NAME.lock` | locked as long as the VM's process lives, whatever ends that ([`RecordLock`]) |
//! | `vms/NAME/vm.json` | the [`Record`]: what the VM says of itself |
//! | `vms/NAME/qmp.sock` | its control socket |
//! | `vms/NAME/console.sock` | its console |
//! | `vms/NAME/log` | its log |
//!
//! A directory whose lock is free is stale: its process was killed. Whoever finds it removes it. Only a VM of `-d` leaves its
//! record, with its end, and its log: until the name is used again, and for the last few of them.

use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use net::{RecordDirectory, RecordError, RecordLock};

use crate::config::{Config, QmpSocket, RunnerFds, VmName, VsockConfig};
use crate::control::exit::chain;
use crate::nic::Inherited;
use crate::nic::registry::Runs;
use crate::qmp::socket::SocketError;
use crate::run::tie::Tie;
use crate::{detach, log_writer};

mod found;
mod place;
mod record;

pub use found::{FindError, Found, all, all_also_ended, find, find_also_ended};
pub use place::Place;
pub use record::{Ended, Record};

/// How long another process may take to write its record, or to remove a stale directory.
const SETTLING: Duration = Duration::from_secs(5);

/// The most VMs whose names are numbers.
const MOST: u32 = 100_000;

/// Why a VM has no directory.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// Another VM has the name.
    #[error("the name {0} is in use by the VM of pid {1}, which runs {2}")]
    InUse(VmName, u32, String),
    /// Another process has locked the name, and does not say what it is.
    #[error("the name {0} is in use by a process that is only starting")]
    Starting(VmName),
    /// It cannot be made.
    #[error("cannot make the directory {0:?} for the VM's sockets")]
    Directory(PathBuf, #[source] io::Error),
    /// There is no place for one.
    #[error("there is no directory for a VM's sockets")]
    Nowhere,
    /// The name of a socket has 107 bytes at most (unix(7)).
    #[error("the path of the directory {0:?} is too long for a VM's sockets")]
    TooLong(PathBuf),
}

impl InstanceError {
    /// What to do about it.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::InUse(name, ..) => Some(format!(
                "choose another one with --name, or end that VM by `minivmm stop {name}`"
            )),
            Self::Starting(_) => Some("choose another one with --name".into()),
            Self::Directory(..) | Self::Nowhere => {
                let user = rustix::process::geteuid().as_raw();
                Some(format!(
                    "a user without rights needs XDG_RUNTIME_DIR, a directory of the user's own \
                     /run/minivmm/{user}, made by root, or /tmp/minivmm-{user} as a directory with mode 0700"
                ))
            }
            Self::TooLong(_) => Some("choose a shorter name, or a shorter XDG_RUNTIME_DIR".into()),
        }
    }

    /// Whether another directory might do.
    fn is_of_directory(&self) -> bool {
        matches!(self, Self::Directory(..) | Self::TooLong(_))
    }
}

/// What a VM is for others.
#[derive(Clone, Copy, Debug)]
pub struct Serves<'a> {
    /// What it runs.
    pub runs: &'a Runs,
    /// The control sockets that the user wants of it, besides its own.
    pub qmp: &'a [QmpSocket],
    /// The sockets between the guest and the host.
    pub vsock: Option<&'a VsockConfig>,
    /// What ties it to the `minivmm run` that has started it, if one has: these sockets are in its directory then, which it
    /// cannot do without.
    pub runner: Option<RunnerFds>,
}

/// The directory of this process's VM. Dropping it removes it, unless the VM has [ended](Self::end) detached.
#[derive(Debug)]
pub struct Instance {
    place: Place,
    record: Record,
    /// Given up when the directory is gone.
    _lock: RecordLock,
}

impl Instance {
    /// Takes the name for a VM, or the lowest free of vm1, vm2 and so on.
    ///
    /// # Errors
    ///
    /// See [`InstanceError`].
    pub fn claim(name: Option<&VmName>, serves: &Serves) -> Result<Self, InstanceError> {
        Self::claim_in(RecordDirectory::own(), name, serves)
    }

    fn claim_in(
        directories: Vec<PathBuf>,
        name: Option<&VmName>,
        serves: &Serves,
    ) -> Result<Self, InstanceError> {
        let claim = |directory: &PathBuf| {
            let vms = place::prepare(directory)?;
            match name {
                Some(name) => Self::take(Place::new(&vms, name.clone()), serves),
                None => Self::take_lowest(&vms, serves),
            }
        };
        let mut claimed = Err(InstanceError::Nowhere);
        for directory in &directories {
            claimed = claim(directory);
            if !claimed.as_ref().is_err_and(InstanceError::is_of_directory) {
                break;
            }
        }
        claimed
    }

    fn take_lowest(vms: &Path, serves: &Serves) -> Result<Self, InstanceError> {
        for number in 1..=MOST {
            let place = Place::new(vms, VmName::numbered(number));
            if !place.is_free() {
                continue;
            }
            match Self::take(place, serves) {
                Err(InstanceError::InUse(..) | InstanceError::Starting(_)) => {}
                taken => return taken,
            }
        }
        Err(InstanceError::Nowhere)
    }

    fn take(place: Place, serves: &Serves) -> Result<Self, InstanceError> {
        place.check()?;
        let record = Record::new(&place, serves);
        let failed = |error| InstanceError::Directory(place.directory(), error);
        let deadline = Instant::now() + SETTLING;
        loop {
            let mut made = Ok(());
            let taken = place.lock(|| made = place.make(&record));
            match taken {
                Ok(lock) => {
                    made.map_err(failed)?;
                    log::debug!("this VM is called {}", place.name());
                    return Ok(Self {
                        place,
                        record,
                        _lock: lock,
                    });
                }
                Err(RecordError::Held(_)) => {}
                Err(RecordError::File(path, error)) => {
                    return Err(InstanceError::Directory(path, error));
                }
                Err(error) => return Err(failed(io::Error::other(error))),
            }
            match place.record() {
                Some(other) if other.ended.is_none() => {
                    let name = place.name().clone();
                    return Err(InstanceError::InUse(
                        name,
                        other.pid,
                        other.runs.path().into(),
                    ));
                }
                // Its VM has just ended, or another process removes what is stale.
                _ if Instant::now() < deadline => thread::sleep(Duration::from_millis(1)),
                _ => return Err(InstanceError::Starting(place.name().clone())),
            }
        }
    }

    /// Takes the name for the VM of this process. Without a name that the user has chosen the VM runs on when
    /// there is no directory for it, unless it has a runner.
    ///
    /// # Errors
    ///
    /// When the name is in use, or cannot be taken.
    pub fn of_program(
        name: Option<&VmName>,
        serves: &Serves,
    ) -> Result<Option<Self>, InstanceError> {
        match Self::claim(name, serves) {
            Ok(instance) => {
                instance.keep_log();
                Ok(Some(instance))
            }
            Err(error) if name.is_some() || serves.runner.is_some() || detach::is_wanted() => {
                Err(error)
            }
            Err(error) => {
                let why = chain(&error);
                let remedy = error.remedy().unwrap_or_default();
                log::warn!(
                    "this VM has no name, and `minivmm ps` does not show it: {why} ({remedy})"
                );
                Ok(None)
            }
        }
    }
}

impl Instance {
    /// The VM's name.
    pub fn name(&self) -> &VmName {
        self.place.name()
    }

    /// Its control socket.
    pub fn qmp_path(&self) -> PathBuf {
        self.place.qmp_path()
    }

    /// The socket of its console.
    pub fn console_path(&self) -> PathBuf {
        self.place.console_path()
    }

    /// The socket of its socket device, and what ties it to the `minivmm run` that has started this process.
    ///
    /// # Errors
    ///
    /// See [`SocketError`].
    pub fn tie(
        &self,
        runner: RunnerFds,
        inherited: &mut Inherited,
    ) -> Result<(VsockConfig, Tie), SocketError> {
        let vsock = VsockConfig::at(self.place.vsock_path());
        let tie = Tie::new(runner, inherited, &vsock.path)?;
        Ok((vsock, tie))
    }

    fn keep_log(&self) {
        let path = self.place.log_path();
        if let Err(error) = log_writer::keep(&path) {
            log::warn!("the log is not kept for `minivmm logs`: cannot make {path:?}: {error}");
        }
    }

    /// The VM has ended so. What is to be known of one that has outlived its command stays.
    pub fn end(mut self, status: u8, reason: String) {
        // Of a VM of `minivmm run` that has another process detached.
        let is_others = self.record.detached && !detach::is_wanted();
        if detach::is_done() || is_others {
            self.record.ended = Some(Ended::now(status, reason));
            self.place.leave(&self.record);
            found::prune(self.place.vms());
        }
    }

    /// Has the guest of `config` use it.
    pub fn enter(&self, config: &mut Config) {
        config.name = Some(self.name().clone());
        config.qmp.push(QmpSocket::Path(self.qmp_path()));
        let console = &mut config.console_socket;
        console.get_or_insert_with(|| self.console_path());
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if self.record.ended.is_none() {
            self.place.remove();
        }
    }
}

#[cfg(test)]
mod tests;
