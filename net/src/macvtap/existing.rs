//! Queues that another program has opened: a shell by `3<>/dev/tap8`, a service manager, a container's network plug-in.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::fs::{FileType, OFlags};
use rustix::io::FdFlags;
use thiserror::Error;

use super::{Macvtap, Sight, TapInfo};
use crate::identity::LinkId;
use crate::link_guard::LinkGuard;
use crate::mac::{MacAddr, ParseMacError};
use crate::netlink::{Link, Netlink};
use crate::{diagnose, ioctl, netns};

/// What who has passed queues on says of their interface.
#[derive(Debug)]
pub struct Passed {
    /// Counts where the interface cannot be seen, and only if its MAC address is the same.
    pub info: TapInfo,
    /// From [`Macvtap::watch_socket`].
    pub watch: Option<OwnedFd>,
}

/// The MTU of an interface that cannot be seen: Ethernet's.
pub const USUAL_MTU: u32 = 1500;

/// Why descriptors are not the queues of one macvtap or tap.
#[derive(Debug, Error)]
#[non_exhaustive]
#[allow(
    missing_docs,
    reason = "the message above each variant says what it is and what its fields are"
)]
pub enum ExistingTapError {
    #[error("no file descriptor is given")]
    None,
    #[error(
        "fd {fd} is not open in this process: open a queue for it, as by `{fd}<>/dev/tapN` in a shell (sudo closes such descriptors, so become root first)"
    )]
    Closed { fd: RawFd },
    #[error("fd {fd} is given twice: name each queue once")]
    Twice { fd: RawFd },
    #[error("fd {fd} and fd {other} are the same queue: open the device once more for each queue")]
    SameQueue { fd: RawFd, other: RawFd },
    #[error("fd {fd} is {what}, not a macvtap queue: open one, as by `{fd}<>/dev/tapN` in a shell")]
    NotTap { fd: RawFd, what: &'static str },
    #[error(
        "fd {fd} belongs to `{name}`, a tun, which has no Ethernet frames: use a macvtap or a tap"
    )]
    Tun { fd: RawFd, name: String },
    #[error(
        "fd {fd} belongs to no interface: it is /dev/net/tun without TUNSETIFF, or the interface is gone"
    )]
    NoInterface { fd: RawFd },
    #[error(
        "fd {fd}, a queue of `{name}`, has no virtio-net header or an extra one before it: set IFF_VNET_HDR and IFF_NO_PI when it is opened"
    )]
    Headers { fd: RawFd, name: String },
    #[error(
        "fd {fd} is a queue of `{name}` ({mac}), and fd {first} one of `{first_name}` ({first_mac}): one NIC needs queues of one interface"
    )]
    Different {
        fd: RawFd,
        name: String,
        mac: MacAddr,
        first: RawFd,
        first_name: String,
        first_mac: MacAddr,
    },
    #[error(
        "`{name}`, whose queue fd {fd} is, has no usable MAC address; give it one with `ip link set {name} address MAC`"
    )]
    Mac {
        fd: RawFd,
        name: String,
        #[source]
        source: ParseMacError,
    },
    #[error("the kernel refused to {doing} fd {fd}")]
    Kernel {
        fd: RawFd,
        doing: &'static str,
        #[source]
        source: io::Error,
    },
}

/// Takes over descriptors that this process was started with, by their numbers.
///
/// # Errors
///
/// [`ExistingTapError::Closed`] and [`ExistingTapError::Twice`].
///
/// # Safety
///
/// Nothing else in this process may own one of the descriptors that are open under these numbers. So call it first, before
/// anything is opened.
pub unsafe fn inherit(numbers: &[RawFd]) -> Result<Vec<OwnedFd>, ExistingTapError> {
    for (at, &fd) in numbers.iter().enumerate() {
        if numbers[..at].contains(&fd) {
            return Err(ExistingTapError::Twice { fd });
        }
        // SAFETY: F_GETFD takes any number, and only asks.
        if fd < 0 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return Err(ExistingTapError::Closed { fd });
        }
    }
    let own = |&fd: &RawFd| {
        // SAFETY: it is open, occurs once, and by the caller's promise nothing else owns it.
        unsafe { OwnedFd::from_raw_fd(fd) }
    };
    Ok(numbers.iter().map(own).collect())
}

