//! What makes a link unfit to carry a macvtap, and what the kernel's error numbers mean. Pure: it reads a list of links
//! and asks nobody.
//!
//! The kernel says little: EINVAL for a loopback, for a NIC that is no Ethernet, for a driver that allows no link on top
//! and for a passthru conflict, EBUSY for everything that already takes a link's frames, and nothing at all for a lower
//! that is down, where frames then vanish silently (drivers/net/macvlan.c, drivers/net/tap.c). So the lower is judged
//! before (`lower.rs`), and the number that comes all the same is explained with every cause that is left (`request.rs`).

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::mac::MacAddr;
use crate::mode::Mode;
use crate::name::NewLinkName;
use crate::netlink::Link;
use crate::privileges::Obstacle;
use crate::queue::QueueError;
use crate::spec::MacvtapSpec;

mod existing;
pub(crate) mod lower;
mod request;

pub(crate) use existing::{check_existing, check_made, problems_of_existing, warn_of_filter};
pub(crate) use lower::{check_lower, warn_of_carrier};
pub(crate) use request::LinkRequest;

/// Why there is no macvtap: one sentence each, with the remedy where there is one.
#[derive(Debug, Error)]
#[non_exhaustive]
#[allow(
    missing_docs,
    reason = "the message above each variant says what it is and what its fields are"
)]
pub enum Problem {
    #[error("there is no network interface `{name}`{hint}")]
    NoSuchLink { name: String, hint: String },
    #[error(
        "`{name}` is the loopback interface, which has no wire to share: choose an Ethernet interface"
    )]
    Loopback { name: String },
    #[error("`{name}` is not an Ethernet interface, and a macvtap needs one: choose another")]
    NotEthernet { name: String },
    #[error(
        "`{name}` {}, and access points drop frames from any MAC address but the NIC's own: choose a wired interface", wifi(.name, .nic)
    )]
    Wireless { name: String, nic: String },
    #[error(
        "`{name}` is a port of the {kind} `{master}`, which takes all of its frames: use `{master}` instead, or free it with `ip link set {name} nomaster`"
    )]
    Enslaved {
        name: String,
        kind: String,
        master: String,
    },
    #[error(
        "`{name}` is a port of an Open vSwitch, which takes all of its frames: use an internal port of the switch instead, or free it with `ovs-vsctl del-port {name}`"
    )]
    InOpenVswitch { name: String },
    #[error(
        "`{name}` is down, and frames would vanish in it silently: bring it up with `ip link set {name} up`"
    )]
    Down { name: String },
    #[error(
        "`{name}` already carries the {kind} `{by}`, which takes all of its frames: delete that with `ip link delete {by}`, or choose another interface"
    )]
    HasExclusive {
        name: String,
        kind: &'static str,
        by: String,
    },
    #[error(
        "`{name}` is of the kind {kind}, on which the kernel allows no other link: choose {instead}"
    )]
    CarriesNone {
        name: String,
        kind: String,
        instead: &'static str,
    },
    #[error("the frames of `{name}` already go to something else ({}): free it, or choose another interface", takers(.master))]
    InUse {
        name: String,
        /// Kind and name of a link that it is a port of.
        master: Option<String>,
    },
    #[error("the kernel takes no macvtap in {mode} mode on `{name}` (EINVAL), {}: end what is in the way, or choose another interface", reasons(*.mode, .kind))]
    Invalid {
        name: String,
        kind: String,
        mode: Mode,
    },
    #[error("passthru mode needs `{name}` for itself alone, and it already carries {}: delete them, or choose another mode", list(.others))]
    NotAlone { name: String, others: Vec<String> },
    #[error("`{name}` belongs to {} alone, which is in passthru mode: end that, or choose another interface", list(.by))]
    TakenByPassthru { name: String, by: Vec<String> },
    #[error(
        "in passthru mode a macvtap has the MAC address of `{name}`, not {mac}: omit the MAC, or give it to `{name}` first with `ip link set {name} address {mac}`"
    )]
    PassthruMac { name: String, mac: MacAddr },
    #[error("an MTU of {mtu} does not fit `{name}`: choose 68 to {limit}, the interface's own MTU")]
    Mtu { name: String, mtu: u32, limit: u32 },
    #[error(
        "{mac} is the MAC address of `{name}` itself: choose another, or omit it for a random one"
    )]
    MacIsLowers { name: String, mac: MacAddr },
    #[error("the MAC address {mac} is already taken on `{name}` by {}: choose another, or omit it for a random one", list_or(.by, "a link in another network namespace, perhaps another VM's or one that was left behind"))]
    MacTaken {
        name: String,
        mac: MacAddr,
        by: Vec<String>,
    },
    #[error(
        "this kernel has no macvtap driver: load it with `modprobe macvtap`, or use a kernel with CONFIG_MACVTAP"
    )]
    NoDriver,
    #[error(transparent)]
    NotPermitted(#[from] Obstacle),
    #[error(
        "the device of the new macvtap `{name}` may not be opened: run as root, and in a container allow the device class macvtap"
    )]
    DeviceRefused { name: String },
    #[error("`{name}` disappeared meanwhile")]
    Gone { name: String },
    #[error(
        "the macvtap `{name}` has the MAC address {has}, not {mac}: omit the MAC, or change it with `ip link set {name} address {mac}`"
    )]
    ExistingMac {
        name: String,
        has: String,
        mac: MacAddr,
    },
    #[error(
        "the macvtap `{name}` is in {has} mode, not {mode}: omit the mode, or change it with `ip link set {name} type macvtap mode {mode}`"
    )]
    ExistingMode {
        name: String,
        has: String,
        mode: Mode,
    },
    #[error(
        "the macvtap `{name}` has an MTU of {has}, not {mtu}: omit the MTU, or change it with `ip link set {name} mtu {mtu}`"
    )]
    ExistingMtu { name: String, has: u32, mtu: u32 },
    #[error(
        "the macvtap `{name}` has a queue length of 0, so that it can receive nothing: change it with `ip link set {name} txqueuelen 500`"
    )]
    NoReceiveRing { name: String },
    #[error(
        "the macvtap `{name}` has a {key} of {has}, not {wanted}: omit that, or change it with `ip link set {name} {command} {wanted}`"
    )]
    ExistingLength {
        name: String,
        key: &'static str,
        has: u32,
        wanted: u32,
        command: &'static str,
    },
    #[error(
        "`{name}` is a macvtap already, used as it is and not renamed to `{wanted}`: omit the new name"
    )]
    ExistingName { name: String, wanted: NewLinkName },
    #[error("a macvtap has 1 to {max} queues, not {wanted}", max = MacvtapSpec::MAX_QUEUES)]
    Queues { wanted: u32 },
    #[error(
        "a queue of a macvtap holds 1 to {max} frames, not {wanted}: choose another txqueuelen, or omit it for 500",
        max = MacvtapSpec::MAX_TX_QUEUE_LEN
    )]
    TxQueueLen { wanted: u32 },
    #[error(
        "with a bcqueuelen of 0 no broadcast is heard, ARP and DHCP included: choose 1 or more, or omit it for 1000"
    )]
    BcQueueLen,
    #[error(
        "only a macvtap in source mode has a list of senders that it hears: give it that mode, or omit the list"
    )]
    SourceMacs,
    #[error("the macvtap `{name}` hears in source mode {}, not {wanted}: omit the list, or change it with `ip link set {name} type macvtap macaddr set {wanted}`", if .has.is_empty() { "nobody" } else { .has })]
    ExistingSources {
        name: String,
        has: Box<str>,
        wanted: Box<str>,
    },
    #[error(
        "this kernel made the macvtap with {key} {has}, not {wanted} as it was asked to: omit that, or take a newer kernel (5.11 for bcqueuelen)"
    )]
    Ignored {
        key: &'static str,
        has: String,
        wanted: String,
    },
    #[error(
        "`{name}` cannot be the name of a new macvtap: a `%` makes the kernel count, so that nobody could tell its name beforehand"
    )]
    NameReserved { name: String },
    #[error(
        "there is a link `{name}` already: choose another name, or omit it for the first free one"
    )]
    NameTaken { name: String },
    #[error(
        "cannot enter the network namespace `{path}`: name one like /run/netns/NAME or /proc/PID/ns/net",
        path = .path.display()
    )]
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
    /// For a step that only the lack of a privilege or a broken machine can refuse.
    pub(crate) fn from_step(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted(Obstacle::of_this_thread()),
            _ => Self::Kernel { doing, source },
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

fn wifi(name: &str, nic: &str) -> String {
    if name == nic {
        return "is a Wi-Fi interface".to_owned();
    }
    format!("goes over the Wi-Fi interface `{nic}`")
}

/// Why the kernel may say EINVAL to a lower that has been judged fit.
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

/// What may take the frames of a lower that has been judged free.
fn takers(master: &Option<String>) -> String {
    let all = "a bridge, bond, team, Open vSwitch, ipvlan, macsec or HSR device, perhaps in another network namespace";
    match master {
        Some(master) => format!("the {master}, which it is a port of, or else {all}"),
        None => all.to_owned(),
    }
}

fn list_or(names: &[String], otherwise: &str) -> String {
    if names.is_empty() {
        return otherwise.to_owned();
    }
    list(names)
}

fn list(names: &[String]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    quoted.join(", ")
}

#[cfg(test)]
pub(crate) mod tests;
