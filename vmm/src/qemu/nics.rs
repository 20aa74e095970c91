//! The NICs: the numbers of their descriptors in QEMU, and what is known of them before they are made.

use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::events::EventSink;
use devices::virtio::net::NetConfig;
use devices::virtio::net::config::ConfigSpace;
use devices::virtio::net::observe::Observer;
use net::{FrameListener, LinkName, MacAddr, MacvtapSpec, Mode, TapInfo};

use crate::config::{NicSource, QemuNic};
use crate::events::EventHub;
use crate::nic::follow::Follower;
use crate::nic::registry::Claim;

/// The numbers that a NIC's descriptors have in QEMU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Numbers {
    pub fds: Vec<RawFd>,
    pub vhost: Vec<RawFd>,
}

/// Numbers the descriptors of all NICs from `first` on: a NIC's queues, then its vhost descriptors. In a `script` those
/// that the caller has opened keep their numbers.
pub(super) fn number(
    requests: &[QemuNic],
    vhost: bool,
    first: RawFd,
    script: bool,
) -> Vec<Numbers> {
    let kept = |request: &QemuNic| match &request.source {
        NicSource::Descriptors(numbers) if script => Some(numbers.clone()),
        _ => None,
    };
    let all_kept: Vec<RawFd> = requests.iter().filter_map(kept).flatten().collect();
    let mut free = (first..).filter(|fd| !all_kept.contains(fd));
    let mut take = |count| free.by_ref().take(count).collect();
    requests
        .iter()
        .map(|request| Numbers {
            fds: kept(request).unwrap_or_else(|| take(request.source.queues())),
            vhost: match request.vhost.unwrap_or(vhost) {
                true => take(request.source.queues()),
                false => Vec::new(),
            },
        })
        .collect()
}

/// A NIC that is followed.
#[derive(Debug)]
pub(super) struct Followed {
    pub follower: Follower,
    pub mac: MacAddr,
    pub observer: Arc<Observer>,
}

/// Publishes what the guest's frames say, and announces it by `events`: nothing else here looks at them. The NIC is
/// called `id` there.
pub(super) fn follow(
    claim: Claim,
    listener: Option<FrameListener>,
    id: &str,
    events: &Arc<EventHub>,
) -> io::Result<Followed> {
    let TapInfo {
        lower, mac, mtu, ..
    } = &claim.nic().tap;
    let mac = *mac;
    let label = format!("{id} on {lower}");
    let config = NetConfig {
        mac: mac.octets(),
        mtu: u16::try_from(*mtu).unwrap_or(u16::MAX),
    };
    let guest = Arc::new(ConfigSpace::new(config, 1, EventSink::default()));
    let observer = Arc::new(Observer::new(label.clone(), Arc::clone(&guest))?);
    let seen = Arc::clone(&observer);
    let mut follower = Follower::new(label, guest, seen, Some(claim), None, listener)?;
    follower.announce_to(id.to_owned(), Arc::clone(events));
    Ok(Followed {
        follower,
        mac,
        observer,
    })
}

/// The number from `first` on for what else QEMU gets: one that it neither inherits nor has named in ARGS.
pub(super) fn free(first: RawFd, named: &[RawFd]) -> RawFd {
    let mut free = (first..).filter(|fd| !named.contains(fd) && !is_inherited(*fd));
    // Few are open.
    free.next().unwrap_or(first)
}

/// Whether exec leaves this descriptor open, as none of minivmm's own.
fn is_inherited(fd: RawFd) -> bool {
    // SAFETY: it takes a number, and only asks for its flags.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    flags >= 0 && flags & libc::FD_CLOEXEC == 0
}

/// What is known of the address of a macvtap that is still to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    Known(MacAddr),
    Random,
    /// It is the link's, which cannot be looked at from here.
    Unknown,
}

/// The directory of a link in sysfs, which knows none of its alternative names.
pub(super) fn sysfs_of(link: &LinkName) -> PathBuf {
    let name = net::current_name(link).ok().flatten();
    Path::new("/sys/class/net").join(name.as_deref().unwrap_or(link.as_str()))
}

/// The address that a macvtap will have.
pub(super) fn expected_mac(spec: &MacvtapSpec) -> Expected {
    if let Some(mac) = spec.mac {
        return Expected::Known(mac);
    }
    if spec.lower_netns.is_some() {
        return Expected::Unknown;
    }
    let link = sysfs_of(&spec.link);
    if spec.mode == Some(Mode::Passthru) || link.join("macvtap").exists() {
        let address = std::fs::read_to_string(link.join("address"));
        let mac = address.ok().and_then(|mac| mac.trim().parse().ok());
        return mac.map_or(Expected::Unknown, Expected::Known);
    }
    // What does not exist has an error of its own.
    if link.exists() {
        Expected::Random
    } else {
        Expected::Unknown
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn numbers_follow_one_another() {
        let nics = ["a,queues=2", "b,vhost=off", "c"].map(|text| text.parse::<QemuNic>().unwrap());
        let numbers = number(&nics, true, 3, false);
        assert_eq!(numbers[0].fds, [3, 4]);
        assert_eq!(numbers[0].vhost, [5, 6]);
        assert_eq!(
            (numbers[1].fds.as_slice(), numbers[1].vhost.len()),
            (&[7][..], 0)
        );
        assert_eq!((numbers[2].fds[0], numbers[2].vhost[0]), (8, 9));
        assert!(number(&nics, false, 3, false)[0].vhost.is_empty());
    }

    #[test]
    fn numbers_that_args_name_or_qemu_inherits_are_not_taken() {
        let (ours, _) = std::io::pipe().unwrap();
        let ours = ours.as_raw_fd();
        assert_eq!(free(ours, &[]), ours);
        assert!(free(ours, &[ours]) > ours);
        // The standard descriptors are the test's too.
        assert!(free(0, &[]) > 2);
    }

    #[test]
    fn numbers_of_a_script_leave_open_descriptors_where_they_are() {
        let nics = ["a", "fd=4:3", "c"].map(|text| text.parse::<QemuNic>().unwrap());
        let numbers = number(&nics, false, 3, true);
        let fds: Vec<_> = numbers.iter().map(|numbers| numbers.fds.clone()).collect();
        assert_eq!(fds, [vec![5], vec![4, 3], vec![6]]);
    }
}
