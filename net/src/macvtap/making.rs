//! Making a macvtap: in its namespace, up, with its queues open.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use rtnetlink::packet_route::link::InfoKind;
use rustix::fs::Dev;

use super::{Macvtap, Sight, TapInfo, connect, this_namespace};
use crate::diagnose::{self, LinkRequest, Problem};
use crate::identity::LinkId;
use crate::link_guard::LinkGuard;
use crate::mac::MacAddr;
use crate::mode::Mode;
use crate::name::NewLinkName;
use crate::netlink::{Link, Netlink, NewLink, Steps, random_index, random_name};
use crate::owner::Owner;
use crate::privileges::{Obstacle, Privileges};
use crate::queue::QueueError;
use crate::spec::{MacvtapSpec, Placement};
use crate::sysfs::Sysfs;
use crate::{netns, queue, wifi};

pub(super) fn make_new(
    host: &Netlink,
    links: &[Link],
    lower: &Link,
    spec: &MacvtapSpec,
    steps: &Steps,
    home: OwnedFd,
) -> Result<Macvtap, Problem> {
    // Before anything is made, while this thread is in the lower's namespace.
    let privileges = Privileges::of_this_thread()
        .map_err(Problem::from_step("show in /proc what this process may do"))?;
    if let Some(obstacle) = privileges.obstacle_to_making() {
        return Err(obstacle.into());
    }
    let real = wifi::fit_lower(links, lower)?;
    if real.index != lower.index {
        let (macvlan, real) = (&lower.name, &real.name);
        log::info!("{macvlan} is a macvlan: the macvtap goes straight onto {real} under it");
    }
    let mode = spec.mode.unwrap_or_default();
    let request = LinkRequest {
        links,
        lower: real,
        mode,
        mac: spec.mac,
        mtu: spec.mtu,
    };
    request.check()?;
    let lower_id = LinkId {
        namespace: this_namespace()?,
        index: real.index,
    };

    // From here on this thread is in the new namespace; `host` still speaks to the lower's.
    let namespace = netns::enter_new().map_err(Problem::from_step("make a network namespace"))?;
    forbid_ipv6("default");
    let index = create(host, &request, spec, namespace.as_fd())?;
    let link_guard = match spec.netns {
        Placement::Private => LinkGuard::private(namespace, index),
        Placement::Host => move_home(spec, steps, index, home)?,
    };
    let (link, device, queues, mac) = start(&request, spec, steps, privileges, index)?;
    if mode == Mode::Source && spec.source_macs.is_empty() {
        log::warn!(
            "in source mode the macvtap receives only from listed senders, and its list is empty"
        );
    }
    Ok(Macvtap {
        queues,
        link_guard,
        sight: Sight::Guarded,
        watch_socket: None,
        is_passed: false,
        info: TapInfo {
            name: link.name,
            lower: real.name.clone(),
            mac,
            mtu: link.mtu,
            device,
            id: Some(LinkId {
                namespace: this_namespace()?,
                index: link.index,
            }),
            lower_id: Some(lower_id),
            mode: Some(mode),
        },
    })
}

/// Makes the macvtap in `namespace`, and returns its index.
fn create(
    host: &Netlink,
    request: &LinkRequest<'_>,
    spec: &MacvtapSpec,
    namespace: BorrowedFd<'_>,
) -> Result<u32, Problem> {
    let mac = chosen_mac(request.mode, spec.mac)
        .map_err(Problem::from_step("give random bytes for a MAC address"))?;
    let new = NewLink {
        kind: InfoKind::MacVtap,
        name: &new_name(spec).map_err(Problem::from_step("give random bytes for a name"))?,
        lower: request.lower.index,
        namespace: Some(namespace),
        alias: "",
        mode: request.mode,
        mac,
        mtu: spec.mtu,
        tx_queue_len: spec.tx_queue_len,
        bc_queue_len: spec.bc_queue_len,
        source_macs: &spec.source_macs,
    };
    host.create(&new, random_index)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EEXIST) => name_taken(new.name),
            _ => request.explain_create(error),
        })
}

/// Moves the macvtap with this index from this thread's private namespace to `home`, and the thread too. It is tagged
/// before: whenever this process is killed, either the private namespace ends with the macvtap, or a tagged link stays.
fn move_home(
    spec: &MacvtapSpec,
    steps: &Steps,
    index: u32,
    home: OwnedFd,
) -> Result<LinkGuard, Problem> {
    let owner = Owner::this_process()
        .map_err(Problem::from_step("show in /proc which process this is"))?
        .to_string();
    let private = connect(steps)?;
    private
        .set_alias(index, &owner)
        .map_err(Problem::from_step("tag the macvtap with its owner"))?;
    let name = spec.name.as_ref().map_or(FREE_NAME, NewLinkName::as_str);
    private
        .move_to(home.as_fd(), index, name)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EEXIST) => name_taken(name),
            _ => Problem::from_step("move the macvtap to this network namespace")(error),
        })?;
    netns::enter(&home).map_err(Problem::from_step("return to this network namespace"))?;
    Ok(LinkGuard::visible(home, index, owner))
}

