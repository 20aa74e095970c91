//! Making a macvlan or macvtap: the one place for both.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoMacVtap, LinkAttribute, LinkInfo, LinkMessage, MacVtapMacAddressMode,
};

use super::{Netlink, link};
use crate::mac::MacAddr;
use crate::mode::Mode;

/// A macvlan or macvtap to be made.
#[derive(Debug)]
pub(crate) struct NewLink<'a> {
    /// MacVlan or MacVtap.
    pub kind: InfoKind,
    /// `hl%d` stands for the first free one of `hl0`, `hl1` and so on.
    pub name: &'a str,
    /// The index of the lower link, in the connection's namespace.
    pub lower: u32,
    /// Another network namespace to make it in, where no other process makes links; None for its lower's.
    pub namespace: Option<BorrowedFd<'a>>,
    /// Its alias from the first moment, beside its lower.
    pub alias: &'a str,
    pub mode: Mode,
    /// None in passthru mode, which takes the lower's.
    pub mac: Option<MacAddr>,
    /// None for the lower's.
    pub mtu: Option<u32>,
    /// None for the driver's.
    pub tx_queue_len: Option<u32>,
    /// None for the driver's.
    pub bc_queue_len: Option<u32>,
    /// The senders that it receives from in source mode.
    pub source_macs: &'a [MacAddr],
}

impl Netlink {
    /// Makes a link, which is still down, and returns its index. That is one of `draw`: it identifies the link whatever
    /// others make of its name. EEXIST is for the name.
    pub(crate) fn create(
        &self,
        new: &NewLink<'_>,
        mut draw: impl FnMut() -> io::Result<u32>,
    ) -> io::Result<u32> {
        let mut once = || {
            let index = draw()?;
            self.create_with(new, index).map(|()| index)
        };
        match once() {
            // The name, or the index: the kernel has one word for both.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => once(),
            result => result,
        }
    }

    fn create_with(&self, new: &NewLink<'_>, index: u32) -> io::Result<()> {
        let make = RouteNetlinkMessage::NewLink(new.message(index));
        let mut messages = vec![(make, NLM_F_CREATE | NLM_F_EXCL)];
        let is_here = new.namespace.is_none();
        if is_here {
            // The alias would become another link's.
            if self.link(index).is_ok() {
                return Err(io::Error::from_raw_os_error(libc::EEXIST));
            }
            // The kernel takes no alias in the message that makes a link. But it handles the messages of one datagram in
            // one go: not even SIGKILL comes between them.
            let tag = RouteNetlinkMessage::SetLink(link(index).alias(new.alias).build());
            messages.push((tag, 0));
        }
        self.change(messages).inspect_err(|_| {
            // It is there if only its alias was refused.
            if is_here && let Err(error) = self.delete(index) {
                log::debug!("no link {index} to delete: {error}");
            }
        })
    }

    /// Requests a macvtap on the loopback interface, which no driver would make. The error says whether there is one:
    /// EINVAL from the driver, EOPNOTSUPP from a kernel without it. The request loads a driver that is a module.
    pub(crate) fn request_impossible_macvtap(&self) -> io::Result<()> {
        const LOOPBACK: u32 = 1;
        let impossible = NewLink::new(InfoKind::MacVtap, "probe", LOOPBACK);
        self.create(&impossible, random_index).map(drop)
    }
}

impl<'a> NewLink<'a> {
    /// One beside its lower, everything else by default.
    pub(crate) const fn new(kind: InfoKind, name: &'a str, lower: u32) -> Self {
        Self {
            kind,
            name,
            lower,
            namespace: None,
            alias: "",
            mode: Mode::Bridge,
            mac: None,
            mtu: None,
            tx_queue_len: None,
            bc_queue_len: None,
            source_macs: &[],
        }
    }

