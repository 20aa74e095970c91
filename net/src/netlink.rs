//! The kernel's tables of links, addresses and routes behind blocking calls, none of which waits for ever: what is asked
//! for goes through a small client of our own (`reading.rs`), what is made and changed through rtnetlink.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{InfoMacVtap, LinkMessage, MacVlanMode};
use rtnetlink::{LinkMacVtap, LinkUnspec};

use crate::mac::MacAddr;
use crate::mode::Mode;

mod changing;
mod ip;
mod link;
mod reading;
mod wire;
mod worker;

pub(crate) use link::Link;
use reading::Request;
pub(crate) use reading::{is_interrupted, receive};
pub(crate) use wire::{Message, Messages};
use worker::Worker;

/// A connection to the network namespace of the thread that made it.
#[derive(Debug)]
pub(crate) struct Netlink(Worker);

/// A macvtap to be made.
#[derive(Debug)]
pub(crate) struct NewMacvtap<'a> {
    pub name: &'a str,
    pub index: u32,
    /// The index of the lower link, in the connection's namespace.
    pub lower: u32,
    /// Where the macvtap is born.
    pub namespace: BorrowedFd<'a>,
    pub mode: Mode,
    /// None in passthru mode, which takes the lower's.
    pub mac: Option<MacAddr>,
    /// None for the lower's.
    pub mtu: Option<u32>,
    /// None for the driver's.
    pub tx_queue_len: Option<u32>,
    /// None for the driver's.
    pub bc_queue_len: Option<u32>,
}

impl Netlink {
    /// Connects to the network namespace of the calling thread.
    pub(crate) fn connect() -> io::Result<Self> {
        Worker::start(reading::LIMIT).map(Self)
    }

    /// All links of the namespace.
    pub(crate) fn links(&self) -> io::Result<Vec<Link>> {
        self.ask(link_request(0, libc::NLM_F_DUMP), Link::parse)
    }

    /// The link with this index.
    pub(crate) fn link(&self, index: u32) -> io::Result<Link> {
        let mut found = self.ask(link_request(index, libc::NLM_F_ACK), Link::parse)?;
        found
            .pop()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }

    /// Makes a macvtap. It is still down.
    pub(crate) fn create(&self, new: &NewMacvtap<'_>) -> io::Result<()> {
        let mut message = LinkMacVtap::new(new.name, new.lower, kernel_mode(new.mode))
            .index(new.index)
            .setns_by_fd(new.namespace.as_raw_fd());
        if let Some(mac) = new.mac {
            message = message.address(mac.octets().to_vec());
        }
        if let Some(mtu) = new.mtu {
            message = message.mtu(mtu);
        }
        if let Some(length) = new.tx_queue_len {
            message = message.txqueuelen(length);
        }
        if let Some(length) = new.bc_queue_len {
            message = message.append_info_data(InfoMacVtap::BcQueueLen(length));
        }
        self.add(message.build())
    }

    /// Writes a text on a link.
    pub(crate) fn set_alias(&self, index: u32, alias: &str) -> io::Result<()> {
        self.set(LinkUnspec::new_with_index(index).alias(alias).build())
    }

    /// Moves a link that is down to another namespace, and renames it there if a new name is given: `mvt%d` stands for
    /// the first free one of `mvt0`, `mvt1` and so on.
    pub(crate) fn move_to(
        &self,
        namespace: BorrowedFd<'_>,
        index: u32,
        new_name: Option<&str>,
    ) -> io::Result<()> {
        let mut message = LinkUnspec::new_with_index(index).setns_by_fd(namespace.as_raw_fd());
        if let Some(name) = new_name {
            message = message.name(name);
        }
        self.set(message.build())
    }

    /// Brings a link up, receiving all multicast: the macvlan driver would pass on only the groups that the *host* has
    /// joined.
    pub(crate) fn bring_up(&self, index: u32) -> io::Result<()> {
        let message = LinkUnspec::new_with_index(index)
            .allmulticast(true)
            .up()
            .build();
        self.set(message)
    }

    fn set(&self, message: LinkMessage) -> io::Result<()> {
        self.change(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Deletes a link.
    pub(crate) fn delete(&self, index: u32) -> io::Result<()> {
        let message = LinkUnspec::new_with_index(index).build();
        self.change(RouteNetlinkMessage::DelLink(message), 0)
    }

    fn add(&self, message: LinkMessage) -> io::Result<()> {
        let message = RouteNetlinkMessage::NewLink(message);
        self.change(message, NLM_F_CREATE | NLM_F_EXCL)
    }

    fn change(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.0.call(move |changer| changer.change(message, flags))
    }

    fn ask<T: Send + 'static>(
        &self,
        request: Request,
        parse: fn(&[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        self.0.call(move |_| reading::ask(&request, parse))
    }
}

/// The message that asks for all links, with an answer that has this number.
pub(crate) fn link_dump(sequence: u32) -> Vec<u8> {
    let all = link_request(0, libc::NLM_F_DUMP);
    wire::request(all.kind, all.flags, sequence, &all.body)
}

/// Asks for the link with this index, or with NLM_F_DUMP and 0 for all, without the statistics.
fn link_request(index: u32, flags: i32) -> Request {
    let mut body = link::header(index);
    let without_statistics = libc::RTEXT_FILTER_SKIP_STATS.to_ne_bytes();
    body.extend(wire::attribute(libc::IFLA_EXT_MASK, &without_statistics));
    Request {
        kind: libc::RTM_GETLINK,
        flags,
        body,
        answer: libc::RTM_NEWLINK,
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
