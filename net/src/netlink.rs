//! rtnetlink behind blocking calls: the only async code of the crate.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::{
    InfoData, InfoIpVlan, InfoKind, InfoMacVlan, InfoMacVtap, IpVlanMode, LinkAttribute,
    LinkExtentMask, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, MacVlanMode,
};
use rtnetlink::{Handle, LinkMacVtap, LinkUnspec};
use tokio::runtime::{Builder, Runtime};

use crate::mac::MacAddr;
use crate::mode::Mode;

mod ip;

/// A connection to the kernel's table of links, in the network namespace of the thread that made it.
#[derive(Debug)]
pub(crate) struct Netlink {
    runtime: Runtime,
    handle: Handle,
}

/// What the crate needs to know of one link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Link {
    /// Unique in its namespace, and only there.
    pub index: u32,
    pub name: String,
    /// The driver's word for a virtual link (`macvtap`, `bridge`); empty for a real card.
    pub kind: String,
    /// None when it isn't six bytes.
    pub mac: Option<[u8; 6]>,
    pub mtu: u32,
    /// For a macvtap: how many frames its queue holds for a slow reader.
    pub tx_queue_len: u32,
    /// For a macvtap or macvlan: how many broadcasts from outside it wants to be held for it.
    pub bc_queue_len: u32,
    /// Somebody has brought it up (IFF_UP).
    pub up: bool,
    /// The wire is there (IFF_LOWER_UP).
    pub carrier: bool,
    /// It takes every multicast frame (IFF_ALLMULTI).
    pub all_multicast: bool,
    pub loopback: bool,
    pub ethernet: bool,
    /// The index of the bridge, bond, ... that it is a port of.
    pub master: Option<u32>,
    /// The index of the link that it sits on, when that is in the same namespace.
    pub lower: Option<u32>,
    /// The mode of a macvlan or macvtap.
    pub mode: Option<Mode>,
    /// When the link that it sits on is in another namespace: our number for that namespace, and the link's index there.
    pub lower_elsewhere: Option<(i32, u32)>,
    /// The mode of an ipvlan.
    pub ipvlan_mode: Option<&'static str>,
    /// RFC 2863's word for its state, as ip-link(8) has it, in small letters.
    pub oper_state: String,
    /// Free text that anybody may give a link (IFLA_IFALIAS); empty for none.
    pub alias: String,
}

/// A macvtap to be made.
#[derive(Debug)]
pub(crate) struct NewMacvtap<'a> {
    pub name: &'a str,
    pub index: u32,
    /// The index of the lower link, in the connection's namespace.
    pub lower: u32,
    /// Where the macvtap is born.
    pub namespace: BorrowedFd<'a>,
    pub mode: Mode,
    /// None in passthru mode, which takes the lower's.
    pub mac: Option<MacAddr>,
    /// None for the lower's.
    pub mtu: Option<u32>,
    /// None for the driver's.
    pub tx_queue_len: Option<u32>,
    /// None for the driver's.
    pub bc_queue_len: Option<u32>,
}

impl Netlink {
    /// Connects to the network namespace of the calling thread.
    pub(crate) fn connect() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = {
            let _inside = runtime.enter();
            let (connection, handle, _) = rtnetlink::new_connection()?;
            runtime.spawn(connection);
            handle
        };
        Ok(Self { runtime, handle })
    }

    /// All links of the namespace.
    pub(crate) fn links(&self) -> io::Result<Vec<Link>> {
        let without_statistics = vec![LinkExtentMask::SkipStats];
        let request = self
            .handle
            .link()
            .get()
            .set_filter_mask(AddressFamily::Unspec, without_statistics);
        let links = request.execute().map_ok(Link::from).try_collect();
        self.runtime.block_on(links).map_err(into_io)
    }

    /// The link with this index.
    pub(crate) fn link(&self, index: u32) -> io::Result<Link> {
        let mut answers = Box::pin(self.handle.link().get().match_index(index).execute());
        let answer = self.runtime.block_on(answers.try_next()).map_err(into_io)?;
        answer
            .map(Link::from)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }

    /// Makes a macvtap. It is still down.
    pub(crate) fn create(&self, new: &NewMacvtap<'_>) -> io::Result<()> {
        let mut message = LinkMacVtap::new(new.name, new.lower, kernel_mode(new.mode))
            .index(new.index)
            .setns_by_fd(new.namespace.as_raw_fd());
        if let Some(mac) = new.mac {
            message = message.address(mac.octets().to_vec());
        }
        if let Some(mtu) = new.mtu {
            message = message.mtu(mtu);
        }
        if let Some(length) = new.tx_queue_len {
            message = message.txqueuelen(length);
        }
        if let Some(length) = new.bc_queue_len {
            message = message.append_info_data(InfoMacVtap::BcQueueLen(length));
        }
        self.runtime
            .block_on(self.handle.link().add(message.build()).execute())
            .map_err(into_io)
    }

    /// Writes a text on a link.
    pub(crate) fn set_alias(&self, index: u32, alias: &str) -> io::Result<()> {
        self.set(LinkUnspec::new_with_index(index).alias(alias).build())
    }

    /// Moves a link that is down to another namespace, and renames it there if a new name is given: `mvt%d` stands for
    /// the first free one of `mvt0`, `mvt1` and so on.
    pub(crate) fn move_to(
        &self,
        namespace: BorrowedFd<'_>,
        index: u32,
        new_name: Option<&str>,
    ) -> io::Result<()> {
        let mut message = LinkUnspec::new_with_index(index).setns_by_fd(namespace.as_raw_fd());
        if let Some(name) = new_name {
            message = message.name(name);
        }
        self.set(message.build())
    }

    /// Brings a link up, receiving all multicast: the macvlan driver would pass on only the groups that the *host* has
    /// joined.
    pub(crate) fn bring_up(&self, index: u32) -> io::Result<()> {
        let message = LinkUnspec::new_with_index(index)
            .allmulticast(true)
            .up()
            .build();
        self.set(message)
    }

    fn set(&self, message: LinkMessage) -> io::Result<()> {
        self.runtime
            .block_on(self.handle.link().set(message).execute())
            .map_err(into_io)
    }

    /// Deletes a link.
    pub(crate) fn delete(&self, index: u32) -> io::Result<()> {
        self.runtime
            .block_on(self.handle.link().del(index).execute())
            .map_err(into_io)
    }
}

