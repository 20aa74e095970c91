//! The NICs of a machine, and what the control thread does for them.

use std::cell::RefCell;
use std::error::Error;
use std::fs::File;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use devices::virtio::net::backend::Backend;
use devices::virtio::net::capture::Capture;
use devices::virtio::net::config::ConfigSpace;
use devices::virtio::net::observe::Observer;
use devices::virtio::net::stream::Stream;
use devices::virtio::net::tap::Tap;
use devices::virtio::net::vhost::{VhostError, VhostPair};
use devices::virtio::net::{Net, NetConfig, NetHandle, NetOptions};
use event_manager::MutEventSubscriber;
use net::LinkGuard;
use vm_memory::GuestMemoryMmap;

use crate::config::{BackendChoice, NicOptions};
use crate::events::EventHub;
use crate::events::start::StartedNic;
use crate::machine::{Machine, MachineError};
use crate::nic::Nic;
use crate::nic::acquire::{HostEnd, MacvtapEnd};
use crate::nic::follow::Follower;
use crate::nic::link::Link;
use crate::nic::passt::{HangUp, Passt};
use crate::service::Services;

/// The NICs, once they stand on the bus.
#[derive(Default)]
pub struct NetDevices {
    /// What keeps the macvtaps in being.
    pub guards: Vec<LinkGuard>,
    /// What others hold of the NICs, in order.
    pub handles: Vec<Arc<NetHandle>>,
    /// What is said of them when the guest starts.
    pub started: Vec<StartedNic>,
    /// The names of those on a user network.
    pub user_nets: Vec<String>,
    /// The programs of user networks, which the guest's last frames are left to.
    pub passts: Services,
    followers: Vec<Follower>,
    hang_ups: Vec<HangUp>,
}

/// A NIC that is put into the machine.
struct Added {
    name: String,
    label: String,
    config: NetConfig,
    options: NetOptions,
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
            let label = match nic.tap() {
                Some(tap) => format!("{name} on {}", tap.lower),
                None => format!("{name} on a user network"),
            };
            let [rx_limit, tx_limit] = nic.options.limits();
            let capture = nic.pcap.map(|file| start_capture(file, &name)).transpose();
            let options = NetOptions {
                label: label.clone(),
                permissions: nic.permissions,
                rx_limit,
                tx_limit,
                capture: capture.map_err(MachineError::Capture)?,
                vhost: Vec::new(),
                events: machine.event_sink(&name),
            };
            let added = Added {
                name,
                label,
                config: nic.config,
                options,
            };
            match nic.end {
                HostEnd::Macvtap(end) => devices.add_macvtap(machine, added, *end, &nic.options)?,
                HostEnd::UserNet(passt) => devices.add_user_net(machine, added, passt)?,
            }
        }
        Ok(devices)
    }

    fn add_macvtap(
        &mut self,
        machine: &mut Machine,
        mut added: Added,
        end: MacvtapEnd,
        options: &NicOptions,
    ) -> Result<(), MachineError> {
        self.started
            .push(StartedNic::new(&added.name, &end.claim.nic().tap));
        let label = added.label.clone();
        added.options.vhost = vhost_pairs(&label, &end.taps, options, machine.memory())?;
        let listener = end.listener.filter(|_| !added.options.vhost.is_empty());
        let (guest, observer) = self.add_device(machine, added, end.taps)?;
        self.guards.push(end.guard);
        let link = |watch| Link::new(watch, label.clone(), Arc::clone(&guest));
        let link = end.watch.map(link).transpose()?;
        let claim = Some(end.claim);
        let follower = Follower::new(label, guest, observer, claim, link, listener)?;
        self.followers.push(follower);
        Ok(())
    }

    fn add_user_net(
        &mut self,
        machine: &mut Machine,
        added: Added,
        passt: Passt,
    ) -> Result<(), MachineError> {
        self.started
            .push(StartedNic::of_user_net(&added.name, passt.mac));
        self.user_nets.push(added.name.clone());
        let label = added.label.clone();
        let socket = passt.socket.try_clone().and_then(Stream::new);
        let stream = socket.map_err(MachineError::Device)?;
        let (guest, observer) = self.add_device(machine, added, vec![stream])?;
        self.hang_ups.push(HangUp {
            label: label.clone(),
            guest: Arc::clone(&guest),
            socket: passt.socket,
        });
        self.passts.push(Rc::new(RefCell::new(passt.service)));
        let follower = Follower::new(label, guest, observer, None, None, None)?;
        self.followers.push(follower);
        Ok(())
    }

    /// Puts it on the bus, with its frames passing by `backends`.
    fn add_device<B: Backend>(
        &mut self,
        machine: &mut Machine,
        added: Added,
        backends: Vec<B>,
    ) -> Result<(Arc<ConfigSpace>, Arc<Observer>), MachineError> {
        let device = Net::new(added.name, added.config, backends, added.options);
        let device = device.map_err(MachineError::Device)?;
        let handle = device.handle();
        let seen = (Arc::clone(handle.config()), Arc::clone(handle.observer()));
        self.handles.push(handle);
        machine.add_virtio(device)?;
        Ok(seen)
    }

    /// What the control thread does for them while the guest runs. New addresses are announced by `events`.
    pub fn followers(&mut self, events: &Arc<EventHub>) -> Vec<Box<dyn MutEventSubscriber>> {
        let boxed = |(n, mut follower): (usize, Follower)| {
            follower.announce_to(format!("net{n}"), Arc::clone(events));
            Box::new(follower) as Box<dyn MutEventSubscriber>
        };
        let followers = self.followers.drain(..).enumerate().map(boxed);
        let hang_ups = self.hang_ups.drain(..);
        let hang_ups = hang_ups.map(|hang_up| Box::new(hang_up) as Box<dyn MutEventSubscriber>);
        followers.chain(hang_ups).collect()
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
