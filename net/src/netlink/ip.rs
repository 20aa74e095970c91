//! What the host link and the diagnosis need besides. Addresses and routes are the kernel's own messages here: who moves
//! one must lose nothing of it.

use std::io;

use rtnetlink::LinkUnspec;
use rtnetlink::packet_core::{DefaultNla, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, Parseable};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage};

use super::Netlink;
use super::reading::Request;
use super::wire::{self, Attributes};

/// Size of `struct ifaddrmsg`, which the attributes follow.
const ADDRESS_HEADER: usize = 8;

/// Size of `struct rtmsg`, which the attributes follow.
const ROUTE_HEADER: usize = 12;

impl Netlink {
    /// All addresses of the namespace, of both families, in the kernel's order: a primary one before its secondaries.
    pub(crate) fn addresses(&self) -> io::Result<Vec<AddressMessage>> {
        let request = Request {
            kind: libc::RTM_GETADDR,
            flags: libc::NLM_F_DUMP,
            body: vec![0; ADDRESS_HEADER],
            answer: libc::RTM_NEWADDR,
        };
        self.ask(request, parse_address)
    }

    /// All routes of the namespace, of both families and all tables.
    pub(crate) fn routes(&self) -> io::Result<Vec<RouteMessage>> {
        let mut routes = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut body = vec![0; ROUTE_HEADER];
            body[0] = family as u8;
            let request = Request {
                kind: libc::RTM_GETROUTE,
                flags: libc::NLM_F_DUMP,
                body,
                answer: libc::RTM_NEWROUTE,
            };
            routes.extend(self.ask(request, parse_route)?);
        }
        Ok(routes)
    }

    /// Adds an address to the link whose index the message has. One that is there already is an error.
    pub(crate) fn add_address(&self, address: &AddressMessage) -> io::Result<()> {
        let message = RouteNetlinkMessage::NewAddress(address.clone());
        self.change(message, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Takes an address away.
    pub(crate) fn delete_address(&self, address: &AddressMessage) -> io::Result<()> {
        self.change(RouteNetlinkMessage::DelAddress(address.clone()), 0)
    }

    /// Adds a route beside those that the same destination has already. The very same one is an error.
    pub(crate) fn add_route(&self, route: &RouteMessage) -> io::Result<()> {
        let message = RouteNetlinkMessage::NewRoute(route.clone());
        self.change(message, NLM_F_CREATE | NLM_F_APPEND)
    }

    /// Takes a route away.
    pub(crate) fn delete_route(&self, route: &RouteMessage) -> io::Result<()> {
        self.change(RouteNetlinkMessage::DelRoute(route.clone()), 0)
    }

    /// Brings a link up and changes nothing else.
    pub(crate) fn up(&self, index: u32) -> io::Result<()> {
        self.set(LinkUnspec::new_with_index(index).up().build())
    }

    /// Makes a link a port of another one.
    pub(crate) fn set_master(&self, index: u32, master: u32) -> io::Result<()> {
        let message = LinkUnspec::new_with_index(index).controller(master);
        self.set(message.build())
    }
}

fn parse_address(body: &[u8]) -> Option<AddressMessage> {
    let attributes = |message: &mut AddressMessage| std::mem::take(&mut message.attributes);
    let (mut message, all) = parse(body, ADDRESS_HEADER, attributes, AddressAttribute::Other)?;
    message.attributes = all;
    Some(message)
}

fn parse_route(body: &[u8]) -> Option<RouteMessage> {
    let attributes = |message: &mut RouteMessage| std::mem::take(&mut message.attributes);
    let (mut message, all) = parse(body, ROUTE_HEADER, attributes, RouteAttribute::Other)?;
    message.attributes = all;
    Some(message)
}

/// Reads a message with a header of `header` bytes by its parser, and keeps as bytes what attributes that does not take.
pub(super) fn parse<M: Parseable<[u8]>, A>(
    body: &[u8],
    header: usize,
    attributes: impl Fn(&mut M) -> Vec<A>,
    other: impl Fn(DefaultNla) -> A,
) -> Option<(M, Vec<A>)> {
    if let Ok(mut message) = M::parse(body) {
        let all = attributes(&mut message);
        return Some((message, all));
    }
    let (header, rest) = body.split_at_checked(header)?;
    let message = M::parse(header).ok()?;
    let one_by_one = Attributes(rest).flat_map(|attribute| {
        let bytes = wire::attribute(attribute.raw_kind, attribute.value);
        match M::parse(&[header, &bytes].concat()) {
            Ok(mut alone) => attributes(&mut alone),
            Err(_) => {
                let value = attribute.value.to_vec();
                vec![other(DefaultNla::new(attribute.raw_kind, value))]
            }
        }
    });
    let all = one_by_one.collect();
    Some((message, all))
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use proptest::collection::vec;
    use proptest::prelude::*;
    use rtnetlink::packet_core::Emitable;

    use super::*;

    fn bytes_of(message: &impl Emitable) -> Vec<u8> {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    #[test]
    fn address_with_a_label_that_is_no_utf8_loses_nothing() {
        let ip = IpAddr::from(Ipv4Addr::new(192, 0, 2, 1));
        let mut message = AddressMessage::default();
        message.header.index = 7;
        message.attributes = vec![AddressAttribute::Local(ip)];
        let mut bytes = bytes_of(&message);
        bytes.extend(wire::attribute(libc::IFA_LABEL, b"v0:B\xfcr\0"));

        let read = parse_address(&bytes).unwrap();
        assert_eq!(read.header.index, 7);
        assert_eq!(read.attributes[0], AddressAttribute::Local(ip));
        assert_eq!(bytes_of(&read), bytes);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_when_there_is_a_header(bytes in vec(any::<u8>(), 0..200)) {
            let address = parse_address(&bytes);
            prop_assert_eq!(address.is_some(), bytes.len() >= ADDRESS_HEADER);
            let route = parse_route(&bytes);
            prop_assert_eq!(route.is_some(), bytes.len() >= ROUTE_HEADER);
        }
    }
}
