//! Making a macvtap, or using one that exists, and giving back what was made.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::diagnose::{self, Problem};
use crate::identity::LinkId;
use crate::link_guard::LinkGuard;
use crate::listen::FrameListener;
use crate::mac::MacAddr;
use crate::mode::Mode;
use crate::netlink::{Link, Netlink, Steps, watched};
use crate::record::RecordKey;
use crate::spec::MacvtapSpec;
use crate::sysfs::Sysfs;
use crate::watch::{self, LinkWatch};
use crate::{netns, queue, stale};

mod existing;
mod making;

pub use existing::{ExistingTapError, Passed, USUAL_MTU, inherit};
use making::make_new;

/// A macvtap that could not be had.
#[derive(Debug, Error)]
#[error("cannot {what}")]
#[non_exhaustive]
pub struct Error {
    what: String,
    /// Why.
    pub source: Problem,
}

/// The interface of some open queues: a macvtap, or with [`Macvtap::from_fds`] perhaps a tap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapInfo {
    /// Its name in its own network namespace.
    pub name: String,
    /// The name of the link that it sits on; its own where that link cannot be seen.
    pub lower: String,
    /// Its MAC address, read from a queue.
    pub mac: MacAddr,
    /// In bytes, without the Ethernet header; 1500 where it is unknown. A queue does not say it (`tap_ioctl` in
    /// drivers/net/tap.c has no SIOCGIFMTU).
    pub mtu: u32,
    /// The number of its character device, the same in all network namespaces. All taps share one.
    #[serde(default)]
    pub device: u64,
    /// Which link it is, where that is known.
    #[serde(default)]
    pub id: Option<LinkId>,
    /// Which link it sits on, where that is known.
    #[serde(default)]
    pub lower_id: Option<LinkId>,
    /// How it treats its siblings, where that is known.
    #[serde(default)]
    pub mode: Option<Mode>,
}

impl TapInfo {
    /// The record of its use.
    pub fn key(&self) -> RecordKey {
        RecordKey::of_tap(self.device, self.id, self.mac)
    }
}

/// The open queues of a macvtap that is up. Dropping it deletes the macvtap, unless it existed before.
#[derive(Debug)]
pub struct Macvtap {
    // Before the guard: fields are dropped in order, and a deleted macvtap's queue cannot be used.
    queues: Vec<OwnedFd>,
    link_guard: LinkGuard,
    sight: Sight,
    /// For [`Macvtap::watch`], from the thread that was in the link's namespace anyway.
    watch_socket: Option<OwnedFd>,
    is_passed: bool,
    info: TapInfo,
}

/// How this process sees the link.
#[derive(Debug)]
enum Sight {
    /// In the caller's network namespace.
    Here,
    /// In this one.
    In(OwnedFd),
    /// In the guard's.
    Guarded,
    /// By nothing but this rtnetlink socket, if there is one.
    By(Option<OwnedFd>),
}

impl Macvtap {
    /// Makes a macvtap on the link that `spec` names, brings it up and opens its queues. When that link is itself a
    /// macvtap, opens queues of it instead and changes nothing.
    ///
    /// The queues are non-blocking and close-on-exec. Header size, offloads and send buffer are the driver's defaults.
    ///
    /// The stale links of the caller's namespace are deleted first (see [`delete_stale`](crate::delete_stale())).
    ///
    /// # Errors
    ///
    /// One of the [`Problem`]s, and nothing is left of it then.
    pub fn open(spec: &MacvtapSpec) -> Result<Self, Error> {
        let its_spec = spec.clone();
        let opened = watched(move |steps| {
            let mut doing = MAKE;
            open_here(&its_spec, steps, &mut doing).map_err(|source| (doing, source))
        });
        opened
            .map_err(Problem::from_step("have a thread do it"))
            .map_err(|source| (MAKE, source))
            .and_then(|opened| opened)
            .map_err(|(doing, source)| {
                let of = |path: &PathBuf| format!(" of the network namespace {}", path.display());
                let of = spec.lower_netns.as_ref().map(of).unwrap_or_default();
                Error {
                    what: format!("{doing} `{}`{of}", spec.link),
                    source,
                }
            })
    }

