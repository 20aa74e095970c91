//! What of the guest is served outside QEMU: user networks by passt, shares by their servers, and sockets between guest
//! and host by minivmm itself.

use std::ffi::OsString;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use devices::events::EventSink;
use devices::virtio::served::Served;
use event_manager::MutEventSubscriber;
use net::{MacAddr, USUAL_MTU};

use super::args::escaped;
use super::binary::Qemu;
use super::{Plan, QemuError, conflict, failed_to, nics};
use crate::cli::QemuArgs;
use crate::config::{Config, Forward, ShareConfig, ShareSource, UserNet};
use crate::events::EventHub;
use crate::events::start::StartedNic;
use crate::nic::NicError;
use crate::nic::passt::{Starting, must_differ};
use crate::qmp::socket::Listener;
use crate::shares::{self, Opened, ShareError};
use crate::vsock::{self, VsockSocket};

/// Queues of the socket device; its third one is QEMU's.
const VSOCK_QUEUES: usize = 2;
/// The first QEMU with `-netdev stream`.
const STREAM: (u64, u64) = (7, 2);
/// The first QEMU with `-device vhost-user-vsock-pci`.
const VSOCK: (u64, u64) = (5, 1);

/// What QEMU gets for it, and what is kept as long as QEMU runs.
#[derive(Default)]
pub(super) struct Extras {
    /// QEMU's options.
    pub args: Vec<OsString>,
    /// What they name.
    pub placed: Vec<(RawFd, OwnedFd)>,
    /// The NICs on user networks.
    pub nics: Vec<StartedNic>,
    /// What follows the programs, and ends them when dropped.
    pub followers: Vec<Box<dyn MutEventSubscriber>>,
    vsock: Option<(Served, Listener)>,
}

impl Extras {
    /// Starts it all; descriptors have free numbers from `first` on. The programs end with minivmm.
    pub fn start(
        plan: &Plan,
        args: &QemuArgs,
        first: RawFd,
        events: &Arc<EventHub>,
    ) -> Result<Self, QemuError> {
        check(&plan.qemu, args)?;
        must_differ(&args.user_net).map_err(NicError::from)?;
        let named = conflict::named(&args.args);
        let mut extras = Self::default();
        let mut next = first;
        let mut place = |extras: &mut Self, socket: OwnedFd| {
            let number = nics::free(next, &named);
            next = number + 1;
            extras.placed.push((number, socket));
            number
        };
        for (n, net) in args.user_net.iter().enumerate() {
            let passt = Starting::new(net).and_then(Starting::finish);
            let passt = passt.map_err(NicError::from)?;
            let mtu = passt.config().mtu;
            let fd = place(&mut extras, passt.socket.into());
            let id = format!("user{n}");
            log::info!("{id} on a user network: MAC {}", passt.mac);
            let backend = format!("stream,id=minivmm-{id},server=off,addr.type=fd,addr.str={fd}");
            extras.push(nic(&id, &backend, passt.mac, mtu, plan));
            extras.nics.push(StartedNic::of_user_net(&id, passt.mac));
            extras.followers.push(Box::new(passt.service));
        }
        let config = Config {
            shares: args.share.clone(),
            ..Config::new(PathBuf::new())
        };
        let shares = shares::open(&config)?;
        for (n, (share, opened)) in args.share.iter().zip(shares).enumerate() {
            let socket = match opened {
                Opened::Other(socket) => socket,
                Opened::Ours(mut server) => {
                    server.wait_ready().map_err(ShareError::from)?;
                    let events = events.sink(&format!("share{n}"));
                    server.service.report_share(share.tag.as_str(), events);
                    extras.followers.push(Box::new(server.service));
                    server.socket
                }
            };
            let fd = place(&mut extras, socket.into());
            extras.push(share_args(n, share, &format!("fd={fd}")));
        }
        if let Some(config) = &args.vsock {
            let socket = VsockSocket::open(config)?;
            let made = vsock::device(socket, EventSink::default());
            let (device, listener) = made.map_err(failed_to("make a socket device"))?;
            let (ours, its) = UnixStream::pair().map_err(failed_to("make a socket"))?;
            let served = Served::start("vsock", Box::new(device), VSOCK_QUEUES, ours);
            let served = served.map_err(failed_to("start the thread of the socket device"))?;
            let fd = place(&mut extras, its.into());
            extras.push(vsock_args(&format!("fd={fd}")));
            extras.vsock = Some((served, listener));
        }
        Ok(extras)
    }

