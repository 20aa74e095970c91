//! One NIC for one interface: whoever opens a second queue of a macvtap gets a share of its frames, unasked, and a queue
//! that nobody empties swallows its own.

use std::io;
use std::os::fd::AsFd;

use net::{ExistingTap, LinkId, MacAddr, Macvtap, RecordKey};

use crate::nic::inherited::Inherited;
use crate::nic::registry::{Claim, Entry, InUse, NicEntry, Runs, Wanted};

/// Two for one interface.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    /// Both are ours.
    #[error(
        "two NICs are on {name} ({mac}), and each would get a part of its frames: give each NIC \
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
        "{name} ({mac}) is the NIC of {by}, and each would get a part of its frames: end that, or use another interface"
    )]
    InUse {
        /// The interface.
        name: String,
        /// Its MAC address.
        mac: MacAddr,
        /// The other process.
        by: String,
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
    /// This process has made it.
    is_new: bool,
    /// `net open` has passed it on to us.
    is_passed: bool,
}

impl Interface {
    /// Of a macvtap that was made or opened here.
    ///
    /// # Errors
    ///
    /// When its queue cannot be looked at.
    pub fn of_macvtap(macvtap: &Macvtap) -> Result<Self, SharedError> {
        Ok(Self {
            device: device_of(macvtap.queue(), macvtap.name())?,
            name: macvtap.name().to_owned(),
            mac: macvtap.mac(),
            id: Some(macvtap.id()),
            is_new: macvtap.is_new(),
            is_passed: false,
        })
    }

    /// Of queues that somebody else has opened, and of which somebody may have `told`.
    ///
    /// # Errors
    ///
    /// When a queue cannot be looked at.
    pub fn of_existing(
        existing: &ExistingTap,
        told: Option<&Inherited>,
    ) -> Result<Self, SharedError> {
        Ok(Self {
            device: device_of(&existing.queues[0], &existing.name)?,
            name: existing.name.clone(),
            mac: existing.mac,
            id: existing.id.or(told.and_then(|told| told.id)),
            is_new: false,
            is_passed: told.is_some(),
        })
    }

    fn is(&self, other: &Self) -> bool {
        (self.device, &self.name, self.mac) == (other.device, &other.name, other.mac)
            // Two taps may look the same in two namespaces.
            && (self.id.is_none() || other.id.is_none() || self.id == other.id)
    }

    fn in_use(&self, in_use: InUse) -> SharedError {
        let by = in_use.entry.map_or_else(
            || "another process, which is only starting".to_owned(),
            |entry| format!("{} (pid {})", entry.runs.path(), entry.pid),
        );
        let (name, mac) = (self.name.clone(), self.mac);
        SharedError::InUse { name, mac, by }
    }
}

fn device_of(queue: impl AsFd, name: &str) -> Result<u64, SharedError> {
    let stat = rustix::fs::fstat(queue);
    stat.map(|stat| stat.st_rdev)
        .map_err(|errno| SharedError::Look(name.to_owned(), errno.into()))
}

/// Claims each NIC, and tells others of it. Refuses two NICs on one interface, and one that is the NIC of another
/// running minivmm. What other users say of theirs is only warned of: it need not be true.
///
/// # Errors
///
/// See [`SharedError`].
pub fn claim(
    runs: &Runs,
    user: Option<u32>,
    nics: &[(&Interface, &NicEntry)],
) -> Result<Vec<Claim>, SharedError> {
    let mut claims = Vec::with_capacity(nics.len());
    for (n, (interface, nic)) in nics.iter().enumerate() {
        must_be_new(interface, &nics[..n])?;
        let Interface { mac, id, .. } = **interface;
        let wanted = Wanted {
            key: RecordKey::of_tap(interface.device, id, mac),
            is_new: interface.is_new,
            is_passed: interface.is_passed,
        };
        let doubtful = |in_use: InUse| {
            let user = in_use.said_by.unwrap_or_default();
            log::warn!("user {user} says that {}", interface.in_use(in_use));
        };
        let entry = Entry::new(runs.clone(), user, (*nic).clone());
        let claim = Claim::new(&wanted, entry, doubtful);
        claims.push(claim.map_err(|in_use| interface.in_use(in_use))?);
    }
    Ok(claims)
}

fn must_be_new(
    interface: &Interface,
    others: &[(&Interface, &NicEntry)],
) -> Result<(), SharedError> {
    if others.iter().any(|(other, _)| other.is(interface)) {
        let (name, mac) = (interface.name.clone(), interface.mac);
        return Err(SharedError::Twice { name, mac });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(device: u64, id: Option<u32>) -> Interface {
        Interface {
            device,
            name: "mine".into(),
            mac: "02:00:00:00:00:01".parse().unwrap(),
            id: id.map(|index| LinkId {
                namespace: 1,
                index,
            }),
            is_new: false,
            is_passed: false,
        }
    }

    #[test]
    fn interface_for_two_nics_is_refused() {
        let twice = |one: Interface, other: Interface| one.is(&other);
        assert!(twice(interface(7, None), interface(7, Some(2))));
        assert!(twice(interface(7, Some(2)), interface(7, Some(2))));
        assert!(!twice(interface(7, None), interface(8, None)));
        // Taps of two namespaces.
        assert!(!twice(interface(7, Some(2)), interface(7, Some(3))));
    }
}
