//! One card for one interface: whoever opens a second queue of a macvtap gets a share of its frames, unasked, and a queue
//! that nobody empties swallows its own.

use std::io;
use std::os::fd::AsFd;

use net::{Adopted, LinkId, MacAddr, Macvtap};

use crate::handed::Handed;
use crate::registry::{self, InUse, NicEntry, Runs};

/// Two for one interface.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    /// Both are ours.
    #[error(
        "two cards are on {name} ({mac}), and each would get a part of its frames: give each card \
         an interface of its own"
    )]
    Twice {
        /// The interface.
        name: String,
        /// Its MAC address.
        mac: MacAddr,
    },
    /// The other one is another process's.
    #[error(
        "{name} ({mac}) is the card of {runs} (pid {pid}), and each would get a part of its \
         frames: end that, or use another interface"
    )]
    InUse {
        /// The interface.
        name: String,
        /// Its MAC address.
        mac: MacAddr,
        /// The other process.
        pid: u32,
        /// What it runs.
        runs: String,
    },
    /// A queue does not say what it is.
    #[error("cannot look at a queue of {0}")]
    Look(String, #[source] io::Error),
}

/// The interface behind a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// The number of the character device: a macvtap's own, or the one of all taps.
    pub device: u64,
    name: String,
    mac: MacAddr,
    id: Option<LinkId>,
    /// `net open` made it, and has told of it so that we use it.
    is_handed: bool,
}

impl Interface {
    /// Of a macvtap that was made or opened here.
    ///
    /// # Errors
    ///
    /// When its queue cannot be looked at.
    pub fn of_macvtap(macvtap: &Macvtap) -> Result<Self, SharedError> {
        let (name, mac, id) = (macvtap.name(), macvtap.mac(), Some(macvtap.id()));
        Self::of(macvtap.queue(), name, mac, id, false)
    }

    /// Of queues that somebody else has opened, and of which somebody may have `told`.
    ///
    /// # Errors
    ///
    /// When a queue cannot be looked at.
    pub fn of_adopted(adopted: &Adopted, told: Option<&Handed>) -> Result<Self, SharedError> {
        let (name, mac) = (&adopted.name, adopted.mac);
        let id = adopted.id.or(told.and_then(|told| told.id));
        Self::of(&adopted.queues[0], name, mac, id, told.is_some())
    }

    fn of(
        queue: impl AsFd,
        name: &str,
        mac: MacAddr,
        id: Option<LinkId>,
        is_handed: bool,
    ) -> Result<Self, SharedError> {
        let stat = rustix::fs::fstat(queue)
            .map_err(|errno| SharedError::Look(name.to_owned(), errno.into()))?;
        Ok(Self {
            device: stat.st_rdev,
            name: name.to_owned(),
            mac,
            id,
            is_handed,
        })
    }

    fn is(&self, other: &Self) -> bool {
        (self.device, &self.name, self.mac) == (other.device, &other.name, other.mac)
            // Two taps may look the same in two namespaces.
            && (self.id.is_none() || other.id.is_none() || self.id == other.id)
    }

    fn is_card(&self, nic: &NicEntry) -> bool {
        let id = nic.id.map(LinkId::from);
        let other = nic.mac.parse().map(|mac| Self {
            device: nic.device,
            name: nic.name.clone(),
            mac,
            id,
            is_handed: false,
        });
        other.is_ok_and(|other| self.is(&other))
    }
}

/// Refuses two cards on one interface, and one that is the card of another running minivmm. What other users say of
/// theirs is only warned of: it need not be true.
///
/// # Errors
///
/// See [`SharedError`].
pub fn check(interfaces: &[Interface]) -> Result<(), SharedError> {
    check_against(interfaces, &registry::cards_in_use())
}

fn check_against(interfaces: &[Interface], in_use: &[InUse]) -> Result<(), SharedError> {
    for (n, interface) in interfaces.iter().enumerate() {
        let Interface { name, mac, .. } = interface;
        if interfaces[..n].iter().any(|other| other.is(interface)) {
            let (name, mac) = (name.clone(), *mac);
            return Err(SharedError::Twice { name, mac });
        }
        for InUse {
            entry,
            nic,
            is_certain,
        } in in_use
        {
            let (Runs::Kernel(runs) | Runs::Program(runs)) = &entry.runs;
            // Who has handed it to us waits for our end.
            let gave = interface.is_handed && matches!(entry.runs, Runs::Program(_));
            if gave || !interface.is_card(nic) {
                continue;
            }
            let error = SharedError::InUse {
                name: name.clone(),
                mac: *mac,
                pid: entry.pid,
                runs: runs.display().to_string(),
            };
            if *is_certain {
                return Err(error);
            }
            log::warn!("another user says that {error}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Entry;

    fn interface(device: u64, id: Option<u32>) -> Interface {
        Interface {
            device,
            name: "mine".into(),
            mac: "02:00:00:00:00:01".parse().unwrap(),
            id: id.map(|index| LinkId {
                namespace: 1,
                index,
            }),
            is_handed: false,
        }
    }

    fn in_use(runs: Runs, is_certain: bool) -> InUse {
        let nic = NicEntry {
            name: "mine".into(),
            lower: "eno1".into(),
            mac: "02:00:00:00:00:01".into(),
            mtu: 1500,
            addresses: Vec::new(),
            wrong_source_frames: 0,
            device: 7,
            id: None,
            lower_id: None,
            mode: None,
            link: None,
        };
        InUse {
            entry: Entry {
                pid: 4711,
                owner: String::new(),
                runs,
                nics: vec![nic.clone()],
            },
            nic,
            is_certain,
        }
    }

    #[test]
    fn interface_for_two_cards_is_refused() {
        let twice = |one, other| check_against(&[one, other], &[]).is_err();
        assert!(twice(interface(7, None), interface(7, Some(2))));
        assert!(twice(interface(7, Some(2)), interface(7, Some(2))));
        assert!(!twice(interface(7, None), interface(8, None)));
        // Taps of two namespaces.
        assert!(!twice(interface(7, Some(2)), interface(7, Some(3))));
    }

    #[test]
    fn interface_of_another_process_is_refused_unless_it_handed_it_over_or_is_a_strangers() {
        let kernel = || Runs::Kernel("bzImage".into());
        let program = || Runs::Program("minivmm".into());
        let refused = |interface, runs, is_certain| {
            check_against(&[interface], &[in_use(runs, is_certain)]).is_err()
        };
        assert!(refused(interface(7, None), kernel(), true));
        assert!(refused(interface(7, None), program(), true));
        assert!(!refused(interface(7, None), kernel(), false));
        assert!(!refused(interface(8, None), kernel(), true));
        let handed = Interface {
            is_handed: true,
            ..interface(7, None)
        };
        assert!(!refused(handed.clone(), program(), true));
        assert!(refused(handed, kernel(), true));
    }
}
