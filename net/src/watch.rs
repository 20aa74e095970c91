//! News of links, for an event loop: no thread, no runtime, one socket.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, sockopt};

use crate::mac::MacAddr;
use crate::netlink::{Link, Message, Messages, flags_change, is_interrupted, link_dump, receive};
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
    /// What has changed.
    pub change: LinkChange,
}

/// What has changed about a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LinkChange {
    /// Its carrier is there, or gone (IFF_LOWER_UP).
    Carrier(bool),
    /// It was brought up, or down (IFF_UP).
    Admin(bool),
    /// Its new MTU in bytes, without the Ethernet header.
    Mtu(u32),
    /// Its new MAC address.
    Mac(MacAddr),
    /// It takes every multicast frame now, or no longer (IFF_ALLMULTI).
    AllMulticast(bool),
    /// What [`LinkWatch::turn_all_multicast_on`] asked for was refused, with this error number.
    Refused(i32),
    /// It doesn't exist in this namespace any more; its last event.
    Deleted,
}

/// Watches some links of one network namespace. Wait for [`LinkWatch::as_fd`] to become readable, then call
/// [`LinkWatch::next`] until it has nothing more.
///
/// The first events are those of links that are down, without carrier or gone; for others there is none.
#[derive(Debug)]
pub struct LinkWatch {
    socket: OwnedFd,
    /// What is known of each link, [`unseen`] before the first look; None for one that is gone.
    known: BTreeMap<u32, Option<Link>>,
    ready: VecDeque<LinkEvent>,
    /// The number of the last dump that was asked for.
    sequence: u32,
    /// A dump that is under way: the links that it has shown so far.
    dump: Option<Vec<u32>>,
    /// It may have missed some.
    dump_again: bool,
    /// The link that was last asked to be changed.
    changed: u32,
}

/// The number of a request for a change, which no dump has.
const CHANGE: u32 = u32::MAX;

