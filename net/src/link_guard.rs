//! Deleting what was made.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::identity::LinkId;
use crate::netlink::{Netlink, is_gone};
use crate::netns;
use crate::record::{self, RecordLock};

/// Keeps the macvtap that was made for some queues. Dropping it deletes the macvtap at once.
///
/// When the process ends without that, or has no right to any more:
///
/// - In its private namespace the kernel deletes the macvtap as soon as the last of its queues, and this guard, are
///   closed. An open queue keeps that namespace by itself, so a program that inherits nothing but the queue has a link
///   that works.
/// - In the host's namespace it stays until the next [`Macvtap::open`](crate::Macvtap::open) or
///   [`delete_stale`](crate::delete_stale()) there, by whichever process, once no queue of it is open.
///
/// The lower gets back what passthru mode took, its MAC address and promiscuity, from the kernel itself whenever the
/// macvtap is deleted, in each of these ways (`macvlan_port_destroy` and `macvlan_stop` in drivers/net/macvlan.c).
#[derive(Debug)]
pub struct LinkGuard(Option<Held>);

#[derive(Debug)]
struct Held {
    namespace: OwnedFd,
    index: u32,
    /// Its tag, where others can see it.
    alias: String,
    /// Says there that it is in use.
    _record: Option<RecordLock>,
}

impl LinkGuard {
    /// Of a macvtap that another program made.
    pub(crate) fn of_nothing() -> Self {
        Self(None)
    }

    /// Whether it keeps one, which then was made by this process.
    pub(crate) fn is_of_new(&self) -> bool {
        self.0.is_some()
    }

    /// The network namespace of the macvtap, unless another program made it.
    pub(crate) fn namespace(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(|held| held.namespace.as_fd())
    }

    /// Of the link with this index in `namespace`, which no other process sees.
    pub(crate) fn private(namespace: OwnedFd, index: u32) -> Self {
        Self(Some(Held {
            namespace,
            index,
            alias: String::new(),
            _record: None,
        }))
    }

    /// Of the link with this index and alias in `namespace`.
    pub(crate) fn visible(namespace: OwnedFd, index: u32, alias: String) -> Self {
        let id = netns::inode(&namespace).map(|namespace| LinkId { namespace, index });
        let record = id.ok().and_then(|id| record::lock_link(id, &alias));
        Self(Some(Held {
            namespace,
            index,
            alias,
            _record: record,
        }))
    }
}

impl Held {
    fn delete(&self) -> io::Result<()> {
        netns::on_own_thread(|| {
            netns::enter(&self.namespace)?;
            let netlink = Netlink::connect()?;
            let link = match netlink.link(self.index) {
                Err(error) if is_gone(&error) => return Ok(()),
                link => link?,
            };
            if !link.is_macvlan() {
                return Ok(());
            }
            if link.alias != self.alias {
                log::warn!(
                    "{} is deleted although its alias has changed from {:?} to {:?}: something here changes new \
                     interfaces, such as a .link file of udev (Alias=)",
                    link.name,
                    self.alias,
                    link.alias
                );
            }
            netlink.delete(self.index).map(|_| ())
        })?
    }
}

impl Drop for LinkGuard {
    fn drop(&mut self) {
        let Some(held) = self.0.take() else { return };
        match held.delete() {
            Err(error) if held.alias.is_empty() => {
                log::debug!("leaving the macvtap to the kernel to delete: {error}");
            }
            Err(error) => {
                log::warn!("cannot delete the link, the next start as root will: {error}");
            }
            Ok(()) => {}
        }
    }
}
