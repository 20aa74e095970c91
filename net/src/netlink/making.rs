//! Making a macvlan or macvtap: the one place for both.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rtnetlink::LinkUnspec;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoMacVlan, InfoMacVtap, LinkAttribute, LinkInfo, LinkMessage,
    MacVlanMode, MacVtapMacAddressMode,
};

use super::Netlink;
use crate::mac::MacAddr;
use crate::mode::Mode;

/// A macvlan or macvtap to be made.
#[derive(Debug)]
pub(crate) struct NewLink<'a> {
    pub driver: Driver,
    /// `hl%d` stands for the first free one of `hl0`, `hl1` and so on.
    pub name: &'a str,
    /// The index of the lower link, in the connection's namespace.
    pub lower: u32,
    pub place: Birthplace<'a>,
    pub mode: Mode,
    /// None in passthru mode, which takes the lower's.
    pub mac: Option<MacAddr>,
    /// None for the lower's.
    pub mtu: Option<u32>,
    /// None for the driver's.
    pub tx_queue_len: Option<u32>,
    /// None for the driver's.
    pub bc_queue_len: Option<u32>,
    /// The senders that it hears in source mode.
    pub source_macs: &'a [MacAddr],
}

/// Which driver a link is made by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Driver {
    Macvlan,
    Macvtap,
}

