//! A NIC's share of the host: a queue, its interface, and what keeps and watches it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;

use devices::virtio::net::NetConfig;
use devices::virtio::net::ctrl::Permissions;
use devices::virtio::net::tap::{Tap, TapError};
use net::{
    ExistingTapError, FrameListener, LinkGuard, LinkWatch, MacAddr, Macvtap, MacvtapSpec, Mode,
};

use crate::config::{BackendChoice, NicConfig, NicOptions, NicSource};
use crate::nic::exclusive::{self, Interface, SharedError};
use crate::nic::inherited::Inherited;
use crate::nic::registry::{Claim, NicEntry, Runs};

/// Why there is no NIC.
#[derive(Debug, thiserror::Error)]
pub enum NicError {
    /// The macvtap.
    #[error(transparent)]
    Macvtap(#[from] net::Error),
    /// Descriptors of somebody else's.
    #[error("cannot use the file descriptors of --macvtap fd=")]
    Existing(#[from] ExistingTapError),
    /// One interface for two NICs.
    #[error(transparent)]
    Shared(#[from] SharedError),
    /// A queue that cannot be set up.
    #[error("the queue of {name} cannot be used")]
    Tap {
        /// The interface.
        name: String,
        /// Why.
        #[source]
        source: TapError,
    },
}

/// An open queue that is ready to be a NIC.
#[derive(Debug)]
pub struct Nic {
    /// The queues, one for each pair.
    pub taps: Vec<Tap>,
    /// What the guest is told.
    pub config: NetConfig,
    /// How the NIC is to behave.
    pub options: NicOptions,
    /// What the guest's commands may do on the host.
    pub permissions: Permissions,
    /// The file for what passes, which is opened before any NIC is made.
    pub pcap: Option<File>,
    /// What others are told.
    pub entry: NicEntry,
    /// Which interface it is.
    pub interface: Interface,
    /// Keeps others from it.
    pub claim: Option<Claim>,
    /// News of the interface, where it can be seen.
    pub watch: Option<LinkWatch>,
    /// Hears what the guest sends, where its frames may pass through the kernel alone.
    pub listener: Option<FrameListener>,
    /// Keeps a macvtap of our own in being.
    pub guard: Option<LinkGuard>,
}

impl Nic {
    fn make(spec: &MacvtapSpec, options: &NicOptions) -> Result<Self, NicError> {
        let macvtap = Macvtap::open(spec)?;
        let interface = Interface::of_macvtap(&macvtap)?;
        let listener = wants_listener(options).then(|| listening(macvtap.name(), macvtap.listen()));
        let host = Host {
            entry: NicEntry::of(&macvtap, interface.device),
            interface,
            mac: macvtap.mac(),
            mode: Some(macvtap.mode()),
            watch: watched(macvtap.name(), macvtap.watch()),
            listener: listener.flatten(),
        };
        let (queues, guard) = macvtap.into_parts();
        Self::new(host, queues, Some(guard), options)
    }

    /// `numbers` are those that the descriptors had on the command line.
    fn from_fds(
        descriptors: Vec<OwnedFd>,
        numbers: &[RawFd],
        given: &mut Given,
        options: &NicOptions,
    ) -> Result<Self, NicError> {
        let existing = net::from_fds(descriptors)?;
        let told = given.inherited.as_ref();
        let told = told.filter(|told| told.is_of(numbers, existing.mac));
        let interface = Interface::of_existing(&existing, told)?;
        let name = &existing.name;
        let watch = match (existing.id, told.and_then(|told| told.id), &mut given.watch) {
            (Some(id), _, _) => watched(name, LinkWatch::new(&[id.index])),
            (None, Some(id), socket @ Some(_)) => socket
                .take()
                .and_then(|socket| watched(name, LinkWatch::from_socket(socket, &[id.index]))),
            _ => {
                log::info!(
                    "{name} is in a network namespace that minivmm does not see: its carrier and its \
                     end will not show in the guest"
                );
                None
            }
        };
        let listener = existing.id.filter(|_| wants_listener(options));
        let listener =
            listener.and_then(|id| listening(name, FrameListener::new(id.index, existing.mac)));
        let host = Host {
            entry: NicEntry::of_existing(&existing, told, interface.device),
            interface,
            mac: existing.mac,
            mode: existing.mode.or(told.and_then(|told| told.mode)),
            watch,
            listener,
        };
        Self::new(host, existing.queues, None, options)
    }

    fn new(
        host: Host,
        queues: Vec<OwnedFd>,
        guard: Option<LinkGuard>,
        options: &NicOptions,
    ) -> Result<Self, NicError> {
        let Host {
            entry,
            interface,
            mac,
            mode,
            watch,
            listener,
        } = host;
        // An Ethernet interface's MTU is at most 65,535.
        let mtu = u16::try_from(entry.mtu).unwrap_or(u16::MAX);
        log::info!("NIC on {}: MAC {mac}, MTU {mtu}", entry.lower);
        let name = entry.name.clone();
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
            allow_promisc: mode == Some(Mode::Passthru),
        };
        Ok(Self {
            taps,
            config,
            options: options.clone(),
            permissions,
            pcap: None,
            entry,
            interface,
            claim: None,
            watch,
            listener,
            guard,
        })
    }
}

/// What is known of a NIC's macvtap on the host.
#[derive(Debug)]
struct Host {
    entry: NicEntry,
    interface: Interface,
    mac: MacAddr,
    mode: Option<Mode>,
    watch: Option<LinkWatch>,
    listener: Option<FrameListener>,
}

/// What this process was started with.
#[derive(Debug)]
pub struct Given {
    /// The queues of the NICs that name descriptors.
    queues: Vec<OwnedFd>,
    /// What is told of them.
    inherited: Option<Inherited>,
    /// The socket that comes with them.
    watch: Option<OwnedFd>,
}

/// Whether vhost-net may get the frames.
fn wants_listener(options: &NicOptions) -> bool {
    options.backend != BackendChoice::User
        && options.needs_frames().is_none()
        && opens("/dev/vhost-net")
}

fn opens(path: &str) -> bool {
    OpenOptions::new().read(true).write(true).open(path).is_ok()
}

/// A NIC works without being heard, so a failure is no more than a word.
fn listening(name: &str, listener: io::Result<FrameListener>) -> Option<FrameListener> {
    listener
        .inspect_err(|error| {
            log::info!("{name}: the guest's addresses will not be learnt from its frames: {error}");
        })
        .ok()
}

/// Takes over the descriptors that the NICs name.
///
/// # Errors
///
/// Says which of them is not open.
///
/// # Safety
///
/// Nothing in this process may own them: call it before anything is opened.
pub unsafe fn inherit(nics: &[NicConfig]) -> Result<Given, NicError> {
    let sources = nics.iter().map(|nic| &nic.source);
    let numbers: Vec<RawFd> = sources.flat_map(NicSource::descriptors).collect();
    let inherited = Inherited::from_environment();
    // SAFETY: as for this function.
    let queues = unsafe { net::inherit(&numbers) }?;
    let watch = inherited.as_ref().and_then(|told| {
        let number = told.watch_beside(&numbers)?;
        // SAFETY: as for this function; it is none of `numbers`.
        unsafe { net::inherit(&[number]) }
            .inspect_err(|error| log::warn!("cannot watch {}: {error}", told.name))
            .ok()?
            .pop()
    });
    Ok(Given {
        queues,
        inherited,
        watch,
    })
}

/// Makes what each NIC needs, in order, or takes it from what was `given`, and claims it for a guest with this kernel.
///
/// # Errors
///
/// Says what could not be had; what had been made is gone again.
pub fn acquire(nics: &[NicConfig], mut given: Given, kernel: &Path) -> Result<Vec<Nic>, NicError> {
    let mut inherited = std::mem::take(&mut given.queues).into_iter();
    let make = |NicConfig { source, options }: &NicConfig| match source {
        NicSource::Macvtap(spec) => Nic::make(spec, options),
        NicSource::Descriptors(fds) => {
            let descriptors = inherited.by_ref().take(fds.len()).collect();
            Nic::from_fds(descriptors, fds, &mut given, options)
        }
    };
    let mut nics: Vec<Nic> = nics.iter().map(make).collect::<Result<_, _>>()?;
    let wanted: Vec<_> = nics
        .iter()
        .map(|nic| (&nic.interface, &nic.entry))
        .collect();
    let claims = exclusive::claim(&Runs::kernel(kernel), None, &wanted)?;
    for (nic, claim) in nics.iter_mut().zip(claims) {
        nic.claim = Some(claim);
    }
    Ok(nics)
}

/// A NIC works without being watched, so a failure is no more than a warning.
fn watched(name: &str, watch: io::Result<LinkWatch>) -> Option<LinkWatch> {
    watch
        .inspect_err(|error| log::warn!("cannot watch {name}: {error}"))
        .ok()
}
