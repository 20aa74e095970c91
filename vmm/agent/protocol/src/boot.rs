//! The boot connection: how a guest of `minivmm run` comes to be what its command needs.
//!
//! The init says [`FromInit::Hello`], the host [`ToInit::Boot`]. The init then reports each stage that
//! is over, and at last [`FromInit::Ready`] or [`FromInit::Failed`]. The connection stays open: when
//! the host sends [`ToInit::PowerOff`] the init ends all processes, writes all file systems, says
//! [`FromInit::Ended`] and powers off; when the host closes it, it does the same.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// What the init says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromInit {
    /// It runs. Its first message.
    Hello {
        /// [`VERSION`](crate::VERSION).
        version: u32,
        /// The kernel's release, as of uname(2).
        kernel: String,
        /// When this was sent.
        at: Uptime,
    },
    /// A part of its work is done.
    Stage {
        /// Which one, in one word.
        name: String,
        /// When it was done.
        at: Uptime,
    },
    /// [`Root::Archive`] is to be unpacked now, by a session of [`Request::Unpack`](crate::session::Request::Unpack). The host then says
    /// [`ToInit::Unpacked`].
    Unpack {
        /// The directory.
        path: Vec<u8>,
    },
    /// Something that the user should know, and that the command can do without.
    Warning(String),
    /// The guest is as it should be, and the agent listens on [`AGENT_PORT`](crate::AGENT_PORT).
    Ready {
        /// What came of each NIC, in the order of [`Boot::nics`].
        nics: Vec<NicStatus>,
        /// When it was.
        at: Uptime,
    },
    /// The guest cannot become what it should be. The host then ends it, by [`ToInit::PowerOff`] or by closing the connection.
    Failed {
        /// Which part.
        part: Part,
        /// What was tried on what, and why that failed.
        text: String,
    },
    /// All is written. The machine powers off as soon as the host has closed the connection.
    Ended(Usage),
}

/// Time since the kernel started, in microseconds (CLOCK_BOOTTIME).
pub type Uptime = u64;

/// The part of a guest that cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    /// A module of the kernel's.
    Module,
    /// The root file system.
    Root,
    /// A shared directory.
    Share,
    /// A NIC or its addresses.
    Network,
    /// All else.
    Other,
}

/// What a guest has used until its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// The most memory that was in use at one time, in bytes. It is looked at five times a second, and is at least what the
    /// largest process had.
    pub peak_memory: u64,
    /// Processes that the kernel has killed since memory had run out.
    pub oom_kills: u64,
}

/// What the host says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToInit {
    /// What the guest is to be.
    Boot(Box<Boot>),
    /// The archive is unpacked.
    Unpacked,
    /// The end.
    PowerOff,
}

/// What a guest is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// The guest's name.
    pub hostname: String,
    /// Its root file system.
    pub root: Root,
    /// What may be written to the root.
    pub access: Access,
    /// Directories of the host's, in the order in which they are mounted.
    pub shares: Vec<Share>,
    /// Its NICs.
    pub nics: Vec<Nic>,
    /// How long NICs may take to get their addresses, in milliseconds.
    pub network_patience: u64,
}

/// Where the root file system is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Root {
    /// In a shared directory with this tag (virtio-fs).
    Share {
        /// Its tag.
        tag: String,
    },
    /// On the first disk: in its first partition that has a root file system, or on all of it.
    Disk,
    /// In a tar archive: see [`FromInit::Unpack`]. It may always be written.
    Archive,
}

/// What the guest may write to its root, or to a share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// Nothing: it is mounted read-only.
    ReadOnly,
    /// Anything, and it is lost at the end: an overlay in the guest's memory.
    Overlay,
    /// Anything, and the host keeps it.
    ReadWrite,
}

/// A directory of the host's in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// The tag of the virtio-fs device.
    pub tag: String,
    /// Where it is mounted: an absolute path, which is made where it is not there.
    pub path: Vec<u8>,
    /// What the guest may write to it.
    pub access: Access,
    /// Whether the guest goes on without it when `path` cannot be made.
    pub optional: bool,
}

/// A NIC of the guest's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// By which the guest knows it.
    pub mac: [u8; 6],
    /// Its addresses.
    pub ip: IpConfig,
}

/// How a NIC gets its addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum IpConfig {
    /// It has none, and stays down.
    None,
    /// IPv4 by DHCP, IPv6 by router advertisements.
    Dhcp,
    /// It has these.
    Static(StaticIp),
}

/// Addresses that do not come from the network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StaticIp {
    /// Addresses with the length of their network's prefix.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Default gateways, at most one of each family.
    pub gateways: Vec<IpAddr>,
    /// Name servers.
    pub dns: Vec<IpAddr>,
}

/// What came of a NIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicStatus {
    /// Its name in the guest.
    pub name: String,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its addresses but for those of the link alone.
    pub addresses: Vec<(IpAddr, u8)>,
}
