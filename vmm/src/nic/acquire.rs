//! Taking a NIC from the host: for a guest of minivmm, for one in QEMU, and for the program of `net open`.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use devices::virtio::net::NetConfig;
use devices::virtio::net::ctrl::Permissions;
use devices::virtio::net::tap::{Tap, TapError};
use net::{ExistingTapError, FrameListener, LinkGuard, LinkWatch, Macvtap, Mode, TapInfo};

use super::inherited::Inherited;
use super::passt::{Passt, PasstError, Starting, must_differ};
use super::registry::{Claim, ClaimError, Runs};
use crate::config::{BackendChoice, NicConfig, NicOptions, NicSource, UserNet};

/// Why there is no NIC.
#[derive(Debug, thiserror::Error)]
pub enum NicError {
    /// The macvtap.
    #[error(transparent)]
    Macvtap(#[from] net::Error),
    /// Inherited descriptors.
    #[error("cannot use the file descriptors of --macvtap fd=")]
    Existing(#[from] ExistingTapError),
    /// Another NIC is on the same interface.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// A user network.
    #[error(transparent)]
    UserNet(#[from] PasstError),
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

/// A macvtap that this process alone uses, as far as others can be known.
#[derive(Debug)]
pub struct HostNic {
    /// Keeps others from it.
    pub claim: Claim,
    /// Its queues, and what deletes it if it is new.
    pub macvtap: Macvtap,
}

impl HostNic {
    /// Claims `macvtap` for what this process `runs`, for itself or for the program of another `user`.
    ///
    /// # Errors
    ///
    /// [`NicError::Claim`].
    pub fn claim(macvtap: Macvtap, runs: &Runs, user: Option<u32>) -> Result<Self, NicError> {
        let claim = Claim::new(&macvtap, runs, user)?;
        Ok(Self { claim, macvtap })
    }
}

/// Opens a macvtap for each of `sources` that has one, in order, and claims it for what this process `runs`.
///
/// # Errors
///
/// What could not be had; what had been made is gone again.
pub fn acquire<'a>(
    sources: impl Iterator<Item = &'a NicSource> + Clone,
    mut inherited: Inherited,
    runs: &Runs,
) -> Result<Vec<HostNic>, NicError> {
    let sources = sources.filter(|source| !matches!(source, NicSource::UserNet(_)));
    // What is wrong with inherited queues is said before anything is made.
    let existing = sources.clone().map(|source| match source {
        NicSource::Descriptors(numbers) => inherited.macvtap(numbers).map(Some),
        _ => Ok(None),
    });
    let existing = existing.collect::<Result<Vec<_>, _>>()?;
    let mut macvtaps = Vec::<Macvtap>::new();
    for (source, existing) in sources.zip(existing) {
        let macvtap = match (source, existing) {
            (NicSource::Macvtap(spec), None) => Macvtap::open(spec)?,
            (_, existing) => existing.ok_or(ExistingTapError::None)?,
        };
        let tap = macvtap.info();
        if macvtaps.iter().any(|other| is_same(other.info(), tap)) {
            let (name, mac) = (tap.name.clone(), tap.mac);
            return Err(ClaimError::Twice { name, mac }.into());
        }
        macvtaps.push(macvtap);
    }
    let claim = |macvtap| HostNic::claim(macvtap, runs, None);
    macvtaps.into_iter().map(claim).collect()
}

/// Whether both are one interface. Two taps may look the same in two namespaces.
fn is_same(one: &TapInfo, other: &TapInfo) -> bool {
    (one.device, &one.name, one.mac) == (other.device, &other.name, other.mac)
        && (one.id.is_none() || other.id.is_none() || one.id == other.id)
}

/// What the host has of a NIC, ready for a guest.
#[derive(Debug)]
pub struct Nic {
    /// What the guest finds in its NIC.
    pub config: NetConfig,
    /// How the NIC is to behave.
    pub options: NicOptions,
    /// What the guest's commands may do on the host.
    pub permissions: Permissions,
    /// The file for its frames, which is opened before any NIC is made.
    pub pcap: Option<File>,
    /// Where the frames go.
    pub end: HostEnd,
}

/// The host's end of a NIC.
#[derive(Debug)]
pub enum HostEnd {
    /// On one of its interfaces.
    Macvtap(Box<MacvtapEnd>),
    /// In a program.
    UserNet(Passt),
}

/// A macvtap, open.
#[derive(Debug)]
pub struct MacvtapEnd {
    /// The queues, one for each pair.
    pub taps: Vec<Tap>,
    /// Keeps others from it.
    pub claim: Claim,
    /// News of the interface, where it can be seen.
    pub watch: Option<LinkWatch>,
    /// Learns what the guest sends, where its frames may pass through the kernel alone.
    pub listener: Option<FrameListener>,
    /// Deletes a new macvtap.
    pub guard: LinkGuard,
}

impl Nic {
    fn on_macvtap(host: HostNic, options: &NicOptions) -> Result<Self, NicError> {
        let HostNic { claim, mut macvtap } = host;
        let tap = claim.nic().tap.clone();
        // An Ethernet interface's MTU is at most 65,535.
        let mtu = u16::try_from(tap.mtu).unwrap_or(u16::MAX);
        log::info!("NIC on {}: MAC {}, MTU {mtu}", tap.lower, tap.mac);
        let (watch, listener) = (watch(&mut macvtap), listener(&macvtap, options));
        let (queues, guard) = macvtap.into_parts();
        let taps = queues.into_iter().map(Tap::new).collect::<Result<_, _>>();
        let name = tap.name;
        Ok(Self {
            config: NetConfig {
                mac: tap.mac.octets(),
                mtu,
            },
            options: options.clone(),
            permissions: Permissions {
                change_mac: options.trust_mac,
                // The lower is promiscuous then, and all that it receives is for the macvtap.
                allow_promisc: tap.mode == Some(Mode::Passthru),
            },
            pcap: None,
            end: HostEnd::Macvtap(Box::new(MacvtapEnd {
                taps: taps.map_err(|source| NicError::Tap { name, source })?,
                claim,
                watch,
                listener,
                guard,
            })),
        })
    }

    fn on_user_net(passt: Passt, options: &NicOptions) -> Self {
        let config = passt.config();
        log::info!(
            "NIC on a user network: MAC {}, MTU {}",
            passt.mac,
            config.mtu
        );
        Self {
            config,
            options: options.clone(),
            // Nothing else is on this network.
            permissions: Permissions {
                change_mac: true,
                allow_promisc: true,
            },
            pcap: None,
            end: HostEnd::UserNet(passt),
        }
    }

    /// Its macvtap, if it is on one.
    pub fn tap(&self) -> Option<&TapInfo> {
        match &self.end {
            HostEnd::Macvtap(end) => Some(&end.claim.nic().tap),
            HostEnd::UserNet(_) => None,
        }
    }
}

/// The NICs of a guest with this kernel. What the user networks take ends with the calling thread.
///
/// # Errors
///
/// See [`acquire`].
pub fn acquire_for_guest(
    nics: &[NicConfig],
    inherited: Inherited,
    kernel: &Path,
) -> Result<Vec<Nic>, NicError> {
    fn user_net(nic: &NicConfig) -> Option<&UserNet> {
        match &nic.source {
            NicSource::UserNet(net) => Some(net),
            _ => None,
        }
    }
    must_differ(nics.iter().filter_map(user_net))?;
    let start = |nic| user_net(nic).map(Starting::new).transpose();
    let starting = nics.iter().map(start).collect::<Result<Vec<_>, _>>()?;
    let sources = nics.iter().map(|nic| &nic.source);
    let mut hosts = acquire(sources, inherited, &Runs::kernel(kernel))?.into_iter();
    let mut ready = |(nic, starting): (&NicConfig, Option<Starting>)| match starting {
        Some(starting) => Ok(Some(Nic::on_user_net(starting.finish()?, &nic.options))),
        None => hosts
            .next()
            .map(|host| Nic::on_macvtap(host, &nic.options))
            .transpose(),
    };
    let nics = nics.iter().zip(starting);
    nics.filter_map(|nic| ready(nic).transpose()).collect()
}

/// A NIC works without being watched, so a failure is no more than a warning.
fn watch(macvtap: &mut Macvtap) -> Option<LinkWatch> {
    let watch = macvtap.watch();
    let name = &macvtap.info().name;
    match watch {
        Ok(None) => log::info!(
            "{name} is in a network namespace that minivmm does not see: its carrier and its end \
             will not show in the guest"
        ),
        Err(error) => log::warn!("cannot watch {name}: {error}"),
        Ok(watch) => return watch,
    }
    None
}

/// Where vhost-net may get the frames.
fn listener(macvtap: &Macvtap, options: &NicOptions) -> Option<FrameListener> {
    let may_be_vhost = options.backend != BackendChoice::User && options.needs_frames().is_none();
    if !may_be_vhost || open_vhost().is_err() {
        return None;
    }
    listen(macvtap)
}

/// Learns what the guest sends. A NIC works without, so a failure is no more than a line.
pub fn listen(macvtap: &Macvtap) -> Option<FrameListener> {
    let name = &macvtap.info().name;
    let failed = |error: &io::Error| {
        log::info!("{name}: the guest's addresses will not be learnt from its frames: {error}");
    };
    macvtap.listen().inspect_err(failed).ok().flatten()
}

/// The host kernel's data path.
pub const VHOST_NET: &str = "/dev/vhost-net";

/// Opens vhost-net once: each open file serves one queue.
///
/// # Errors
///
/// When the host has none, or not for this user.
pub fn open_vhost() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(VHOST_NET)
}

#[cfg(test)]
mod tests {
    use net::LinkId;

    use super::*;

    fn tap(device: u64, index: Option<u32>) -> TapInfo {
        TapInfo {
            name: "mine".into(),
            lower: "eno1".into(),
            mac: "02:00:00:00:00:01".parse().unwrap(),
            mtu: 1500,
            device,
            id: index.map(|index| LinkId {
                namespace: 1,
                index,
            }),
            lower_id: None,
            mode: None,
        }
    }

    #[test]
    fn interface_is_the_same_unless_device_or_link_differ() {
        let same = |one, other| is_same(&one, &other);
        assert!(same(tap(7, None), tap(7, Some(2))));
        assert!(same(tap(7, Some(2)), tap(7, Some(2))));
        assert!(!same(tap(7, None), tap(8, None)));
        // Taps of two namespaces.
        assert!(!same(tap(7, Some(2)), tap(7, Some(3))));
    }
}
