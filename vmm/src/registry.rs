//! What a running minivmm tells about its guest, for `minivmm net list`: a file for each, that is
//! gone when the monitor is.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use devices::virtio::net::observe::Observer;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use net::Owner;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

/// A running monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its process, for people.
    pub pid: u32,
    /// Its process, for good: a number alone is given out again.
    pub owner: String,
    /// The guest's kernel, as it was named.
    pub kernel: PathBuf,
    /// The guest's network cards.
    pub nics: Vec<NicEntry>,
}

/// A network card of a running guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicEntry {
    /// The macvtap.
    pub name: String,
    /// The interface that it stands on.
    pub lower: String,
    /// The address that the guest has to use.
    pub mac: String,
    /// In bytes.
    pub mtu: u32,
    /// What the guest has said its addresses are.
    pub addresses: Vec<IpAddr>,
    /// Frames that the guest has sent from another MAC address.
    pub wrong_source_frames: u64,
}

/// The place of the files: one for the system's, or one for the user's where the former is not ours to
/// write.
fn directories() -> impl Iterator<Item = PathBuf> {
    let of_user = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    [Some(PathBuf::from("/run")), of_user]
        .into_iter()
        .flatten()
        .map(|dir| dir.join("minivmm"))
}

/// The file of this process. Dropping it removes the file.
#[derive(Debug)]
pub struct Registration {
    path: Option<PathBuf>,
    entry: Entry,
    observers: Vec<Arc<Observer>>,
}

impl Registration {
    /// Tells of this process, and of the cards that `observers` watch, in the same order. Where no
    /// file can be written, nothing is told, and nothing else is different.
    pub fn new(kernel: PathBuf, nics: Vec<NicEntry>, observers: Vec<Arc<Observer>>) -> Self {
        let pid = std::process::id();
        let mut new = Self {
            path: None,
            entry: Entry {
                pid,
                owner: String::new(),
                kernel,
                nics,
            },
            observers,
        };
        match Owner::this_process() {
            Ok(owner) => new.entry.owner = owner.to_string(),
            Err(error) => {
                log::debug!("cannot tell of this guest: {error}");
                return new;
            }
        }
        new.path = directories()
            .map(|dir| dir.join(format!("{pid}.json")))
            .find(|path| {
                let written = write(path, &new.entry);
                if let Err(error) = &written {
                    log::debug!("cannot tell of this guest in {path:?}: {error}");
                }
                written.is_ok()
            });
        new
    }

    /// Writes what has been learnt since.
    pub fn update(&mut self) {
        for (nic, observer) in self.entry.nics.iter_mut().zip(&self.observers) {
            nic.addresses = observer.addresses();
            nic.wrong_source_frames = observer.wrong_source();
        }
        if let Some(path) = &self.path
            && let Err(error) = write(path, &self.entry)
        {
            log::debug!("cannot tell of this guest in {path:?}: {error}");
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

/// Keeps the file up to date, on the control thread.
#[derive(Debug)]
pub struct Announcer {
    registration: Registration,
    changed: EventFd,
    /// Runs while something has been learnt that the file does not say yet.
    delay: TimerFd,
}

impl Announcer {
    /// How long a change may wait for others: a guest can cause any number of them.
    const DELAY: Duration = Duration::from_millis(100);

    /// Updates `registration` after `changed`, which the observers signal.
    ///
    /// # Errors
    ///
    /// Fails when the process has no file descriptor left.
    pub fn new(registration: Registration, changed: EventFd) -> io::Result<Self> {
        Ok(Self {
            registration,
            changed,
            delay: TimerFd::new()?,
        })
    }
}

impl MutEventSubscriber for Announcer {
    fn init(&mut self, ops: &mut EventOps) {
        for events in [
            Events::new(&self.changed, EventSet::IN),
            Events::new(&self.delay, EventSet::IN),
        ] {
            if let Err(error) = ops.add(events) {
                log::warn!("the guest's addresses will not be told: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if events.fd() == self.changed.as_raw_fd() {
            let _ = self.changed.read();
            if !self.delay.is_armed().unwrap_or(false) {
                let _ = self.delay.reset(Self::DELAY, None);
            }
        } else {
            let _ = self.delay.wait();
            self.registration.update();
        }
    }
}

/// Writes so that a reader sees the old or the new, never a part.
fn write(path: &Path, entry: &Entry) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let new = path.with_extension("new");
    fs::write(&new, serde_json::to_vec(entry)?)?;
    fs::rename(new, path)
}

/// The monitors that run now. Files of those that were killed are removed on the way.
pub fn running() -> Vec<Entry> {
    let mut entries: Vec<_> = directories()
        .flat_map(|directory| read(&directory))
        .collect();
    entries.sort_by_key(|entry| entry.pid);
    entries
}

fn read(directory: &Path) -> Vec<Entry> {
    let Ok(files) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let paths = files.flatten().map(|file| file.path());
    paths
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .filter_map(|path| {
            let entry: Entry = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
            let owner: Owner = entry.owner.parse().ok()?;
            if owner.is_dead() {
                let _ = fs::remove_file(&path);
                return None;
            }
            Some(entry)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(owner: &str) -> Entry {
        let nic = NicEntry {
            name: "macvtap0".into(),
            lower: "eno1".into(),
            mac: "02:00:00:00:00:01".into(),
            mtu: 1500,
            addresses: vec!["10.0.0.5".parse().unwrap(), "fe80::1".parse().unwrap()],
            wrong_source_frames: 3,
        };
        Entry {
            pid: 1,
            owner: owner.into(),
            kernel: "bzImage".into(),
            nics: vec![nic],
        }
    }

    #[test]
    fn entry_of_a_live_process_is_read_back_and_that_of_a_dead_one_removed() {
        let directory = tempfile::tempdir().unwrap();
        let own = Owner::this_process().unwrap().to_string();
        let live = entry(&own);
        write(&directory.path().join("1.json"), &live).unwrap();
        // The same number, given again to another process.
        let start = own
            .split_whitespace()
            .find(|word| word.starts_with("start="))
            .unwrap();
        write(
            &directory.path().join("2.json"),
            &entry(&own.replace(start, "start=1")),
        )
        .unwrap();
        fs::write(directory.path().join("3.json"), "{").unwrap();
        assert_eq!(read(directory.path()), [live]);
        assert!(!directory.path().join("2.json").exists());
    }
}
