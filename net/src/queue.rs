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

/// Why no queue of a macvtap could be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum QueueError {
    /// Sysfs doesn't show the link, or not its device.
    #[error(
        "cannot find the tap device of `{link}` in sysfs; is /sys mounted, and that of this network namespace?"
    )]
    Find {
        /// The macvtap.
        link: String,
        /// What sysfs said.
        #[source]
        source: io::Error,
    },
    /// The right node is there, and is not ours to open.
    #[error("`{node}`, the device of `{link}`, may not be opened: run as root, or let root give it away with `chown {user} {node}`", user = rustix::process::geteuid().as_raw())]
    NotPermitted {
        /// The macvtap.
        link: String,
        /// The path of its node.
        node: String,
    },
    /// The right node is there, and the driver refused to open it.
    #[error("cannot open `{node}`, the device of `{link}`")]
    Open {
        /// The macvtap.
        link: String,
        /// The path of its node.
        node: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The driver opens no more at once.
    #[error(
        "all {max} queues that `{link}` can have are open: close some of them, or use another macvtap",
        max = MacvtapSpec::MAX_QUEUES
    )]
    AllOpen {
        /// The macvtap.
        link: String,
    },
    /// `/dev/tap<index>` isn't the right node, and a private one could not be made and opened.
    #[error(
        "cannot make a device node for `{link}` ({node} is missing or another network namespace's); run as root, and in a container allow mknod and the device"
    )]
    PrivateNode {
        /// The macvtap.
        link: String,
        /// The path of the node that would have been the usual one.
        node: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The open descriptor cannot be asked whose it is.
    #[error("cannot ask the queue of `{link}` for its name and MAC address")]
    Ask {
        /// The macvtap.
        link: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The open descriptor belongs to another link.
    #[error(
        "the device node opened for `{link}` turned out to be that of {found}; is /sys that of another network namespace?"
    )]
    WrongDevice {
        /// The macvtap.
        link: String,
        /// Name and MAC of the link that it is.
        found: String,
    },
    /// The macvtap's MAC address is none that a NIC may have.
    #[error(
        "`{link}` has no usable MAC address; give it one with `ip link set {link} address MAC`"
    )]
    Mac {
        /// The macvtap.
        link: String,
        /// What is wrong with it.
        #[source]
        source: ParseMacError,
    },
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
        .map_err(|source| QueueError::Find {
            link: link.name.clone(),
            source,
        })?;
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

const READ_WRITE: OFlags = OFlags::RDWR.union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

fn open_device(device: Dev, link: &Link) -> Result<OwnedFd, QueueError> {
    let (node, link) = (format!("/dev/tap{}", link.index), link.name.clone());
    let is_right = |stat: rustix::fs::Stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == device
    };
    if !rustix::fs::stat(&node).is_ok_and(is_right) {
        return open_private_node(device).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => QueueError::AllOpen { link },
            _ => QueueError::PrivateNode { link, node, source },
        });
    }
    rustix::fs::open(&node, READ_WRITE, Mode::empty()).map_err(|errno| match errno {
        rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => {
            QueueError::NotPermitted { link, node }
        }
        rustix::io::Errno::BUSY => QueueError::AllOpen { link },
        errno => QueueError::Open {
            link,
            node,
            source: errno.into(),
        },
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
    let ask = |source| QueueError::Ask {
        link: link.name.clone(),
        source,
    };
    let (name, _) = ioctl::tap_interface(queue.as_fd()).map_err(ask)?;
    let bytes = ioctl::tap_mac(queue.as_fd()).map_err(ask)?;
    let mac = MacAddr::try_from(bytes).map_err(|source| QueueError::Mac {
        link: link.name.clone(),
        source,
    })?;
    if name == link.name && Some(bytes) == link.mac {
        Ok(mac)
    } else {
        Err(QueueError::WrongDevice {
            link: link.name.clone(),
            found: format!("`{name}` with MAC {mac}"),
        })
    }
}