/// A link as it should be, so that the first look makes events of all else.
fn unseen() -> Link {
    Link {
        up: true,
        carrier: true,
        ..Link::default()
    }
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

    /// Watches by a socket that another process has opened, by [`Macvtap::watch_socket`](crate::Macvtap::watch_socket), the
    /// links with these indexes in its network namespace. That takes no privilege.
    ///
    /// # Errors
    ///
    /// When it is no such socket, or the kernel refuses the list of links.
    pub fn from_socket(socket: OwnedFd, indexes: &[u32]) -> io::Result<Self> {
        let is_netlink = sockopt::socket_domain(&socket)? == AddressFamily::NETLINK;
        // NETLINK_ROUTE is 0, which is no protocol elsewhere.
        if !is_netlink || sockopt::socket_protocol(&socket)?.is_some() {
            return Err(io::Error::other("not a socket of rtnetlink"));
        }
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
        rustix::io::ioctl_fionbio(&socket, true)?;
        Self::over(socket, indexes)
    }

    fn over(socket: OwnedFd, indexes: &[u32]) -> io::Result<Self> {
        let mut watch = Self {
            socket,
            known: indexes
                .iter()
                .map(|index| (*index, Some(unseen())))
                .collect(),
            ready: VecDeque::new(),
            sequence: 0,
            dump: None,
            dump_again: false,
            changed: 0,
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
        Self::over(open_socket_in(Some(namespace))?, indexes)
    }

    /// The next event; None when there is none for now.
    ///
    /// When events came faster than they were fetched, the kernel drops some. The state of all links is then requested
    /// again, and the differences become events.
    ///
    /// # Errors
    ///
    /// When the socket fails.
    #[allow(
        clippy::should_implement_trait,
        reason = "an iterator that ends may not go on later"
    )]
    pub fn next(&mut self) -> io::Result<Option<LinkEvent>> {
        // Not kept: there may be nothing for long.
        let mut buffer = Vec::new();
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            match receive(self.socket.as_fd(), &mut buffer) {
                // Another process may write to the socket.
                Ok((datagram, sender)) if sender.is_some_and(|sender| sender.pid() == 0) => {
                    self.learn(datagram)?;
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    log::debug!("events of links were lost: asking for the state of all");
                    self.request_dump()?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Asks the kernel to let a watched link take every multicast frame, and does not wait: the change is an event, and so
    /// is a refusal. The request itself would wait while the kernel's lock (RTNL) is held, so a thread sends it.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started.
    pub fn turn_all_multicast_on(&mut self, index: u32) -> io::Result<()> {
        let socket = self.socket.try_clone()?;
        let request = flags_change(index, libc::IFF_ALLMULTI as u32, CHANGE);
        self.changed = index;
        let ask = move || {
            let kernel = SocketAddrNetlink::new(0, 0);
            if let Err(error) = rustix::net::sendto(&socket, &request, SendFlags::NOSIGNAL, &kernel)
            {
                log::debug!("cannot ask for a link's multicast frames: {error}");
            }
        };
        thread::Builder::new()
            .name("rtnetlink".to_owned())
            .spawn(ask)?;
        Ok(())
    }

    fn request_dump(&mut self) -> io::Result<()> {
        if self.dump.is_some() {
            // The kernel makes one after the other.
            self.dump_again = true;
            return Ok(());
        }
        self.sequence += 1;
        let request = link_dump(self.sequence);
        let kernel = SocketAddrNetlink::new(0, 0);
        rustix::net::sendto(&self.socket, &request, SendFlags::NOSIGNAL, &kernel)?;
        self.dump = Some(Vec::new());
        Ok(())
    }

    /// Takes the messages of a datagram in.
    fn learn(&mut self, datagram: &[u8]) -> io::Result<()> {
        let mut learnt = Messages(datagram).map(|message| self.take(message));
        learnt.find(Result::is_err).unwrap_or(Ok(()))
    }

    fn take(&mut self, message: Message<'_>) -> io::Result<()> {
        let is_of_dump = self.dump.is_some() && message.sequence == self.sequence;
        self.dump_again |= is_of_dump && is_interrupted(&message);
        if let Some(outcome) = message.outcome().filter(|_| is_of_dump) {
            return self.finish_dump(outcome);
        }
        if let Some(outcome) = message.outcome().filter(|_| message.sequence == CHANGE) {
            self.note_refusal(outcome);
            return Ok(());
        }
        // A bridge reports its ports by the same messages: one that left it is not deleted.
        let of_bridge = message.body.first() == Some(&(libc::AF_BRIDGE as u8));
        let Some(link) = Link::parse(message.body).filter(|_| !of_bridge) else {
            return Ok(());
        };
        match message.kind {
            libc::RTM_NEWLINK => {
                // One that came as news will be in the rest of the dump.
                if let Some(shown) = self.dump.as_mut().filter(|_| is_of_dump) {
                    shown.push(link.index);
                }
                self.compare(link);
            }
            libc::RTM_DELLINK => self.forget(link.index),
            _ => {}
        }
        Ok(())
    }

    fn finish_dump(&mut self, outcome: io::Result<()>) -> io::Result<()> {
        let shown = self.dump.take().unwrap_or_default();
        // Links that came and went during a dump can make it skip others.
        if std::mem::take(&mut self.dump_again) {
            return self.request_dump();
        }
        outcome?;
        let is_gone = |(index, link): (&u32, &Option<Link>)| {
            (link.is_some() && !shown.contains(index)).then_some(*index)
        };
        let gone: Vec<u32> = self.known.iter().filter_map(is_gone).collect();
        gone.into_iter().for_each(|index| self.forget(index));
        Ok(())
    }

    /// Makes events of what has changed about `link`.
    fn compare(&mut self, link: Link) {
        let Some(Some(known)) = self.known.get_mut(&link.index) else {
            return;
        };
        let old = std::mem::replace(known, link.clone());
        let is_first = old.name.is_empty();
        let later = |differs: bool| differs && !is_first;
        let changes = [
            (old.up != link.up).then_some(LinkChange::Admin(link.up)),
            (old.carrier != link.carrier).then_some(LinkChange::Carrier(link.carrier)),
            later(old.mtu != link.mtu).then_some(LinkChange::Mtu(link.mtu)),
            link.mac_addr()
                .filter(|_| later(old.mac != link.mac))
                .map(LinkChange::Mac),
            later(old.all_multicast != link.all_multicast)
                .then_some(LinkChange::AllMulticast(link.all_multicast)),
        ];
        for change in changes.into_iter().flatten() {
            self.report(&link, link.index, change);
        }
    }

    fn report(&mut self, link: &Link, index: u32, change: LinkChange) {
        self.ready.push_back(LinkEvent {
            index,
            name: link.name.clone(),
            change,
        });
    }

    fn note_refusal(&mut self, outcome: io::Result<()>) {
        let index = self.changed;
        let number = outcome.err().and_then(|error| error.raw_os_error());
        if let (Some(number), Some(Some(link))) = (number, self.known.get(&index)) {
            self.report(&link.clone(), index, LinkChange::Refused(number));
        }
    }

    fn forget(&mut self, index: u32) {
        if let Some(link) = self.known.get_mut(&index).and_then(Option::take) {
            self.report(&link, index, LinkChange::Deleted);
        }
    }
}

/// A socket that receives the events of all links of this thread's network namespace, and stays in it.
pub(crate) fn open_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    // No protocol stands for 0, which is NETLINK_ROUTE.
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, LINK_GROUP))?;
    Ok(socket)
}

/// The same in the network namespace that `namespace` is a descriptor of.
pub(crate) fn open_socket_in(namespace: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    netns::on_own_thread(|| {
        namespace.map_or(Ok(()), netns::enter)?;
        open_socket()
    })?
}

impl AsFd for LinkWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
