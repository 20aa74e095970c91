//! Giving back what was made.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::netlink::Netlink;
use crate::{netns, reap};

/// Keeps the macvtap that was made for some queues. Dropping it deletes the macvtap at once.
///
/// When the process ends without that, or has no right to any more:
///
/// - In its private namespace the kernel deletes the macvtap as soon as the last of its queues, and this lease, are
///   closed. An open queue keeps that namespace by itself, so a program that inherits nothing but the queue has a link
///   that works.
/// - In the host's namespace it stays until the next [`Macvtap::open`](crate::Macvtap::open) or
///   [`reap`](crate::reap()) there, by whichever process.
///
/// The lower gets back what passthru mode took, its MAC address and promiscuity, from the kernel itself whenever the
/// macvtap is deleted, in each of these ways (`macvlan_port_destroy` and `macvlan_stop` in drivers/net/macvlan.c).
#[derive(Debug)]
pub struct Lease(Option<Held>);

#[derive(Debug)]
struct Held {
    namespace: OwnedFd,
    index: u32,
    /// Its tag, where others could take it away and put another in its place.
    alias: String,
}

impl Lease {
    /// Of a macvtap that is somebody else's.
    pub(crate) fn of_nothing() -> Self {
        Self(None)
    }

    /// The network namespace of the macvtap, unless it is somebody else's.
    pub(crate) fn namespace(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(|held| held.namespace.as_fd())
    }

    /// Of the link with this index in `namespace`.
    pub(crate) fn new(namespace: OwnedFd, index: u32, alias: String) -> Self {
        Self(Some(Held {
            namespace,
            index,
            alias,
        }))
    }
}

impl Held {
    fn delete(&self) -> io::Result<()> {
        netns::on_own_thread(|| {
            netns::enter(&self.namespace)?;
            reap::delete_if_still(&Netlink::connect()?, self.index, &self.alias)?;
            Ok(())
        })?
    }
}

impl Drop for Lease {
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
