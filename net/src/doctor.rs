//! What stands in the way of macvtaps on this machine: one line a check.
//!
//! [`diagnose_host`] collects facts; `verdicts.rs`, `lower.rs` and `neighbour.rs` judge them, and are pure.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{FileType, OFlags};
use serde::Serialize;

use crate::diagnose;
use crate::ioctl;
use crate::name::LinkName;
use crate::netlink::{Link, Netlink};
use crate::netns;
use crate::owner::Owner;
use crate::privileges::Privileges;
use crate::stale::Judge;
use crate::sysfs::Sysfs;
use crate::wifi::{self, Air};

mod lower;
mod neighbour;
mod verdicts;

pub use neighbour::Neighbour;

/// One thing that was checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Check {
    /// What was checked, in a word or two; the same in every run.
    #[serde(rename = "check")]
    pub name: &'static str,
    /// Whether it is as it should be.
    pub status: Status,
    /// What was found, as a sentence without a full stop.
    pub message: String,
    /// What to do about it, where there is something to do.
    pub remedy: Option<String>,
}

/// The outcome of a [`Check`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// It works, but not for everything, or not for long.
    Warn,
    /// No macvtap will work like this.
    Fail,
}

impl Status {
    /// `ok`, `warn` or `fail`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// All that the checks of the host's network are made from.
#[derive(Debug, Default)]
struct Facts {
    driver: Driver,
    vhost_net: VhostNet,
    /// None when /proc does not show them.
    privileges: Option<Privileges>,
    /// It can mount the sysfs of its network namespace.
    mounts_sysfs: bool,
    /// None when they cannot be listed.
    links: Option<Vec<Link>>,
    /// By interface index.
    hardware: BTreeMap<u32, Hardware>,
    /// Links whose owner has ended, by interface index.
    stale: BTreeMap<u32, Owner>,
    nodes: Vec<Node>,
    /// The inode of this network namespace.
    namespace: u64,
    /// Macvtaps of running guests; none when the namespace is unknown.
    neighbours: Vec<Neighbour>,
}

/// What is known of the macvtap driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Driver {
    /// It has answered, or its module is loaded.
    Present,
    /// As a module that isn't loaded.
    Loadable,
    Absent,
    /// Only a privileged process could find out.
    #[default]
    Unknown,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum VhostNet {
    Usable,
    NotPermitted,
    #[default]
    Absent,
}

/// What sysfs and ioctls say of a link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Hardware {
    wireless: bool,
    driver: Option<String>,
    /// It drops the frames of VLANs that nothing on this host is in. Looked at for the named link alone.
    filters_vlans: bool,
}

/// What `/dev/tap<index>` is, and what it should be for this namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Node {
    index: u32,
    /// Its device number; None when there is no such node.
    found: Option<u64>,
    /// The device number of this namespace's macvtap with that index; None when it has none.
    expected: Option<u64>,
}

/// Checks what macvtaps need of the host's network, in the caller's network namespace: the driver, vhost-net, the macvtaps
/// that there are; and with a link, whether that can carry one.
///
/// What is in other namespaces does not show: `neighbours` are those that the caller knows of.
///
/// It changes nothing, except that the kernel may load the macvtap driver. Without privileges it sees a little less.
pub fn diagnose_host(link: Option<&LinkName>, neighbours: &[Neighbour]) -> Vec<Check> {
    let facts = netns::on_own_thread(|| Facts::collect(link, neighbours)).unwrap_or_default();
    verdicts::all(&facts, link.map(LinkName::as_str))
}