impl Macvtap {
    /// Proves that `fds` are the queues of one macvtap or tap, sets them non-blocking and close-on-exec, and asks them for
    /// what a NIC needs to know. That takes no privilege. Who has opened them may have `passed` more.
    ///
    /// Each has the flags IFF_TAP, IFF_NO_PI and IFF_VNET_HDR then. The header's size is the user's to set. One thing the
    /// kernel does not show of a tap, unlike of a macvtap: whether it was opened with IFF_NO_PI, as it must be (TUNGETIFF
    /// shows the same bit for IFF_NOFILTER).
    ///
    /// # Errors
    ///
    /// An [`ExistingTapError`]; the descriptors are closed then.
    pub fn from_fds(fds: Vec<OwnedFd>, passed: Option<Passed>) -> Result<Self, ExistingTapError> {
        let Queue {
            device, name, mac, ..
        } = examine_all(&fds)?;
        let passed = passed.filter(|passed| passed.info.mac == mac);
        let is_passed = passed.is_some();
        let info = TapInfo {
            lower: name.clone(),
            name,
            mac,
            mtu: USUAL_MTU,
            device,
            id: None,
            lower_id: None,
            mode: None,
        };
        let (info, sight) = match (visible(&info), passed) {
            (Some(mut seen), passed) => {
                if let (None, Some(Passed { info: said, .. })) = (seen.lower_id, passed) {
                    (seen.lower, seen.lower_id) = (said.lower, said.lower_id);
                }
                (seen, Sight::Here)
            }
            (None, Some(Passed { info: said, watch })) => {
                let name = info.name;
                let said = TapInfo {
                    name,
                    device,
                    ..said
                };
                (said, Sight::By(watch))
            }
            (None, None) => (info, Sight::By(None)),
        };
        Ok(Self {
            queues: fds,
            link_guard: LinkGuard::of_nothing(),
            sight,
            watch_socket: None,
            is_passed,
            info,
        })
    }
}

/// Proves all of them, and returns what the first says.
fn examine_all(fds: &[OwnedFd]) -> Result<Queue, ExistingTapError> {
    let mut queues: Vec<Queue> = Vec::new();
    for fd in fds {
        let queue = Queue::examine(fd.as_fd())?;
        if let Some(first) = queues.first() {
            queue.must_be_of(first)?;
        }
        if let Some(same) = queues.iter().find(|other| same_file(queue.fd, other.fd)) {
            return Err(ExistingTapError::SameQueue {
                fd: queue.fd,
                other: same.fd,
            });
        }
        prepare(fd.as_fd()).map_err(|source| ExistingTapError::Kernel {
            fd: queue.fd,
            doing: "set the flags of",
            source: source.into(),
        })?;
        queues.push(queue);
    }
    queues.into_iter().next().ok_or(ExistingTapError::None)
}

/// What one descriptor says of itself.
struct Queue {
    fd: RawFd,
    /// The device node's number: of one macvtap, or of all taps and tuns.
    device: u64,
    name: String,
    mac: MacAddr,
}

