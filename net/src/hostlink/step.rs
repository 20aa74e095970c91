//! The changes that make up a move, and their journal, which takes them all back when one fails.

use std::io;
use std::path::PathBuf;

use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressMessage;
use rtnetlink::packet_route::neighbour::NeighbourMessage;
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::packet_route::rule::RuleMessage;

use super::moving::{is_leased, is_prefix_route};
use crate::netlink::Netlink;

/// One change to the namespace, and by [`Step::inverse`] the way back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    AddAddress(AddressMessage),
    DeleteAddress(AddressMessage),
    AddRoute(RouteMessage),
    DeleteRoute(RouteMessage),
    AddNeighbour(NeighbourMessage),
    DeleteNeighbour(NeighbourMessage),
    AddRule(RuleMessage),
    DeleteRule(RuleMessage),
    /// A setting in /proc/sys.
    Write {
        path: PathBuf,
        before: String,
        after: String,
    },
}

impl Step {
    fn inverse(self) -> Self {
        match self {
            Self::AddAddress(address) => Self::DeleteAddress(address),
            Self::DeleteAddress(address) => Self::AddAddress(address),
            Self::AddRoute(route) => Self::DeleteRoute(route),
            Self::DeleteRoute(route) => Self::AddRoute(route),
            Self::AddNeighbour(entry) => Self::DeleteNeighbour(entry),
            Self::DeleteNeighbour(entry) => Self::AddNeighbour(entry),
            Self::AddRule(rule) => Self::DeleteRule(rule),
            Self::DeleteRule(rule) => Self::AddRule(rule),
            Self::Write {
                path,
                before,
                after,
            } => Self::Write {
                path,
                before: after,
                after: before,
            },
        }
    }

    /// What it does, for a message that begins "the kernel refused to".
    pub(super) const fn doing(&self) -> &'static str {
        match self {
            Self::AddAddress(_) => "add an address",
            Self::DeleteAddress(_) => "take an address from its link",
            Self::AddRoute(_) => "add a route",
            Self::DeleteRoute(_) => "take a route from its link",
            Self::AddNeighbour(_) => "add a neighbour entry",
            Self::DeleteNeighbour(_) => "take a neighbour entry from its link",
            Self::AddRule(_) => "add a policy rule",
            Self::DeleteRule(_) => "delete a policy rule",
            Self::Write { .. } => "change a setting in /proc/sys/net",
        }
    }

    fn apply(&self, host: &Netlink) -> io::Result<()> {
        match self {
            Self::AddAddress(address) => host.add_address(address),
            Self::DeleteAddress(address) => {
                host.delete_address(address)?;
                delete_prefix_route(host, address)
            }
            // The routes that the kernel itself keeps for an address come and go with it.
            Self::AddRoute(route) => unless(libc::EEXIST, host.add_route(route)),
            Self::DeleteRoute(route) => unless(libc::ESRCH, host.delete_route(route)),
            Self::AddNeighbour(entry) => host.add_neighbour(entry),
            Self::DeleteNeighbour(entry) => unless(libc::ENOENT, host.delete_neighbour(entry)),
            Self::AddRule(rule) => host.add_rule(rule),
            Self::DeleteRule(rule) => unless(libc::ENOENT, host.delete_rule(rule)),
            Self::Write { path, after, .. } => std::fs::write(path, after),
        }
    }
}

/// Deletes the route to the network of an IPv6 address, which the kernel leaves there for addresses that were given for a
/// time only (`ipv6_del_addr` in net/ipv6/addrconf.c). In which table it is, the link's VRF says.
fn delete_prefix_route(host: &Netlink, address: &AddressMessage) -> io::Result<()> {
    if address.header.family != AddressFamily::Inet6 || !is_leased(address) {
        return Ok(());
    }
    let routes = host.routes()?;
    routes
        .iter()
        .filter(|route| is_prefix_route(route, address))
        .try_for_each(|route| unless(libc::ESRCH, host.delete_route(route)))
}

fn unless(harmless: i32, result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| match error.raw_os_error() {
        Some(number) if number == harmless => Ok(()),
        _ => Err(error),
    })
}

/// The steps that were taken. Dropped before [`Journal::commit`], it takes them back, the last one first.
#[derive(Debug)]
pub(super) struct Journal<'a> {
    host: &'a Netlink,
    taken: Vec<Step>,
    /// The number of steps that may still succeed, in tests of what happens when one doesn't.
    #[cfg(test)]
    pub(super) patience: Option<usize>,
}

impl<'a> Journal<'a> {
    pub(super) const fn new(host: &'a Netlink) -> Self {
        Self {
            host,
            taken: Vec::new(),
            #[cfg(test)]
            patience: None,
        }
    }

    pub(super) fn take(&mut self, step: Step) -> io::Result<()> {
        #[cfg(test)]
        if let Some(left) = &mut self.patience {
            *left = left
                .checked_sub(1)
                .ok_or_else(|| io::Error::from_raw_os_error(libc::EIO))?;
        }
        step.apply(self.host)?;
        self.taken.push(step);
        Ok(())
    }

    pub(super) fn commit(mut self) {
        self.taken.clear();
    }
}

impl Drop for Journal<'_> {
    fn drop(&mut self) {
        for step in self.taken.drain(..).rev() {
            let back = step.inverse();
            if let Err(error) = back.apply(self.host) {
                log::error!(
                    "cannot put everything back, the kernel refused to {}: {error}: {back:?}",
                    back.doing()
                );
            }
        }
    }
}
