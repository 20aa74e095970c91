//! Making a macvtap, or using one that exists, and giving back what was made.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use thiserror::Error;

use crate::diagnose::{self, Problem};
use crate::identity::LinkId;
use crate::link_guard::LinkGuard;
use crate::listen::FrameListener;
use crate::mac::MacAddr;
use crate::mode::Mode;
use crate::name::LinkName;
use crate::netlink::{Link, Netlink};
use crate::spec::MacvtapSpec;
use crate::sysfs::Sysfs;
use crate::watch::{self, LinkWatch};
use crate::{netns, queue, stale};

mod making;
use making::make_new;

/// A macvtap that could not be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// None could be made on a lower link.
    #[error("cannot make a macvtap on `{link}`{}", of(.namespace))]
    Make {
        /// The lower link.
        link: LinkName,
        /// The network namespace that it is in, if not the caller's.
        namespace: Option<Box<Path>>,
        /// Why.
        #[source]
        source: Problem,
    },
    /// The link is a macvtap already, and cannot be used.
    #[error("cannot use the macvtap `{link}`{}", of(.namespace))]
    Use {
        /// The macvtap.
        link: LinkName,
        /// The network namespace that it is in, if not the caller's.
        namespace: Option<Box<Path>>,
        /// Why.
        #[source]
        source: Problem,
    },
    /// What dead processes left behind could not be deleted.
    #[error("cannot clear away what dead processes left")]
    Stale(#[source] Problem),
}

fn of(namespace: &Option<Box<Path>>) -> String {
    let words = |path: &Path| format!(" of the network namespace {}", path.display());
    namespace.as_deref().map(words).unwrap_or_default()
}

/// The open queues of a macvtap that is up. Dropping it deletes the macvtap, unless it existed before.
#[derive(Debug)]
pub struct Macvtap {
    // Before the guard: fields are dropped in order, and a deleted macvtap's queue cannot be used.
    queues: Vec<OwnedFd>,
    link_guard: LinkGuard,
    /// Of an existing macvtap; that of a new one is the guard's.
    namespace: Option<OwnedFd>,
    id: LinkId,
    name: String,
    lower: String,
    lower_id: Option<LinkId>,
    mac: MacAddr,
    mtu: u32,
    mode: Mode,
}

impl Macvtap {
    /// Makes a macvtap on the link that `spec` names, brings it up and opens its queues. When that link is itself a
    /// macvtap, opens queues of it instead and changes nothing.
    ///
    /// The queues are non-blocking and close-on-exec. Header size, offloads and send buffer are the driver's defaults.
    ///
    /// The stale links of the caller's namespace are deleted first (see [`delete_stale`](crate::delete_stale())), so that they stand in
    /// nobody's way.
    ///
    /// # Errors
    ///
    /// One of the [`Problem`]s, which then left nothing behind.
    pub fn open(spec: &MacvtapSpec) -> Result<Self, Error> {
        netns::on_own_thread(|| open_here(spec))
            .map_err(|source| make_error(spec, Problem::from_step("start a thread")(source)))?
    }

