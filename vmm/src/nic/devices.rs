//! The NICs of a machine, and what the control thread does for them.

use std::error::Error;
use std::fs::File;
use std::io;
use std::sync::Arc;

use devices::virtio::net::capture::Capture;
use devices::virtio::net::config::ConfigSpace;
use devices::virtio::net::observe::Observer;
use devices::virtio::net::tap::Tap;
use devices::virtio::net::vhost::{VhostError, VhostPair};
use devices::virtio::net::{Net, NetOptions};
use event_manager::MutEventSubscriber;
use net::{FrameListener, LinkGuard, LinkWatch};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::config::{BackendChoice, NicOptions};
use crate::machine::{Machine, MachineError};
use crate::nic::Nic;
use crate::nic::listener::GuestListener;
use crate::nic::registry::{Announcer, RegisteredNic};
use crate::nic::watch::{FollowedLink, LinkFollower};

/// The NICs, once they stand on the bus.
#[derive(Debug)]
pub struct NetDevices {
    /// What keeps the macvtaps in being.
    pub guards: Vec<LinkGuard>,
    /// Signalled when a guest's addresses have changed.
    learnt: EventFd,
    watched: Vec<Watched>,
    listeners: Vec<(FrameListener, Arc<Observer>)>,
    registered: Vec<RegisteredNic>,
}

/// A NIC whose interface can be watched.
#[derive(Debug)]
struct Watched {
    label: String,
    watch: LinkWatch,
    guest: Arc<ConfigSpace>,
    link: Arc<FollowedLink>,
}

impl NetDevices {
    /// Puts each NIC into the machine.
    ///
    /// # Errors
    ///
    /// See [`MachineError`].
    pub fn add(machine: &mut Machine, nics: Vec<Nic>) -> Result<Self, MachineError> {
        let eventfd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let mut devices = Self {
            guards: Vec::new(),
            learnt: eventfd.map_err(MachineError::EventFd)?,
            watched: Vec::new(),
            listeners: Vec::new(),
            registered: Vec::new(),
        };
        for (n, nic) in (0..).zip(nics) {
            let name = format!("net{n}");
            // As it was asked for: the macvtap's own name says little.
            let label = format!("{name} on {}", nic.entry().tap.lower);
            let learnt = devices.learnt.try_clone().map_err(MachineError::EventFd)?;
            let observer = Arc::new(Observer::new(label.clone(), nic.config.mac, learnt));
            let [rx_limit, tx_limit] = nic.options.limits();
            let capture = nic.pcap.map(|file| start_capture(file, &name)).transpose();
            let vhost = vhost_pairs(&label, &nic.taps, &nic.options, machine.memory())?;
            if let Some(listener) = nic.listener.filter(|_| !vhost.is_empty()) {
                devices.listeners.push((listener, Arc::clone(&observer)));
            }
            let options = NetOptions {
                observer: Arc::clone(&observer),
                permissions: nic.permissions,
                rx_limit,
                tx_limit,
                capture: capture.map_err(MachineError::Capture)?,
                vhost,
            };
            let device =
                Net::new(name, nic.config, nic.taps, options).map_err(MachineError::Device)?;
            let config = Arc::clone(device.config());
            machine.add_virtio(device)?;
            devices.guards.push(nic.guard);
            let link = nic.watch.is_some().then(Arc::<FollowedLink>::default);
            devices.registered.push(RegisteredNic {
                claim: nic.claim,
                observer,
                link: link.clone(),
            });
            let watched = nic.watch.zip(link).map(|(watch, link)| Watched {
                label,
                watch,
                guest: config,
                link,
            });
            devices.watched.extend(watched);
        }
        Ok(devices)
    }

    /// What the control thread does meanwhile: lets each NIC's link follow the host's, and tells
    /// other programs of the guest.
    ///
    /// # Errors
    ///
    /// Fails when the process has no file descriptor left.
    pub fn watchers(&mut self) -> io::Result<Vec<Box<dyn MutEventSubscriber>>> {
        let mut watchers: Vec<Box<dyn MutEventSubscriber>> = Vec::new();
        for Watched {
            label,
            watch,
            guest,
            link,
        } in self.watched.drain(..)
        {
            let changed = self.learnt.try_clone()?;
            let follower = LinkFollower::new(label, watch, guest, link, changed)?;
            watchers.push(Box::new(follower));
        }
        for (listener, observer) in self.listeners.drain(..) {
            watchers.push(Box::new(GuestListener::new(listener, observer)?));
        }
        let nics = std::mem::take(&mut self.registered);
        let announcer = Announcer::new(nics, self.learnt.try_clone()?)?;
        watchers.push(Box::new(announcer));
        Ok(watchers)
    }
}

fn start_capture(file: File, name: &str) -> io::Result<Capture> {
    if file.metadata()?.is_file() {
        file.set_len(0)?;
    }
    Capture::start(file, name)
}

/// vhost-net for each queue of a NIC, or none where threads of our own are to move its frames.
fn vhost_pairs(
    label: &str,
    taps: &[Tap],
    options: &NicOptions,
    memory: &Arc<GuestMemoryMmap>,
) -> Result<Vec<VhostPair>, VhostError> {
    let open = || {
        taps.iter()
            .map(|tap| VhostPair::open(tap, Arc::clone(memory)))
            .collect::<Result<Vec<_>, _>>()
    };
    let pairs = match options.backend {
        BackendChoice::User => return Ok(Vec::new()),
        BackendChoice::Vhost => open()?,
        BackendChoice::Auto if options.needs_frames().is_some() => return Ok(Vec::new()),
        BackendChoice::Auto => open().unwrap_or_else(|error| {
            let why = error.source().map(ToString::to_string).unwrap_or_default();
            log::debug!("{label}: {error}: {why}; threads of minivmm move the frames");
            Vec::new()
        }),
    };
    if !pairs.is_empty() {
        log::info!("{label}: vhost-net moves the frames");
    }
    Ok(pairs)
}
