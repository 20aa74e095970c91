//! From the name of a network interface to an open, proven macvtap queue.
//!
//! A macvtap is a second Ethernet NIC on the wire of an existing one (its *lower* link): it has a MAC address of its
//! own, and its frames are read and written through a file descriptor, its *queue*. [`Macvtap::open`] makes one by
//! rtnetlink, in a network namespace that only this process holds, so that the kernel removes it whichever way the
//! process ends; or, where it shall be seen, in the caller's namespace ([`Placement::Host`]), where [`delete_stale`](delete_stale())
//! deletes what the dead left behind. Or it opens queues of a macvtap that exists. [`Macvtap::from_fds`] takes queues that
//! another program has opened. What can go wrong is told in [`Problem`] and [`ExistingTapError`], a sentence each, with the
//! remedy.
//!
//! ```no_run
//! use net::{Macvtap, MacvtapSpec};
//!
//! let macvtap = Macvtap::open(&MacvtapSpec::new("eno1".parse()?))?;
//! let info = macvtap.info();
//! println!("{} on {}: MAC {}, MTU {}", info.name, info.lower, info.mac, info.mtu);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The link and the macvtaps on it cannot hear each other. [`HostLink`] makes the macvlan by which the host talks with
//! them all the same. [`inventory()`] lists who shares which wire, [`diagnose_host`] says what is amiss, and a
//! [`LinkWatch`] tells an event loop of carrier, MTU and deletion; `examples/watch.rs` shows two of them. A
//! [`FrameListener`] hears which addresses the user of a macvtap says it has.
//!
//! The crate knows nothing of virtual machines: header size, offloads and buffer sizes of the queue are its user's to
//! set.
//!
//! # Files
//!
//! | file | what it is |
//! | --- | --- |
//! | `spec.rs` | what can be asked for, of the types in `mac.rs`, `name.rs` and `mode.rs` |
//! | `macvtap.rs` | making one: check, make, bring up, open; or queues that another program has opened |
//! | `link_guard.rs`, `owner.rs`, `stale.rs` | giving back: at the end, and what the dead could not |
//! | `record.rs` | a lock for each thing of the host that a process uses |
//! | `identity.rs` | which link is meant, in whichever namespace |
//! | `hostlink.rs` | the host's own link among the macvtaps on a lower, and moving addresses onto it; `address.rs` |
//! | `inventory.rs`, `watch.rs` | who shares a wire, and news of links for an event loop |
//! | `listen.rs` | what the user of a macvtap sends, where that tells about it |
//! | `doctor.rs` | what stands in the way on this machine, one line a check |
//! | `diagnose.rs` | what makes a lower link unfit, and what the kernel's error numbers mean; pure |
//! | `netlink.rs` | reads links, addresses and routes by a client of our own, and changes them by rtnetlink, the only async code |
//! | `netns.rs` | the private network namespace |
//! | `queue.rs` | finds the right device node, opens it and proves it |
//! | `wifi.rs` | whether frames go over the air |
//! | `sysfs.rs`, `ioctl.rs` | what only sysfs and ioctls can tell |
//!
//! # Threads
//!
//! All calls block. Each does its work on a short-lived thread of its own, and that thread alone ever enters another
//! network namespace. So the caller's threads stay where they are. A second one speaks to rtnetlink, with a
//! current-thread tokio runtime where something is changed: the first waits for it 10 seconds at most. So a caller may be
//! inside a runtime of its own.

mod address;
mod diagnose;
mod doctor;
mod hostlink;
mod identity;
mod inventory;
mod ioctl;
mod link_guard;
mod listen;
mod mac;
mod macvtap;
mod mode;
mod name;
mod netlink;
mod netns;
mod owner;
mod privileges;
mod queue;
mod record;
mod spec;
mod stale;
mod sysfs;
mod watch;
mod wifi;

#[cfg(test)]
#[path = "../../tests/harness/netns.rs"]
mod harness;

pub use address::{InterfaceAddress, ParseAddressError};
pub use diagnose::{Difference, Problem, Unfit};
pub use doctor::{Check, Neighbour, Status, diagnose_host};
pub use hostlink::{HostLink, HostLinkError, HostLinkGuard, HostLinkProblem, HostLinkSpec};
pub use identity::{LinkId, current_name, links_here, this_namespace};
pub use inventory::{InventoryError, LinkState, LowerInfo, Place, UpperInfo, UpperKind, inventory};
pub use link_guard::LinkGuard;
pub use listen::{FrameListener, HEARD_LEN};
pub use mac::{MacAddr, ParseMacError};
pub use macvtap::{Error, ExistingTapError, Macvtap, Passed, TapInfo, inherit};
pub use mode::{Mode, ParseModeError};
pub use name::{LinkName, NewLinkName, ParseLinkNameError};
pub use owner::{Owner, ParseOwnerError};
pub use privileges::Obstacle;
pub use queue::QueueError;
pub use record::{
    RecordDirectory, RecordError, RecordKey, RecordLock, RecordState, RecordView,
    make_record_directory_for,
};
pub use spec::{MacvtapSpec, Placement};
pub use stale::{StaleLink, delete_stale};
pub use watch::{LinkChange, LinkEvent, LinkWatch};
