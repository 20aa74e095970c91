//! A place of this process's own on a wire, for connections to the macvtaps there.
//!
//! The link that macvtaps sit on cannot reach them, but a macvlan beside them can. This one is in a network namespace
//! that only this process holds, and the kernel takes both down with it. It says as little as it can on the wire: its
//! only address is an IPv6 one of the link, drawn at random and so not looked for first, it asks for no router, and it
//! knows whom it speaks to.

use std::fs;
use std::io;
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, OwnedFd};

use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::InfoKind;
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rustix::net::{SocketFlags, SocketType, socket_with};

use crate::address::InterfaceAddress;
use crate::diagnose::{self, LinkRequest, Problem};
use crate::hostlink::new_address;
use crate::identity::LinkId;
use crate::mac::MacAddr;
use crate::mode::Mode;
use crate::netlink::{Netlink, NewLink, Object, random_index};
use crate::netns;

/// Why there is no place on a wire.
#[derive(Debug, thiserror::Error)]
pub enum StationError {
    /// The link cannot be seen.
    #[error("the interface is in another network namespace")]
    Elsewhere,
    /// Something is in the way.
    #[error("cannot make a link on the interface")]
    Link(#[source] Problem),
    /// The kernel or the system refuses something.
    #[error("cannot {0}")]
    Step(&'static str, #[source] io::Error),
}

/// A macvlan in a network namespace of its own. Both end when it and its sockets are dropped.
#[derive(Debug)]
pub struct Station {
    namespace: OwnedFd,
    index: u32,
}

fn failed_to(what: &'static str) -> impl Fn(io::Error) -> StationError {
    move |error| StationError::Step(what, error)
}

impl Station {
    /// Makes one on `lower`, in the caller's network namespace, among links in bridge mode.
    ///
    /// # Errors
    ///
    /// See [`StationError`].
    pub fn on(lower: LinkId) -> Result<Self, StationError> {
        netns::on_own_thread(|| make(lower)).map_err(failed_to("start a thread"))?
    }

    /// Its number in its namespace: the scope of the addresses of its link.
    pub fn scope(&self) -> u32 {
        self.index
    }

    /// Has it speak to `address` at this MAC address, without asking the wire for it.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it.
    pub fn introduce(&self, address: Ipv6Addr, mac: MacAddr) -> io::Result<()> {
        let mut entry = NeighbourMessage::default();
        entry.header.family = AddressFamily::Inet6;
        entry.header.ifindex = self.index;
        entry.header.state = NeighbourState::Permanent;
        entry.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)),
            NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec()),
        ];
        self.there(|| Netlink::connect()?.add(&Object::Neighbour(entry)))
    }

    /// A TCP socket for IPv6 in its namespace, which does not block.
    ///
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub fn socket(&self) -> io::Result<OwnedFd> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        self.there(|| {
            let (family, kind) = (rustix::net::AddressFamily::INET6, SocketType::STREAM);
            Ok(socket_with(family, kind, flags, None)?)
        })
    }

    fn there<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        netns::on_own_thread(|| {
            netns::enter(&self.namespace)?;
            work()
        })?
    }
}

fn make(lower: LinkId) -> Result<Station, StationError> {
    let here = netns::inode_of_current().map_err(failed_to("look at the network namespace"))?;
    if here != lower.namespace {
        return Err(StationError::Elsewhere);
    }
    let host = Netlink::connect().map_err(failed_to("connect to the kernel"))?;
    let links = host.links().map_err(failed_to("list the links"))?;
    let link = diagnose::by_index(&links, Some(lower.index)).ok_or(StationError::Elsewhere)?;
    let mac = MacAddr::random().map_err(failed_to("give random bytes for a MAC address"))?;
    let request = LinkRequest {
        links: &links,
        lower: link,
        mode: Mode::Bridge,
        mac: Some(mac),
        mtu: None,
    };
    request.check().map_err(StationError::Link)?;
    let namespace = netns::enter_new().map_err(failed_to("make a network namespace"))?;
    keep_quiet().map_err(failed_to("set up IPv6"))?;
    let new = NewLink {
        namespace: Some(namespace.as_fd()),
        mac: Some(mac),
        ..NewLink::new(InfoKind::MacVlan, "station", lower.index)
    };
    let index = host
        .create(&new, random_index)
        .map_err(|error| StationError::Link(request.explain_create(error)))?;
    let own = Netlink::connect().map_err(failed_to("connect to the kernel"))?;
    own.up(index).map_err(failed_to("bring the link up"))?;
    let address = random_address().map_err(failed_to("give random bytes for an address"))?;
    own.add(&Object::Address(new_address(&address, index)))
        .map_err(failed_to("give the link an IPv6 address"))?;
    Ok(Station { namespace, index })
}

/// Has the links that this namespace gets take no address by themselves, and ask for no router.
fn keep_quiet() -> io::Result<()> {
    for (setting, value) in [
        ("disable_ipv6", "0"),
        ("addr_gen_mode", "1"),
        ("accept_ra", "0"),
        ("router_solicitations", "0"),
    ] {
        fs::write(format!("/proc/sys/net/ipv6/conf/default/{setting}"), value)?;
    }
    Ok(())
}

/// An address of the link, with an interface identifier that no other host on it can be expected to have.
fn random_address() -> io::Result<InterfaceAddress> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes[8..], rustix::rand::GetRandomFlags::empty())?;
    bytes[..2].copy_from_slice(&[0xfe, 0x80]);
    let address = InterfaceAddress::new(Ipv6Addr::from(bytes).into(), 64);
    address.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
}
