//! What makes a link unfit to carry a macvtap, and what the kernel's error numbers mean. Pure: it reads a list of links.
//!
//! The kernel says little: EINVAL for a loopback, for a NIC that is no Ethernet, for a driver that allows no link on top
//! and for a passthru conflict, EBUSY for everything that already takes a link's frames, and nothing at all for a lower
//! that is down and drops frames silently (drivers/net/macvlan.c, drivers/net/tap.c). So the lower is checked before
//! (`lower.rs`), and a number that comes all the same is explained with every cause that is left (`request.rs`).

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::mac::MacAddr;
use crate::mode::Mode;
use crate::netlink::Link;
use crate::privileges::Obstacle;
use crate::queue::QueueError;

mod existing;
pub(crate) mod lower;
mod request;

pub use existing::Difference;
pub(crate) use existing::{check_existing, check_made, problems_of_existing, warn_of_filter};
pub use lower::Unfit;
pub(crate) use lower::check_lower;
pub(crate) use request::{LinkRequest, check_spec};

/// Why there is no macvtap.
#[derive(Debug, Error)]
#[non_exhaustive]
#[allow(
    missing_docs,
    reason = "the message above each variant says what it is and what its fields are"
)]
pub enum Problem {
    #[error(transparent)]
    Unfit(#[from] Unfit),
    #[error(transparent)]
    NotPermitted(#[from] Obstacle),
    #[error("there is no network interface `{name}`{hint}")]
    NoSuchLink { name: String, hint: String },
    #[error("the frames of `{name}` already go to something else ({})", takers(.master))]
    InUse {
        name: String,
        /// Kind and name of a link that it is a port of.
        master: Option<String>,
    },
    #[error("the kernel takes no macvtap in {mode} mode on `{name}` (EINVAL), {}", reasons(*.mode, .kind))]
    Invalid {
        name: String,
        kind: String,
        mode: Mode,
    },
    #[error("passthru mode needs `{name}` for itself alone, and it already carries {}", list(.others))]
    NotAlone { name: String, others: Vec<String> },
    #[error("in passthru mode a macvtap has the MAC address of `{name}`, not {mac}")]
    PassthruMac { name: String, mac: MacAddr },
    #[error("an MTU of {mtu} does not fit `{name}`")]
    Mtu { name: String, mtu: u32, limit: u32 },
    #[error("{mac} is the MAC address of `{name}` itself")]
    MacIsLowers { name: String, mac: MacAddr },
    #[error("the MAC address {mac} is already taken on `{name}` by {}", holders(.by))]
    MacTaken {
        name: String,
        mac: MacAddr,
        by: Vec<String>,
    },
    #[error("this kernel has no {driver} driver")]
    NoDriver { driver: &'static str },
    #[error("the device of the new macvtap `{name}` may not be opened")]
    DeviceRefused { name: String },
    #[error("`{name}` disappeared meanwhile")]
    Gone { name: String },
    #[error(
        "the macvtap `{name}` has the {} {}, not {}",
        .difference.what, .difference.has, .difference.wanted
    )]
    Existing {
        name: String,
        difference: Box<Difference>,
    },
    #[error("{key} has to be 1 to {max}, not {wanted}")]
    OutOfRange {
        key: &'static str,
        max: u32,
        wanted: u32,
    },
    #[error("with a bcqueuelen of 0 a macvtap receives no broadcast, ARP and DHCP included")]
    BcQueueLen,
    #[error("only a macvtap in source mode has a list of senders that it receives from")]
    SourceMacs,
    #[error(
        "this kernel made the macvtap with {} {}, not {} as it was asked to",
        .0.what, .0.has, .0.wanted
    )]
    Ignored(Box<Difference>),
    #[error(
        "`{name}` cannot be the name of a new macvtap: a `%` makes the kernel count, and its name would not be known before"
    )]
    NameReserved { name: String },
    #[error("there is a link `{name}` already")]
    NameTaken { name: String },
    #[error("cannot enter the network namespace `{}`", .path.display())]
    Namespace {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("the kernel refused to {doing}")]
    Kernel {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
}