/// Brings up the macvtap with this index, in the namespace of this thread, and opens its queues.
fn start(
    request: &LinkRequest<'_>,
    spec: &MacvtapSpec,
    steps: &Steps,
    privileges: Privileges,
    index: u32,
) -> Result<(Link, Dev, Vec<OwnedFd>, MacAddr), Problem> {
    let here = connect(steps)?;
    let look = || {
        here.link(index)
            .map_err(Problem::from_step("show the new macvtap"))
    };
    let made = look()?;
    diagnose::check_made(&made, spec)?;
    if spec.netns == Placement::Host {
        forbid_ipv6(&made.name);
    }
    bring_up(&here, index).map_err(|error| request.explain_up(&made, error))?;
    // Once more: with an old udev or a passthru lower the address may have changed since.
    let link = look()?;
    // In a user namespace of its own a process is refused, as `doctor` says, whatever a node's mode lets it open.
    let opened = (!privileges.is_confined()).then(|| queue::open_new(&link, spec.queues));
    let (device, queues, mac) = match opened.flatten() {
        Some(opened) => opened,
        None => {
            let sysfs = Sysfs::of_this_namespace().map_err(Problem::from_step("open sysfs"))?;
            queue::open(&sysfs, &link, spec.queues).map_err(explain_open)?
        }
    };
    if let Some(wanted) = spec.mac.filter(|wanted| *wanted != mac) {
        log::warn!("{}", other_mac(&link.name, wanted, mac));
    }
    Ok((link, device, queues, mac))
}

/// The meaning of a refusal to open the device of a new macvtap. Its node ends with this process: it cannot be given
/// away.
fn explain_open(error: QueueError) -> Problem {
    let is_confined =
        || Privileges::of_this_thread().is_ok_and(|privileges| privileges.is_confined());
    match error {
        QueueError::Find(..) | QueueError::NotPermitted(..) | QueueError::PrivateNode(..)
            if is_confined() =>
        {
            Obstacle::Devices.into()
        }
        QueueError::NotPermitted(name, _) => Problem::DeviceRefused { name },
        other => other.into(),
    }
}

/// For a new macvtap that has another address than the one it was made with.
fn other_mac(name: &str, wanted: MacAddr, has: MacAddr) -> String {
    format!(
        "{name} was made with the MAC address {wanted} and now has {has}, which it is used with: something here changes \
         new interfaces, such as a .link file of udev (MACAddressPolicy=)"
    )
}

/// How long a MAC address that is taken may take to become free.
const PATIENCE: Duration = Duration::from_secs(1);

/// Brings the link up. When its MAC address is taken, that is tried again for a moment: the kernel removes the links of
/// a process that has just ended in the background, and whoever starts it again at once asks for the same address.
fn bring_up(here: &Netlink, index: u32) -> io::Result<()> {
    let start = Instant::now();
    loop {
        match here.bring_up(index) {
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EADDRINUSE | libc::EBUSY))
                    && start.elapsed() < PATIENCE =>
            {
                thread::sleep(PATIENCE / 50);
            }
            result => return result,
        }
    }
}

fn forbid_ipv6(link: &str) {
    if let Err(error) = netns::forbid_ipv6(link) {
        log::warn!(
            "cannot keep the host's IPv6 off the macvtap, its multicast may suffer: {error}"
        );
    }
}

/// Its name in the caller's namespace: the kernel puts the first number there that is free.
const FREE_NAME: &str = "mvt%d";

/// Its name in the private namespace, where there is no other but `lo`.
fn new_name(spec: &MacvtapSpec) -> io::Result<String> {
    match (&spec.name, spec.netns) {
        (Some(name), _) => Ok(name.to_string()),
        (None, Placement::Private) => Ok("macvtap0".to_owned()),
        // One that no link has in the caller's namespace, until it gets its number there.
        (None, Placement::Host) => random_name(),
    }
}

fn name_taken(name: &str) -> Problem {
    let name = name.to_owned();
    Problem::NameTaken { name }
}

/// What to ask the kernel for. A random address is chosen here, so that the kernel counts it as set on purpose and udev
/// leaves it; in passthru mode it is the lower's, unasked.
fn chosen_mac(mode: Mode, wanted: Option<MacAddr>) -> io::Result<Option<MacAddr>> {
    match (mode, wanted) {
        (Mode::Passthru, _) => Ok(None),
        (_, Some(mac)) => Ok(Some(mac)),
        (_, None) => MacAddr::random().map(Some),
    }
}

#[cfg(test)]
mod tests;
