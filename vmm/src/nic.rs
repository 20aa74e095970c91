//! A network card's share of the host: a queue, its interface, and what keeps and watches it.

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use devices::virtio::net::NetConfig;
use devices::virtio::net::tap::{Tap, TapError};
use net::{AdoptError, Adopted, Lease, LinkWatch, MacAddr, Macvtap, MacvtapSpec};

use crate::config::NicSource;
use crate::registry::NicEntry;

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
    /// Descriptors of one interface for two cards.
    #[error(
        "two cards have file descriptors of {name} ({mac}), and each would get a part of its \
         frames: give each card an interface of its own"
    )]
    Shared {
        /// The interface.
        name: String,
        /// Its MAC address.
        mac: String,
    },
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
    /// What others are told.
    pub entry: NicEntry,
    /// News of the interface, where it can be seen.
    pub watch: Option<LinkWatch>,
    /// Keeps a macvtap of our own in being.
    pub lease: Option<Lease>,
}

impl Nic {
    fn make(spec: &MacvtapSpec) -> Result<Self, NicError> {
        let macvtap = Macvtap::open(spec)?;
        let entry = entry(
            macvtap.name(),
            macvtap.lower(),
            macvtap.mac(),
            macvtap.mtu(),
        );
        let watch = watched(macvtap.name(), macvtap.watch());
        let mac = macvtap.mac();
        let (queues, lease) = macvtap.into_parts();
        Self::new(entry, mac, queues, watch, Some(lease))
    }

    fn adopt(descriptors: Vec<OwnedFd>) -> Result<Self, NicError> {
        let Adopted {
            queues,
            name,
            mac,
            mtu,
            index,
            ..
        } = net::adopt(descriptors)?;
        let watch = index.and_then(|index| watched(&name, LinkWatch::new(&[index])));
        let entry = entry(&name, &name, mac, mtu.unwrap_or(USUAL_MTU));
        Self::new(entry, mac, queues, watch, None)
    }

    fn new(
        entry: NicEntry,
        mac: MacAddr,
        queues: Vec<OwnedFd>,
        watch: Option<LinkWatch>,
        lease: Option<Lease>,
    ) -> Result<Self, NicError> {
        // An Ethernet interface's MTU is at most 65,535.
        let mtu = u16::try_from(entry.mtu).unwrap_or(u16::MAX);
        log::info!("network card on {}: MAC {mac}, MTU {mtu}", entry.lower);
        let taps = queues
            .into_iter()
            .map(Tap::new)
            .collect::<Result<Vec<_>, _>>();
        let taps = taps.map_err(|source| NicError::Tap {
            name: entry.name.clone(),
            source,
        })?;
        let config = NetConfig {
            mac: mac.octets(),
            mtu,
        };
        Ok(Self {
            taps,
            config,
            entry,
            watch,
            lease,
        })
    }
}

/// Takes over the descriptors that the sources name.
///
/// # Errors
///
/// Says which of them is not open.
///
/// # Safety
///
/// Nothing in this process may own them: call it before anything is opened.
pub unsafe fn inherit(sources: &[NicSource]) -> Result<Vec<OwnedFd>, NicError> {
    let numbers: Vec<RawFd> = sources.iter().flat_map(NicSource::descriptors).collect();
    // SAFETY: as for this function.
    Ok(unsafe { net::inherit(&numbers) }?)
}

/// Makes what each card needs, in order, or takes it from `inherited`.
///
/// # Errors
///
/// Says what could not be had; what had been made is gone again.
pub fn acquire(sources: &[NicSource], inherited: Vec<OwnedFd>) -> Result<Vec<Nic>, NicError> {
    let mut inherited = inherited.into_iter();
    let make = |source: &NicSource| match source {
        NicSource::Macvtap(spec) => Nic::make(spec),
        NicSource::Descriptors(fds) => Nic::adopt(inherited.by_ref().take(fds.len()).collect()),
    };
    let nics: Vec<Nic> = sources.iter().map(make).collect::<Result<_, _>>()?;
    must_not_share(&nics)?;
    Ok(nics)
}

/// Refuses cards by descriptors of the same interface. (A name alone may occur in two namespaces.)
fn must_not_share(nics: &[Nic]) -> Result<(), NicError> {
    let mut adopted: Vec<_> = nics.iter().filter(|nic| nic.lease.is_none()).collect();
    while let Some(Nic { entry, .. }) = adopted.pop() {
        let is_same =
            |other: &&Nic| (&other.entry.name, &other.entry.mac) == (&entry.name, &entry.mac);
        if adopted.iter().any(is_same) {
            let (name, mac) = (entry.name.clone(), entry.mac.clone());
            return Err(NicError::Shared { name, mac });
        }
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
    }
}

/// A card works without being watched, so a failure is no more than a warning.
fn watched(name: &str, watch: io::Result<LinkWatch>) -> Option<LinkWatch> {
    watch
        .inspect_err(|error| log::warn!("cannot watch {name}: {error}"))
        .ok()
}