impl Problem {
    /// What to do about it, where there is something to do.
    pub fn remedy(&self) -> Option<String> {
        Some(match self {
            Self::Unfit(unfit) => unfit.remedy(),
            Self::NotPermitted(obstacle) => obstacle.remedy().into(),
            Self::Queue(error) => return error.remedy(),
            Self::InUse { .. } => "free it, or choose another interface".into(),
            Self::Invalid { .. } => "end what is in the way, or choose another interface".into(),
            Self::NotAlone { .. } => "delete them, or choose another mode".into(),
            Self::PassthruMac { name, mac } => format!(
                "omit the MAC, or give it to `{name}` first with `ip link set {name} address {mac}`"
            ),
            Self::Mtu { limit, .. } => format!("choose 68 to {limit}, the interface's own MTU"),
            Self::MacIsLowers { .. } | Self::MacTaken { .. } => {
                "choose another, or omit it for a random one".into()
            }
            Self::NoDriver { driver } => format!(
                "load it with `modprobe {driver}`, or use a kernel with CONFIG_{}",
                driver.to_uppercase()
            ),
            Self::DeviceRefused { .. } => {
                "run as root, and in a container allow the device class macvtap".into()
            }
            Self::Existing { name, difference } => format!(
                "omit that, or change it with `ip link set {name} {} {}`",
                difference.set, difference.wanted
            ),
            Self::OutOfRange { .. } => "choose another, or omit it".into(),
            Self::BcQueueLen => "choose 1 or more, or omit it for 1000".into(),
            Self::SourceMacs => "give it that mode, or omit the list".into(),
            Self::Ignored(_) => "omit that, or take a newer kernel (5.11 for bcqueuelen)".into(),
            Self::NameTaken { .. } => {
                "choose another name, or omit it for the first free one".into()
            }
            Self::Namespace { .. } => "name one like /run/netns/NAME or /proc/PID/ns/net".into(),
            Self::NoSuchLink { .. }
            | Self::Gone { .. }
            | Self::NameReserved { .. }
            | Self::Kernel { .. } => return None,
        })
    }

    /// For a step that only the lack of a privilege or a broken machine can refuse.
    pub(crate) fn from_step(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted(Obstacle::of_this_thread()),
            _ => Self::Kernel { doing, source },
        }
    }

    /// For entering the network namespace that a path stands for.
    pub(crate) fn from_namespace(path: &Path) -> impl FnOnce(io::Error) -> Self {
        |source| match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Obstacle::of_this_thread().into(),
            _ => Self::Namespace {
                path: path.to_owned(),
                source,
            },
        }
    }
}

/// The link called `name`, or a hint which was meant.
pub(crate) fn find<'a>(links: &'a [Link], name: &str) -> Result<&'a Link, Problem> {
    links
        .iter()
        .find(|link| link.is_called(name))
        .ok_or_else(|| Problem::NoSuchLink {
            name: name.to_owned(),
            hint: hint(links, name),
        })
}

fn hint(links: &[Link], name: &str) -> String {
    const SHOWN: usize = 20;
    let usable: Vec<&str> = links
        .iter()
        .filter(|link| link.ethernet && !link.loopback)
        .map(|link| link.name.as_str())
        .collect();
    if usable.is_empty() {
        return ", nor any other Ethernet interface in this network namespace".to_owned();
    }
    let nearest = usable
        .iter()
        .map(|other| (distance(name, other), *other))
        .min();
    let near = match nearest {
        Some((1..=2, other)) => format!("; did you mean `{other}`?"),
        _ => String::new(),
    };
    let more = if usable.len() > SHOWN { ", ..." } else { "" };
    let shown = &usable[..usable.len().min(SHOWN)];
    format!(
        "{near} (there {} {}{more})",
        if usable.len() == 1 { "is" } else { "are" },
        shown.join(", ")
    )
}

/// The number of letters to change, add or drop to make `b` of `a` (Levenshtein's distance).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, to) in b.iter().enumerate() {
            let changed = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// The link that a macvtap on `link` would really sit on: the macvlan driver goes through another macvlan to its lower.
pub(crate) fn real_device<'a>(links: &'a [Link], link: &'a Link) -> &'a Link {
    by_index(links, link.lower)
        .filter(|_| link.is_macvlan())
        .unwrap_or(link)
}

pub(crate) fn by_index(links: &[Link], index: Option<u32>) -> Option<&Link> {
    links.iter().find(|link| Some(link.index) == index)
}

/// Why the kernel may say EINVAL to a lower that was found fit.
fn reasons(mode: Mode, kind: &str) -> String {
    let hidden = match mode {
        Mode::Passthru => {
            "since links in another network namespace, such as other VMs', are on it already"
        }
        _ => {
            "since a link in passthru mode in another network namespace, such as another VM's, has it for itself alone"
        }
    };
    let driver = match kind {
        "" => "its driver".to_owned(),
        kind => format!("its driver ({kind})"),
    };
    let old = match mode {
        Mode::Source => ", or this kernel knows no source mode",
        _ => "",
    };
    format!("{hidden}, or {driver} allows no link on top of it{old}")
}

/// What may take the frames of a lower that was found free.
fn takers(master: &Option<String>) -> String {
    let all = "a bridge, bond, team, Open vSwitch, ipvlan, macsec or HSR device, perhaps in another network namespace";
    match master {
        Some(master) => format!("the {master}, which it is a port of, or else {all}"),
        None => all.to_owned(),
    }
}

fn holders(names: &[String]) -> String {
    if names.is_empty() {
        return "a link in another network namespace, perhaps another VM's or a stale one"
            .to_owned();
    }
    list(names)
}

fn list(names: &[String]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    quoted.join(", ")
}

#[cfg(test)]
pub(crate) mod tests;
