//! What a thread may do, and what it lacks to make and open macvtaps.
//!
//! Capabilities count in a user namespace and those under it. A network namespace belongs to the one that its maker was
//! in, and devices belong to the initial one: a process that has all capabilities in a user namespace of its own (as root
//! of a rootless container, or by `unshare -U`) has none over other networks, and none over devices.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use thiserror::Error;

use crate::{ioctl, netns};

/// What stands in the way of a process without enough rights.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Obstacle {
    /// It is no privileged process.
    #[error("this process lacks {}", .0.join(" and "))]
    Capabilities(Vec<&'static str>),
    /// Its capabilities are those of a user namespace that has no say over the network namespace.
    #[error(
        "this network namespace belongs to another user namespace than that of this process, and CAP_NET_ADMIN is needed in the one that owns it"
    )]
    ForeignNetwork,
    /// Its capabilities are those of a user namespace, and devices take those of the initial one.
    #[error(
        "this process is in a user namespace of its own, and opening a macvtap takes CAP_SYS_ADMIN and CAP_MKNOD in the initial one"
    )]
    Devices,
    /// It has the capabilities, and something refuses all the same.
    #[error(
        "this process has CAP_NET_ADMIN and CAP_SYS_ADMIN, and a security module or filter (seccomp, SELinux, AppArmor, the cgroup's devices) refuses it all the same"
    )]
    Other,
}

impl Obstacle {
    /// What to do about it.
    pub const fn remedy(&self) -> &'static str {
        match self {
            Self::Capabilities(_) => {
                "run it as root, for example with `sudo`, and in a container allow CAP_NET_ADMIN and CAP_SYS_ADMIN"
            }
            Self::ForeignNetwork => "run this outside, as root",
            Self::Devices => {
                "run this outside, as root, or have the macvtap opened there and its descriptors passed in"
            }
            Self::Other => "allow it there",
        }
    }

    /// Why the kernel has said EPERM or EACCES to this thread.
    pub(crate) fn of_this_thread() -> Self {
        let privileges = Privileges::of_this_thread();
        let found = privileges.map(|privileges| privileges.obstacle_to_making());
        found.ok().flatten().unwrap_or(Self::Other)
    }
}

/// What a thread may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Privileges {
    /// The effective capabilities (CapEff in proc(5)).
    effective: u64,
    /// They count in the initial user namespace.
    initial: bool,
    /// They count for the network namespace.
    over_network: bool,
    /// It is the user who owns new devices, root outside of all user namespaces.
    owns_devices: bool,
}

// include/uapi/linux/capability.h
const CAPABILITIES: [(u32, &str); 2] = [(12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN")];

impl Privileges {
    /// Those of the calling thread, over its network namespace.
    pub(crate) fn of_this_thread() -> io::Result<Self> {
        Self::over(netns::current()?.as_fd())
    }

    /// Those of the calling thread, over `network`.
    pub(crate) fn over(network: BorrowedFd<'_>) -> io::Result<Self> {
        let owner = rustix::fs::stat("/proc/sys/kernel")?.st_uid;
        Ok(Self {
            effective: effective(&fs::read_to_string("/proc/thread-self/status")?),
            initial: rustix::fs::stat("/proc/thread-self/ns/user")?.st_ino == INITIAL,
            // A kernel without that ioctl (before 4.9) is not worth a false alarm.
            over_network: !ioctl::is_owned_elsewhere(network),
            owns_devices: owner == rustix::process::geteuid().as_raw(),
        })
    }

    /// What keeps the thread from making macvtaps on links of the network namespace.
    pub(crate) fn obstacle_to_making(&self) -> Option<Obstacle> {
        if !self.over_network {
            return Some(Obstacle::ForeignNetwork);
        }
        let lacks = CAPABILITIES.iter();
        let lacks = lacks.filter(|(bit, _)| self.effective >> bit & 1 == 0);
        let lacks: Vec<&str> = lacks.map(|(_, name)| *name).collect();
        (!lacks.is_empty()).then_some(Obstacle::Capabilities(lacks))
    }

    /// What will keep it from opening them, as far as that can be known before. `mounts_sysfs`: it can mount the sysfs that
    /// shows which device is meant.
    pub(crate) fn obstacle_to_opening(&self, mounts_sysfs: bool) -> Option<Obstacle> {
        let may = self.initial || (self.owns_devices && mounts_sysfs);
        (!may).then_some(Obstacle::Devices)
    }

    /// Whether the capabilities of this process are those of a user namespace of its own.
    pub(crate) const fn is_confined(&self) -> bool {
        !self.initial
    }
}

/// The inode of the initial user namespace (PROC_USER_INIT_INO in include/linux/proc_ns.h).
const INITIAL: u64 = 0xEFFF_FFFD;

fn effective(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or_default()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const ROOT: Privileges = Privileges {
        effective: u64::MAX,
        initial: true,
        over_network: true,
        owns_devices: true,
    };
    /// An ordinary user.
    pub(crate) const USER: Privileges = Privileges {
        effective: 0,
        owns_devices: false,
        ..ROOT
    };
    /// `unshare -Ur` in the host's network.
    pub(crate) const FOREIGN: Privileges = Privileges {
        initial: false,
        over_network: false,
        ..ROOT
    };
    /// `unshare -Urn` by root.
    pub(crate) const CONFINED_ROOT: Privileges = Privileges {
        initial: false,
        ..ROOT
    };
    /// The same by an ordinary user.
    pub(crate) const CONFINED: Privileges = Privileges {
        owns_devices: false,
        ..CONFINED_ROOT
    };

    #[test]
    fn obstacles_are_told_apart() {
        let without_sys_admin = Privileges {
            effective: !(1 << 21),
            ..ROOT
        };
        let both = Obstacle::Capabilities(vec!["CAP_NET_ADMIN", "CAP_SYS_ADMIN"]);
        let one = Obstacle::Capabilities(vec!["CAP_SYS_ADMIN"]);
        for (privileges, making, opening) in [
            (ROOT, None, None),
            (USER, Some(both), None),
            (without_sys_admin, Some(one), None),
            (FOREIGN, Some(Obstacle::ForeignNetwork), None),
            (CONFINED_ROOT, None, None),
            (CONFINED, None, Some(Obstacle::Devices)),
        ] {
            assert_eq!(privileges.obstacle_to_making(), making, "{privileges:?}");
            assert_eq!(
                privileges.obstacle_to_opening(true),
                opening,
                "{privileges:?}"
            );
        }
        let unseen = CONFINED_ROOT.obstacle_to_opening(false);
        assert_eq!(unseen, Some(Obstacle::Devices));
    }

    #[test]
    fn effective_capabilities_are_read_from_the_status() {
        let status = "Name:\tx\nCapPrm:\t0\nCapEff:\t000001ffffffffff\nCapBnd:\t0\n";
        assert_eq!(effective(status), 0x1ff_ffff_ffff);
        assert_eq!(effective(""), 0);
        Privileges::of_this_thread().unwrap();
    }
}
