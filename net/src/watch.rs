//! News of links, for an event loop: no thread, no runtime, one socket.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use rtnetlink::packet_core::{
    NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::netlink::Link;
use crate::netns;

/// The group that RTM_NEWLINK and RTM_DELLINK are sent to (RTNLGRP_LINK), as its bit in an address.
const LINK_GROUP: u32 = 1;

/// What happened to a watched link.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LinkEvent {
    /// The link's interface index.
    pub index: u32,
    /// Its name at the time.
    pub name: String,
    /// What is new.
    pub change: LinkChange,
}

/// What is new about a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LinkChange {
    /// The wire is there, or gone (IFF_LOWER_UP).
    Carrier(bool),
    /// Somebody has brought it up, or down (IFF_UP).
    Admin(bool),
    /// Its new MTU in bytes, without the Ethernet header.
    Mtu(u32),
    /// It doesn't exist in this namespace any more. Nothing more will be heard of it.
    Deleted,
}

/// Watches some links of one network namespace. Wait for [`LinkWatch::as_fd`] to become readable, then call
/// [`LinkWatch::next`] until it has nothing more.
///
/// The first events tell what is amiss already: for a link that is up, has its carrier and exists there is none.
#[derive(Debug)]
pub struct LinkWatch {
    socket: Socket,
    /// What is known of each link; None for one that is gone.
    known: BTreeMap<u32, Option<State>>,
    ready: VecDeque<LinkEvent>,
    /// A dump that is under way: the links that it has shown so far.
    dump: Option<Vec<u32>>,
    /// It may have missed some.
    dump_again: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    name: String,
    carrier: bool,
    up: bool,
    mtu: u32,
}

impl LinkWatch {
    /// Watches the links with these indexes in the caller's network namespace.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the socket, the subscription or the list of links.
    pub fn new(indexes: &[u32]) -> io::Result<Self> {
        Self::over(open_socket()?, indexes)
    }

    /// Watches by a socket that somebody else has opened, by [`Macvtap::watch_socket`](crate::Macvtap::watch_socket), the
    /// links with these indexes in its network namespace. That takes no privilege.
    ///
    /// # Errors
    ///
    /// When it is no such socket, or the kernel refuses the list of links.
    pub fn adopt(socket: OwnedFd, indexes: &[u32]) -> io::Result<Self> {
        use rustix::net::{AddressFamily, sockopt};
        let is_netlink = sockopt::socket_domain(&socket)? == AddressFamily::NETLINK;
        // NETLINK_ROUTE is 0, which is no protocol elsewhere.
        if !is_netlink || sockopt::socket_protocol(&socket)?.is_some() {
            return Err(io::Error::other("not a socket of rtnetlink"));
        }
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
        // SAFETY: it is an open socket, and from here on the new owner's.
        let socket = unsafe { Socket::from_raw_fd(socket.into_raw_fd()) };
        socket.set_non_blocking(true)?;
        Self::over(socket, indexes)
    }

    fn over(socket: Socket, indexes: &[u32]) -> io::Result<Self> {
        let mut watch = Self {
            socket,
            // As a link should be, so that the dump makes events of all else.
            known: indexes
                .iter()
                .map(|index| (*index, Some(State::healthy())))
                .collect(),
            ready: VecDeque::new(),
            dump: None,
            dump_again: false,
        };
        watch.request_dump()?;
        Ok(watch)
    }

    /// Watches the links with these indexes in another network namespace, of which `namespace` is a descriptor.
    ///
    /// # Errors
    ///
    /// As for [`LinkWatch::new`], and without CAP_SYS_ADMIN for both namespaces.
    pub fn in_namespace(namespace: BorrowedFd<'_>, indexes: &[u32]) -> io::Result<Self> {
        netns::on_own_thread(|| {
            netns::enter(namespace)?;
            Self::new(indexes)
        })?
    }