impl Queue {
    fn examine(tap: BorrowedFd<'_>) -> Result<Self, ExistingTapError> {
        let fd = tap.as_raw_fd();
        let refused = |doing| move |source| ExistingTapError::Kernel { fd, doing, source };
        let stat = rustix::fs::fstat(tap).map_err(|errno| refused("look at")(errno.into()))?;
        if let Some(what) = other_than_device(FileType::from_raw_mode(stat.st_mode)) {
            return Err(ExistingTapError::NotTap { fd, what });
        }
        let (name, flags) =
            ioctl::tap_interface(tap).map_err(|source| match source.raw_os_error() {
                Some(libc::ENOTTY | libc::EINVAL | libc::ENOSYS) => ExistingTapError::NotTap {
                    fd,
                    what: "some other device",
                },
                Some(libc::EBADFD | libc::ENOLINK) => ExistingTapError::NoInterface { fd },
                _ => refused("ask for the interface of")(source),
            })?;
        if flags & libc::IFF_TAP == 0 {
            return Err(ExistingTapError::Tun { fd, name });
        }
        let headers = libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        // A macvtap lets its flags be changed at any time, a tap only before it has an interface.
        if flags & headers != headers && ioctl::set_tap_flags(tap, libc::IFF_TAP | headers).is_err()
        {
            return Err(ExistingTapError::Headers { fd, name });
        }
        let bytes = ioctl::tap_mac(tap).map_err(refused("ask for the MAC address of"))?;
        match MacAddr::try_from(bytes) {
            Ok(mac) => Ok(Self {
                fd,
                device: stat.st_rdev,
                name,
                mac,
            }),
            Err(source) => Err(ExistingTapError::Mac { fd, name, source }),
        }
    }

    fn must_be_of(&self, first: &Self) -> Result<(), ExistingTapError> {
        let key = |queue: &Self| (queue.device, queue.name.clone(), queue.mac);
        if key(self) == key(first) {
            return Ok(());
        }
        Err(ExistingTapError::Different {
            fd: self.fd,
            name: self.name.clone(),
            mac: self.mac,
            first: first.fd,
            first_name: first.name.clone(),
            first_mac: first.mac,
        })
    }
}

fn other_than_device(kind: FileType) -> Option<&'static str> {
    match kind {
        FileType::CharacterDevice => None,
        FileType::RegularFile => Some("a file"),
        FileType::Directory => Some("a directory"),
        FileType::Socket => Some("a socket"),
        FileType::Fifo => Some("a pipe"),
        FileType::BlockDevice => Some("a disk"),
        _ => Some("something else"),
    }
}

/// Whether two descriptors are the same open file, as after dup(2) (kcmp(2), KCMP_FILE). A kernel that cannot tell is
/// believed to say no.
fn same_file(one: RawFd, other: RawFd) -> bool {
    const KCMP_FILE: libc::c_int = 0;
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: kcmp takes five numbers.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_FILE, one, other) };
    order == 0
}

fn prepare(queue: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let status = rustix::fs::fcntl_getfl(queue)?;
    rustix::fs::fcntl_setfl(queue, status | OFlags::NONBLOCK)?;
    rustix::io::fcntl_setfd(queue, FdFlags::CLOEXEC)
}

/// What the caller's network namespace shows of the interface, if that is in it.
fn visible(tap: &TapInfo) -> Option<TapInfo> {
    let is_it = |link: &&Link| {
        link.name == tap.name
            && link.mac == Some(tap.mac.octets())
            && (link.is_macvtap() || link.kind == "tun")
    };
    let find = || {
        let links = Netlink::connect()?.links()?;
        let Some(link) = links.iter().find(is_it) else {
            return Ok(None);
        };
        let namespace = netns::inode_of_current()?;
        let id = |index| LinkId { namespace, index };
        if !link.up {
            let name = &link.name;
            log::warn!(
                "{name} is down, and frames vanish in it silently: bring it up with `ip link set {name} up`"
            );
        }
        diagnose::warn_of_filter(link);
        let lower = diagnose::by_index(&links, link.lower);
        Ok::<_, io::Error>(Some(TapInfo {
            lower: lower.unwrap_or(link).name.clone(),
            mtu: link.mtu,
            id: Some(id(link.index)),
            lower_id: lower.map(|lower| id(lower.index)),
            mode: link.mode,
            ..tap.clone()
        }))
    };
    match netns::on_own_thread(find).and_then(|found| found) {
        Ok(seen) => seen,
        Err(error) => {
            log::debug!(
                "cannot look for {} in this network namespace: {error}",
                tap.name
            );
            None
        }
    }
}
