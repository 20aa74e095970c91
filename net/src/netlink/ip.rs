//! What the host link and the diagnosis need besides. Addresses and routes are the kernel's own messages here: who moves
//! one must lose nothing of it.

use std::io;

use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::AddressMessage;
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::{LinkMacVlan, LinkMacVtap, LinkUnspec, RouteMessageBuilder};

use super::{Netlink, into_io, kernel_mode};
use crate::mac::MacAddr;
use crate::mode::Mode;

impl Netlink {
    /// All addresses of the namespace, of both families, in the kernel's order: a primary one before its secondaries.
    pub(crate) fn addresses(&self) -> io::Result<Vec<AddressMessage>> {
        let all = self.handle.address().get().execute().try_collect();
        self.runtime.block_on(all).map_err(into_io)
    }

    /// All routes of the namespace, of both families and all tables.
    pub(crate) fn routes(&self) -> io::Result<Vec<RouteMessage>> {
        let four = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
        let six = RouteMessageBuilder::<std::net::Ipv6Addr>::new().build();
        let mut routes = Vec::new();
        for family in [four, six] {
            let part = self.handle.route().get(family).execute().try_collect();
            let part: Vec<RouteMessage> = self.runtime.block_on(part).map_err(into_io)?;
            routes.extend(part);
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

    /// Makes a macvlan in bridge mode on the link `lower`, in the same namespace. It is still down.
    pub(crate) fn create_macvlan(&self, name: &str, lower: u32, mac: MacAddr) -> io::Result<()> {
        let message = LinkMacVlan::new(name, lower, kernel_mode(Mode::Bridge))
            .address(mac.octets().to_vec())
            .build();
        let request = self.handle.link().add(message).execute();
        self.runtime.block_on(request).map_err(into_io)
    }

    /// Asks for a macvtap on the loopback interface, which no driver would make. The error tells whether there is one:
    /// EINVAL from the driver, EOPNOTSUPP from a kernel without it. The question loads a driver that is a module.
    pub(crate) fn ask_for_impossible_macvtap(&self) -> io::Result<()> {
        const LOOPBACK: u32 = 1;
        let message = LinkMacVtap::new("probe", LOOPBACK, kernel_mode(Mode::Bridge)).build();
        let request = self.handle.link().add(message).execute();
        self.runtime.block_on(request).map_err(into_io)
    }

    /// Brings a link up and changes nothing else.
    pub(crate) fn up(&self, index: u32) -> io::Result<()> {
        self.set(LinkUnspec::new_with_index(index).up().build())
    }

    fn change(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut handle = self.handle.clone();
        let mut answers = handle.request(request).map_err(into_io)?;
        while let Some(answer) = self.runtime.block_on(answers.next()) {
            if let NetlinkPayload::Error(error) = answer.payload
                && error.code.is_some()
            {
                return Err(into_io(rtnetlink::Error::NetlinkError(error)));
            }
        }
        Ok(())
    }
}
