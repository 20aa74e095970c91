//! Addresses, routes, neighbour entries and policy rules, as the kernel's own messages: whoever moves one loses nothing of
//! it.

use std::io;

use rtnetlink::packet_core::{
    DefaultNla, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Parseable,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAttribute, NeighbourMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleMessage};

use super::Netlink;
use super::client::Request;
use super::wire::{self, Attributes};

/// What a namespace keeps besides links.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Object {
    Address(AddressMessage),
    Route(RouteMessage),
    Neighbour(NeighbourMessage),
    Rule(RuleMessage),
}

const FAMILIES: [u8; 2] = [libc::AF_INET as u8, libc::AF_INET6 as u8];

/// Where `ndm_flags` is in `struct ndmsg`.
const NEIGHBOUR_FLAGS: usize = 10;

impl Netlink {
    /// All addresses of the namespace, of both families, in the kernel's order: a primary one before its secondaries.
    pub(crate) fn addresses(&self) -> io::Result<Vec<AddressMessage>> {
        self.list(0, &[0])
    }

    /// All routes of the namespace, of both families and all tables.
    pub(crate) fn routes(&self) -> io::Result<Vec<RouteMessage>> {
        self.list(0, &FAMILIES)
    }

    /// All neighbour entries of the namespace: learnt ones, set ones and proxies.
    pub(crate) fn neighbours(&self) -> io::Result<Vec<NeighbourMessage>> {
        self.list(NEIGHBOUR_FLAGS, &[0, libc::NTF_PROXY])
    }

    /// All policy rules of the namespace, of both families.
    pub(crate) fn rules(&self) -> io::Result<Vec<RuleMessage>> {
        self.list(0, &FAMILIES)
    }

    /// The objects that a dump shows with each of these values at this place of its header. What the kernel was built
    /// without, as policy rules can be, has none.
    fn list<M: Listed>(&self, at: usize, values: &[u8]) -> io::Result<Vec<M>> {
        let mut all = Vec::new();
        for value in values {
            let mut body = vec![0; M::HEADER];
            body[at] = *value;
            let request = Request {
                kind: M::REQUEST,
                flags: libc::NLM_F_DUMP,
                body,
            };
            match self.ask(request, parse) {
                Ok(part) => all.extend::<Vec<M>>(part),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP) => {}
                    _ => return Err(error),
                },
            }
        }
        Ok(all)
    }

    /// Adds an object. One that is there already is an error; but a neighbour entry replaces one that the link has learnt.
    pub(crate) fn add(&self, object: &Object) -> io::Result<()> {
        let (message, flags) = match object.clone() {
            Object::Address(new) => (RouteNetlinkMessage::NewAddress(new), NLM_F_EXCL),
            // Beside others to the same destination.
            Object::Route(new) => (RouteNetlinkMessage::NewRoute(new), NLM_F_APPEND),
            Object::Neighbour(new) => (RouteNetlinkMessage::NewNeighbour(new), NLM_F_REPLACE),
            Object::Rule(new) => (RouteNetlinkMessage::NewRule(new), NLM_F_EXCL),
        };
        self.change(vec![(message, NLM_F_CREATE | flags)])
    }

    pub(crate) fn remove(&self, object: &Object) -> io::Result<()> {
        let message = match object.clone() {
            Object::Address(old) => RouteNetlinkMessage::DelAddress(old),
            Object::Route(old) => RouteNetlinkMessage::DelRoute(old),
            Object::Neighbour(old) => RouteNetlinkMessage::DelNeighbour(old),
            Object::Rule(old) => RouteNetlinkMessage::DelRule(old),
        };
        self.change(vec![(message, 0)])
    }
}

/// A message that a dump is made of.
trait Listed: Parseable<[u8]> + Send + 'static {
    type Attribute;
    /// The request for the dump.
    const REQUEST: u16;
    /// The size of the header before the attributes.
    const HEADER: usize;

    fn attributes(&mut self) -> &mut Vec<Self::Attribute>;
    fn unknown(attribute: DefaultNla) -> Self::Attribute;
}

macro_rules! listed {
    ($($message:ty: $request:ident, $header:literal bytes, $attribute:ident;)*) => {$(
        impl Listed for $message {
            type Attribute = $attribute;
            const REQUEST: u16 = libc::$request;
            const HEADER: usize = $header;

            fn attributes(&mut self) -> &mut Vec<$attribute> {
                &mut self.attributes
            }

            fn unknown(attribute: DefaultNla) -> $attribute {
                $attribute::Other(attribute)
            }
        }
    )*};
}

// The headers are struct ifaddrmsg, rtmsg, ndmsg and fib_rule_hdr.
listed! {
    AddressMessage: RTM_GETADDR, 8 bytes, AddressAttribute;
    RouteMessage: RTM_GETROUTE, 12 bytes, RouteAttribute;
    NeighbourMessage: RTM_GETNEIGH, 12 bytes, NeighbourAttribute;
    RuleMessage: RTM_GETRULE, 12 bytes, RuleAttribute;
}

/// Reads a message by its parser. An attribute that this rejects is kept as bytes.
fn parse<M: Listed>(body: &[u8]) -> Option<M> {
    if let Ok(message) = M::parse(body) {
        return Some(message);
    }
    let (header, rest) = body.split_at_checked(M::HEADER)?;
    let mut message = M::parse(header).ok()?;
    for attribute in Attributes(rest) {
        let bytes = wire::attribute(attribute.raw_kind, attribute.value);
        match M::parse(&[header, &bytes].concat()) {
            Ok(mut alone) => message.attributes().append(alone.attributes()),
            Err(_) => {
                let raw = DefaultNla::new(attribute.raw_kind, attribute.value.to_vec());
                message.attributes().push(M::unknown(raw));
            }
        }
    }
    Some(message)
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

        let read: AddressMessage = parse(&bytes).unwrap();
        assert_eq!(read.header.index, 7);
        assert_eq!(read.attributes[0], AddressAttribute::Local(ip));
        assert_eq!(bytes_of(&read), bytes);
    }

    fn is_read<M: Listed>(bytes: &[u8]) -> bool {
        parse::<M>(bytes).is_some() == (bytes.len() >= M::HEADER)
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_when_there_is_a_header(bytes in vec(any::<u8>(), 0..200)) {
            prop_assert!(is_read::<AddressMessage>(&bytes));
            prop_assert!(is_read::<RouteMessage>(&bytes));
            prop_assert!(is_read::<NeighbourMessage>(&bytes));
            prop_assert!(is_read::<RuleMessage>(&bytes));
        }
    }
}
