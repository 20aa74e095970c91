//! The NICs of a machine, and what the control thread does for them.

use std::error::Error;
use std::fs::File;
use std::io;
use std::sync::Arc;

use devices::virtio::net::capture::Capture;
use devices::virtio::net::tap::Tap;
use devices::virtio::net::vhost::{VhostError, VhostPair};
use devices::virtio::net::{Net, NetHandle, NetOptions};
use event_manager::MutEventSubscriber;
use net::LinkGuard;
use vm_memory::GuestMemoryMmap;

use crate::config::{BackendChoice, NicOptions};
use crate::events::EventHub;
use crate::events::start::StartedNic;
use crate::machine::{Machine, MachineError};
use crate::nic::Nic;
use crate::nic::follow::Follower;
use crate::nic::link::Link;

/// The NICs, once they stand on the bus.
#[derive(Debug, Default)]
pub struct NetDevices {
    /// What keeps the macvtaps in being.
    pub guards: Vec<LinkGuard>,
    /// What others hold of the NICs, in order.
    pub handles: Vec<Arc<NetHandle>>,
    /// What is said of them when the guest starts.
    pub started: Vec<StartedNic>,
    followers: Vec<Follower>,
}

impl NetDevices {
    /// Puts each NIC into the machine.
    ///
    /// # Errors
    ///
    /// See [`MachineError`].
    pub fn add(machine: &mut Machine, nics: Vec<Nic>) -> Result<Self, MachineError> {
        let mut devices = Self::default();
        for (n, nic) in (0..).zip(nics) {
            let name = format!("net{n}");
            // As it was asked for: the macvtap's own name says little.
            let tap = &nic.entry().tap;
            let label = format!("{name} on {}", tap.lower);
            devices.started.push(StartedNic::new(&name, tap));
            let [rx_limit, tx_limit] = nic.options.limits();
            let capture = nic.pcap.map(|file| start_capture(file, &name)).transpose();
            let vhost = vhost_pairs(&label, &nic.taps, &nic.options, machine.memory())?;
            let listener = nic.listener.filter(|_| !vhost.is_empty());
            let options = NetOptions {
                label: label.clone(),
                permissions: nic.permissions,
                rx_limit,
                tx_limit,
                capture: capture.map_err(MachineError::Capture)?,
                vhost,
                events: machine.event_sink(&name),
            };
            let device =
                Net::new(name, nic.config, nic.taps, options).map_err(MachineError::Device)?;
            let handle = device.handle();
            let (guest, observer) = (Arc::clone(handle.config()), Arc::clone(handle.observer()));
            devices.handles.push(handle);
            machine.add_virtio(device)?;
            devices.guards.push(nic.guard);
            let link = |watch| Link::new(watch, label.clone(), Arc::clone(&guest));
            let link = nic.watch.map(link).transpose();
            let follower = link
                .and_then(|link| Follower::new(label, guest, observer, nic.claim, link, listener));
            devices
                .followers
                .push(follower.map_err(MachineError::EventFd)?);
        }
        Ok(devices)
    }

    /// What the control thread does for them while the guest runs. New addresses are announced by `events`.
    pub fn followers(&mut self, events: &Arc<EventHub>) -> Vec<Box<dyn MutEventSubscriber>> {
        let boxed = |(n, mut follower): (usize, Follower)| {
            follower.announce_to(format!("net{n}"), Arc::clone(events));
            Box::new(follower) as Box<dyn MutEventSubscriber>
        };
        self.followers.drain(..).enumerate().map(boxed).collect()
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
