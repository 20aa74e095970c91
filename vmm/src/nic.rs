//! The NICs: from a request to a macvtap of the host or a user network, and what follows it while the guest runs.
//!
//! | file | what it is |
//! | --- | --- |
//! | `acquire.rs` | queues, claim, watch and guard of each NIC |
//! | `passt.rs` | the program that forwards what passes a user network |
//! | `inherited.rs` | the queues that this process was started with, and what `net open` says of them |
//! | `registry.rs` | what other programs can read of a running guest, and the locks for it |
//! | `devices.rs` | the NICs on the bus |
//! | `follow.rs` | what the control thread does for a NIC while the guest runs |
//! | `link.rs` | the guest's link follows the host's, which is kept as the guest needs it |
//! | `host_link.rs` | the host's own link among its guests |

pub mod acquire;
pub mod devices;
pub mod follow;
pub mod host_link;
pub mod inherited;
mod link;
pub mod passt;
pub mod registry;

pub use acquire::{HostNic, Nic, NicError, acquire, acquire_for_guest};
pub use inherited::{Inherited, watch_beside};
