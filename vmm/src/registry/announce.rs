//! The file of this process, and what keeps it up to date.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use devices::virtio::net::observe::Observer;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use net::Owner;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::{Entry, NicEntry, Runs, store};
use crate::link_watch::FollowedLink;

/// The file of this process. Dropping it removes the file.
#[derive(Debug)]
pub struct Registration {
    path: Option<PathBuf>,
    entry: Entry,
    /// What each of the entry's cards is learnt by.
    sources: Vec<Source>,
}

#[derive(Debug)]
struct Source {
    observer: Option<Arc<Observer>>,
    link: Option<Arc<FollowedLink>>,
}

/// A card to tell of.
#[derive(Debug)]
pub struct RegisteredCard {
    /// What is known at the start.
    pub nic: NicEntry,
    /// Tells what its guest says.
    pub observer: Option<Arc<Observer>>,
    /// Tells what becomes of the macvtap.
    pub link: Option<Arc<FollowedLink>>,
}

impl RegisteredCard {
    /// One of which nothing more will be known.
    pub fn new(nic: NicEntry) -> Self {
        Self {
            nic,
            observer: None,
            link: None,
        }
    }
}

impl Registration {
    /// Tells of this process and its cards. Where no file can be written, nothing is told, and
    /// nothing else is different.
    pub fn new(runs: Runs, cards: Vec<RegisteredCard>) -> Self {
        let split = |RegisteredCard {
                         nic,
                         observer,
                         link,
                     }| (nic, Source { observer, link });
        let (nics, sources) = cards.into_iter().map(split).unzip();
        let mut new = Self {
            path: None,
            entry: Entry::new(runs, nics),
            sources,
        };
        new.learn();
        match Owner::this_process() {
            Ok(owner) => new.entry.owner = owner.to_string(),
            Err(error) => {
                log::debug!("cannot tell of this guest: {error}");
                return new;
            }
        }
        new.path = store::own_directories()
            .into_iter()
            .find_map(|directory| new.write_in(&directory));
        new
    }

    /// Returns the file's path, if it could be written. What killed monitors left there goes.
    fn write_in(&self, directory: &Path) -> Option<PathBuf> {
        store::read(directory);
        let path = directory.join(format!("{}.json", self.entry.pid));
        match store::write(&path, &self.entry) {
            Ok(()) => Some(path),
            Err(error) => {
                log::debug!("cannot tell of this guest in {path:?}: {error}");
                None
            }
        }
    }

    fn learn(&mut self) {
        for (nic, Source { observer, link }) in self.entry.nics.iter_mut().zip(&self.sources) {
            if let Some(observer) = observer {
                nic.addresses = observer.addresses();
                nic.wrong_source_frames = observer.wrong_source();
            }
            if let Some(link) = link {
                nic.link = Some(link.seen());
            }
        }
    }

    /// Writes what has been learnt since.
    pub fn update(&mut self) {
        self.learn();
        if let Some(path) = &self.path
            && let Err(error) = store::write(path, &self.entry)
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
