//! What a running minivmm tells about its NICs, and that nobody else may have them: a locked record for each, that ends
//! with whoever holds it.

use std::net::IpAddr;
use std::path::Path;

use net::{ExistingTap, LinkId, MacAddr, Macvtap, Owner, RecordDirectory, RecordKey, RecordView};
use serde::{Deserialize, Serialize};

use crate::nic::inherited::Inherited;

mod announce;
mod claim;
mod store;
mod text;

pub use announce::{Announcer, RegisteredNic};
pub use claim::{Claim, InUse, Wanted};

/// The MTU of an interface that cannot be asked: Ethernet's.
const USUAL_MTU: u32 = 1500;

/// A running monitor, or another program that has its NIC by minivmm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its process in its own pid namespace, for people.
    pub pid: u32,
    /// Its process, for good: a number alone is given out again. Empty where /proc does not show it.
    pub owner: String,
    /// What it runs.
    #[serde(flatten)]
    pub runs: Runs,
    /// The user whose program has got the NIC from root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<u32>,
    /// The user who says all this.
    #[serde(default)]
    pub vouched_by: u32,
    /// Whether it can be relied on which NICs these are: root or this process's own user says so.
    #[serde(skip)]
    pub is_certain: bool,
    /// The guest's NICs. A record tells of one.
    pub nics: Vec<NicEntry>,
}

/// What a process does with its NICs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Runs {
    /// It is minivmm with a guest: the kernel, as it was named.
    Kernel(String),
    /// It is another program.
    Program(String),
}

impl Runs {
    /// A guest with this kernel.
    pub fn kernel(path: &Path) -> Self {
        Self::Kernel(path.to_string_lossy().into_owned())
    }

    /// Another program.
    pub fn program(path: &Path) -> Self {
        Self::Program(path.to_string_lossy().into_owned())
    }

    /// The kernel or program, as it was named.
    pub fn path(&self) -> &str {
        let (Self::Kernel(path) | Self::Program(path)) = self;
        path
    }
}

/// A NIC of a running guest.
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
    /// It has another MAC address than its guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wrong_mac: Option<WrongMac>,
    /// It takes every multicast frame no longer.
    #[serde(default)]
    pub filters_multicast: bool,
}

/// Two MAC addresses that should be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrongMac {
    /// The link's.
    #[serde(with = "text")]
    pub link: MacAddr,
    /// The guest's, which it may have changed since it started.
    #[serde(with = "text")]
    pub guest: MacAddr,
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
    pub fn of_existing(existing: &ExistingTap, told: Option<&Inherited>, device: u64) -> Self {
        // What can be seen counts more than what was told, which may have changed since.
        let (lower, lower_id) = match (&existing.lower, told) {
            (Some((lower, id)), _) => (lower, Some(*id)),
            (None, Some(told)) => (&told.lower, told.lower_id),
            (None, None) => (&existing.name, None),
        };
        let mtu = existing.mtu.or(told.map(|told| told.mtu));
        let mode = existing.mode.or(told.and_then(|told| told.mode));
        let id = existing.id.or(told.and_then(|told| told.id));
        Self {
            name: existing.name.clone(),
            lower: lower.clone(),
            mac: existing.mac.to_string(),
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

    /// Its record; none if its address is none.
    fn key(&self) -> Option<RecordKey> {
        let mac = self.mac.parse().ok()?;
        Some(RecordKey::of_tap(self.device, self.id.map(Into::into), mac))
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
    /// Of this process, with one NIC.
    pub fn new(runs: Runs, user: Option<u32>, nic: NicEntry) -> Self {
        let owner = Owner::this_process().map(|owner| owner.to_string());
        Self {
            pid: std::process::id(),
            owner: owner.unwrap_or_default(),
            runs,
            user,
            vouched_by: rustix::process::geteuid().as_raw(),
            is_certain: true,
            nics: vec![nic],
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
        tame(path);
    }

    /// Whether it is the same process as `other`, by the same word.
    fn is(&self, other: &Self) -> bool {
        let id = |entry: &Self| (entry.vouched_by, entry.is_certain, entry.pid);
        id(self) == id(other) && self.owner == other.owner && self.runs == other.runs
    }
}

/// The monitors that run now. What killed ones have left is removed on the way, where this process may.
pub fn running() -> Vec<Entry> {
    let view = RecordView::default();
    let directories = RecordDirectory::all();
    let found = directories.iter().flat_map(|dir| store::read(&view, dir));
    together(once(found.collect()))
}

/// Leaves out the programs whose NICs are those of a guest: `net open` and the minivmm in it tell of the same. Which NIC
/// that is stays the former's word, if it names the latter's user; with any other user both are told.
fn once(found: Vec<store::Found>) -> Vec<Entry> {
    let (mut passed, mut entries): (Vec<_>, Vec<_>) =
        found.into_iter().partition(|found| found.is_passed);
    for guest in &mut passed {
        let guest = &mut guest.entry;
        let is_giver = |giver: &Entry| {
            giver.is_certain
                && matches!(giver.runs, Runs::Program(_))
                && giver.nics[0].key() == guest.nics[0].key()
                && (guest.is_certain || giver.user == Some(guest.vouched_by))
        };
        let Some(at) = entries.iter().position(|found| is_giver(&found.entry)) else {
            continue;
        };
        let giver = entries.swap_remove(at).entry;
        guest.is_certain = true;
        let told = guest.nics[0].clone();
        guest.nics[0] = NicEntry {
            addresses: told.addresses,
            wrong_source_frames: told.wrong_source_frames,
            link: told.link,
            mtu: told.mtu,
            ..giver.nics[0].clone()
        };
    }
    entries.extend(passed);
    entries.into_iter().map(|found| found.entry).collect()
}

/// Puts the NICs of each process together.
fn together(mut entries: Vec<Entry>) -> Vec<Entry> {
    entries.sort_by_key(|entry| (entry.pid, entry.vouched_by));
    let mut all: Vec<Entry> = Vec::new();
    for entry in entries {
        match all.last_mut() {
            Some(last) if last.is(&entry) => last.nics.extend(entry.nics),
            _ => all.push(entry),
        }
    }
    for entry in &mut all {
        entry.nics.sort_by_key(|nic| nic.device);
    }
    all
}

#[cfg(test)]
mod tests;
