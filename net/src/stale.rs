//! Deleting the links of ended processes.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, RawFd};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::diagnose::Problem;
use crate::identity::LinkId;
use crate::ioctl;
use crate::netlink::{CHOSEN_INDEXES, Link, Netlink, is_gone};
use crate::netns;
use crate::owner::Owner;
use crate::record::{self, RecordDirectory, RecordKey, RecordState, RecordView};
use crate::sysfs::Sysfs;

/// A stale link that was deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StaleLink {
    /// Its name.
    pub name: String,
    /// Its driver: `macvtap` or `macvlan`.
    pub kind: String,
    /// The process that it belonged to.
    pub owner: Owner,
}

/// Stale links could not be deleted.
#[derive(Debug, thiserror::Error)]
#[error("cannot delete the links of ended processes")]
pub struct StaleError(#[source] Problem);

/// Deletes the stale macvtaps and macvlans of the caller's network namespace, and returns them: those that a process has
/// made for its own time and that no process uses any more. A link without an [`Owner`] is never touched, nor one that
/// may be in use.
///
/// Two that do this at once share the work, and each returns only its part.
///
/// # Errors
///
/// When links cannot be listed, or one cannot be deleted, for want of CAP_NET_ADMIN above all.
pub fn delete_stale() -> Result<Vec<StaleLink>, StaleError> {
    let delete = || {
        let netlink = Netlink::connect()?;
        delete_stale_by(&netlink, &netlink.links()?)
    };
    netns::on_own_thread(delete)
        .and_then(|deleted| deleted)
        .map_err(Problem::from_step("delete the links of ended processes"))
        .map_err(StaleError)
}

/// [`delete_stale`] of these `links`, by a connection to the calling thread's namespace.
fn delete_stale_by(netlink: &Netlink, links: &[Link]) -> io::Result<Vec<StaleLink>> {
    let mut deleted = Vec::new();
    let mut candidates = links.iter().filter(|link| link.is_macvlan()).peekable();
    if candidates.peek().is_none() {
        return Ok(deleted);
    }
    let judge = Judge::new();
    for link in candidates {
        let Some(owner) = judge.stale_owner(link) else {
            continue;
        };
        // Another process may have been faster.
        if delete_if_still(netlink, link.index, &link.alias)? {
            judge.forget(link);
            deleted.push(StaleLink {
                name: link.name.clone(),
                kind: link.kind.clone(),
                owner,
            });
        }
    }
    Ok(deleted)
}

/// [`delete_stale`] of these `links` before something else, which it may help and must not hinder. Returns whether others
/// may be there now.
pub(crate) fn try_delete_stale(netlink: &Netlink, links: &[Link]) -> bool {
    match delete_stale_by(netlink, links) {
        Ok(deleted) => {
            for link in &deleted {
                log::info!("deleted {} of an ended process: {}", link.name, link.owner);
            }
            !deleted.is_empty()
        }
        Err(error) => {
            log::debug!("cannot delete the links of ended processes: {error}");
            true
        }
    }
}

/// Decides which links of the calling thread's namespace are stale.
#[derive(Debug)]
pub(crate) struct Judge {
    namespace: Option<u64>,
    directories: Vec<RecordDirectory>,
    view: RecordView,
    me: Option<Owner>,
    /// Needed only for a link that is probably stale.
    sysfs: OnceCell<Option<Sysfs>>,
    open_devices: OnceCell<OpenDevices>,
}

impl Judge {
    pub(crate) fn new() -> Self {
        Self {
            namespace: netns::inode_of_current().ok(),
            directories: RecordDirectory::readable_own(),
            view: RecordView::default(),
            me: Owner::this_process().ok(),
            sysfs: OnceCell::new(),
            open_devices: OnceCell::new(),
        }
    }

    /// Whose link it is, by its alias; or by its record, if the alias was changed.
    pub(crate) fn owner_of(&self, link: &Link) -> Option<Owner> {
        if !link.is_macvlan() {
            return None;
        }
        link.alias.parse().ok().or_else(|| self.recorded(link))
    }

    /// Whose link it is, by its record.
    fn recorded(&self, link: &Link) -> Option<Owner> {
        let id = self.id(link).filter(|id| id.index >= CHOSEN_INDEXES)?;
        let mut directories = self.directories.iter();
        let text = directories.find_map(|dir| record::owner_of_link(dir, id))?;
        text.parse().ok()
    }

    /// The ended owner of a stale link; None for a link without owner, and for one that may be in use.
    pub(crate) fn stale_owner(&self, link: &Link) -> Option<Owner> {
        let owner = self.owner_of(link)?;
        // The owner writes its record under the lock: one that was written before the look at the lock, and is not locked
        // then, was given up. One that is empty may be about to be locked.
        let was_locked = self.recorded(link).is_some();
        let is_stale = match self.record_of(link) {
            RecordState::Held => false,
            RecordState::Free if was_locked => true,
            RecordState::Free | RecordState::Missing => {
                let me = self.me.as_ref();
                me.is_some_and(|me| owner.is_dead_to(me))
            }
        };
        // The process that made it may have passed its queues on.
        (is_stale && !(link.is_macvtap() && self.may_be_open(link))).then_some(owner)
    }

    fn id(&self, link: &Link) -> Option<LinkId> {
        let index = link.index;
        self.namespace.map(|namespace| LinkId { namespace, index })
    }

    fn record_of(&self, link: &Link) -> RecordState {
        self.id(link).map_or(RecordState::Missing, |id| {
            self.state(&RecordKey::of_link(id))
        })
    }

    /// The most that one of the directories says.
    fn state(&self, key: &RecordKey) -> RecordState {
        let directories = self.directories.iter();
        let states = directories.map(|directory| self.view.state(directory, key));
        states.max().unwrap_or(RecordState::Missing)
    }

    fn may_be_open(&self, link: &Link) -> bool {
        let sysfs = self.sysfs.get_or_init(|| Sysfs::of_this_namespace().ok());
        let device = sysfs
            .as_ref()
            .and_then(|sysfs| sysfs.tap_device(&link.name, link.index).ok());
        let (Some(device), Some(mac)) = (device, link.mac_addr()) else {
            return true;
        };
        let key = RecordKey::of_tap(device, self.id(link), mac);
        if [self.state(&key), self.state(&key.passed())].contains(&RecordState::Held) {
            return true;
        }
        let open = self.open_devices.get_or_init(OpenDevices::look);
        // Where there is a record, its lock is passed on with a queue.
        let in_doubt = open.is_partial && self.record_of(link) == RecordState::Missing;
        in_doubt || open.has(device, &link.name)
    }

    /// Removes the record of a link that is gone.
    fn forget(&self, link: &Link) {
        if let Some(id) = self.id(link) {
            record::forget(&self.directories, &RecordKey::of_link(id));
        }
    }
}

/// The character devices that processes have open.
#[derive(Debug, Default)]
struct OpenDevices {
    /// The descriptors of each, by their processes.
    devices: BTreeMap<u64, Vec<(Pid, RawFd)>>,
    /// There are processes that cannot be looked at.
    is_partial: bool,
}

impl OpenDevices {
    fn look() -> Self {
        let mut found = Self::default();
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = number(&process).and_then(Pid::from_raw) else {
                continue;
            };
            match fs::read_dir(process.path().join("fd")) {
                Ok(descriptors) => {
                    for fd in descriptors.flatten() {
                        if let (Some(number), Some(device)) = (number(&fd), device(&fd)) {
                            let all = found.devices.entry(device).or_default();
                            all.push((pid, number));
                        }
                    }
                }
                Err(error) => found.is_partial |= error.kind() == io::ErrorKind::PermissionDenied,
            }
        }
        found
    }

    /// Whether a process has the macvtap `name` open. Its device's number may have been that of a deleted one, of which
    /// descriptors are still open.
    fn has(&self, device: u64, name: &str) -> bool {
        let descriptors = self.devices.get(&device).into_iter().flatten();
        let mut names = descriptors.map(|(pid, number)| {
            let process = pidfd_open(*pid, PidfdFlags::empty())?;
            let queue = pidfd_getfd(process, *number, PidfdGetfdFlags::empty())?;
            Ok::<_, io::Error>(ioctl::tap_interface(queue.as_fd())?.0)
        });
        let ended = [libc::ENOLINK, libc::ESRCH, libc::EBADF];
        names.any(|found| match found {
            Ok(found) => found == name,
            Err(error) => !ended.map(Some).contains(&error.raw_os_error()),
        })
    }
}

fn number(entry: &fs::DirEntry) -> Option<i32> {
    entry.file_name().to_str()?.parse().ok()
}

/// The character device of a descriptor in /proc.
fn device(descriptor: &fs::DirEntry) -> Option<u64> {
    // It may be a file of a server that does not answer.
    let flags = AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(CWD, descriptor.path(), flags, StatxFlags::TYPE).ok()?;
    let kind = FileType::from_raw_mode(stat.stx_mode.into());
    (kind == FileType::CharacterDevice)
        .then(|| rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor))
}

/// Deletes the link with this index if it still has this alias, and returns whether it did: the index could be another
/// link's by now.
fn delete_if_still(netlink: &Netlink, index: u32, alias: &str) -> io::Result<bool> {
    match netlink.link(index) {
        Ok(link) => Ok(link.alias == alias && netlink.delete(index)?),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(error),
    }
}
