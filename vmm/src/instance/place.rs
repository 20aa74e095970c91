//! Where the files of a VM are.

use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use agent_protocol::BOOT_PORT;
use net::{RecordDirectory, RecordError, RecordKey, RecordLock, RecordState, RecordView};

use super::{InstanceError, Record};
use crate::config::VmName;
use crate::files;
use crate::run::tie::port_path;

/// The most bytes of a socket's path: sun_path of unix(7) without the NUL at its end.
const LONGEST: usize = 107;

/// The directory of a VM, and its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    vms: PathBuf,
    name: VmName,
}

/// Makes the place of all VMs in a directory for records.
pub(super) fn prepare(directory: &Path) -> Result<PathBuf, InstanceError> {
    let vms = vms_in(directory);
    RecordDirectory::make(directory)
        .and_then(|()| make_own(&vms))
        .and_then(|()| match is_own(directory) && is_own(&vms) {
            true => Ok(()),
            false => Err(io::Error::other("it belongs to another user")),
        })
        .map_err(|error| InstanceError::Directory(vms.clone(), error))?;
    Ok(vms)
}

/// The place of all VMs in a directory for records, if there is one that no other user can change.
pub(super) fn find(directory: &Path) -> Option<PathBuf> {
    let vms = vms_in(directory);
    (is_own(directory) && is_own(&vms)).then_some(vms)
}

fn vms_in(directory: &Path) -> PathBuf {
    directory.join("vms")
}

/// Whether it is a directory of this user's. XDG_RUNTIME_DIR may be any, such as /tmp for root.
fn is_own(directory: &Path) -> bool {
    let user = rustix::process::geteuid().as_raw();
    fs::symlink_metadata(directory).is_ok_and(|found| found.is_dir() && found.uid() == user)
}

fn make_own(directory: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// The VM whose directory, or whose lock, has this name.
pub(super) fn named(entry: &str) -> Option<VmName> {
    let lock = entry
        .strip_prefix('.')
        .and_then(|name| name.strip_suffix(".lock"));
    lock.unwrap_or(entry).parse().ok()
}

impl Place {
    /// Of the VM `name` in `vms`.
    pub(super) fn new(vms: &Path, name: VmName) -> Self {
        let vms = vms.to_owned();
        Self { vms, name }
    }

    /// The place of all VMs.
    pub(super) fn vms(&self) -> &Path {
        &self.vms
    }

    /// The VM's name.
    pub fn name(&self) -> &VmName {
        &self.name
    }

    /// Its control socket.
    pub fn qmp_path(&self) -> PathBuf {
        self.directory().join("qmp.sock")
    }

    /// The socket of its console.
    pub fn console_path(&self) -> PathBuf {
        self.directory().join("console.sock")
    }

    /// The socket of its socket device, if `minivmm run` has started it.
    pub fn vsock_path(&self) -> PathBuf {
        self.directory().join("vsock")
    }

    /// Its log.
    pub fn log_path(&self) -> PathBuf {
        self.directory().join("log")
    }

    pub(super) fn directory(&self) -> PathBuf {
        self.vms.join(self.name.as_str())
    }

    fn record_path(&self) -> PathBuf {
        self.directory().join("vm.json")
    }

    /// No name begins with a dot.
    fn key(&self) -> RecordKey {
        RecordKey::any(&format!(".{}", self.name))
    }

    /// Whether its sockets can have their names.
    pub(super) fn check(&self) -> Result<(), InstanceError> {
        match self.console_path().as_os_str().len() {
            ..=LONGEST => Ok(()),
            _ => Err(InstanceError::TooLong(self.directory())),
        }
    }

    /// Locks it; `change` runs while no other process can see whether the lock is taken.
    pub(super) fn lock(&self, mut change: impl FnMut()) -> Result<RecordLock, RecordError> {
        RecordLock::take(&self.vms, &self.key(), |_| change())
    }

    /// Whether a process has it.
    pub(super) fn is_in_use(&self) -> bool {
        let view = RecordView::default();
        RecordDirectory::open(self.vms.clone(), None)
            .is_ok_and(|vms| view.state(&vms, &self.key()) == RecordState::Held)
    }

    /// Makes the directory anew, with the lock.
    pub(super) fn make(&self, record: &Record) -> io::Result<()> {
        self.remove();
        make_own(&self.directory())?;
        self.write(record).inspect_err(|_| self.remove())
    }

    /// Writes the record anew, with the lock.
    pub(super) fn write(&self, record: &Record) -> io::Result<()> {
        files::replace(&self.record_path(), 0o600, &record.to_json()?).map(drop)
    }

    /// Leaves record and log of a VM that has ended, with the lock.
    pub(super) fn leave(&self, record: &Record) {
        if let Err(error) = self.write(record) {
            log::warn!("cannot write how {} has ended: {error}", self.name);
        }
        let boot = port_path(&self.vsock_path(), BOOT_PORT);
        let sockets = [
            self.qmp_path(),
            self.console_path(),
            self.vsock_path(),
            boot,
        ];
        for socket in sockets {
            let _ = fs::remove_file(socket);
        }
    }

    /// Removes the directory, with the lock.
    pub(super) fn remove(&self) {
        match fs::remove_dir_all(self.directory()) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                log::warn!("cannot remove {:?}: {error}", self.directory());
            }
            _ => {}
        }
    }

    /// Whether a VM may have the name that is given none: not while another has it, and not while there is what one of -d
    /// has left.
    pub(super) fn is_free(&self) -> bool {
        !self.is_in_use() && !self.record().is_some_and(|record| record.detached)
    }

    /// What its VM says of itself. Nothing while it is only starting.
    pub(super) fn record(&self) -> Option<Record> {
        Record::from_json(&fs::read(self.record_path()).ok()?)
    }
}
