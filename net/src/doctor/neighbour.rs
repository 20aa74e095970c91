//! Macvtaps that share a wire from other network namespaces: no list of links shows them, but somebody may know.

use super::Facts;
use crate::identity::LinkId;
use crate::mac::MacAddr;
use crate::mode::Mode;
use crate::netlink::Link;

/// A macvtap that the caller of [`diagnose_host`](crate::diagnose_host()) knows of, wherever it lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Its name in its own network namespace.
    pub name: String,
    /// Which link it is, where that is known.
    pub id: Option<LinkId>,
    /// Which link it stands on.
    pub lower: LinkId,
    /// Its address.
    pub mac: MacAddr,
    /// How it treats its siblings, where that is known.
    pub mode: Option<Mode>,
    /// The process that uses it.
    pub pid: u32,
}

/// Those that stand on links of `namespace`, which has `links`, and are not among these: as links with indexes that no
/// real one has, each with its process.
pub(super) fn out_of_sight(
    neighbours: &[Neighbour],
    links: &[Link],
    namespace: u64,
) -> Vec<(Link, u32)> {
    let is_hidden = |neighbour: &&Neighbour| match neighbour.id {
        Some(id) => id.namespace != namespace,
        None => links.iter().all(|link| link.name != neighbour.name),
    };
    let on_ours = neighbours
        .iter()
        .filter(|neighbour| neighbour.lower.namespace == namespace);
    let as_link = |(index, neighbour): (u32, &Neighbour)| {
        let link = Link {
            index,
            name: format!("{} of pid {}", neighbour.name, neighbour.pid),
            kind: "macvtap".to_owned(),
            mac: Some(neighbour.mac.octets()),
            lower: Some(neighbour.lower.index),
            mode: neighbour.mode,
            up: true,
            ethernet: true,
            ..Link::default()
        };
        (link, neighbour.pid)
    };
    // The kernel's indexes are positive ints.
    let indexes = (0..=u32::MAX).rev();
    indexes
        .zip(on_ours.filter(is_hidden))
        .map(as_link)
        .collect()
}

impl Facts {
    /// The process that uses a link, if that is one of another namespace, which no command here could change.
    pub(super) fn user_of(&self, link: &Link) -> Option<u32> {
        let mut neighbours = self.neighbours.iter();
        let (_, pid) = neighbours.find(|(neighbour, _)| neighbour.index == link.index)?;
        Some(*pid)
    }
}
