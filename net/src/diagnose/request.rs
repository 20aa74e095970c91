//! What is asked of a macvtap and its lower, and what the kernel's refusals mean. Pure.

use std::io;

use super::{Problem, by_index, lower};
use crate::mac::MacAddr;
use crate::mode::Mode;
use crate::netlink::Link;
use crate::spec::MacvtapSpec;

/// Refuses what makes no sense on any link.
pub(crate) fn check_spec(spec: &MacvtapSpec) -> Result<(), Problem> {
    for (key, max, wanted) in [
        ("queues", MacvtapSpec::MAX_QUEUES, Some(spec.queues)),
        (
            "txqueuelen",
            MacvtapSpec::MAX_TX_QUEUE_LEN,
            spec.tx_queue_len,
        ),
    ] {
        if let Some(wanted) = wanted.filter(|wanted| !(1..=max).contains(wanted)) {
            return Err(Problem::OutOfRange { key, max, wanted });
        }
    }
    if spec.bc_queue_len == Some(0) {
        return Err(Problem::BcQueueLen);
    }
    if !spec.source_macs.is_empty() && spec.mode != Some(Mode::Source) {
        return Err(Problem::SourceMacs);
    }
    match &spec.name {
        Some(name) if name.counts() => Err(Problem::NameReserved {
            name: name.to_string(),
        }),
        _ => Ok(()),
    }
}

/// What is asked for, as far as explanations need it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkRequest<'a> {
    /// All links of the lower's namespace.
    pub links: &'a [Link],
    /// The link that carries the macvtap; never a macvlan itself.
    pub lower: &'a Link,
    pub mode: Mode,
    pub mac: Option<MacAddr>,
    pub mtu: Option<u32>,
}

impl LinkRequest<'_> {
    /// Refuses what the kernel would ignore, or refuse with a number that says too little.
    pub(crate) fn check(&self) -> Result<(), Problem> {
        let name = self.lower.name.clone();
        let others = self.users(Link::is_macvlan);
        if self.mode == Mode::Passthru && !others.is_empty() {
            return Err(Problem::NotAlone { name, others });
        }
        let limit = self.lower.mtu;
        if let Some(mtu) = self.mtu.filter(|mtu| !(68..=limit).contains(mtu)) {
            return Err(Problem::Mtu { name, mtu, limit });
        }
        let Some(mac) = self.mac else { return Ok(()) };
        let is_own = self.lower.mac == Some(mac.octets());
        match (self.mode == Mode::Passthru, is_own) {
            (true, false) => Err(Problem::PassthruMac { name, mac }),
            (false, true) => Err(Problem::MacIsLowers { name, mac }),
            _ => Ok(()),
        }
    }

    /// The meaning of the kernel's refusal to make it on a lower that was found fit: every cause that is left.
    pub(crate) fn explain_create(&self, source: io::Error) -> Problem {
        let name = self.lower.name.clone();
        match source.raw_os_error() {
            Some(libc::EBUSY) => {
                let master = by_index(self.links, self.lower.master)
                    .filter(|master| !lower::MASTERS_THAT_SHARE.contains(&master.kind.as_str()));
                Problem::InUse {
                    name,
                    master: master.map(|master| format!("{} `{}`", master.kind, master.name)),
                }
            }
            Some(libc::EINVAL) => Problem::Invalid {
                name,
                kind: self.lower.kind.clone(),
                mode: self.mode,
            },
            Some(libc::EOPNOTSUPP) => Problem::NoDriver { driver: "macvtap" },
            Some(libc::ENODEV) => Problem::Gone { name },
            _ => Problem::from_step("make the macvtap")(source),
        }
    }

    /// The meaning of the kernel's refusal to bring it up. A taken address shows only here.
    pub(crate) fn explain_up(&self, made: &Link, source: io::Error) -> Problem {
        let name = self.lower.name.clone();
        match (source.raw_os_error(), made.mac_addr()) {
            (Some(libc::EADDRINUSE | libc::EBUSY), Some(mac)) => {
                if made.mac == self.lower.mac {
                    return Problem::MacIsLowers { name, mac };
                }
                let by = self.users(|user| user.is_macvlan() && user.mac == made.mac);
                Problem::MacTaken { name, mac, by }
            }
            (Some(libc::ENODEV), _) => Problem::Gone { name },
            _ => Problem::from_step("bring the macvtap up")(source),
        }
    }

    /// The names of the known links on the lower that `pick` chooses.
    fn users(&self, pick: impl Fn(&Link) -> bool) -> Vec<String> {
        let picked = lower::uppers(self.links, self.lower).filter(|link| pick(link));
        picked.map(|link| link.name.clone()).collect()
    }
}

#[cfg(test)]
mod tests;
