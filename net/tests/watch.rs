//! News of links in network namespaces of the tests' own. They need root.

#![allow(
    clippy::unwrap_used,
    reason = "all of this file is tests, and the lint spares #[test] functions alone"
)]

#[path = "../../tests/harness/netns.rs"]
mod netns;

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use net::{LinkChange, LinkWatch, Macvtap, MacvtapSpec};
use netns::{Netns, root_test};
use rustix::event::{PollFd, PollFlags, Timespec};

fn index(netns: &Netns, link: &str) -> u32 {
    let listing = netns.ip(&format!("-o link show dev {link}"));
    listing.split(':').next().unwrap().parse().unwrap()
}

fn watch(netns: &Netns, indexes: &[u32]) -> LinkWatch {
    let namespace = File::open(netns.path()).unwrap();
    LinkWatch::in_namespace(namespace.as_fd(), indexes).unwrap()
}

type Change = (u32, LinkChange);

/// All that has come when it is `enough`, within some seconds, and then nothing more has come for a
/// moment.
fn changes_until(watch: &mut LinkWatch, enough: impl Fn(&[Change]) -> bool) -> Vec<Change> {
    let mut found = Vec::new();
    let start = Instant::now();
    loop {
        while let Some(event) = watch.next().unwrap() {
            found.push((event.index, event.change));
        }
        let patience = if enough(&found) {
            Duration::from_millis(200)
        } else {
            Duration::from_secs(10).saturating_sub(start.elapsed())
        };
        let patience = Timespec::try_from(patience).unwrap();
        let fd = watch.as_fd();
        let mut ready = [PollFd::new(&fd, PollFlags::IN)];
        if rustix::event::poll(&mut ready, Some(&patience)).unwrap() == 0 {
            return found;
        }
    }
}

#[track_caller]
fn expect(watch: &mut LinkWatch, expected: &[Change]) {
    let found = changes_until(watch, |found| found.len() >= expected.len());
    assert_eq!(found, expected);
}

#[track_caller]
fn expect_last(watch: &mut LinkWatch, last: Change) {
    let found = changes_until(watch, |found| found.last() == Some(&last));
    assert_eq!(found.last(), Some(&last), "{found:?}");
}

root_test!(watch_reports_unhealthy_links_alone_at_first, || {
    let netns = Netns::new();
    netns.wire("v0");
    netns.wire("v1");
    netns.down("v1");
    let (good, bad, absent) = (index(&netns, "v0"), index(&netns, "v1"), 4_000_000);
    let mut watch = watch(&netns, &[good, bad, absent]);
    expect(
        &mut watch,
        &[
            (bad, LinkChange::Admin(false)),
            (bad, LinkChange::Carrier(false)),
            (absent, LinkChange::Deleted),
        ],
    );
});

root_test!(watch_reports_changes_of_watched_links_alone, || {
    let netns = Netns::new();
    netns.wire("v0");
    let v0 = index(&netns, "v0");
    let mut watch = watch(&netns, &[v0]);
    expect(&mut watch, &[]);

    netns.down("v0-far");
    expect(&mut watch, &[(v0, LinkChange::Carrier(false))]);
    netns.up("v0-far");
    expect(&mut watch, &[(v0, LinkChange::Carrier(true))]);
    netns.ip("link set v0 mtu 1400");
    expect(&mut watch, &[(v0, LinkChange::Mtu(1400))]);
    // Joining and leaving a bridge is no deletion.
    netns.bridge("br0", &["v0"]);
    netns.ip("link set v0 nomaster");
    expect(&mut watch, &[]);
    netns.ip("link delete v0");
    expect_last(&mut watch, (v0, LinkChange::Deleted));
    expect(&mut watch, &[]);
});

root_test!(watch_reports_mac_changes_and_restores_multicast, || {
    let netns = Netns::new();
    netns.wire("v0");
    netns.macvtap("m0", "v0", "bridge");
    let m0 = index(&netns, "m0");
    let mut watch = watch(&netns, &[m0]);
    // The first state is no change.
    expect(&mut watch, &[]);
    netns.ip("link set m0 allmulticast on");
    expect(&mut watch, &[(m0, LinkChange::AllMulticast(true))]);
    netns.ip("link set m0 address 02:00:00:00:00:99");
    let mac = "02:00:00:00:00:99".parse().unwrap();
    expect(&mut watch, &[(m0, LinkChange::Mac(mac))]);
    netns.ip("link set m0 allmulticast off");
    expect(&mut watch, &[(m0, LinkChange::AllMulticast(false))]);
    watch.turn_all_multicast_on(m0).unwrap();
    expect(&mut watch, &[(m0, LinkChange::AllMulticast(true))]);
    assert!(netns.ip("link show m0").contains("ALLMULTI"));

    netns.ip("link set m0 allmulticast off");
    expect(&mut watch, &[(m0, LinkChange::AllMulticast(false))]);
    // Without the right to it there is an error.
    let without_rights = || {
        // SAFETY: it takes plain numbers, and as a bare system call changes this thread alone.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, -1, 65534, -1) };
        assert_eq!(changed, 0);
        watch.turn_all_multicast_on(m0).unwrap();
    };
    std::thread::scope(|scope| scope.spawn(without_rights).join().unwrap());
    expect(&mut watch, &[(m0, LinkChange::Refused(libc::EPERM))]);
});

