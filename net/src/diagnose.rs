//! What makes a link unfit to carry a macvtap, and what the kernel's error numbers mean. Pure: it reads a list of links
//! and asks nobody.
//!
//! The kernel says little: EINVAL for a loopback, for a card that is no Ethernet and for a passthru conflict, EBUSY for
//! everything that already takes a link's frames, and nothing at all for a lower that is down, where frames then vanish
//! silently (drivers/net/macvlan.c, drivers/net/tap.c). So the lower is checked before, and the number explained after.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::mac::MacAddr;
use crate::mode::Mode;
use crate::name::LinkName;
use crate::netlink::Link;
use crate::queue::QueueError;
use crate::spec::MacvtapSpec;

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
        "`{name}` {}, and access points drop frames from any MAC address but the card's own: choose a wired interface", wifi(.name, .card)
    )]
    Wireless { name: String, card: String },
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
        "`{name}` already carries the ipvlan `{by}`, and a link carries either ipvlan or macvtap: delete that with `ip link delete {by}`, or choose another interface"
    )]
    HasIpvlan { name: String, by: String },
    #[error(
        "the frames of `{name}` already go to something else (a bridge, bond, team, Open vSwitch or ipvlan, perhaps in another network namespace): free it, or choose another interface"
    )]
    InUse { name: String },
    #[error("passthru mode needs `{name}` for itself alone, and it already carries {}: delete them, or choose another mode", list_or(.others, "links in another network namespace, such as other VMs'"))]
    NotAlone { name: String, others: Vec<String> },
    #[error("`{name}` belongs to {} alone, which is in passthru mode: end that, or choose another interface", list_or(.by, "a link in another network namespace, such as another VM's,"))]
    TakenByPassthru { name: String, by: Vec<String> },
    #[error(
        "in passthru mode a macvtap has the MAC address of `{name}`, not {mac}: leave the MAC away, or give it to `{name}` first with `ip link set {name} address {mac}`"
    )]
    PassthruMac { name: String, mac: MacAddr },
    #[error("an MTU of {mtu} does not fit `{name}`: choose 68 to {limit}, the interface's own MTU")]
    Mtu { name: String, mtu: u32, limit: u32 },
    #[error(
        "{mac} is the MAC address of `{name}` itself: choose another, or leave it away for a random one"
    )]
    MacIsLowers { name: String, mac: MacAddr },
    #[error("the MAC address {mac} is already taken on `{name}` by {}: choose another, or leave it away for a random one", list_or(.by, "a link in another network namespace, perhaps another VM's or one that was left behind"))]
    MacTaken {
        name: String,
        mac: MacAddr,
        by: Vec<String>,
    },
    #[error(
        "this kernel has no macvtap driver: load it with `modprobe macvtap`, or use a kernel with CONFIG_MACVTAP"
    )]
    NoDriver,
    #[error(
        "this process lacks CAP_NET_ADMIN or CAP_SYS_ADMIN: run it as root, for example with `sudo`, and in a container allow both"
    )]
    NotPermitted,
    #[error("`{name}` disappeared meanwhile")]
    Gone { name: String },
    #[error(
        "the macvtap `{name}` has the MAC address {has}, not {mac}: leave the MAC away, or change it with `ip link set {name} address {mac}`"
    )]
    ExistingMac {
        name: String,
        has: String,
        mac: MacAddr,
    },
    #[error(
        "the macvtap `{name}` is in {has} mode, not {mode}: leave the mode away, or change it with `ip link set {name} type macvtap mode {mode}`"
    )]
    ExistingMode {
        name: String,
        has: String,
        mode: Mode,
    },
    #[error(
        "the macvtap `{name}` has an MTU of {has}, not {mtu}: leave the MTU away, or change it with `ip link set {name} mtu {mtu}`"
    )]
    ExistingMtu { name: String, has: u32, mtu: u32 },
    #[error(
        "the macvtap `{name}` has a queue length of 0, so that it can receive nothing: change it with `ip link set {name} txqueuelen 500`"
    )]
    NoReceiveRing { name: String },
    #[error(
        "the macvtap `{name}` has a {key} of {has}, not {wanted}: leave that away, or change it with `ip link set {name} {command} {wanted}`"
    )]
    ExistingLength {
        name: String,
        key: &'static str,
        has: u32,
        wanted: u32,
        command: &'static str,
    },
    #[error(
        "`{name}` is a macvtap already, used as it is and not renamed to `{wanted}`: leave the new name away"
    )]
    ExistingName { name: String, wanted: LinkName },
    #[error("a macvtap has 1 to {max} queues, not {wanted}", max = MacvtapSpec::MAX_QUEUES)]
    Queues { wanted: u32 },
    #[error(
        "a queue of a macvtap holds 1 to {max} frames, not {wanted}: choose another txqueuelen, or leave it away for 500",
        max = MacvtapSpec::MAX_TX_QUEUE_LEN
    )]
    TxQueueLen { wanted: u32 },
    #[error(
        "with a bcqueuelen of 0 no broadcast is heard, ARP and DHCP included: choose 1 or more, or leave it away for 1000"
    )]
    BcQueueLen,
    #[error(
        "`{name}` cannot be the name of a new link: `all`, `default` and a `%` have a meaning of their own to the kernel"
    )]
    NameReserved { name: String },
    #[error(
        "there is a link `{name}` already: choose another name, or leave it away for the first free one"
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
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted,
            _ => Self::Kernel { doing, source },
        }
    }
}