impl Facts {
    fn collect(link: Option<&LinkName>, neighbours: &[Neighbour]) -> Self {
        let links = Netlink::connect().and_then(|host| host.links()).ok();
        let seen = links.as_deref().unwrap_or_default();
        let named = link.and_then(|name| diagnose::find(seen, name.as_str()).ok());
        let named = named.map(|link| diagnose::real_device(seen, link).index);
        let sysfs = Sysfs::of_this_namespace().ok();
        let air = sysfs.as_ref().map(Air::new);
        let hardware = |link: &Link| Hardware {
            wireless: air.as_ref().is_some_and(|air| air.is_wireless(link)),
            driver: sysfs.as_ref().and_then(|sysfs| sysfs.driver(&link.name)),
            filters_vlans: named == Some(link.index) && filters_vlans(link),
        };
        let judge = Judge::new();
        let stale = |link: &Link| judge.stale_owner(link).map(|owner| (link.index, owner));
        let mut facts = Self {
            vhost_net: VhostNet::look(Path::new("/dev/vhost-net")),
            privileges: Privileges::of_this_thread().ok(),
            mounts_sysfs: sysfs.as_ref().is_some_and(Sysfs::is_own),
            hardware: seen
                .iter()
                .map(|link| (link.index, hardware(link)))
                .collect(),
            stale: seen.iter().filter_map(stale).collect(),
            nodes: nodes(seen, sysfs.as_ref(), Path::new("/dev")),
            ..Self::default()
        };
        if let Ok(namespace) = netns::inode_of_current() {
            (facts.namespace, facts.neighbours) = (namespace, neighbours.to_vec());
        }
        facts.links = links;
        // Last: it moves this thread to another namespace.
        facts.driver = Driver::look();
        facts
    }

    /// The Wi-Fi interface that carries the frames of `link`.
    fn wireless_under<'a>(&self, links: &'a [Link], link: &'a Link) -> Option<&'a Link> {
        let is_wireless = |link: &Link| {
            let hardware = self.hardware.get(&link.index);
            hardware.is_some_and(|hardware| hardware.wireless)
        };
        wifi::first(links, link, is_wireless)
    }
}

impl Driver {
    fn look() -> Self {
        let asked = netns::enter_new()
            .and_then(|_namespace| Netlink::connect())
            .map(|private| private.request_impossible_macvtap());
        match asked {
            Ok(Err(error)) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Self::Absent,
            Ok(Err(error)) if error.raw_os_error() == Some(libc::EINVAL) => Self::Present,
            _ => Self::guess(Path::new("/")),
        }
    }

    /// From the files under `root`. What is built in doesn't always show there, so they cannot prove its absence.
    fn guess(root: &Path) -> Self {
        if root.join("sys/module/macvtap").exists() {
            return Self::Present;
        }
        let release = rustix::system::uname();
        let modules = root
            .join("lib/modules")
            .join(release.release().to_str().unwrap_or_default());
        let lists = |file: &str| {
            let list = std::fs::read_to_string(modules.join(file)).unwrap_or_default();
            list.contains("/macvtap.ko")
        };
        match (lists("modules.builtin"), lists("modules.dep")) {
            (true, _) => Self::Present,
            (_, true) => Self::Loadable,
            _ => Self::Unknown,
        }
    }
}

impl VhostNet {
    fn look(path: &Path) -> Self {
        // Opened, not only looked at: access(2) knows nothing of a container's device rules.
        match rustix::fs::open(
            path,
            OFlags::RDWR | OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        ) {
            Ok(_) => Self::Usable,
            Err(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) => Self::NotPermitted,
            Err(_) => Self::Absent,
        }
    }
}

fn filters_vlans(link: &Link) -> bool {
    let asked = UdpSocket::bind("0.0.0.0:0")
        .and_then(|socket| ioctl::has_feature(socket.as_fd(), &link.name, "rx-vlan-filter"));
    asked.unwrap_or(false)
}

/// Every `tap<index>` in `directory`, and every macvtap of this namespace.
fn nodes(links: &[Link], sysfs: Option<&Sysfs>, directory: &Path) -> Vec<Node> {
    let found: BTreeMap<u32, u64> = tap_nodes(directory).unwrap_or_default();
    let device = |link: &Link| {
        // Without the right sysfs nothing can be said.
        let device = sysfs?.tap_device(&link.name, link.index).ok()?;
        Some((link.index, device))
    };
    let macvtaps = links.iter().filter(|link| link.is_macvtap());
    let expected: BTreeMap<u32, u64> = macvtaps.filter_map(device).collect();
    let indexes: BTreeSet<&u32> = found.keys().chain(expected.keys()).collect();
    let node = |index: &u32| Node {
        index: *index,
        found: found.get(index).copied(),
        expected: expected.get(index).copied(),
    };
    indexes.into_iter().map(node).collect()
}

fn tap_nodes(directory: &Path) -> io::Result<BTreeMap<u32, u64>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let index = name
            .to_str()
            .and_then(|name| name.strip_prefix("tap")?.parse().ok());
        let Some(index) = index else { continue };
        let stat = rustix::fs::lstat(entry.path())?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice {
            found.insert(index, stat.st_rdev);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
