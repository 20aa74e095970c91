//! The changes that make up a move, and their journal, which takes them all back when one fails.

use std::io;
use std::path::PathBuf;

use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressMessage;

use super::moving::{is_leased, is_prefix_route};
use crate::netlink::{Netlink, Object};

/// One change to the namespace, and by [`Step::inverse`] the way back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Add(Object),
    Delete(Object),
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
            Self::Add(object) => Self::Delete(object),
            Self::Delete(object) => Self::Add(object),
            Self::Write {
                path,
                before: after,
                after: before,
            } => Self::Write {
                path,
                before,
                after,
            },
        }
    }

    /// What it does, for a message that begins "the kernel refused to".
    pub(super) const fn doing(&self) -> &'static str {
        match self {
            Self::Add(Object::Address(_)) => "add an address",
            Self::Add(Object::Route(_)) => "add a route",
            Self::Add(Object::Neighbour(_)) => "add a neighbour entry",
            Self::Add(Object::Rule(_)) => "add a policy rule",
            Self::Delete(Object::Address(_)) => "delete an address",
            Self::Delete(Object::Route(_)) => "delete a route",
            Self::Delete(Object::Neighbour(_)) => "delete a neighbour entry",
            Self::Delete(Object::Rule(_)) => "delete a policy rule",
            Self::Write { .. } => "change a setting in /proc/sys/net",
        }
    }

    fn apply(&self, host: &Netlink) -> io::Result<()> {
        match self {
            // The routes that the kernel itself keeps for an address come and go with it.
            Self::Add(route @ Object::Route(_)) => unless(libc::EEXIST, host.add(route)),
            Self::Add(object) => host.add(object),
            Self::Delete(object @ Object::Address(address)) => {
                host.remove(object)?;
                delete_prefix_route(host, address)
            }
            Self::Delete(route @ Object::Route(_)) => unless(libc::ESRCH, host.remove(route)),
            Self::Delete(object) => unless(libc::ENOENT, host.remove(object)),
            Self::Write { path, after, .. } => std::fs::write(path, after),
        }
    }
}

/// Deletes the route to the network of an IPv6 address, which the kernel keeps for addresses with a lifetime
/// (`ipv6_del_addr` in net/ipv6/addrconf.c). In which table it is, the link's VRF says.
fn delete_prefix_route(host: &Netlink, address: &AddressMessage) -> io::Result<()> {
    if address.header.family != AddressFamily::Inet6 || !is_leased(address) {
        return Ok(());
    }
    let mut routes = host.routes()?;
    routes.retain(|route| is_prefix_route(route, address));
    let mut routes = routes.into_iter().map(Object::Route);
    routes.try_for_each(|route| unless(libc::ESRCH, host.remove(&route)))
}

fn unless(harmless: i32, result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| match error.raw_os_error() {
        Some(number) if number == harmless => Ok(()),
        _ => Err(error),
    })
}

/// What was done so far. Dropped before [`Journal::commit`], it takes the steps back, the last one first, and then deletes
/// the new link.
#[derive(Debug)]
pub(super) struct Journal<'a> {
    host: &'a Netlink,
    taken: Vec<Step>,
    /// The index of a link that was made for the steps.
    pub(super) new_link: Option<u32>,
    /// The number of steps that may still succeed, in tests of what happens when one doesn't.
    #[cfg(test)]
    pub(super) patience: Option<usize>,
}

impl<'a> Journal<'a> {
    pub(super) const fn new(host: &'a Netlink) -> Self {
        Self {
            host,
            taken: Vec::new(),
            new_link: None,
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
        self.new_link = None;
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
        if let Some(index) = self.new_link
            && let Err(error) = self.host.delete(index)
        {
            log::error!("cannot delete the new link {index} again: {error}");
        }
    }
}