    /// What QEMU does by itself, for a script: its own user network, and shares whose server is there.
    pub fn of_script(plan: &Plan, args: &QemuArgs) -> Result<Self, QemuError> {
        must_differ(&args.user_net).map_err(NicError::from)?;
        let mut extras = Self::default();
        for (n, net) in args.user_net.iter().enumerate() {
            let id = format!("user{n}");
            let mac = net.mac.map_or_else(MacAddr::random, Ok);
            let mac = mac.map_err(failed_to("choose a MAC address"))?;
            let backend = format!("user,id=minivmm-{id},net={}{}", net.network, forwards(net));
            extras.push(nic(&id, &backend, mac, USUAL_MTU as u16, plan));
        }
        for (n, share) in args.share.iter().enumerate() {
            match &share.source {
                ShareSource::Socket(path) => {
                    let mut words = share_args(n, share, "path=").map(OsString::from);
                    words[1].push(escaped(path));
                    extras.args.extend(words);
                }
                ShareSource::Directory { path, .. } => log::warn!(
                    "the script does not serve the share of {path:?}: start virtiofsd, and name its socket with \
                     --share socket=PATH,tag=TAG"
                ),
            }
        }
        if args.vsock.is_some() {
            log::warn!("the script does not serve --vsock: QEMU has no such device of its own");
        }
        Ok(extras)
    }

    fn push(&mut self, args: impl IntoIterator<Item = String>) {
        self.args.extend(args.into_iter().map(OsString::from));
    }
}

/// Refuses what this QEMU, or the machine of ARGS, lacks.
fn check(qemu: &Qemu, args: &QemuArgs) -> Result<(), QemuError> {
    let needs = |option, device, (major, minor): (u64, u64)| match qemu.is_before(major, minor) {
        true => Err(QemuError::Old(option, device, major, minor)),
        false => Ok(()),
    };
    if !args.user_net.is_empty() {
        needs("--user-net", "-netdev stream", STREAM)?;
    }
    if args.vsock.is_some() {
        needs("--vsock", "-device vhost-user-vsock-pci", VSOCK)?;
    }
    Ok(())
}

/// A NIC's backend and its device. A guest whose kernel is given needs no network boot from the NIC's ROM.
fn nic(id: &str, backend: &str, mac: MacAddr, mtu: u16, plan: &Plan) -> [String; 4] {
    let mut device = format!("virtio-net-pci,netdev=minivmm-{id},mac={mac}");
    if u32::from(mtu) != USUAL_MTU {
        device += &format!(",host_mtu={mtu}");
    }
    if plan.machine.is_some() {
        device += ",romfile=";
    }
    [
        "-netdev".into(),
        backend.to_owned(),
        "-device".into(),
        device,
    ]
}

/// What reaches the guest, in QEMU's words for its own user network.
fn forwards(net: &UserNet) -> String {
    let forward = |forward: &Forward| {
        let (protocol, port) = (forward.protocol, forward.port);
        let address = forward.address.map(|address| address.to_string());
        let (address, to) = (address.unwrap_or_default(), forward.guest_port);
        format!(",hostfwd={protocol}:{address}:{port}-:{to}")
    };
    net.forwards.iter().map(forward).collect()
}

/// A share's socket, at `place`, and its device.
fn share_args(n: usize, share: &ShareConfig, place: &str) -> [String; 4] {
    let (id, tag) = (format!("minivmm-share{n}"), share.tag.as_str());
    // A comma is doubled.
    let tag = tag.replace(',', ",,");
    [
        "-chardev".into(),
        format!("socket,id={id},{place}"),
        "-device".into(),
        format!("vhost-user-fs-pci,chardev={id},tag={tag}"),
    ]
}

fn vsock_args(place: &str) -> [String; 4] {
    [
        "-chardev".into(),
        format!("socket,id=minivmm-vsock,{place}"),
        "-device".into(),
        "vhost-user-vsock-pci,chardev=minivmm-vsock".into(),
    ]
}
