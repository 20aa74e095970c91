//! From the name of a network interface to an open macvtap queue.
//!
//! A macvtap is a second Ethernet NIC on the wire of an existing one (its *lower* link): it has a MAC address of its own,
//! and its frames are read and written through a file descriptor, its *queue*. [`Macvtap::open`] makes one by rtnetlink,
//! in a network namespace that only this process holds: the kernel removes it when the process ends, in whatever way.
//! In the caller's namespace ([`Placement::Host`]), [`delete_stale`](delete_stale()) deletes those of ended processes. Or it opens
//! queues of a macvtap that exists, and [`Macvtap::from_fds`] takes queues that another program has opened. [`Problem`] and
//! [`ExistingTapError`] say what can go wrong, and [`remedy`] what to do about it.
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
//! The link and the macvtaps on it cannot reach each other. [`HostLink`] makes the macvlan by which the host does.
//! [`inventory()`] lists who shares which wire, [`diagnose_host`] checks the host, a [`LinkWatch`] reports carrier, MTU and
//! deletion to an event loop (`examples/watch.rs`), and a [`FrameListener`] shows the addresses that a macvtap's user has.
//!
//! The crate knows nothing of virtual machines: header size, offloads and buffer sizes of a queue are its user's to set.
//!
//! # Files
//!
//! Each uses only those below it.
//!
//! | file | what it is |
//! | --- | --- |
//! | `doctor.rs` | `diagnose_host`: what stands in the way on this machine, one line a check |
//! | `inventory.rs` | who shares a wire |
//! | `macvtap.rs` | checks, makes, brings up and opens a macvtap; or takes queues that another program has opened |
//! | `hostlink.rs` | the host's own link among the macvtaps on a lower, and moving addresses onto it |
//! | `station.rs` | a place of this process's own among the macvtaps on a lower |
//! | `link_guard.rs` | deletes what was made |
//! | `stale.rs`, `owner.rs` | deletes what ended processes have made |
//! | `wifi.rs` | whether frames go over the air |
//! | `diagnose.rs` | what makes a lower link unfit, and what the kernel's error numbers mean; pure |
//! | `privileges.rs` | what a thread may do |
//! | `queue.rs` | finds the right device node, opens it and proves it |
//! | `record.rs` | a lock for each thing of the host that a process uses |
//! | `watch.rs`, `listen.rs` | events of links and frames with addresses, for an event loop |
//! | `identity.rs` | which link is meant, in whichever namespace |
//! | `spec.rs` | what can be asked for, of the types in `mac.rs`, `name.rs` and `mode.rs`; `address.rs` |
//! | `netlink.rs` | links, addresses, routes and so on: reads, makes and changes them |
//! | `netns.rs` | the private network namespace |
//! | `sysfs.rs`, `ioctl.rs` | what only sysfs and ioctls show |
//!
//! # Threads
//!
//! All calls block. Each does its work on a short-lived thread of its own, and that thread alone ever enters another
//! network namespace: the caller's threads stay where they are. A second one speaks to the kernel by netlink; the first
//! waits for it 10 seconds at most.

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
mod station;
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
pub use inventory::{InventoryError, LowerInfo, Place, UpperInfo, inventory};
pub use link_guard::LinkGuard;
pub use listen::{FrameListener, HEARD_LEN};
pub use mac::{MacAddr, ParseMacError};
pub use macvtap::{Error, ExistingTapError, Macvtap, Passed, TapInfo, USUAL_MTU, inherit};
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
pub use stale::{StaleError, StaleLink, delete_stale};
pub use station::{Station, StationError};
pub use watch::{LinkChange, LinkEvent, LinkWatch};

/// What to do about an error of this crate, or one that has such a one as a source, where there is something to do.
pub fn remedy(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    std::iter::successors(Some(error), |error| error.source()).find_map(|error| {
        if let Some(problem) = error.downcast_ref::<HostLinkProblem>() {
            return problem.remedy();
        }
        error.downcast_ref::<Problem>()?.remedy()
    })
}

/// A test writes it while it starts a program, which has a copy of every descriptor, and of the locks
/// that go with them, until its exec. Tests that look whether a lock is gone read it.
#[cfg(test)]
static STARTING: std::sync::RwLock<()> = std::sync::RwLock::new(());
