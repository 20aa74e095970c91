//! Whether the frames of a link go over the air, and with that whether it is fit to carry a macvtap.

use std::net::UdpSocket;
use std::os::fd::AsFd;

use crate::diagnose::{self, Problem};
use crate::ioctl;
use crate::netlink::Link;
use crate::sysfs::Sysfs;

/// Finds the Wi-Fi interfaces of the calling thread's network namespace.
#[derive(Debug)]
pub(crate) struct Air<'a> {
    sysfs: &'a Sysfs,
    socket: Option<UdpSocket>,
}

impl<'a> Air<'a> {
    /// Asks `sysfs`, which is this namespace's, and by ioctl the drivers that do not show there.
    pub(crate) fn new(sysfs: &'a Sysfs) -> Self {
        let socket = UdpSocket::bind("0.0.0.0:0").ok();
        Self { sysfs, socket }
    }

    /// Whether `link` itself is a Wi-Fi interface.
    pub(crate) fn is_wireless(&self, link: &Link) -> bool {
        let by_ioctl =
            |socket: &UdpSocket| ioctl::has_wireless_extensions(socket.as_fd(), &link.name);
        self.sysfs.is_wireless(&link.name) || self.socket.as_ref().is_some_and(by_ioctl)
    }
}

/// The link that a macvtap on `link` sits on, if that is fit. Warns if it has no wire.
pub(crate) fn fit_lower<'a>(links: &'a [Link], link: &'a Link) -> Result<&'a Link, Problem> {
    let sysfs = Sysfs::of_this_namespace().map_err(Problem::from_step("open sysfs"))?;
    let air = Air::new(&sysfs);
    diagnose::check_lower(
        links,
        link,
        first(links, link, |link| air.is_wireless(link)),
    )?;
    let lower = diagnose::real_device(links, link);
    if !lower.carrier {
        let name = &lower.name;
        log::warn!("{name} has no carrier: no frame will pass until its cable or peer is there");
    }
    Ok(lower)
}

/// The first that `is_wireless`, of `link` and what carries its frames.
pub(crate) fn first<'a>(
    links: &'a [Link],
    link: &'a Link,
    is_wireless: impl Fn(&Link) -> bool,
) -> Option<&'a Link> {
    let below = |link: &&'a Link| {
        // Of a veth, it is the other end.
        let sits_on_it = link.is_macvlan() || link.kind == "vlan";
        diagnose::by_index(links, link.lower).filter(|_| sits_on_it)
    };
    // No more than eight can be stacked (MAX_NEST_DEV in include/linux/netdevice.h).
    std::iter::successors(Some(link), below)
        .take(8)
        .find(|link| is_wireless(link))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, kind: &str, lower: Option<u32>) -> Link {
        Link {
            index,
            name: name.to_owned(),
            kind: kind.to_owned(),
            lower,
            ..Link::default()
        }
    }

    #[test]
    fn wifi_is_found_under_vlans_and_macvlans_and_not_beside_them() {
        let links = [
            link(2, "wlan0", "", None),
            link(3, "wlan0.5", "vlan", Some(2)),
            link(4, "mv0", "macvlan", Some(3)),
            link(5, "eno1", "", None),
            link(6, "eno1.5", "vlan", Some(5)),
            // Two ends of a wire, which lead to each other.
            link(7, "v0", "veth", Some(8)),
            link(8, "wlan1", "veth", Some(7)),
        ];
        let found = links.each_ref().map(|link| {
            let found = first(&links, link, |link| {
                ["wlan0", "wlan1"].contains(&link.name.as_str())
            });
            found.map(|link| link.name.as_str())
        });
        let wlan0 = Some("wlan0");
        assert_eq!(
            found,
            [wlan0, wlan0, wlan0, None, None, None, Some("wlan1")]
        );
    }
}
