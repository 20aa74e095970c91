//! What a running minivmm tells about its guest, for `minivmm net list`: a file for each, that is
//! gone when the monitor is.

use std::net::IpAddr;
use std::path::PathBuf;

use net::{Adopted, LinkId, Macvtap};
use serde::{Deserialize, Serialize};

use crate::handed::Handed;

mod announce;
mod store;

pub use announce::{Announcer, RegisteredCard, Registration};
pub use store::make_directory_for;

/// The MTU of an interface that cannot be asked: Ethernet's.
const USUAL_MTU: u32 = 1500;

/// A running monitor, or another program that has its network card by minivmm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its process, for people.
    pub pid: u32,
    /// Its process, for good: a number alone is given out again.
    pub owner: String,
    /// What it runs.
    #[serde(flatten)]
    pub runs: Runs,
    /// The guest's network cards.
    pub nics: Vec<NicEntry>,
}

/// What a process does with its cards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Runs {
    /// It is minivmm with a guest: the kernel, as it was named.
    Kernel(PathBuf),
    /// It is another program.
    Program(PathBuf),
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
    /// The number of the macvtap's character device, the same in all namespaces.
    #[serde(default)]
    pub device: u64,
    /// Which link the macvtap is, where that is known.
    #[serde(default)]
    pub id: Option<Id>,
    /// Which link it stands on, where that is known.
    #[serde(default)]
    pub lower_id: Option<Id>,
    /// The macvtap's mode, where that is known.
    #[serde(default)]
    pub mode: Option<String>,
    /// What the host last said of the macvtap, where that is watched.
    #[serde(default)]
    pub link: Option<LinkSeen>,
}

/// A link of the host, as it was last seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkSeen {
    /// It has not been deleted.
    pub exists: bool,
    /// Somebody has brought it up.
    pub up: bool,
    /// The wire is there.
    pub carrier: bool,
}

impl NicEntry {
    /// Of a macvtap with the character device `device`.
    pub fn of(macvtap: &Macvtap, device: u64) -> Self {
        Self {
            name: macvtap.name().to_owned(),
            lower: macvtap.lower().to_owned(),
            mac: macvtap.mac().to_string(),
            mtu: macvtap.mtu(),
            addresses: Vec::new(),
            wrong_source_frames: 0,
            device,
            id: Some(macvtap.id().into()),
            lower_id: macvtap.lower_id().map(Into::into),
            mode: Some(macvtap.mode().to_string()),
            link: None,
        }
    }

    /// Of queues that somebody else has opened, and of which somebody may have `told`.
    pub fn of_adopted(adopted: &Adopted, told: Option<&Handed>, device: u64) -> Self {
        // What can be seen counts more than what was told, which may have changed since.
        let (lower, lower_id) = match (&adopted.lower, told) {
            (Some((lower, id)), _) => (lower, Some(*id)),
            (None, Some(told)) => (&told.lower, told.lower_id),
            (None, None) => (&adopted.name, None),
        };
        let mtu = adopted.mtu.or(told.map(|told| told.mtu));
        let mode = adopted.mode.or(told.and_then(|told| told.mode));
        let id = adopted.id.or(told.and_then(|told| told.id));
        Self {
            name: adopted.name.clone(),
            lower: lower.clone(),
            mac: adopted.mac.to_string(),
            mtu: mtu.unwrap_or(USUAL_MTU),
            addresses: Vec::new(),
            wrong_source_frames: 0,
            device,
            id: id.map(Into::into),
            lower_id: lower_id.map(Into::into),
            mode: mode.map(|mode| mode.to_string()),
            link: None,
        }
    }

    /// Whether it is the card that `other` is.
    fn is(&self, other: &Self) -> bool {
        (self.device, &self.name, &self.mac) == (other.device, &other.name, &other.mac)
    }
}

/// A [`LinkId`] in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Id {
    /// The network namespace's inode.
    pub namespace: u64,
    /// The interface index.
    pub index: u32,
}

impl From<LinkId> for Id {
    fn from(LinkId { namespace, index }: LinkId) -> Self {
        Self { namespace, index }
    }
}

impl From<Id> for LinkId {
    fn from(Id { namespace, index }: Id) -> Self {
        Self { namespace, index }
    }
}

impl Entry {
    /// Of this process, whose owner's tag is still missing.
    fn new(runs: Runs, nics: Vec<NicEntry>) -> Self {
        Self {
            pid: std::process::id(),
            owner: String::new(),
            runs,
            nics,
        }
    }

    /// Makes it fit to be shown: another user has written it.
    fn tame(&mut self) {
        let tame = |text: &mut String| text.retain(|c| !c.is_control());
        for nic in &mut self.nics {
            let texts = [&mut nic.name, &mut nic.lower, &mut nic.mac];
            texts.into_iter().chain(&mut nic.mode).for_each(tame);
        }
        let (Runs::Kernel(path) | Runs::Program(path)) = &mut self.runs;
        let mut text = path.to_string_lossy().into_owned();
        tame(&mut text);
        *path = text.into();
    }
}

/// A card that is in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InUse {
    /// By whom.
    pub entry: Entry,
    /// The card.
    pub nic: NicEntry,
    /// Whether root or this process's own user says so.
    pub is_certain: bool,
}

/// The monitors that run now. Files of those that were killed are removed on the way.
pub fn running() -> Vec<Entry> {
    without_givers(found().into_iter().map(|found| found.entry).collect())
}

/// Leaves out the programs whose cards are those of a guest: `net open` and the minivmm in it tell of the same.
fn without_givers(mut entries: Vec<Entry>) -> Vec<Entry> {
    let is_guest = |entry: &&Entry| matches!(entry.runs, Runs::Kernel(_));
    let guests = entries.iter().filter(is_guest);
    let cards: Vec<_> = guests.flat_map(|guest| guest.nics.clone()).collect();
    entries.retain(|entry| {
        let is_in_guest = |nic: &NicEntry| cards.iter().any(|card| card.is(nic));
        is_guest(&entry) || !entry.nics.iter().all(is_in_guest)
    });
    entries
}

/// The cards of other processes than this one.
pub fn cards_in_use() -> Vec<InUse> {
    let own = [0, rustix::process::geteuid().as_raw()];
    let mut cards = Vec::new();
    for store::Found { entry, user } in found() {
        if entry.pid == std::process::id() {
            continue;
        }
        cards.extend(entry.nics.iter().map(|nic| InUse {
            entry: entry.clone(),
            nic: nic.clone(),
            is_certain: own.contains(&user),
        }));
    }
    cards
}

fn found() -> Vec<store::Found> {
    let directories = store::all_directories();
    let mut found: Vec<_> = directories
        .iter()
        .flat_map(|dir| store::read(dir))
        .collect();
    found.sort_by_key(|found| found.entry.pid);
    found
}

#[cfg(test)]
mod tests;