impl Link {
    /// Whether it shares its lower's wire by the macvlan driver.
    pub(crate) fn is_macvlan(&self) -> bool {
        self.kind == "macvlan" || self.is_macvtap()
    }

    /// Whether frames can be read and written through it.
    pub(crate) fn is_macvtap(&self) -> bool {
        self.kind == "macvtap"
    }
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let flags = message.header.flags;
        let mut link = Self {
            index: message.header.index,
            up: flags.contains(LinkFlags::Up),
            carrier: flags.contains(LinkFlags::LowerUp),
            all_multicast: flags.contains(LinkFlags::Allmulti),
            loopback: flags.contains(LinkFlags::Loopback),
            ethernet: message.header.link_layer_type == LinkLayerType::Ether,
            ..Self::default()
        };
        let mut namespace = None;
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Address(bytes) => link.mac = bytes.try_into().ok(),
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::TxQueueLen(length) => link.tx_queue_len = length,
                LinkAttribute::Controller(index) => link.master = Some(index),
                LinkAttribute::Link(index) => link.lower = Some(index),
                LinkAttribute::LinkNetNsId(id) => namespace = Some(id),
                LinkAttribute::OperState(state) => {
                    link.oper_state = state.to_string().to_lowercase()
                }
                LinkAttribute::IfAlias(alias) => link.alias = alias,
                LinkAttribute::LinkInfo(infos) => {
                    infos.into_iter().for_each(|info| link.learn(info))
                }
                _ => {}
            }
        }
        if let Some(namespace) = namespace {
            link.lower_elsewhere = link.lower.take().map(|index| (namespace, index));
        }
        link
    }
}

impl Link {
    fn learn(&mut self, info: LinkInfo) {
        match info {
            LinkInfo::Kind(kind) => self.kind = InfoKind::to_string(&kind),
            LinkInfo::Data(InfoData::MacVlan(data)) => {
                for item in data {
                    match item {
                        InfoMacVlan::Mode(mode) => self.mode = our_mode(mode),
                        InfoMacVlan::BcQueueLen(length) => self.bc_queue_len = length,
                        _ => {}
                    }
                }
            }
            LinkInfo::Data(InfoData::IpVlan(data)) => {
                self.ipvlan_mode = data.iter().find_map(|item| match item {
                    InfoIpVlan::Mode(IpVlanMode::L2) => Some("l2"),
                    InfoIpVlan::Mode(IpVlanMode::L3) => Some("l3"),
                    InfoIpVlan::Mode(IpVlanMode::L3S) => Some("l3s"),
                    _ => None,
                });
            }
            LinkInfo::Data(InfoData::MacVtap(data)) => {
                for item in data {
                    match item {
                        InfoMacVtap::Mode(mode) => self.mode = our_mode(mode),
                        InfoMacVtap::BcQueueLen(length) => self.bc_queue_len = length,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
}

fn kernel_mode(mode: Mode) -> MacVlanMode {
    match mode {
        Mode::Bridge => MacVlanMode::Bridge,
        Mode::Vepa => MacVlanMode::Vepa,
        Mode::Private => MacVlanMode::Private,
        Mode::Passthru => MacVlanMode::Passthrough,
        Mode::Source => MacVlanMode::Source,
    }
}

fn our_mode(mode: MacVlanMode) -> Option<Mode> {
    match mode {
        MacVlanMode::Bridge => Some(Mode::Bridge),
        MacVlanMode::Vepa => Some(Mode::Vepa),
        MacVlanMode::Private => Some(Mode::Private),
        MacVlanMode::Passthrough => Some(Mode::Passthru),
        MacVlanMode::Source => Some(Mode::Source),
        _ => None,
    }
}

/// The kernel's refusals come back as what they are, error numbers, so that they can be told apart.
fn into_io(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => match message.code {
            Some(code) => io::Error::from_raw_os_error(code.get().saturating_neg()),
            None => io::Error::other("an acknowledgement where an answer was due"),
        },
        other => io::Error::other(other),
    }
}
