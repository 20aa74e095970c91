//! What a running minivmm publishes about its NICs, and its claim to them: a locked record for each, that ends
//! with whoever holds it.

use std::net::IpAddr;
use std::path::Path;

use net::{MacAddr, Owner, RecordDirectory, RecordView, TapInfo};
use serde::{Deserialize, Serialize};

mod claim;
mod store;

pub use claim::{Claim, ClaimError};

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
    /// The guest's NICs. A record has one.
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
    /// Its macvtap. The guest has to use the MAC address.
    #[serde(flatten)]
    pub tap: TapInfo,
    /// What the guest has said its addresses are.
    pub addresses: Vec<IpAddr>,
    /// Frames that the guest has sent from another MAC address.
    pub wrong_source_frames: u64,
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
    pub link: MacAddr,
    /// The guest's, which it may have changed since it started.
    pub guest: MacAddr,
}

impl NicEntry {
    /// Of a guest that has sent nothing yet.
    pub fn new(tap: TapInfo) -> Self {
        Self {
            tap,
            addresses: Vec::new(),
            wrong_source_frames: 0,
            link: None,
        }
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
            tame(&mut nic.tap.name);
            tame(&mut nic.tap.lower);
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
                && giver.nics[0].tap.key() == guest.nics[0].tap.key()
                && (guest.is_certain || giver.user == Some(guest.vouched_by))
        };
        let Some(at) = entries.iter().position(|found| is_giver(&found.entry)) else {
            continue;
        };
        let giver = entries.swap_remove(at).entry;
        guest.is_certain = true;
        let tap = &mut guest.nics[0].tap;
        *tap = TapInfo {
            mtu: tap.mtu,
            ..giver.nics[0].tap.clone()
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
        entry.nics.sort_by_key(|nic| nic.tap.device);
    }
    all
}

#[cfg(test)]
mod tests;
