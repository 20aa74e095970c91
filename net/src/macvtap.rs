//! Making a macvtap, or using one that exists, and giving back what was made.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::diagnose::{self, Problem, Wish};
use crate::identity::LinkId;
use crate::lease::Lease;
use crate::listen::FrameListener;
use crate::mac::MacAddr;
use crate::mode::Mode;
use crate::name::LinkName;
use crate::netlink::{Link, Netlink, NewMacvtap};
use crate::owner::Owner;
use crate::spec::{MacvtapSpec, Placement};
use crate::sysfs::Sysfs;
use crate::watch::LinkWatch;
use crate::{netns, queue, reap, wifi};

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
    Reap(#[source] Problem),
}

fn of(namespace: &Option<Box<Path>>) -> String {
    let words = |path: &Path| format!(" of the network namespace {}", path.display());
    namespace.as_deref().map(words).unwrap_or_default()
}

/// The open queues of a macvtap that is up. Dropping it deletes the macvtap, unless it existed before.
#[derive(Debug)]
pub struct Macvtap {
    // Before the lease: fields are dropped in order, and a deleted macvtap's queue is of no use.
    queues: Vec<OwnedFd>,
    lease: Lease,
    /// Of an existing macvtap; that of a new one is the lease's.
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
    /// The links of the caller's namespace whose owner is dead are deleted on the way (see [`reap`](crate::reap())), so
    /// that they stand in nobody's way.
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
        let existing = || self.namespace.as_ref().map(AsFd::as_fd);
        match self.lease.namespace().or_else(existing) {
            Some(namespace) => LinkWatch::in_namespace(namespace, &[self.id.index]),
            // Without a right to other namespaces it can only be in this one.
            None => LinkWatch::new(&[self.id.index]),
        }
    }

    /// Listens to what its user sends, where that tells about it.
    ///
    /// # Errors
    ///
    /// As for [`FrameListener::in_namespace`].
    pub fn listen(&self) -> io::Result<FrameListener> {
        let existing = || self.namespace.as_ref().map(AsFd::as_fd);
        match self.lease.namespace().or_else(existing) {
            Some(namespace) => FrameListener::in_namespace(namespace, self.index, self.mac),
            None => FrameListener::new(self.index, self.mac),
        }
    }

    /// Queues and macvtap apart, for a user that gives the queues away: keep the lease as long as they are used.
    pub fn into_parts(self) -> (Vec<OwnedFd>, Lease) {
        (self.queues, self.lease)
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
    bury_the_dead(&host);
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

fn bury_the_dead(here: &Netlink) {
    match reap::reap_by(here) {
        Ok(reaped) => reaped.iter().for_each(|link| {
            log::info!(
                "deleted {}, which a dead process had left: {}",
                link.name,
                link.owner
            );
        }),
        Err(error) => log::debug!("cannot delete what dead processes left: {error}"),
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
        lease: Lease::of_nothing(),
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

fn make_new(
    host: &Netlink,
    links: &[Link],
    lower: &Link,
    spec: &MacvtapSpec,
    home: OwnedFd,
) -> Result<Macvtap, Problem> {
    diagnose::check_lower(links, lower, wifi::carrying(links, lower)?)?;
    let real = diagnose::real_device(links, lower);
    if real.index != lower.index {
        let (macvlan, real) = (&lower.name, &real.name);
        log::info!("{macvlan} is a macvlan: the macvtap goes straight onto {real} under it");
    }
    let mode = spec.mode.unwrap_or_default();
    let wish = Wish {
        links,
        lower: real,
        mode,
        mac: spec.mac,
        mtu: spec.mtu,
    };
    wish.check()?;
    let lower_id = LinkId {
        namespace: this_namespace()?,
        index: real.index,
    };

    // From here on this thread is in the new namespace; `host` still speaks to the lower's.
    let namespace = netns::enter_new().map_err(Problem::from_step("make a network namespace"))?;
    forbid_ipv6("default");
    let index = create(host, &wish, spec, namespace.as_fd())?;
    let lease = match spec.netns {
        Placement::Private => Lease::new(namespace, index, String::new()),
        Placement::Host => move_home(spec, index, home)?,
    };
    let (link, queues, mac) = start(&wish, spec, index)?;
    if mode == Mode::Source {
        log::warn!("in source mode the macvtap hears only listed senders, and its list is empty");
    }
    Ok(Macvtap {
        queues,
        lease,
        namespace: None,
        id: LinkId {
            namespace: this_namespace()?,
            index: link.index,
        },
        name: link.name,
        lower: real.name.clone(),
        lower_id: Some(lower_id),
        mac,
        mtu: link.mtu,
        mode,
    })
}

fn this_namespace() -> Result<u64, Problem> {
    netns::inode_of_current().map_err(Problem::from_step("show this thread's network namespace"))
}

/// Makes the macvtap in `namespace`, and tells its index.
fn create(
    host: &Netlink,
    wish: &Wish<'_>,
    spec: &MacvtapSpec,
    namespace: BorrowedFd<'_>,
) -> Result<u32, Problem> {
    let random = Problem::from_step("give random bytes for a MAC address and an interface index");
    let (mac, index) = chosen_mac(wish.mode, spec.mac)
        .and_then(|mac| Ok((mac, random_index()?)))
        .map_err(random)?;
    let new = NewMacvtap {
        name: &new_name(spec, index),
        index,
        lower: wish.lower.index,
        namespace,
        mode: wish.mode,
        mac,
        mtu: spec.mtu,
        tx_queue_len: spec.tx_queue_len,
        bc_queue_len: spec.bc_queue_len,
    };
    host.create(&new)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EEXIST) => name_taken(spec, index),
            _ => wish.explain_create(error),
        })?;
    Ok(index)
}

