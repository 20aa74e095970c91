//! Why there is no host link, or why it stays: one sentence each, and the remedy.

use std::io;

use rtnetlink::packet_route::AddressFamily;
use thiserror::Error;

use super::step::Step;
use crate::address::InterfaceAddress;
use crate::diagnose::Problem;
use crate::name::LinkName;
use crate::netlink::Object;

/// A host link that could not be made or deleted. All is as it was before.
#[derive(Debug, Error)]
#[error("cannot {doing} `{link}`")]
#[non_exhaustive]
pub struct HostLinkError {
    pub(super) doing: &'static str,
    /// The lower link; or the host link that was to be deleted.
    pub(super) link: LinkName,
    /// Why.
    pub source: HostLinkProblem,
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
    #[error("it would have no address")]
    NoAddress { name: String },
    #[error("`{name}` has no address to move{}", moved_to(.already))]
    NothingToMove { name: String, already: Vec<String> },
    #[error("there is already an interface `{name}`")]
    NameTaken { name: String },
    #[error("`{by}` has the address {address} already")]
    AddressTaken {
        address: InterfaceAddress,
        by: String,
    },
    #[error(
        "`{by}` with its {other} already leads to the network of {address}, and the host would go on looking for its guests there"
    )]
    SameNetwork {
        address: InterfaceAddress,
        other: InterfaceAddress,
        by: String,
    },
    #[error("a host link that ends with its process cannot take over addresses")]
    MoveIsLasting,
    #[error("so many addresses cannot be remembered with the link")]
    TooManyAddresses,
    #[error("IPv6 is off for `{name}`")]
    Ipv6Disabled { name: String },
    #[error("a route over `{name}` uses a next-hop object, which cannot be moved")]
    NextHopObject { name: String },
    #[error("there is no host link on `{name}`")]
    NoHostLink { name: String },
    #[error("there are several, {}", .names.join(", "))]
    Several { names: Vec<String> },
    #[error("`{name}` was not made as a host link")]
    NotOurs { name: String },
    #[error("`{name}` belongs to the process {pid}, which is running")]
    InUse { name: String, pid: u32 },
    #[error(
        "the link under `{name}`, where its addresses would have to go back to, is in another network namespace"
    )]
    LowerElsewhere { name: String },
    #[error(
        "`{name}` is in {}, but `{lower}` is not, so addresses and routes would change tables on their way back",
        vrf(.has)
    )]
    OtherVrf {
        name: String,
        has: Option<String>,
        lower: String,
    },
}

impl HostLinkProblem {
    /// What to do about it, where there is something to do.
    pub fn remedy(&self) -> Option<String> {
        Some(match self {
            Self::Lower(problem) => return problem.remedy(),
            Self::NoAddress { name } => {
                format!("give it one, or have those of `{name}` moved onto it")
            }
            Self::NothingToMove { .. } => "give the host link one instead".into(),
            Self::NameTaken { .. } => "choose another name, or omit it for a free one".into(),
            Self::AddressTaken { address, by } => format!(
                "have the addresses of the lower link moved, choose another address, or free this one with `ip address delete {address} dev {by}`"
            ),
            Self::SameNetwork { .. } => {
                "have the addresses of the lower link moved instead, or choose an address in another network".into()
            }
            Self::MoveIsLasting => "make a lasting one, or give it an address of its own".into(),
            Self::TooManyAddresses => "give fewer at once".into(),
            Self::Ipv6Disabled { .. } => {
                "turn it on with `sysctl net.ipv6.conf.default.disable_ipv6=0`, or give IPv4 addresses only".into()
            }
            Self::NextHopObject { .. } => {
                "replace it by a plain route (`ip nexthop` lists the objects)".into()
            }
            Self::NoHostLink { .. } => "`ip -d link` lists the links that there are".into(),
            Self::Several { .. } => "name one of them".into(),
            Self::NotOurs { name } => {
                format!("if it is not needed, delete it with `ip link delete {name}`")
            }
            Self::InUse { .. } => "end that, and the link goes with it".into(),
            Self::LowerElsewhere { .. } => "delete it there".into(),
            Self::OtherVrf { has: None, lower, .. } => {
                format!("let it follow first with `ip link set {lower} nomaster`")
            }
            Self::OtherVrf { has: Some(vrf), lower, .. } => {
                format!("let it follow first with `ip link set {lower} master {vrf}`")
            }
        })
    }

    /// The meaning of the kernel's refusal of a step for the link `name`.
    pub(super) fn explain(step: &Step, name: &str, source: io::Error) -> Self {
        let six = matches!(step, Step::Add(Object::Address(address)) if address.header.family == AddressFamily::Inet6);
        match source.raw_os_error() {
            Some(libc::EACCES | libc::EOPNOTSUPP | libc::EAFNOSUPPORT) if six => {
                let name = name.to_owned();
                Self::Ipv6Disabled { name }
            }
            _ => Problem::from_step(step.doing())(source).into(),
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
