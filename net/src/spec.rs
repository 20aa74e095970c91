//! What is asked of a macvtap.

use std::path::PathBuf;

use crate::mac::MacAddr;
use crate::mode::Mode;
use crate::name::{LinkName, NewLinkName};

/// What is asked for. Begin with [`MacvtapSpec::new`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MacvtapSpec {
    /// The link to sit on; or a macvtap, to be used as it is.
    pub link: LinkName,
    /// The network namespace of [`MacvtapSpec::link`], by a path such as `/run/netns/NAME` or `/proc/PID/ns/net`; None for
    /// the caller's.
    pub lower_netns: Option<PathBuf>,
    /// None for the default, [`Mode::Bridge`]; an existing macvtap then may be in any mode.
    pub mode: Option<Mode>,
    /// None for a random, locally administered one, and in passthru mode for the lower's.
    pub mac: Option<MacAddr>,
    /// In bytes, without the Ethernet header; None for the lower's.
    pub mtu: Option<u32>,
    /// How many queues to open, 1 to [`MacvtapSpec::MAX_QUEUES`]. The kernel spreads what it receives over all open
    /// queues, so each of them has to be read.
    pub queues: u32,
    /// How many frames each queue holds for a slow reader, 1 to [`MacvtapSpec::MAX_TX_QUEUE_LEN`]; None for the
    /// driver's 500. (A macvtap receives what the host's side transmits, hence the kernel's name for it.)
    pub tx_queue_len: Option<u32>,
    /// How many broadcasts and multicasts from outside may wait on the lower for a copy to each of its macvtaps, at
    /// least 1; None for the driver's 1,000. The lower keeps the largest that any of them asks for.
    pub bc_queue_len: Option<u32>,
    /// The senders that it receives from in source mode, which [`MacvtapSpec::mode`] then has to be.
    pub source_macs: Vec<MacAddr>,
    /// The new macvtap's name. None for `macvtap0` in a private namespace, and the first free `mvtN` in the caller's.
    pub name: Option<NewLinkName>,
    /// Where a new macvtap lives.
    pub netns: Placement,
}

/// The network namespace that a new macvtap lives in, wherever its lower is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Placement {
    /// One of its own, without a name, that ends with the process: nothing remains, and no other program
    /// meddles with the link.
    #[default]
    Private,
    /// The caller's, where `ip link` shows it. Its alias names its [`Owner`](crate::Owner), so that after a
    /// kill the next [`Macvtap::open`](crate::Macvtap::open) or [`delete_stale`](crate::delete_stale()) can delete it. So the process that opens it has to live as long as it is used: it may exec another program, but not fork
    /// one and end.
    Host,
}

impl MacvtapSpec {
    /// The most queues that the driver opens at once (MAX_TAP_QUEUES in include/linux/if_tap.h).
    pub const MAX_QUEUES: u32 = 256;

    /// The longest receive ring: its pointers have to fit the largest block of the kernel's allocator, 4 MiB
    /// (`__ptr_ring_init_queue_alloc` in include/linux/ptr_ring.h).
    pub const MAX_TX_QUEUE_LEN: u32 = 524_288;

    /// A macvtap on `link`, everything else by default.
    pub const fn new(link: LinkName) -> Self {
        Self {
            link,
            lower_netns: None,
            mode: None,
            mac: None,
            mtu: None,
            queues: 1,
            tx_queue_len: None,
            bc_queue_len: None,
            source_macs: Vec::new(),
            name: None,
            netns: Placement::Private,
        }
    }
}
