//! The kernel's tables of links, addresses and routes behind blocking calls, none of which waits for ever: what is asked
//! for goes through a small client of our own (`reading.rs`), what is made and changed through rtnetlink.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rtnetlink::LinkUnspec;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::LinkMessage;

mod changing;
mod ip;
mod link;
mod making;
mod policy;
mod reading;
mod wire;
mod worker;

pub(crate) use link::Link;
pub(crate) use making::{Birthplace, CHOSEN_INDEXES, Driver, NewLink, random_index, random_name};
use reading::Request;
pub(crate) use reading::{is_interrupted, receive};
pub(crate) use wire::{Message, Messages};
use worker::Worker;

/// A connection to the network namespace of the thread that made it.
#[derive(Debug)]
pub(crate) struct Netlink(Worker);

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

    /// Writes a text on a link.
    pub(crate) fn set_alias(&self, index: u32, alias: &str) -> io::Result<()> {
        self.set(LinkUnspec::new_with_index(index).alias(alias).build())
    }

    /// Moves a link that is down to another namespace, and renames it there: `mvt%d` stands for the first free one of
    /// `mvt0`, `mvt1` and so on.
    pub(crate) fn move_to(
        &self,
        namespace: BorrowedFd<'_>,
        index: u32,
        name: &str,
    ) -> io::Result<()> {
        let message = LinkUnspec::new_with_index(index).setns_by_fd(namespace.as_raw_fd());
        self.set(message.name(name).build())
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

    fn change(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.change_all(vec![(message, flags)])
    }

    /// Makes changes by one datagram, which the kernel works off in one go, and goes on after one that it refuses.
    fn change_all(&self, messages: Vec<(RouteNetlinkMessage, u16)>) -> io::Result<()> {
        self.0.call(move |changer| changer.change(messages))
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

/// The message that turns these flags of a link on (of IFF_*), with a refusal that has this number.
pub(crate) fn flags_change(index: u32, flags: u32, sequence: u32) -> Vec<u8> {
    let mut body = link::header(index);
    // ifi_flags, and ifi_change, which says which of them count.
    body[8..12].copy_from_slice(&flags.to_ne_bytes());
    body[12..16].copy_from_slice(&flags.to_ne_bytes());
    wire::request(libc::RTM_SETLINK, 0, sequence, &body)
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