    fn message(&self, index: u32) -> LinkMessage {
        let mut message = link(index)
            .name(self.name)
            .link(self.lower)
            .append_extra_attribute(LinkAttribute::LinkInfo(self.info()));
        if let Some(namespace) = self.namespace {
            message = message.setns_by_fd(namespace.as_raw_fd());
        }
        if let Some(mac) = self.mac {
            message = message.address(mac.octets().to_vec());
        }
        if let Some(mtu) = self.mtu {
            message = message.mtu(mtu);
        }
        if let Some(length) = self.tx_queue_len {
            message = message.txqueuelen(length);
        }
        message.build()
    }

    fn info(&self) -> Vec<LinkInfo> {
        let mut data = vec![InfoMacVtap::Mode((self.mode as u32).into())];
        data.extend(self.bc_queue_len.map(InfoMacVtap::BcQueueLen));
        if !self.source_macs.is_empty() {
            let macs = self.source_macs.iter().map(|mac| mac.octets());
            let macs = macs.map(InfoMacVtap::MacAddr).collect();
            data.push(InfoMacVtap::MacAddrMode(MacVtapMacAddressMode::Set));
            data.push(InfoMacVtap::MacAddrData(macs));
        }
        // The attributes of both drivers are the same.
        let data = LinkInfo::Data(InfoData::MacVtap(data));
        vec![LinkInfo::Kind(self.kind.clone()), data]
    }
}

/// From here on, a power of two, this crate chooses the interface indexes of its links at random. The kernel counts its own
/// from 1: the same ones soon mean other links in other namespaces.
pub(crate) const CHOSEN_INDEXES: u32 = 0x4000_0000;

/// A high one: no other namespace of the machine then has the same `/dev/tap<index>`.
pub(crate) fn random_index() -> io::Result<u32> {
    Ok(random()? & (CHOSEN_INDEXES - 1) | CHOSEN_INDEXES)
}

/// A name that no other link has.
pub(crate) fn random_name() -> io::Result<String> {
    Ok(format!("new{:08x}", random()?))
}

fn random() -> io::Result<u32> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u32::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::harness::{self as netns, Netns, root_test};

    /// Makes links with these indexes, one after the other until one can be had.
    fn create(netlink: &Netlink, new: &NewLink<'_>, mut indexes: Vec<u32>) -> io::Result<u32> {
        netlink.create(new, || Ok(indexes.remove(0)))
    }

    fn index_of(netlink: &Netlink, name: &str) -> u32 {
        let links = netlink.links().unwrap();
        let found = links.iter().find(|link| link.name == name);
        found.unwrap().index
    }

    root_test!(index_that_is_taken_is_drawn_again_once, || {
        let host = Netns::new();
        host.wire("v0");
        host.enter(|| {
            let netlink = Netlink::connect().unwrap();
            let lower = index_of(&netlink, "v0");
            let private = crate::netns::enter_new().unwrap();
            // The loopback interface's, in either namespace.
            let taken = 1;
            for (namespace, free) in [(Some(private.as_fd()), 77), (None, 78)] {
                let new = NewLink {
                    namespace,
                    alias: "mine",
                    ..NewLink::new(InfoKind::MacVlan, "m0", lower)
                };
                assert_eq!(create(&netlink, &new, vec![taken, free]).unwrap(), free);
                let error = create(&netlink, &new, vec![taken, taken]).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EEXIST));
            }
            assert_eq!(netlink.link(taken).unwrap().alias, "");
            assert_eq!(netlink.link(78).unwrap().alias, "mine");
        });
    });

    root_test!(link_that_cannot_have_its_alias_is_not_there, || {
        let host = Netns::new();
        host.wire("v0");
        host.enter(|| {
            let netlink = Netlink::connect().unwrap();
            // The kernel keeps 255 bytes.
            let alias = "x".repeat(256);
            let new = NewLink {
                alias: &alias,
                ..NewLink::new(InfoKind::MacVlan, "m0", index_of(&netlink, "v0"))
            };
            let error = create(&netlink, &new, vec![77]).unwrap_err();
            assert_ne!(error.raw_os_error(), Some(libc::EEXIST));
        });
        assert_eq!(host.links(), ["v0-far", "v0"]);
    });
}