    /// The first queue: a read takes one received frame, a write sends one, each behind a virtio-net header unless
    /// TUNSETIFF turns that off.
    pub fn queue(&self) -> BorrowedFd<'_> {
        self.queues[0].as_fd()
    }

    /// All queues, as many as were asked for.
    pub fn queues(&self) -> &[OwnedFd] {
        &self.queues
    }

    /// Watches the macvtap, whose carrier and end follow the lower's.
    ///
    /// # Errors
    ///
    /// As for [`LinkWatch::in_namespace`].
    pub fn watch(&self) -> io::Result<LinkWatch> {
        match self.namespace() {
            Some(namespace) => LinkWatch::in_namespace(namespace, &[self.id.index]),
            // Without a right to other namespaces it can only be in this one.
            None => LinkWatch::new(&[self.id.index]),
        }
    }

    /// A socket by which another process, one without privileges, can watch the macvtap: see [`LinkWatch::from_socket`].
    ///
    /// # Errors
    ///
    /// As for [`LinkWatch::in_namespace`].
    pub fn watch_socket(&self) -> io::Result<OwnedFd> {
        watch::open_socket_in(self.namespace())
    }

    /// Listens to what its user sends, where that tells about it.
    ///
    /// # Errors
    ///
    /// As for [`FrameListener::in_namespace`].
    pub fn listen(&self) -> io::Result<FrameListener> {
        match self.namespace() {
            Some(namespace) => FrameListener::in_namespace(namespace, self.id.index, self.mac),
            None => FrameListener::new(self.id.index, self.mac),
        }
    }

    /// Whether it was made by [`Macvtap::open`], and did not exist before.
    pub fn is_new(&self) -> bool {
        self.link_guard.is_of_new()
    }

    /// The namespace that it lives in, if that may not be the caller's.
    fn namespace(&self) -> Option<BorrowedFd<'_>> {
        let existing = || self.namespace.as_ref().map(AsFd::as_fd);
        self.link_guard.namespace().or_else(existing)
    }

    /// Queues and macvtap apart, for a user that gives the queues away: keep the guard as long as they are used.
    pub fn into_parts(self) -> (Vec<OwnedFd>, LinkGuard) {
        (self.queues, self.link_guard)
    }

    /// The address, read from the queue itself.
    pub fn mac(&self) -> MacAddr {
        self.mac
    }

    /// In bytes, without the Ethernet header.
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// How it treats its siblings.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Its name in the network namespace that it lives in.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of the link that it sits on; the macvtap's own when that link is in a namespace out of sight.
    pub fn lower(&self) -> &str {
        &self.lower
    }

    /// Which link it is.
    pub fn id(&self) -> LinkId {
        self.id
    }

    /// Which link it sits on; None when that is in a namespace out of sight.
    pub fn lower_id(&self) -> Option<LinkId> {
        self.lower_id
    }
}

fn make_error(spec: &MacvtapSpec, source: Problem) -> Error {
    Error::Make {
        link: spec.link.clone(),
        namespace: spec.lower_netns.as_deref().map(Box::from),
        source,
    }
}

/// [`Macvtap::open`], on a thread that may change its namespace.
fn open_here(spec: &MacvtapSpec) -> Result<Macvtap, Error> {
    let make = |source| make_error(spec, source);
    spec.check().map_err(make)?;
    let home = netns::current()
        .map_err(Problem::from_step("show this thread's network namespace"))
        .map_err(make)?;
    let connect = || Netlink::connect().map_err(Problem::from_step("connect to rtnetlink"));
    let mut host = connect().map_err(make)?;
    stale::try_delete_stale(&host);
    if let Some(path) = &spec.lower_netns {
        netns::enter_path(path).map_err(make)?;
        host = connect().map_err(make)?;
    }
    let links = host
        .links()
        .map_err(Problem::from_step("list the network interfaces"))
        .map_err(make)?;
    let link = diagnose::find(&links, spec.link.as_str()).map_err(make)?;
    if link.is_macvtap() {
        use_existing(&links, link, spec).map_err(|source| Error::Use {
            link: spec.link.clone(),
            namespace: spec.lower_netns.as_deref().map(Box::from),
            source,
        })
    } else {
        make_new(&host, &links, link, spec, home).map_err(make)
    }
}

fn use_existing(links: &[Link], macvtap: &Link, spec: &MacvtapSpec) -> Result<Macvtap, Problem> {
    diagnose::check_existing(links, macvtap, spec)?;
    let sysfs = Sysfs::of_this_namespace().map_err(Problem::from_step("open sysfs"))?;
    let (queues, mac) = queue::open(&sysfs, macvtap, spec.queues)?;
    log::info!("{} is a macvtap already and is used as it is", macvtap.name);
    diagnose::warn_of_filter(macvtap);
    let lower = diagnose::real_device(links, macvtap).name.clone();
    let namespace = this_namespace()?;
    let id = |index| LinkId { namespace, index };
    Ok(Macvtap {
        queues,
        link_guard: LinkGuard::of_nothing(),
        namespace: spec
            .lower_netns
            .as_ref()
            .and_then(|_| netns::current().ok()),
        id: id(macvtap.index),
        name: macvtap.name.clone(),
        lower,
        lower_id: macvtap.lower.map(id),
        mac,
        mtu: macvtap.mtu,
        // The kernel tells it of every macvtap.
        mode: macvtap.mode.unwrap_or_default(),
    })
}

fn this_namespace() -> Result<u64, Problem> {
    netns::inode_of_current().map_err(Problem::from_step("show this thread's network namespace"))
}