/// Where a link is made.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Birthplace<'a> {
    /// In another network namespace than the lower's, that nobody else makes links in.
    Private(BorrowedFd<'a>),
    /// Beside its lower, with this text on it from the first moment.
    BesideLower { alias: &'a str },
}

impl Netlink {
    /// Makes a link, which is still down, and hands back its index. That is one of `draw`, and with it whoever made the
    /// link finds it again, whatever others have made of its name. EEXIST is for the name.
    pub(crate) fn create(
        &self,
        new: &NewLink<'_>,
        mut draw: impl FnMut() -> io::Result<u32>,
    ) -> io::Result<u32> {
        let mut may_redraw = true;
        loop {
            let index = draw()?;
            match self.create_with(new, index) {
                Ok(()) => return Ok(index),
                // The name, or the index: the kernel has one word for both.
                Err(error)
                    if error.raw_os_error() == Some(libc::EEXIST)
                        && std::mem::take(&mut may_redraw) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn create_with(&self, new: &NewLink<'_>, index: u32) -> io::Result<()> {
        let make = RouteNetlinkMessage::NewLink(new.message(index));
        let make = (make, NLM_F_CREATE | NLM_F_EXCL);
        let Birthplace::BesideLower { alias } = new.place else {
            return self.change_all(vec![make]);
        };
        // The alias would be somebody else's.
        if self.link(index).is_ok() {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        // The kernel takes no alias in the message that makes a link. But the messages of one datagram it handles in one
        // go, so that not even SIGKILL comes between them.
        let tag = LinkUnspec::new_with_index(index).alias(alias).build();
        let tag = (RouteNetlinkMessage::SetLink(tag), 0);
        self.change_all(vec![make, tag]).inspect_err(|_| {
            // It is there if only its alias was refused.
            if let Err(error) = self.delete(index) {
                log::debug!("no link {index} to delete: {error}");
            }
        })
    }

    /// Asks for a macvtap on the loopback interface, which no driver would make. The error tells whether there is one:
    /// EINVAL from the driver, EOPNOTSUPP from a kernel without it. The question loads a driver that is a module.
    pub(crate) fn ask_for_impossible_macvtap(&self) -> io::Result<()> {
        const LOOPBACK: u32 = 1;
        let impossible = NewLink {
            driver: Driver::Macvtap,
            name: "probe",
            lower: LOOPBACK,
            place: Birthplace::BesideLower { alias: "" },
            mode: Mode::Bridge,
            mac: None,
            mtu: None,
            tx_queue_len: None,
            bc_queue_len: None,
            source_macs: &[],
        };
        self.create(&impossible, random_index).map(drop)
    }
}

impl NewLink<'_> {
    fn message(&self, index: u32) -> LinkMessage {
        let mut message = LinkUnspec::new_with_index(index)
            .name(self.name)
            .link(self.lower)
            .append_extra_attribute(LinkAttribute::LinkInfo(self.info()));
        if let Birthplace::Private(namespace) = self.place {
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
        let mode = kernel_mode(self.mode);
        let length = self.bc_queue_len;
        let (kind, data) = match self.driver {
            Driver::Macvlan => {
                let length = length.map(InfoMacVlan::BcQueueLen);
                let data = [InfoMacVlan::Mode(mode)].into_iter().chain(length);
                (InfoKind::MacVlan, InfoData::MacVlan(data.collect()))
            }
            Driver::Macvtap => {
                let length = length.map(InfoMacVtap::BcQueueLen);
                let macs = self.source_macs.iter().map(|mac| mac.octets());
                let macs: Vec<_> = macs.map(InfoMacVtap::MacAddr).collect();
                let set = InfoMacVtap::MacAddrMode(MacVtapMacAddressMode::Set);
                let sources = [set, InfoMacVtap::MacAddrData(macs)].into_iter();
                let data = [InfoMacVtap::Mode(mode)].into_iter().chain(length);
                let data = data.chain(sources.filter(|_| !self.source_macs.is_empty()));
                (InfoKind::MacVtap, InfoData::MacVtap(data.collect()))
            }
        };
        vec![LinkInfo::Kind(kind), LinkInfo::Data(data)]
    }
}

fn kernel_mode(mode: Mode) -> MacVlanMode {
    match mode {
        Mode::Bridge => MacVlanMode::Bridge,
        Mode::Vepa => MacVlanMode::Vepa,
        Mode::Private => MacVlanMode::Private,
        Mode::Passthru => MacVlanMode::Passthrough,
        Mode::Source => MacVlanMode::Source,
    }
}

/// The interface indexes of links that this crate makes are chosen at random from here on: a power of two. The kernel's own,
/// which count from 1, soon mean another link in another namespace.
pub(crate) const CHOSEN_INDEXES: u32 = 0x4000_0000;

/// A high one: `/dev/tap<index>` then is nobody else's, whatever namespaces the machine has.
pub(crate) fn random_index() -> io::Result<u32> {
    Ok(random()? & (CHOSEN_INDEXES - 1) | CHOSEN_INDEXES)
}

/// A name that is nobody else's.
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
    use crate::harness::{self, Netns};
    use crate::netns;

    fn macvlan<'a>(name: &'a str, lower: u32, place: Birthplace<'a>) -> NewLink<'a> {
        NewLink {
            driver: Driver::Macvlan,
            name,
            lower,
            place,
            mode: Mode::Bridge,
            mac: None,
            mtu: None,
            tx_queue_len: None,
            bc_queue_len: None,
            source_macs: &[],
        }
    }

    /// Makes links with these indexes, one after the other until one can be had.
    fn create(netlink: &Netlink, new: &NewLink<'_>, mut indexes: Vec<u32>) -> io::Result<u32> {
        netlink.create(new, || Ok(indexes.remove(0)))
    }

    fn index_of(netlink: &Netlink, name: &str) -> u32 {
        let links = netlink.links().unwrap();
        let found = links.iter().find(|link| link.name == name);
        found.unwrap().index
    }

    #[test]
    fn index_that_is_taken_is_drawn_again_once() {
        if !harness::is_root() {
            return;
        }
        let host = Netns::new();
        host.wire("v0");
        host.enter(|| {
            let netlink = Netlink::connect().unwrap();
            let lower = index_of(&netlink, "v0");
            let private = netns::enter_new().unwrap();
            // The loopback interface's, in either namespace.
            let taken = 1;
            for (place, free) in [
                (Birthplace::Private(private.as_fd()), 77),
                (Birthplace::BesideLower { alias: "mine" }, 78),
            ] {
                let new = macvlan("m0", lower, place);
                assert_eq!(create(&netlink, &new, vec![taken, free]).unwrap(), free);
                let error = create(&netlink, &new, vec![taken, taken]).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EEXIST));
            }
            assert_eq!(netlink.link(taken).unwrap().alias, "");
            assert_eq!(netlink.link(78).unwrap().alias, "mine");
        });
    }

    #[test]
    fn link_that_cannot_have_its_alias_is_not_there() {
        if !harness::is_root() {
            return;
        }
        let host = Netns::new();
        host.wire("v0");
        host.enter(|| {
            let netlink = Netlink::connect().unwrap();
            // The kernel keeps 255 bytes.
            let alias = "x".repeat(256);
            let place = Birthplace::BesideLower { alias: &alias };
            let new = macvlan("m0", index_of(&netlink, "v0"), place);
            let error = create(&netlink, &new, vec![77]).unwrap_err();
            assert_ne!(error.raw_os_error(), Some(libc::EEXIST));
        });
        assert_eq!(host.links(), ["v0-far", "v0"]);
    }
}
