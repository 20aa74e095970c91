//! The settings of single links in /proc/sys/net (`sysctl net.ipv4.conf.LINK`), which shows the namespace of the thread
//! that reads it.
//!
//! A new link has the defaults, whatever its lower has: a router that moves its addresses would no longer forward.

use std::fs;
use std::io;
use std::path::PathBuf;

use super::step::Step;

/// Where links have settings, below /proc/sys/net.
const FOLDERS: [&str; 5] = [
    "ipv4/conf",
    "ipv4/neigh",
    "ipv6/conf",
    "ipv6/neigh",
    "mpls/conf",
];

/// What stays with its link: the MTU, and what its link-local address is made of. [`Paused::ProxyArp`] moves in its own
/// time.
const OWN: [&str; 4] = ["mtu", "addr_gen_mode", "stable_secret", "proxy_arp"];

/// Copies the settings of link `from` to link `to`, but those called `except`, and returns what failed, in words.
pub(super) fn copy(from: &str, to: &str, except: Option<&str>) -> Vec<String> {
    let mut failed = Vec::new();
    for folder in FOLDERS {
        // A kernel without IPv6 or MPLS has none.
        let Ok(files) = fs::read_dir(path(folder, from, "")) else {
            continue;
        };
        let names = files.flatten().map(|file| file.file_name());
        let mut names: Vec<String> = names.filter_map(|name| name.into_string().ok()).collect();
        // Some exist in a rough unit and a fine one (`retrans_time`, `retrans_time_ms`): the fine one comes last.
        names.sort_unstable();
        for name in names {
            if OWN.contains(&name.as_str()) || except == Some(&name) {
                continue;
            }
            if let Err(error) = copy_one(folder, from, to, &name) {
                let key = folder.replace('/', ".");
                failed.push(format!("net.{key}.{from}.{name} ({error})"));
            }
        }
    }
    failed
}

fn copy_one(folder: &str, from: &str, to: &str, name: &str) -> io::Result<()> {
    // Some cannot be read: they have no value yet.
    let Ok(value) = fs::read(path(folder, from, name)) else {
        return Ok(());
    };
    let path = path(folder, to, name);
    if fs::read(&path)? == value {
        return Ok(());
    }
    fs::write(path, value)
}

fn path(folder: &str, link: &str, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/sys/net/{folder}/{link}/{name}"))
}

/// A setting that has to be off for a link whose addresses are elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Paused {
    /// Router advertisements would give it addresses again.
    AcceptRa,
    /// It would answer for every host on its own wire, since the routes to them lead over another link now.
    ProxyArp,
}

impl Paused {
    pub(crate) const ALL: [Self; 2] = [Self::AcceptRa, Self::ProxyArp];

    /// Its name, as sysctl(8) has it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::AcceptRa => "accept_ra",
            Self::ProxyArp => "proxy_arp",
        }
    }

    pub(super) fn path(self, link: &str) -> PathBuf {
        let folder = match self {
            Self::AcceptRa => "ipv6/conf",
            Self::ProxyArp => "ipv4/conf",
        };
        path(folder, link, self.name())
    }

    /// Its value for `link`, if that is not 0.
    pub(super) fn read(self, link: &str) -> Option<u8> {
        let text = fs::read_to_string(self.path(link)).ok()?;
        text.trim().parse().ok().filter(|value| *value != 0)
    }

    /// Sets it for `link`.
    pub(super) fn set(self, link: &str, before: u8, after: u8) -> Step {
        Step::Write {
            path: self.path(link),
            before: before.to_string(),
            after: after.to_string(),
        }
    }
}
