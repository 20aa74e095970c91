//! Why there is no host link, or why it stays: one sentence each, with the remedy.

use std::io;

use rtnetlink::packet_route::AddressFamily;
use thiserror::Error;

use super::step::Step;
use crate::address::InterfaceAddress;
use crate::diagnose::Problem;
use crate::name::LinkName;
use crate::netlink::Object;
use crate::privileges::Obstacle;

/// A host link that could not be made or deleted. All is as it was before.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HostLinkError {
    /// None could be made.
    #[error("cannot make a host link on `{link}`")]
    Make {
        /// The lower link.
        link: LinkName,
        /// Why.
        #[source]
        source: HostLinkProblem,
    },
    /// It could not be deleted.
    #[error("cannot delete the host link `{link}`")]
    Delete {
        /// The host link, or the lower link that it was sought on.
        link: LinkName,
        /// Why.
        #[source]
        source: HostLinkProblem,
    },
}

/// What stands in the way of a host link.
#[derive(Debug, Error)]
#[non_exhaustive]
#[allow(
    missing_docs,
    reason = "the message above each variant says what it is and what its fields are"
)]
pub enum HostLinkProblem {
    #[error(transparent)]
    Lower(#[from] Problem),
    #[error("it would have no address: give it one, or have those of `{name}` moved onto it")]
    NoAddress { name: String },
    #[error(
        "`{name}` has no address to move{}: give the host link one instead",
        moved_to(.already)
    )]
    NothingToMove { name: String, already: Vec<String> },
    #[error(
        "there is already an interface `{name}`: choose another name, or omit it for a free one"
    )]
    NameTaken { name: String },
    #[error(
        "`{by}` has the address {address} already: have the addresses of the lower link moved, choose another address, or free this one with `ip address delete {address} dev {by}`"
    )]
    AddressTaken {
        address: InterfaceAddress,
        by: String,
    },
    #[error(
        "`{by}` with its {other} already leads to the network of {address}, and the host would go on looking for its guests there: have the addresses of the lower link moved instead, or choose an address in another network"
    )]
    SameNetwork {
        address: InterfaceAddress,
        other: InterfaceAddress,
        by: String,
    },
    #[error(
        "a host link that ends with its process cannot take over addresses: make a lasting one, or give it an address of its own"
    )]
    MoveIsLasting,
    #[error("so many addresses cannot be remembered with the link: give fewer at once")]
    TooManyAddresses,
    #[error(
        "IPv6 is off for `{name}`: turn it on with `sysctl net.ipv6.conf.default.disable_ipv6=0`, or give IPv4 addresses only"
    )]
    Ipv6Disabled { name: String },
    #[error(
        "a route over `{name}` uses a next-hop object, which cannot be moved: replace it by a plain route (`ip nexthop` lists the objects)"
    )]
    NextHopObject { name: String },
    #[error("there is no host link on `{name}`: `ip -d link` lists the links that there are")]
    NoHostLink { name: String },
    #[error("there are several, {}: name one of them", .names.join(", "))]
    Several { names: Vec<String> },
    #[error(
        "`{name}` was not made as a host link: if it is not needed, delete it with `ip link delete {name}`"
    )]
    NotOurs { name: String },
    #[error(
        "`{name}` belongs to the process {pid}, which is running: end that, and the link goes with it"
    )]
    InUse { name: String, pid: u32 },
    #[error(
        "the link under `{name}`, where its addresses would have to go back to, is in another network namespace: delete it there"
    )]
    LowerElsewhere { name: String },
    #[error(
        "`{name}` is in {}, but `{lower}` is not: addresses and routes would change tables on their way back. Let it follow first: `ip link set {lower} {}`",
        vrf(.has), .has.as_ref().map_or("nomaster".to_owned(), |has| format!("master {has}"))
    )]
    OtherVrf {
        name: String,
        has: Option<String>,
        lower: String,
    },
    #[error("the kernel refused to {doing}")]
    Refused {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
}

impl HostLinkProblem {
    pub(super) fn from_step(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.raw_os_error() {
            Some(libc::EPERM) => Self::Lower(Obstacle::of_this_thread().into()),
            _ => Self::Refused { doing, source },
        }
    }

    /// The meaning of the kernel's refusal of a step for the link `name`.
    pub(super) fn explain(step: &Step, name: &str, source: io::Error) -> Self {
        let six = matches!(step, Step::Add(Object::Address(address)) if address.header.family == AddressFamily::Inet6);
        match source.raw_os_error() {
            Some(libc::EACCES | libc::EOPNOTSUPP | libc::EAFNOSUPPORT) if six => {
                let name = name.to_owned();
                Self::Ipv6Disabled { name }
            }
            _ => Self::from_step(step.doing())(source),
        }
    }
}

fn vrf(name: &Option<String>) -> String {
    name.as_ref()
        .map_or("no VRF".to_owned(), |name| format!("the VRF `{name}`"))
}

fn moved_to(already: &[String]) -> String {
    if already.is_empty() {
        return String::new();
    }
    format!(" (they are on {} already)", already.join(", "))
}
