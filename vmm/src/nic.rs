//! A network card's share of the host: a queue, its interface, and what keeps and watches it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use devices::virtio::net::NetConfig;
use devices::virtio::net::ctrl::Permissions;
use devices::virtio::net::tap::{Tap, TapError};
use net::{AdoptError, Adopted, Lease, LinkId, LinkWatch, MacAddr, Macvtap, MacvtapSpec, Mode};

use crate::config::{NicConfig, NicOptions, NicSource};
use crate::handed::Handed;
use crate::registry::NicEntry;
use crate::sharing::{self, Interface, SharedError};

/// The MTU of an interface that cannot be asked: Ethernet's.
const USUAL_MTU: u32 = 1500;

/// Why there is no network card.
#[derive(Debug, thiserror::Error)]
pub enum NicError {
    /// The macvtap.
    #[error(transparent)]
    Macvtap(#[from] net::Error),
    /// Descriptors of somebody else's.
    #[error("cannot use the file descriptors of --macvtap fd=")]
    Adopt(#[from] AdoptError),
    /// The file for what passes.
    #[error("cannot record what passes in {0:?}")]
    Pcap(PathBuf, #[source] io::Error),
    /// One file for two cards.
    #[error("two cards cannot record in one file, {0:?}: give each a pcap= of its own")]
    SharedPcap(PathBuf),
    /// One interface for two cards.
    #[error(transparent)]
    Shared(#[from] SharedError),
    /// A queue that cannot be set up.
    #[error("the queue of {name} is of no use")]
    Tap {
        /// The interface.
        name: String,
        /// Why.
        #[source]
        source: TapError,
    },
}

/// An open queue that is ready to be a network card.
#[derive(Debug)]
pub struct Nic {
    /// The queues, one for each pair.
    pub taps: Vec<Tap>,
    /// What the guest is told.
    pub config: NetConfig,
    /// How the card is to behave.
    pub options: NicOptions,
    /// What the guest's commands may do on the host.
    pub permissions: Permissions,
    /// The file for what passes; emptied only when the guest starts.
    pub pcap: Option<File>,
    /// What others are told.
    pub entry: NicEntry,
    /// Which interface it stands on, where that is known.
    pub lower: Option<LinkId>,
    /// Which interface it is.
    pub interface: Interface,
    /// News of the interface, where it can be seen.
    pub watch: Option<LinkWatch>,
    /// Hears what the guest sends, where its frames may pass through the kernel alone.
    pub listener: Option<FrameListener>,
    /// Keeps a macvtap of our own in being.
    pub lease: Option<Lease>,
}

impl Nic {
    fn make(spec: &MacvtapSpec, options: &NicOptions) -> Result<Self, NicError> {
        let macvtap = Macvtap::open(spec)?;
        let entry = entry(
            macvtap.name(),
            macvtap.lower(),
            macvtap.mac(),
            macvtap.mtu(),
        );
        let watch = watched(macvtap.name(), macvtap.watch());
        let (mac, mode) = (macvtap.mac(), macvtap.mode());
        let (id, lower) = (macvtap.id(), macvtap.lower_id());
        let (queues, lease) = macvtap.into_parts();
        let host = Host {
            mode: Some(mode),
            id: Some(id),
            lower,
            is_handed: false,
            watch,
            listener: listener.flatten(),
            lease: Some(lease),
        };
        Self::new(entry, mac, queues, host, options)
    }

    /// `numbers` are those that the descriptors had on the command line.
    fn adopt(
        descriptors: Vec<OwnedFd>,
        numbers: &[RawFd],
        handed: Option<&Handed>,
        options: &NicOptions,
    ) -> Result<Self, NicError> {
        let Adopted {
            queues,
            name,
            mac,
            mtu,
            id,
            lower,
            mode,
            ..
        } = net::adopt(descriptors)?;
        // What can be seen counts more than what was told, which may have changed since.
        let told = handed.filter(|handed| handed.is_of(numbers, mac));
        let mtu = mtu.or(told.map(|told| told.mtu)).unwrap_or(USUAL_MTU);
        let (lower, lower_id) = match (lower, told) {
            (Some((lower, id)), _) => (lower, Some(id)),
            (None, Some(told)) => (told.lower.clone(), told.lower_id),
            (None, None) => (name.clone(), None),
        };
        let watch = id.and_then(|id| watched(&name, LinkWatch::new(&[id.index])));
        let entry = entry(&name, &lower, mac, mtu);
        let host = Host {
            mode,
            id,
            lower: lower_id,
            is_handed: told.is_some(),
            watch,
            listener,
            lease: None,
        };
        Self::new(entry, mac, queues, host, options)
    }

    fn new(
        mut entry: NicEntry,
        mac: MacAddr,
        queues: Vec<OwnedFd>,
        host: Host,
        options: &NicOptions,
    ) -> Result<Self, NicError> {
        // An Ethernet interface's MTU is at most 65,535.
        let mtu = u16::try_from(entry.mtu).unwrap_or(u16::MAX);
        log::info!("network card on {}: MAC {mac}, MTU {mtu}", entry.lower);
        let name = entry.name.clone();
        let interface = Interface::of(&queues[0], &name, mac, host.id, host.is_handed)?;
        entry.device = interface.device;
        entry.id = host.id.map(Into::into);
        entry.lower_id = host.lower.map(Into::into);
        let taps = queues
            .into_iter()
            .map(Tap::new)
            .collect::<Result<Vec<_>, _>>();
        let taps = taps.map_err(|source| NicError::Tap { name, source })?;
        let config = NetConfig {
            mac: mac.octets(),
            mtu,
        };
        let permissions = Permissions {
            change_mac: options.trust_mac,
            // The lower is promiscuous then, and all that it hears is for the macvtap.
            any_address: host.mode == Some(Mode::Passthru),
        };
        Ok(Self {
            taps,
            config,
            options: options.clone(),
            permissions,
            pcap: options.pcap.as_deref().map(open_pcap).transpose()?,
            entry,
            lower: host.lower,
            interface,
            watch: host.watch,
            listener: host.listener,
            lease: host.lease,
        })
    }
}

/// What is known of a card's macvtap on the host.
#[derive(Debug)]
struct Host {
    mode: Option<Mode>,
    id: Option<LinkId>,
    lower: Option<LinkId>,
    is_handed: bool,
    watch: Option<LinkWatch>,
    listener: Option<FrameListener>,
    lease: Option<Lease>,
}

/// Whether vhost-net may get the frames.
fn wants_listener(options: &NicOptions) -> bool {
    options.backend != BackendChoice::User
        && options.needs_frames().is_none()
        && Path::new("/dev/vhost-net").exists()
}

/// A card works without being heard, so a failure is no more than a word.
fn listening(name: &str, listener: io::Result<FrameListener>) -> Option<FrameListener> {
    listener
        .inspect_err(|error| {
            log::info!("{name}: the guest's addresses will not be learnt from its frames: {error}");
        })
        .ok()
}

fn open_pcap(path: &Path) -> Result<File, NicError> {
    // Non-blocking: opening a FIFO that nobody reads would wait for a reader.
    let options = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_NONBLOCK)
        .to_owned();
    let opened = options.open(path).and_then(|file| {
        rustix::fs::fcntl_setfl(&file, rustix::fs::OFlags::empty())?;
        Ok(file)
    });
    opened.map_err(|source| NicError::Pcap(path.to_owned(), source))
}

/// Takes over the descriptors that the cards name.
///
/// # Errors
///
/// Says which of them is not open.
///
/// # Safety
///
/// Nothing in this process may own them: call it before anything is opened.
pub unsafe fn inherit(nics: &[NicConfig]) -> Result<Vec<OwnedFd>, NicError> {
    let sources = nics.iter().map(|nic| &nic.source);
    let numbers: Vec<RawFd> = sources.flat_map(NicSource::descriptors).collect();
    // SAFETY: as for this function.
    Ok(unsafe { net::inherit(&numbers) }?)
}

/// Makes what each card needs, in order, or takes it from `inherited`.
///
/// # Errors
///
/// Says what could not be had; what had been made is gone again.
pub fn acquire(nics: &[NicConfig], inherited: Vec<OwnedFd>) -> Result<Vec<Nic>, NicError> {
    let mut inherited = inherited.into_iter();
    let handed = Handed::from_environment();
    let make = |NicConfig { source, options }: &NicConfig| match source {
        NicSource::Macvtap(spec) => Nic::make(spec, options),
        NicSource::Descriptors(fds) => {
            let descriptors = inherited.by_ref().take(fds.len()).collect();
            Nic::adopt(descriptors, fds, handed.as_ref(), options)
        }
    };
    let nics: Vec<Nic> = nics.iter().map(make).collect::<Result<_, _>>()?;
    let interfaces: Vec<_> = nics.iter().map(|nic| nic.interface.clone()).collect();
    sharing::check(&interfaces)?;
    must_not_share_files(&nics)?;
    Ok(nics)
}

/// Refuses two cards that would write over each other. (What is no regular file has its own ways.)
fn must_not_share_files(nics: &[Nic]) -> Result<(), NicError> {
    let mut seen = Vec::new();
    for nic in nics {
        let (Some(file), Some(path)) = (&nic.pcap, &nic.options.pcap) else {
            continue;
        };
        let metadata = file
            .metadata()
            .map_err(|source| NicError::Pcap(path.clone(), source))?;
        let id = (metadata.dev(), metadata.ino());
        if metadata.is_file() && seen.contains(&id) {
            return Err(NicError::SharedPcap(path.clone()));
        }
        seen.push(id);
    }
    Ok(())
}

fn entry(name: &str, lower: &str, mac: MacAddr, mtu: u32) -> NicEntry {
    NicEntry {
        name: name.to_owned(),
        lower: lower.to_owned(),
        mac: mac.to_string(),
        mtu,
        addresses: Vec::new(),
        wrong_source_frames: 0,
        device: 0,
        id: None,
        lower_id: None,
    }
}

/// A card works without being watched, so a failure is no more than a warning.
fn watched(name: &str, watch: io::Result<LinkWatch>) -> Option<LinkWatch> {
    watch
        .inspect_err(|error| log::warn!("cannot watch {name}: {error}"))
        .ok()
}
