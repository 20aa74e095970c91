//! Which link is meant, whatever it is called and wherever one looks from: names repeat across network namespaces, and
//! indexes do too.

use std::collections::HashMap;
use std::io;

use crate::name::LinkName;
use crate::netlink::{Link, Netlink, is_gone};
use crate::netns;

/// A link of some network namespace, for as long as both exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct LinkId {
    /// The namespace's inode, as `stat -L -c %i /proc/PID/ns/net` shows it.
    pub namespace: u64,
    /// The link's interface index there.
    pub index: u32,
}

impl LinkId {
    /// The link's name now, if it is in the caller's network namespace and exists.
    ///
    /// # Errors
    ///
    /// When /proc does not show the namespace, or the kernel refuses to list the links.
    pub fn name_here(self) -> io::Result<Option<String>> {
        netns::on_own_thread(|| {
            if netns::inode_of_current()? != self.namespace {
                return Ok(None);
            }
            match Netlink::connect()?.link(self.index) {
                Ok(link) => Ok(Some(link.name)),
                Err(error) if is_gone(&error) => Ok(None),
                Err(error) => Err(error),
            }
        })?
    }
}

/// The name that the link called `link` has for itself, in the caller's network namespace: `link` may be one of its
/// alternative names. None when there is no such link.
///
/// # Errors
///
/// When the kernel refuses to list the links.
pub fn current_name(link: &LinkName) -> io::Result<Option<String>> {
    netns::on_own_thread(|| {
        let links = Netlink::connect()?.links()?;
        let found = links
            .into_iter()
            .find(|found| found.is_called(link.as_str()));
        Ok(found.map(|found| found.name))
    })?
}

/// The links of the caller's network namespace, each with its name and MTU now.
///
/// # Errors
///
/// When /proc does not show the namespace, or the kernel refuses to list the links.
pub fn links_here() -> io::Result<HashMap<LinkId, (String, u32)>> {
    netns::on_own_thread(|| {
        let namespace = netns::inode_of_current()?;
        let of = |link: Link| {
            let index = link.index;
            (LinkId { namespace, index }, (link.name, link.mtu))
        };
        Ok(Netlink::connect()?.links()?.into_iter().map(of).collect())
    })?
}

/// The inode of the caller's network namespace, which [`LinkId::namespace`] is to be compared with.
///
/// # Errors
///
/// When /proc does not show it.
pub fn this_namespace() -> io::Result<u64> {
    netns::inode_of_current()
}