root_test!(watch_takes_another_processs_socket_alone, || {
    let netns = Netns::new();
    netns.wire("v0");
    let spec = MacvtapSpec::new("v0".parse().unwrap());
    let macvtap = netns.enter(|| Macvtap::open(&spec)).unwrap();
    let index = macvtap.info().id.unwrap().index;
    // The macvtap's namespace is neither this thread's nor a name's.
    let mut watch = LinkWatch::from_socket(macvtap.watch_socket().unwrap(), &[index]).unwrap();
    expect(&mut watch, &[]);
    netns.down("v0-far");
    expect(&mut watch, &[(index, LinkChange::Carrier(false))]);
    netns.ip("link delete v0");
    expect_last(&mut watch, (index, LinkChange::Deleted));

    let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
    for other in [socket.into(), File::open("/dev/null").unwrap().into()] {
        assert!(LinkWatch::from_socket(other, &[index]).is_err());
    }
});

root_test!(link_that_moves_to_another_namespace_is_gone, || {
    let (netns, other) = (Netns::new(), Netns::new());
    netns.wire("v0");
    let v0 = index(&netns, "v0");
    let mut watch = watch(&netns, &[v0]);
    expect(&mut watch, &[]);
    netns.ip(&format!("link set v0 netns {}", other.name()));
    expect_last(&mut watch, (v0, LinkChange::Deleted));
});

/// `ip -batch` in the namespace: all of it in one process.
fn batch(netns: &Netns, lines: impl Iterator<Item = String>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), lines.collect::<String>()).unwrap();
    netns.ip(&format!("-batch {}", file.path().display()));
}

/// Far more changes of a link than a socket buffer holds the events of.
fn overrun(netns: &Netns, link: &str) {
    let change = |n| format!("link set {link} mtu {}\n", 1300 + n % 2);
    batch(netns, (0..4000).map(change));
}

root_test!(overrun_during_a_listing_makes_no_link_disappear, || {
    let netns = Netns::new();
    netns.wire("v0");
    netns.down("v0");
    // So many that the kernel lists them in several parts.
    let add = |n| format!("link add link v0 name m{n} type macvlan mode bridge\n");
    batch(&netns, (0..200).map(add));
    let v0 = index(&netns, "v0");
    let mut watch = watch(&netns, &[v0]);
    // The first part has come, and shows that it is down.
    let first = watch.next().unwrap().unwrap();
    assert_eq!((first.index, first.change), (v0, LinkChange::Admin(false)));
    overrun(&netns, "m199");
    expect(&mut watch, &[(v0, LinkChange::Carrier(false))]);
    netns.up("v0");
    expect_last(&mut watch, (v0, LinkChange::Carrier(true)));
});

root_test!(overrun_ends_in_the_state_that_is, || {
    let netns = Netns::new();
    netns.wire("v0");
    netns.wire("v1");
    let (v0, v1) = (index(&netns, "v0"), index(&netns, "v1"));
    let mut watch = watch(&netns, &[v0, v1]);
    expect(&mut watch, &[]);
    overrun(&netns, "v0");
    netns.ip("link delete v1");
    netns.ip("link set v0 mtu 1280");
    let last = (v0, LinkChange::Mtu(1280));
    let found = changes_until(&mut watch, |found| {
        found.contains(&last) && found.contains(&(v1, LinkChange::Deleted))
    });
    assert!(found.len() < 4000, "nothing was lost: {}", found.len());
    let mut of_v0 = found.iter().filter(|(index, _)| *index == v0);
    assert_eq!(of_v0.next_back(), Some(&last));
    assert!(found.contains(&(v1, LinkChange::Deleted)));
    // And it goes on.
    netns.down("v0-far");
    expect(&mut watch, &[(v0, LinkChange::Carrier(false))]);
});
