//! Finding, opening and proving a queue of a macvtap.
//!
//! The node of a macvtap is `/dev/tap<index>`, and interface indexes repeat across network namespaces: that node can
//! be another namespace's device, or missing, as in a container. So the device number comes from the sysfs of the right
//! namespace, a node with another number is left alone, and the open descriptor has to show the link's name and MAC.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Dev, FileType, Mode, OFlags};
use thiserror::Error;

use crate::ioctl;
use crate::mac::{MacAddr, ParseMacError};
use crate::netlink::Link;
use crate::spec::MacvtapSpec;
use crate::sysfs::{self, Sysfs};

/// Why no queue of a macvtap, whose name stands first, could be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum QueueError {
    /// Sysfs doesn't show the link, or not its device.
    #[error("cannot find the tap device of `{0}` in sysfs")]
    Find(String, #[source] io::Error),
    /// The right node is there, and is not ours to open.
    #[error("`{1}`, the device of `{0}`, may not be opened")]
    NotPermitted(String, String),
    /// The right node is there, and the driver refused to open it.
    #[error("cannot open `{1}`, the device of `{0}`")]
    Open(String, String, #[source] io::Error),
    /// The driver opens no more at once.
    #[error("all {max} queues that `{0}` can have are open", max = MacvtapSpec::MAX_QUEUES)]
    AllOpen(String),
    /// `/dev/tap<index>` isn't the right node, and a private one could not be made and opened.
    #[error("cannot make a device node for `{0}` ({1} is missing or another network namespace's)")]
    PrivateNode(String, String, #[source] io::Error),
    /// The open descriptor cannot be asked whose it is.
    #[error("cannot ask the queue of `{0}` for its name and MAC address")]
    Ask(String, #[source] io::Error),
    /// The open descriptor belongs to another link.
    #[error("the device node opened for `{0}` turned out to be that of {1}")]
    WrongDevice(String, String),
    /// The macvtap's MAC address is none that a NIC may have.
    #[error("`{0}` has no usable MAC address")]
    Mac(String, #[source] ParseMacError),
}

impl QueueError {
    /// What to do about it, where there is something to do.
    pub fn remedy(&self) -> Option<String> {
        Some(match self {
            Self::Find(..) | Self::WrongDevice(..) => {
                "check that the sysfs on /sys is that of this network namespace".into()
            }
            Self::NotPermitted(_, node) => format!(
                "run as root, or let root give it away with `chown {} {node}`",
                rustix::process::geteuid().as_raw()
            ),
            Self::AllOpen(_) => "close some of them, or use another macvtap".into(),
            Self::PrivateNode(..) => {
                "run as root, and in a container allow mknod and the device".into()
            }
            Self::Mac(link, _) => format!("give it one with `ip link set {link} address MAC`"),
            Self::Open(..) | Self::Ask(..) => return None,
        })
    }
}

/// Opens `count` new queues of `link`, non-blocking, and reads its MAC address from them; also returns the number of its device.
/// Every queue takes a share of what is received.
pub(crate) fn open(
    sysfs: &Sysfs,
    link: &Link,
    count: u32,
) -> Result<(Dev, Vec<OwnedFd>, MacAddr), QueueError> {
    let device = sysfs
        .tap_device(&link.name, link.index)
        .map_err(|source| QueueError::Find(link.name.clone(), source))?;
    let first = open_device(device, link)?;
    let mac = prove(&first, link)?;
    let mut queues = vec![first];
    for _ in 1..count {
        let queue = open_device(device, link)?;
        prove(&queue, link)?;
        queues.push(queue);
    }
    Ok((device, queues, mac))
}

/// The same for a link that was just made, by its node alone: its index was chosen at random, so no other namespace has a
/// node of that name, and the sysfs of a new namespace takes a while to be made. None where that does not work.
pub(crate) fn open_new(link: &Link, count: u32) -> Option<(Dev, Vec<OwnedFd>, MacAddr)> {
    let node = format!("/dev/tap{}", link.index);
    let open = |_| {
        let queue = rustix::fs::open(&node, READ_WRITE, Mode::empty()).ok()?;
        let mac = prove(&queue, link).ok()?;
        Some((queue, mac))
    };
    let (queues, macs): (Vec<_>, Vec<_>) = (0..count).map(open).collect::<Option<_>>()?;
    let device = rustix::fs::fstat(queues.first()?).ok()?.st_rdev;
    Some((device, queues, *macs.first()?))
}

const READ_WRITE: OFlags = OFlags::RDWR.union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

fn open_device(device: Dev, link: &Link) -> Result<OwnedFd, QueueError> {
    let (node, link) = (format!("/dev/tap{}", link.index), link.name.clone());
    let is_right = |stat: rustix::fs::Stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == device
    };
    if !rustix::fs::stat(&node).is_ok_and(is_right) {
        return open_private_node(device).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => QueueError::AllOpen(link),
            _ => QueueError::PrivateNode(link, node, source),
        });
    }
    rustix::fs::open(&node, READ_WRITE, Mode::empty()).map_err(|errno| match errno {
        rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => QueueError::NotPermitted(link, node),
        rustix::io::Errno::BUSY => QueueError::AllOpen(link),
        errno => QueueError::Open(link, node, errno.into()),
    })
}

/// Makes a node for `device` in a tmpfs that only this call sees, and opens it.
fn open_private_node(device: Dev) -> io::Result<OwnedFd> {
    let directory = sysfs::own_mount("tmpfs")?;
    rustix::fs::mknodat(
        &directory,
        "tap",
        FileType::CharacterDevice,
        Mode::RUSR | Mode::WUSR,
        device,
    )?;
    Ok(rustix::fs::openat(
        &directory,
        "tap",
        READ_WRITE,
        Mode::empty(),
    )?)
}

fn prove(queue: &OwnedFd, link: &Link) -> Result<MacAddr, QueueError> {
    let ask = |source| QueueError::Ask(link.name.clone(), source);
    let (name, _) = ioctl::tap_interface(queue.as_fd()).map_err(ask)?;
    let bytes = ioctl::tap_mac(queue.as_fd()).map_err(ask)?;
    let mac =
        MacAddr::try_from(bytes).map_err(|source| QueueError::Mac(link.name.clone(), source))?;
    if name == link.name && Some(bytes) == link.mac {
        Ok(mac)
    } else {
        let found = format!("`{name}` with MAC {mac}");
        Err(QueueError::WrongDevice(link.name.clone(), found))
    }
}
