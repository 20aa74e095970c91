//! The kernel's tables of links, addresses, routes and so on. Calls block, none for ever. rtnetlink's messages make and
//! change things; a client of our own sends them, and reads what the kernel says (`client.rs`).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use rtnetlink::packet_core::{NLM_F_ACK, NetlinkSerializable};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::{LinkMessageBuilder, LinkUnspec};

mod client;
mod link;
mod new_link;
mod objects;
mod wire;
mod worker;

use client::{Client, Request};
pub(crate) use client::{is_interrupted, receive};
pub(crate) use link::Link;
pub(crate) use new_link::{CHOSEN_INDEXES, NewLink, random_index, random_name};
pub(crate) use objects::Object;
pub(crate) use wire::{Message, Messages};
use worker::Worker;
pub(crate) use worker::{Steps, watched};

/// A connection to the network namespace of the thread that made it.
#[derive(Debug)]
pub(crate) struct Netlink {
    client: Arc<Client>,
    by: By,
}

/// Who waits for the kernel.
#[derive(Debug)]
enum By {
    /// A thread of the connection's own, so that the caller need not wait for ever.
    Worker(Worker),
    /// The caller, which is watched itself.
    Caller(Steps),
}

impl Netlink {
    /// Connects to the network namespace of the calling thread.
    pub(crate) fn connect() -> io::Result<Self> {
        Ok(Self {
            client: Arc::new(Client::open()?),
            by: By::Worker(Worker::start(client::LIMIT)?),
        })
    }

    /// Connects to the network namespace of the calling thread, which is [`watched`]: it waits for the kernel itself.
    pub(crate) fn connect_watched(steps: &Steps) -> io::Result<Self> {
        Ok(Self {
            client: Arc::new(Client::open()?),
            by: By::Caller(steps.clone()),
        })
    }

    fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Client) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        match &self.by {
            By::Worker(worker) => {
                let client = Arc::clone(&self.client);
                worker.call(move || work(&client))
            }
            By::Caller(steps) => steps.take(|| work(&self.client)),
        }
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

    pub(crate) fn set_alias(&self, index: u32, alias: &str) -> io::Result<()> {
        self.set(link(index).alias(alias))
    }

    /// Moves a link that is down to another namespace, and renames it there: `mvt%d` stands for the first free one of
    /// `mvt0`, `mvt1` and so on.
    pub(crate) fn move_to(
        &self,
        namespace: BorrowedFd<'_>,
        index: u32,
        name: &str,
    ) -> io::Result<()> {
        self.set(link(index).setns_by_fd(namespace.as_raw_fd()).name(name))
    }

    /// Brings a link up and changes nothing else.
    pub(crate) fn up(&self, index: u32) -> io::Result<()> {
        self.set(link(index).up())
    }

    /// Brings a link up that receives all multicast: the macvlan driver would pass on only the groups that the *host* has
    /// joined.
    pub(crate) fn bring_up(&self, index: u32) -> io::Result<()> {
        self.set(link(index).allmulticast(true).up())
    }

    /// Makes a link a port of another one.
    pub(crate) fn set_master(&self, index: u32, master: u32) -> io::Result<()> {
        self.set(link(index).controller(master))
    }

    fn set(&self, link: LinkMessageBuilder<LinkUnspec>) -> io::Result<()> {
        self.change(vec![(RouteNetlinkMessage::SetLink(link.build()), 0)])
    }

    /// Deletes a link, and returns whether there was one.
    pub(crate) fn delete(&self, index: u32) -> io::Result<bool> {
        let message = RouteNetlinkMessage::DelLink(link(index).build());
        match self.change(vec![(message, 0)]) {
            Err(error) if is_gone(&error) => Ok(false),
            result => result.map(|()| true),
        }
    }

    /// Makes changes by one datagram, each with these of `NLM_F_*`: see [`Client::change`].
    fn change(&self, messages: Vec<(RouteNetlinkMessage, u16)>) -> io::Result<()> {
        let request = |(message, flags): (RouteNetlinkMessage, u16)| {
            let mut body = vec![0; message.buffer_len()];
            message.serialize(&mut body);
            Request {
                kind: message.message_type(),
                flags: (NLM_F_ACK | flags).into(),
                body,
            }
        };
        let requests: Vec<Request> = messages.into_iter().map(request).collect();
        self.call(move |client| client.change(&requests))
    }

    fn ask<T: Send + 'static>(
        &self,
        request: Request,
        parse: fn(&[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        self.call(move |client| client.ask(request, parse))
    }
}

/// The kernel says that there is no such link.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENODEV)
}

/// The beginning of a message about the link with this index.
fn link(index: u32) -> LinkMessageBuilder<LinkUnspec> {
    LinkUnspec::new_with_index(index)
}

/// The message that requests all links, with answers of this number.
pub(crate) fn link_dump(sequence: u32) -> Vec<u8> {
    let all = link_request(0, libc::NLM_F_DUMP);
    wire::request(all.kind, all.flags, sequence, &all.body)
}

/// The message that turns these flags of a link on (of IFF_*), with a refusal of this number.
pub(crate) fn flags_change(index: u32, flags: u32, sequence: u32) -> Vec<u8> {
    let mut body = link::header(index);
    // ifi_flags, and ifi_change, which says which of them count.
    body[8..12].copy_from_slice(&flags.to_ne_bytes());
    body[12..16].copy_from_slice(&flags.to_ne_bytes());
    wire::request(libc::RTM_SETLINK, 0, sequence, &body)
}

/// Requests the link with this index, or with NLM_F_DUMP and 0 all, without the statistics.
fn link_request(index: u32, flags: i32) -> Request {
    let mut body = link::header(index);
    let without_statistics = libc::RTEXT_FILTER_SKIP_STATS.to_ne_bytes();
    body.extend(wire::attribute(libc::IFLA_EXT_MASK, &without_statistics));
    Request {
        kind: libc::RTM_GETLINK,
        flags,
        body,
    }
}