/// The link called `name`, or a hint which was meant.
pub(crate) fn find<'a>(links: &'a [Link], name: &str) -> Result<&'a Link, Problem> {
    links
        .iter()
        .find(|link| link.name == name)
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

/// Whether `lower` can carry a macvtap at all, as far as its own state tells.
///
/// `wireless` is the Wi-Fi interface that carries its frames, if there is one.
pub(crate) fn check_lower(
    links: &[Link],
    lower: &Link,
    wireless: Option<&Link>,
) -> Result<(), Problem> {
    let name = lower.name.clone();
    if lower.loopback {
        return Err(Problem::Loopback { name });
    }
    if !lower.ethernet {
        return Err(Problem::NotEthernet { name });
    }
    if let Some(card) = wireless {
        let card = card.name.clone();
        return Err(Problem::Wireless { name, card });
    }
    if let Some(master) = by_index(links, lower.master) {
        check_master(name, master)?;
    }
    // Through a macvlan, frames take the wire of the link under it.
    let real = by_index(links, lower.lower).filter(|_| lower.is_macvlan());
    for link in std::iter::once(lower).chain(real) {
        if !link.up {
            return Err(Problem::Down {
                name: link.name.clone(),
            });
        }
    }
    if !lower.carrier {
        log::warn!(
            "{} has no carrier: no frame will pass until its cable or peer is there",
            lower.name
        );
    }
    Ok(())
}

fn check_master(name: String, master: &Link) -> Result<(), Problem> {
    match master.kind.as_str() {
        // A VRF only routes; frames still pass by the macvlan driver first.
        "vrf" => Ok(()),
        "openvswitch" => Err(Problem::InOpenVswitch { name }),
        kind => Err(Problem::Enslaved {
            name,
            kind: kind.to_owned(),
            master: master.name.clone(),
        }),
    }
}

/// What is asked for, as far as explanations need it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish<'a> {
    /// All links of the lower's namespace.
    pub links: &'a [Link],
    /// The link that carries the macvtap; never a macvlan itself.
    pub lower: &'a Link,
    pub mode: Mode,
    pub mac: Option<MacAddr>,
    pub mtu: Option<u32>,
}