    /// The next event; None when there is none for now.
    ///
    /// When events came faster than they were fetched, the kernel drops some. The state of all links is then asked for
    /// again, and the differences come as events: what was lost in between is only what has passed.
    ///
    /// # Errors
    ///
    /// When the socket fails, which it doesn't in an ordinary life.
    #[allow(
        clippy::should_implement_trait,
        reason = "an iterator that ends may not go on later"
    )]
    pub fn next(&mut self) -> io::Result<Option<LinkEvent>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            match self.socket.recv_from_full() {
                Ok((datagram, sender)) if sender.port_number() == 0 => self.learn(&datagram)?,
                // Another process may write to the socket; only the kernel is believed.
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    log::debug!("events of links were lost: asking for the state of all");
                    self.request_dump()?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn request_dump(&mut self) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message
            .attributes
            .push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetLink(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        match self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0) {
            Ok(_) => {
                self.dump = Some(Vec::new());
                Ok(())
            }
            // The one before is still under way.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                self.dump_again = true;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Takes the messages of a datagram in.
    fn learn(&mut self, datagram: &[u8]) -> io::Result<()> {
        let mut rest = datagram;
        while rest.len() >= HEADER {
            let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
            let Some(bytes) = rest.get(..length).filter(|_| length >= HEADER) else {
                return Err(io::Error::other("a netlink message with a wrong length"));
            };
            // One that this version cannot read is no reason to be blind to all others.
            match NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) {
                Ok(message) => self.take(message),
                Err(error) => log::debug!("a netlink message that cannot be read: {error}"),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(())
    }

    fn take(&mut self, message: NetlinkMessage<RouteNetlinkMessage>) {
        self.dump_again |= message.header.flags & NLM_F_DUMP_INTR != 0;
        match message.payload {
            // A bridge talks of its ports by the same messages: that one left it does not mean that it is gone.
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link),
            ) if link.header.interface_family == AddressFamily::Bridge => {}
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
                let link = Link::from(link);
                if let Some(shown) = &mut self.dump {
                    shown.push(link.index);
                }
                self.compare(link);
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) => {
                self.forget(link.header.index);
            }
            NetlinkPayload::Done(_) => self.finish_dump(),
            NetlinkPayload::Overrun(_) | NetlinkPayload::Error(_) => {
                log::debug!(
                    "the kernel could not tell of all links: {:?}",
                    message.payload
                );
            }
            _ => {}
        }
    }

    fn finish_dump(&mut self) {
        // Links that came and went during a dump can make it skip others.
        let shown = self.dump.take();
        if std::mem::take(&mut self.dump_again) {
            if let Err(error) = self.request_dump() {
                log::warn!("the state of the links cannot be asked for: {error}");
            }
            return;
        }
        let Some(shown) = shown else { return };
        let is_gone = |(index, state): (&u32, &Option<State>)| {
            (state.is_some() && !shown.contains(index)).then_some(*index)
        };
        let gone: Vec<u32> = self.known.iter().filter_map(is_gone).collect();
        gone.into_iter().for_each(|index| self.forget(index));
    }

    /// Makes events of what is new about `link`.
    fn compare(&mut self, link: Link) {
        let Some(Some(known)) = self.known.get_mut(&link.index) else {
            return;
        };
        let new = State {
            name: link.name,
            carrier: link.carrier,
            up: link.up,
            mtu: link.mtu,
        };
        let old = std::mem::replace(known, new.clone());
        let changes = [
            (old.up != new.up).then_some(LinkChange::Admin(new.up)),
            (old.carrier != new.carrier).then_some(LinkChange::Carrier(new.carrier)),
            (old.mtu != new.mtu && old.mtu != 0).then_some(LinkChange::Mtu(new.mtu)),
        ];
        let event = |change| LinkEvent {
            index: link.index,
            name: new.name.clone(),
            change,
        };
        self.ready.extend(changes.into_iter().flatten().map(event));
    }

    fn forget(&mut self, index: u32) {
        if let Some(state) = self.known.get_mut(&index).and_then(Option::take) {
            let change = LinkChange::Deleted;
            self.ready.push_back(LinkEvent {
                index,
                name: state.name,
                change,
            });
        }
    }
}

/// A socket that hears of the links of this thread's network namespace, and stays in it.
fn open_socket() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind(&SocketAddr::new(0, LINK_GROUP))?;
    socket.set_non_blocking(true)?;
    Ok(socket)
}

/// The same in the network namespace that `namespace` is a descriptor of.
pub(crate) fn open_socket_in(namespace: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    let open = || {
        namespace.map_or(Ok(()), netns::enter)?;
        let socket = open_socket()?;
        // SAFETY: it is open, and the socket gives it up.
        Ok(unsafe { OwnedFd::from_raw_fd(socket.into_raw_fd()) })
    };
    netns::on_own_thread(open)?
}

/// Size of the header before each message (`struct nlmsghdr`).
const HEADER: usize = 16;

impl State {
    /// What needs no event when the first look shows it. The MTU is not known before.
    fn healthy() -> Self {
        Self {
            name: String::new(),
            carrier: true,
            up: true,
            mtu: 0,
        }
    }
}

impl AsFd for LinkWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
