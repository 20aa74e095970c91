//! Links, addresses and routes of the kernel's, by rtnetlink(7).

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with,
};

/// A destination and how packets get there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
    /// The network and the length of its prefix.
    pub(super) to: (IpAddr, u8),
    /// The router, or the link itself.
    pub(super) via: Option<IpAddr>,
}

impl Route {
    /// To everywhere.
    pub(super) fn default_by(gateway: IpAddr) -> Self {
        let everywhere = match gateway {
            IpAddr::V4(_) => IpAddr::from([0; 4]),
            IpAddr::V6(_) => IpAddr::from([0; 16]),
        };
        Self {
            to: (everywhere, 0),
            via: Some(gateway),
        }
    }
}

/// A socket by which the kernel is asked to change something.
#[derive(Debug)]
pub(super) struct Requests {
    socket: OwnedFd,
}

impl Requests {
    pub(super) fn open() -> io::Result<Self> {
        let socket = open(SocketFlags::CLOEXEC, 0)?;
        Ok(Self { socket })
    }

    /// Brings a link up.
    pub(super) fn bring_up(&self, index: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.send(RouteNetlinkMessage::SetLink(message), 0)
    }

    pub(super) fn set_mtu(&self, index: u32, mtu: u16) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = vec![LinkAttribute::Mtu(mtu.into())];
        self.send(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Adds an address, which can be used at once: that another host has an IPv6 address too is not looked for.
    pub(super) fn add_address(&self, index: u32, address: (IpAddr, u8)) -> io::Result<()> {
        let mut message = address_message(index, address);
        message.header.flags = AddressHeaderFlags::Nodad;
        self.send(
            RouteNetlinkMessage::NewAddress(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Deletes an address. Its routes go with it.
    pub(super) fn delete_address(&self, index: u32, address: (IpAddr, u8)) -> io::Result<()> {
        let message = address_message(index, address);
        self.send(RouteNetlinkMessage::DelAddress(message), 0)
    }

    /// Adds a route. Of two to one destination the kernel takes that with the smaller metric. The
    /// router of a link whose addresses have no network (`on_link`) is on the link.
    pub(super) fn add_route(
        &self,
        index: u32,
        route: &Route,
        metric: u32,
        on_link: bool,
    ) -> io::Result<()> {
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: family(route.to.0),
            destination_prefix_length: route.to.1,
            table: RouteHeader::RT_TABLE_MAIN,
            protocol: RouteProtocol::Boot,
            scope: RouteScope::Universe,
            kind: RouteType::Unicast,
            ..RouteHeader::default()
        };
        message.attributes = vec![
            RouteAttribute::Destination(route.to.0.into()),
            RouteAttribute::Oif(index),
            RouteAttribute::Priority(metric),
        ];
        match route.via {
            Some(router) => message
                .attributes
                .push(RouteAttribute::Gateway(router.into())),
            None => message.header.scope = RouteScope::Link,
        }
        if on_link && route.via.is_some() {
            message.header.flags = RouteFlags::Onlink;
        }
        self.send(
            RouteNetlinkMessage::NewRoute(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Sends one request, and takes the kernel's answer.
    fn send(&self, request: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        rustix::io::retry_on_intr(|| send(&self.socket, &bytes, SendFlags::empty()))?;
        let mut answer = [0; 4096];
        let flags = RecvFlags::empty();
        let (length, _) = rustix::io::retry_on_intr(|| recv(&self.socket, &mut answer[..], flags))?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer[..length]);
        match answer.map_err(io::Error::other)?.payload {
            NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
            _ => Ok(()),
        }
    }
}

fn family(address: IpAddr) -> netlink_packet_route::AddressFamily {
    match address {
        IpAddr::V4(_) => netlink_packet_route::AddressFamily::Inet,
        IpAddr::V6(_) => netlink_packet_route::AddressFamily::Inet6,
    }
}

fn address_message(index: u32, (address, length): (IpAddr, u8)) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.family = family(address);
    message.header.prefix_len = length;
    message.header.scope = AddressScope::Universe;
    message.attributes = vec![
        AddressAttribute::Local(address),
        AddressAttribute::Address(address),
    ];
    message
}

fn open(flags: SocketFlags, groups: u32) -> io::Result<OwnedFd> {
    // Protocol 0 is rtnetlink's.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    bind(&socket, &SocketAddrNetlink::new(0, groups))?;
    Ok(socket)
}

/// What the kernel reports by itself.
#[derive(Debug)]
pub(super) struct Events {
    socket: OwnedFd,
}

/// What a router advertises.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Advertised {
    /// A prefix, from which the kernel makes an address if it can.
    Prefix,
    /// Name servers, and for how many seconds: 0 takes them back.
    NameServers(Vec<Ipv6Addr>, u32),
}

// From linux/rtnetlink.h.
const RTMGRP_LINK: u32 = 1;
const RTMGRP_IPV6_IFADDR: u32 = 0x100;
const RTMGRP_IPV6_PREFIX: u32 = 0x20000;
const RTMGRP_ND_USEROPT: u32 = 1 << (20 - 1);
const RTM_NEWPREFIX: u16 = 52;
const RTM_NEWNDUSEROPT: u16 = 68;
/// Recursive DNS server (RFC 8106).
const RDNSS: u8 = 25;

impl Events {
    /// Of links that come and go.
    pub(super) fn of_links() -> io::Result<Self> {
        Self::open(RTMGRP_LINK)
    }

    /// Of IPv6 addresses and router advertisements.
    pub(super) fn of_ipv6() -> io::Result<Self> {
        Self::open(RTMGRP_IPV6_IFADDR | RTMGRP_IPV6_PREFIX | RTMGRP_ND_USEROPT)
    }

    fn open(groups: u32) -> io::Result<Self> {
        let socket = open(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, groups)?;
        Ok(Self { socket })
    }

    /// Takes what is there, and returns what routers have advertised on a link.
    pub(super) fn take(&self, index: u32) -> Vec<Advertised> {
        let mut buffer = [0; 8192];
        let mut all = Vec::new();
        // The end, or ENOBUFS: more than the socket could keep. Addresses are looked up, and routers say all again.
        while let Ok((length, _)) = recv(&self.socket, &mut buffer[..], RecvFlags::empty()) {
            let mut rest = &buffer[..length];
            while let Ok(message) = NetlinkBuffer::new_checked(rest) {
                all.extend(advertised(message.message_type(), message.payload(), index));
                let next = (message.length() as usize).next_multiple_of(4);
                rest = rest.get(next..).unwrap_or_default();
            }
        }
        all
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What a message says that a router advertises on the link `index`.
fn advertised(kind: u16, payload: &[u8], index: u32) -> Option<Advertised> {
    let of_link = payload.get(4..8)? == index.to_ne_bytes();
    match kind {
        // struct prefixmsg: the link in bytes 4 to 7.
        RTM_NEWPREFIX if of_link => Some(Advertised::Prefix),
        // struct nduseroptmsg, 16 bytes and the link in the same place; then the option as it came.
        RTM_NEWNDUSEROPT if of_link => name_servers(payload.get(16..)?),
        _ => None,
    }
}

/// The servers of a recursive DNS server option: type, length in units of 8 bytes, reserved, lifetime, addresses.
fn name_servers(option: &[u8]) -> Option<Advertised> {
    let [kind, length, ..] = *option else {
        return None;
    };
    let (head, addresses) = option.get(..usize::from(length) * 8)?.split_at_checked(8)?;
    let lifetime = u32::from_be_bytes(head[4..].try_into().ok()?);
    let addresses = addresses.chunks_exact(16);
    let addresses = addresses.filter_map(|bytes| <[u8; 16]>::try_from(bytes).ok());
    let addresses = addresses.map(Ipv6Addr::from);
    (kind == RDNSS).then(|| Advertised::NameServers(addresses.collect(), lifetime))
}

/// The name and the index of the NIC that has a MAC address now.
pub(super) fn find(mac: [u8; 6]) -> Option<(String, u32)> {
    let text = super::mac_text(mac);
    for entry in fs::read_dir("/sys/class/net").ok()?.flatten() {
        let address = fs::read_to_string(entry.path().join("address")).unwrap_or_default();
        if address.trim() == text {
            let index = fs::read_to_string(entry.path().join("ifindex")).ok()?;
            return Some((
                entry.file_name().into_string().ok()?,
                index.trim().parse().ok()?,
            ));
        }
    }
    None
}

/// The IPv6 addresses of a link that can be used and reach beyond it.
pub(super) fn global_addresses(index: u32) -> Vec<(IpAddr, u8)> {
    let list = fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
    list.lines()
        .filter_map(|line| global_address(line, index))
        .collect()
}

/// A line of /proc/net/if_inet6: address, link, length of the prefix, scope, flags and the link's name; numbers are hexadecimal.
fn global_address(line: &str, index: u32) -> Option<(IpAddr, u8)> {
    const TENTATIVE_OR_DUPLICATE: u8 = 0x48;
    let mut words = line.split_whitespace();
    let address = u128::from_str_radix(words.next()?, 16).ok()?;
    let mut number = || u32::from_str_radix(words.next()?, 16).ok();
    let (link, length, scope, flags) = (number()?, number()?, number()?, number()?);
    let global = link == index && scope == 0 && flags as u8 & TENTATIVE_OR_DUPLICATE == 0;
    let length = u8::try_from(length).ok()?;
    global.then(|| (Ipv6Addr::from(address).into(), length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_of_a_router_are_read_from_the_kernels_message() {
        let header = [10, 0, 24, 0, 7, 0, 0, 0, 134, 0, 0, 0, 0, 0, 0, 0];
        let option = [RDNSS, 3, 0, 0, 0, 0, 2, 0x58];
        let server: Ipv6Addr = "fd00::53".parse().unwrap();
        let message = [&header[..], &option, &server.octets()].concat();
        let servers = Advertised::NameServers(vec![server], 600);
        assert_eq!(advertised(RTM_NEWNDUSEROPT, &message, 7), Some(servers));
        assert_eq!(advertised(RTM_NEWNDUSEROPT, &message, 8), None);
        for length in 0..message.len() {
            assert_eq!(advertised(RTM_NEWNDUSEROPT, &message[..length], 7), None);
        }
    }

    #[test]
    fn address_counts_that_is_global_and_known_to_be_no_duplicate() {
        let line = |index: &str, scope: &str, flags: &str| {
            format!("fd000000000000000000000000000002 {index} 40 {scope} {flags}     eth0")
        };
        let address = ("fd00::2".parse().unwrap(), 64);
        assert_eq!(global_address(&line("0a", "00", "80"), 10), Some(address));
        assert_eq!(global_address(&line("0a", "00", "00"), 10), Some(address));
        assert_eq!(global_address(&line("0a", "20", "80"), 10), None);
        assert_eq!(global_address(&line("0a", "00", "40"), 10), None);
        assert_eq!(global_address(&line("0a", "00", "88"), 10), None);
        assert_eq!(global_address(&line("0b", "00", "80"), 10), None);
        assert_eq!(global_address("fd00 0a", 10), None);
    }
}