impl Wish<'_> {
    /// Refuses what the kernel would ignore, or answer with a number that says too little.
    pub(crate) fn check(&self) -> Result<(), Problem> {
        let name = self.lower.name.clone();
        let limit = self.lower.mtu;
        if let Some(mtu) = self.mtu.filter(|mtu| !(68..=limit).contains(mtu)) {
            return Err(Problem::Mtu { name, mtu, limit });
        }
        let Some(mac) = self.mac else { return Ok(()) };
        match (
            self.mode == Mode::Passthru,
            self.lower.mac == Some(mac.octets()),
        ) {
            (true, false) => Err(Problem::PassthruMac { name, mac }),
            (false, true) => Err(Problem::MacIsLowers { name, mac }),
            _ => Ok(()),
        }
    }

    /// The meaning of the kernel's refusal to make it.
    pub(crate) fn explain_create(&self, source: io::Error) -> Problem {
        let name = self.lower.name.clone();
        match source.raw_os_error() {
            Some(libc::EBUSY) => match self
                .users(|user| user.kind.starts_with("ipv"))
                .into_iter()
                .next()
            {
                Some(by) => Problem::HasIpvlan { name, by },
                None => Problem::InUse { name },
            },
            Some(libc::EINVAL) if self.mode == Mode::Passthru => Problem::NotAlone {
                name,
                others: self.users(Link::is_macvlan),
            },
            Some(libc::EINVAL) => Problem::TakenByPassthru {
                name,
                by: self.users(|user| user.mode == Some(Mode::Passthru)),
            },
            Some(libc::EOPNOTSUPP) => Problem::NoDriver,
            Some(libc::ENODEV) => Problem::Gone { name },
            _ => Problem::from_step("make the macvtap")(source),
        }
    }

    /// The meaning of the kernel's refusal to bring it up. A taken address shows only here.
    pub(crate) fn explain_up(&self, made: &Link, source: io::Error) -> Problem {
        let name = self.lower.name.clone();
        let mac = made.mac.and_then(|bytes| MacAddr::try_from(bytes).ok());
        match (source.raw_os_error(), mac) {
            (Some(libc::EADDRINUSE | libc::EBUSY), Some(mac)) => {
                let by = self.users(|user| user.is_macvlan() && user.mac == made.mac);
                Problem::MacTaken { name, mac, by }
            }
            (Some(libc::ENODEV), _) => Problem::Gone { name },
            _ => Problem::from_step("bring the macvtap up")(source),
        }
    }

    /// The names of the links on the lower that we can see and `pick` chooses.
    fn users(&self, pick: impl Fn(&Link) -> bool) -> Vec<String> {
        let on_lower = |link: &&Link| link.lower == Some(self.lower.index);
        self.links
            .iter()
            .filter(on_lower)
            .filter(|link| pick(link))
            .map(|link| link.name.clone())
            .collect()
    }
}

/// Whether an existing macvtap can be used as it is, and is what was asked for.
pub(crate) fn check_existing(
    links: &[Link],
    macvtap: &Link,
    expected: &MacvtapSpec,
) -> Result<(), Problem> {
    let name = macvtap.name.clone();
    if let Some(mac) = expected.mac.filter(|mac| macvtap.mac != Some(mac.octets())) {
        let has = macvtap.mac.and_then(|bytes| MacAddr::try_from(bytes).ok());
        return Err(Problem::ExistingMac {
            name,
            has: has.map_or("none".to_owned(), |mac| mac.to_string()),
            mac,
        });
    }
    if let Some(mode) = expected.mode.filter(|mode| macvtap.mode != Some(*mode)) {
        let has = macvtap.mode.map_or("an unknown", Mode::as_str).to_owned();
        return Err(Problem::ExistingMode { name, has, mode });
    }
    if let Some(mtu) = expected.mtu.filter(|mtu| macvtap.mtu != *mtu) {
        return Err(Problem::ExistingMtu {
            name,
            has: macvtap.mtu,
            mtu,
        });
    }
    if let Some(wanted) = expected
        .name
        .clone()
        .filter(|wanted| wanted.as_str() != name)
    {
        return Err(Problem::ExistingName { name, wanted });
    }
    let (tx, bc) = (macvtap.tx_queue_len, macvtap.bc_queue_len);
    for (key, command, has, wanted) in [
        ("txqueuelen", "txqueuelen", tx, expected.tx_queue_len),
        (
            "bcqueuelen",
            "type macvtap bcqueuelen",
            bc,
            expected.bc_queue_len,
        ),
    ] {
        if let Some(wanted) = wanted.filter(|wanted| *wanted != has) {
            return Err(Problem::ExistingLength {
                name,
                key,
                has,
                wanted,
                command,
            });
        }
    }
    if macvtap.tx_queue_len == 0 {
        return Err(Problem::NoReceiveRing { name });
    }
    for link in std::iter::once(macvtap).chain(by_index(links, macvtap.lower)) {
        if !link.up {
            return Err(Problem::Down {
                name: link.name.clone(),
            });
        }
    }
    Ok(())
}

/// Warns of a macvtap, made by somebody else, that passes on only the multicast which the host itself has joined: IPv6
/// neighbours would look for its user in vain.
pub(crate) fn warn_of_filter(macvtap: &Link) {
    if macvtap.is_macvtap() && !macvtap.all_multicast {
        let name = &macvtap.name;
        log::warn!(
            "{name} filters multicast, so a fixed IPv6 address behind it may not be found: `ip link set {name} allmulticast on`"
        );
    }
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

fn wifi(name: &str, card: &str) -> String {
    if name == card {
        return "is a Wi-Fi interface".to_owned();
    }
    format!("goes over the Wi-Fi interface `{card}`")
}

fn list_or(names: &[String], otherwise: &str) -> String {
    if names.is_empty() {
        return otherwise.to_owned();
    }
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    quoted.join(", ")
}

#[cfg(test)]
mod tests;
