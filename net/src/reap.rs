//! Taking away the links that dead processes left behind.

use std::io;

use crate::Error;
use crate::diagnose::Problem;
use crate::netlink::{Link, Netlink};
use crate::netns;
use crate::owner::Owner;

/// A link that was left behind and is deleted now.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reaped {
    /// Its name.
    pub name: String,
    /// Its driver: `macvtap` or `macvlan`.
    pub kind: String,
    /// Whose it was.
    pub owner: Owner,
}

/// Deletes the macvtaps and macvlans of the caller's network namespace whose [`Owner`] is dead, and says which. A link
/// without the tag of an owner is never touched, nor one whose owner lives or may live.
///
/// Two that do this at once share the work, and each tells only its part.
///
/// # Errors
///
/// [`Error::Reap`], when links cannot be listed, or one cannot be deleted, for want of CAP_NET_ADMIN above all.
pub fn reap() -> Result<Vec<Reaped>, Error> {
    let all = || {
        let netlink = Netlink::connect().map_err(Problem::from_step("connect to rtnetlink"))?;
        reap_by(&netlink).map_err(Problem::from_step("delete the links of dead processes"))
    };
    netns::on_own_thread(all)
        .map_err(Problem::from_step("start a thread"))
        .and_then(|reaped| reaped)
        .map_err(Error::Reap)
}

/// [`reap`] by a connection to the namespace in question.
pub(crate) fn reap_by(netlink: &Netlink) -> io::Result<Vec<Reaped>> {
    let mut reaped = Vec::new();
    for link in netlink.links()? {
        let Some(owner) = dead_owner(&link) else {
            continue;
        };
        // Another reaper may have been faster.
        if delete_if_still(netlink, link.index, &link.alias)? {
            reaped.push(Reaped {
                name: link.name,
                kind: link.kind,
                owner,
            });
        }
    }
    Ok(reaped)
}

fn dead_owner(link: &Link) -> Option<Owner> {
    let owner: Owner = link.alias.parse().ok()?;
    (link.is_macvlan() && owner.is_dead()).then_some(owner)
}

/// Deletes the link with this index if it still has this alias, and says whether it did. The look comes first since an
/// index could be another link's by now.
pub(crate) fn delete_if_still(netlink: &Netlink, index: u32, alias: &str) -> io::Result<bool> {
    let gone = |error: &io::Error| error.raw_os_error() == Some(libc::ENODEV);
    match netlink.link(index) {
        Ok(link) if link.alias == alias => match netlink.delete(index) {
            Ok(()) => Ok(true),
            Err(error) if gone(&error) => Ok(false),
            Err(error) => Err(error),
        },
        Ok(_) => Ok(false),
        Err(error) if gone(&error) => Ok(false),
        Err(error) => Err(error),
    }
}