    /// The first queue: a read takes one received frame, a write sends one, each after a virtio-net header unless
    /// TUNSETIFF turns that off.
    pub fn queue(&self) -> BorrowedFd<'_> {
        self.queues[0].as_fd()
    }

    /// All queues, as many as were asked for.
    pub fn queues(&self) -> &[OwnedFd] {
        &self.queues
    }

    /// What it is.
    pub fn info(&self) -> &TapInfo {
        &self.info
    }

    /// Watches the macvtap, whose carrier and end follow the lower's. None where it cannot be seen.
    ///
    /// # Errors
    ///
    /// As for [`LinkWatch::in_namespace`] and [`LinkWatch::from_socket`].
    pub fn watch(&mut self) -> io::Result<Option<LinkWatch>> {
        let Some(id) = self.info.id else {
            return Ok(None);
        };
        let socket = match &mut self.sight {
            Sight::By(socket) => socket.take(),
            _ => Some(
                self.watch_socket
                    .take()
                    .map_or_else(|| self.watch_socket(), Ok)?,
            ),
        };
        socket
            .map(|socket| LinkWatch::from_socket(socket, &[id.index]))
            .transpose()
    }

    /// A socket by which another process, one without privileges, can watch the macvtap: see [`LinkWatch::from_socket`].
    ///
    /// # Errors
    ///
    /// As for [`LinkWatch::in_namespace`].
    pub fn watch_socket(&self) -> io::Result<OwnedFd> {
        watch::open_socket_in(self.namespace())
    }

    /// Listens for frames that show its user's addresses. None where the macvtap cannot be seen.
    ///
    /// # Errors
    ///
    /// Without CAP_NET_RAW, and CAP_SYS_ADMIN if it is in another network namespace; and when it is gone.
    pub fn listen(&self) -> io::Result<Option<FrameListener>> {
        match (self.info.id, &self.sight) {
            (None, _) | (_, Sight::By(_)) => Ok(None),
            (Some(id), _) => {
                FrameListener::new(self.namespace(), id.index, self.info.mac).map(Some)
            }
        }
    }

    /// Whether it was made by [`Macvtap::open`], and did not exist before.
    pub fn is_new(&self) -> bool {
        self.link_guard.is_of_new()
    }

    /// Whether who has passed its queues on has said what it is, see [`Passed`].
    pub fn is_passed(&self) -> bool {
        self.is_passed
    }

    /// The namespace that it is in, if that may not be the caller's.
    fn namespace(&self) -> Option<BorrowedFd<'_>> {
        match &self.sight {
            Sight::In(namespace) => Some(namespace.as_fd()),
            Sight::Guarded => self.link_guard.namespace(),
            Sight::Here | Sight::By(_) => None,
        }
    }

    /// Queues and macvtap apart, for a user that gives the queues away: keep the guard as long as they are used.
    pub fn into_parts(self) -> (Vec<OwnedFd>, LinkGuard) {
        (self.queues, self.link_guard)
    }
}

const MAKE: &str = "make a macvtap on";

/// [`Macvtap::open`], on a thread that may change its namespace. It changes `doing` to what it does on a macvtap.
fn open_here(
    spec: &MacvtapSpec,
    steps: &Steps,
    doing: &mut &'static str,
) -> Result<Macvtap, Problem> {
    diagnose::check_spec(spec)?;
    let home =
        netns::current().map_err(Problem::from_step("show this thread's network namespace"))?;
    let mut host = connect(steps)?;
    let mut links = list(&host)?;
    let has_deleted = stale::try_delete_stale(&host, &links);
    if let Some(path) = &spec.lower_netns {
        let entered = netns::open(path).and_then(netns::enter);
        entered.map_err(Problem::from_namespace(path))?;
        host = connect(steps)?;
    }
    if has_deleted || spec.lower_netns.is_some() {
        links = list(&host)?;
    }
    let link = diagnose::find(&links, spec.link.as_str())?;
    let mut macvtap = if link.is_macvtap() {
        *doing = "use the macvtap";
        use_existing(&links, link, spec)?
    } else {
        make_new(&host, &links, link, spec, steps, home)?
    };
    // This thread is in its namespace.
    macvtap.watch_socket = watch::open_socket().ok();
    Ok(macvtap)
}

fn connect(steps: &Steps) -> Result<Netlink, Problem> {
    Netlink::connect_watched(steps).map_err(Problem::from_step("connect to rtnetlink"))
}

fn list(host: &Netlink) -> Result<Vec<Link>, Problem> {
    host.links()
        .map_err(Problem::from_step("list the network interfaces"))
}

fn use_existing(links: &[Link], macvtap: &Link, spec: &MacvtapSpec) -> Result<Macvtap, Problem> {
    diagnose::check_existing(links, macvtap, spec)?;
    let sysfs = Sysfs::of_this_namespace().map_err(Problem::from_step("open sysfs"))?;
    let (device, queues, mac) = queue::open(&sysfs, macvtap, spec.queues)?;
    log::info!("{} is a macvtap already and is used as it is", macvtap.name);
    diagnose::warn_of_filter(macvtap);
    let namespace = this_namespace()?;
    let id = |index| LinkId { namespace, index };
    let elsewhere = spec.lower_netns.as_ref();
    Ok(Macvtap {
        queues,
        link_guard: LinkGuard::of_nothing(),
        sight: elsewhere
            .and_then(|_| netns::current().ok())
            .map_or(Sight::Here, Sight::In),
        watch_socket: None,
        is_passed: false,
        info: TapInfo {
            name: macvtap.name.clone(),
            lower: diagnose::real_device(links, macvtap).name.clone(),
            mac,
            mtu: macvtap.mtu,
            device,
            id: Some(id(macvtap.index)),
            lower_id: macvtap.lower.map(id),
            mode: macvtap.mode,
        },
    })
}

fn this_namespace() -> Result<u64, Problem> {
    netns::inode_of_current().map_err(Problem::from_step("show this thread's network namespace"))
}