/// Moves the macvtap with this index from this thread's private namespace to `home`, and the thread too. It is tagged
/// before: whenever this process is killed, either the private namespace ends with the macvtap, or a tagged link stays.
fn move_home(spec: &MacvtapSpec, index: u32, home: OwnedFd) -> Result<Lease, Problem> {
    let owner = Owner::this_process()
        .map_err(Problem::from_step("tell from /proc who this process is"))?
        .to_string();
    let private = Netlink::connect().map_err(Problem::from_step("connect to rtnetlink"))?;
    private
        .set_alias(index, &owner)
        .map_err(Problem::from_step("tag the macvtap with its owner"))?;
    let free_name = spec.name.is_none().then_some(FREE_NAME);
    private
        .move_to(home.as_fd(), index, free_name)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EEXIST) => name_taken(spec, index),
            _ => Problem::from_step("move the macvtap to this network namespace")(error),
        })?;
    netns::enter(&home).map_err(Problem::from_step("return to this network namespace"))?;
    Ok(Lease::new(home, index, owner))
}

/// Brings up the macvtap with this index, in the namespace of this thread, and opens its queues.
fn start(
    wish: &Wish<'_>,
    spec: &MacvtapSpec,
    index: u32,
) -> Result<(Link, Vec<OwnedFd>, MacAddr), Problem> {
    let here = Netlink::connect().map_err(Problem::from_step("connect to rtnetlink"))?;
    let look = || {
        here.link(index)
            .map_err(Problem::from_step("show the new macvtap"))
    };
    let made = look()?;
    if spec.netns == Placement::Host {
        forbid_ipv6(&made.name);
    }
    bring_up(&here, index).map_err(|error| wish.explain_up(&made, error))?;
    // Once more: with an old udev or a passthru lower the address may have changed since.
    let link = look()?;
    let sysfs = Sysfs::of_this_namespace().map_err(Problem::from_step("open sysfs"))?;
    let (queues, mac) = queue::open(&sysfs, &link, spec.queues)?;
    Ok((link, queues, mac))
}

/// How long a MAC address that is taken may take to become free.
const PATIENCE: Duration = Duration::from_secs(1);

/// Brings the link up. When its MAC address is taken, that is tried again for a moment: the kernel removes the links of
/// a process that has just ended in the background, and whoever starts it again at once asks for the same address.
fn bring_up(here: &Netlink, index: u32) -> io::Result<()> {
    let start = Instant::now();
    loop {
        match here.bring_up(index) {
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EADDRINUSE | libc::EBUSY))
                    && start.elapsed() < PATIENCE =>
            {
                thread::sleep(PATIENCE / 50);
            }
            result => return result,
        }
    }
}

fn forbid_ipv6(link: &str) {
    if let Err(error) = netns::forbid_ipv6(link) {
        log::warn!(
            "cannot keep the host's IPv6 off the macvtap, its multicast may suffer: {error}"
        );
    }
}

/// Its name in the caller's namespace: the kernel puts the first number there that is free.
const FREE_NAME: &str = "mvt%d";

/// Its name in the private namespace, where there is no other but `lo`.
fn new_name(spec: &MacvtapSpec, index: u32) -> String {
    match (&spec.name, spec.netns) {
        (Some(name), _) => name.to_string(),
        (None, Placement::Private) => "macvtap0".to_owned(),
        // One that is nobody's in the caller's namespace, until it gets its number there.
        (None, Placement::Host) => format!("new{index:08x}"),
    }
}

fn name_taken(spec: &MacvtapSpec, index: u32) -> Problem {
    let name = new_name(spec, index);
    Problem::NameTaken { name }
}

/// What to ask the kernel for. A random address is chosen here, so that the kernel counts it as set on purpose and udev
/// leaves it; in passthru mode it is the lower's, unasked.
fn chosen_mac(mode: Mode, wanted: Option<MacAddr>) -> io::Result<Option<MacAddr>> {
    match (mode, wanted) {
        (Mode::Passthru, _) => Ok(None),
        (_, Some(mac)) => Ok(Some(mac)),
        (_, None) => MacAddr::random().map(Some),
    }
}

/// A high one: `/dev/tap<index>` then is nobody else's, whatever namespaces the machine has.
fn random_index() -> io::Result<u32> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u32::from_ne_bytes(bytes) & 0x3fff_ffff | 0x4000_0000)
}
