//! Links with bytes on them that are no text: the links are seen all the same. They need root.

#![allow(
    clippy::unwrap_used,
    reason = "all of this file is tests, and the lint spares #[test] functions alone"
)]

#[path = "../../tests/harness/netns.rs"]
mod netns;

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::mpsc;
use std::time::Duration;

use net::{
    HostLink, HostLinkSpec, LinkChange, LinkWatch, Macvtap, MacvtapSpec, Placement, inventory,
};
use netns::{Netns, root_test};
use rustix::event::{PollFd, PollFlags, Timespec};

/// An alias in Latin-1, as `ip link set LINK alias 'Büro'` gives it in a terminal of that kind.
const LATIN_1: &[u8] = b"B\xfcro";

/// `ip -n NETNS ARGS`, of which the last is any bytes.
fn ip(netns: &Netns, args: &str, last: &[u8]) {
    let mut command = std::process::Command::new("ip");
    command.args(["-n", netns.name()]).args(args.split(' '));
    let output = command.arg(OsStr::from_bytes(last)).output().unwrap();
    assert!(output.status.success(), "ip {args}: {output:?}");
}

fn index(netns: &Netns, link: &str) -> u32 {
    let listing = netns.ip(&format!("-o link show dev {link}"));
    listing.split(':').next().unwrap().parse().unwrap()
}

/// What `work` gives, which has to come while one waits for it.
fn soon<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    std::thread::spawn(move || done.send(work()));
    let patience = Duration::from_secs(60);
    result.recv_timeout(patience).expect("it ends")
}

root_test!(lower_with_a_non_utf8_alias_carries_links, || {
    let host = Netns::new();
    host.wire("v0");
    host.wire("v1");
    for link in ["v0", "v1"] {
        ip(&host, &format!("link set {link} alias"), LATIN_1);
    }
    let name: net::LinkName = "v0".parse().unwrap();
    host.enter(|| {
        let macvtap = Macvtap::open(&MacvtapSpec::new(name.clone())).unwrap();
        assert_eq!(macvtap.info().lower.as_str(), "v0");
        let mut spec = HostLinkSpec::new(name.clone());
        spec.addresses = vec!["192.0.2.1/24".parse().unwrap()];
        let made = HostLink::create(&spec).unwrap();
        ip(&host, "link set macvlan0 alias", LATIN_1);
        let found = inventory(Some(&name)).unwrap();
        let upper = &found[0].uppers[0];
        assert_eq!(
            (upper.index, upper.alias.as_str()),
            (made.index, "B\u{fffd}ro")
        );
        let checks = net::diagnose_host(Some(&name), &[]);
        let of_link = checks.iter().find(|check| check.message.contains("v0"));
        assert_eq!(of_link.unwrap().status, net::Status::Ok, "{checks:?}");
    });
});

root_test!(macvtap_whose_alias_becomes_no_utf8_is_still_let_go, || {
    let host = Netns::new();
    host.wire("v0");
    let mut spec = MacvtapSpec::new("v0".parse().unwrap());
    spec.netns = Placement::Host;
    let macvtap = host.enter(|| Macvtap::open(&spec)).unwrap();
    ip(
        &host,
        &format!("link set {} alias", macvtap.info().name.as_str()),
        LATIN_1,
    );
    soon(move || drop(macvtap));
});

root_test!(changes_of_a_link_with_a_non_utf8_alias_are_seen, || {
    let host = Netns::new();
    host.wire("v0");
    let v0 = index(&host, "v0");
    let namespace = File::open(host.path()).unwrap();
    let mut watch = LinkWatch::in_namespace(namespace.as_fd(), &[v0]).unwrap();
    ip(&host, "link set v0 alias", LATIN_1);
    host.down("v0-far");
    let patience = Timespec::try_from(Duration::from_secs(10)).unwrap();
    loop {
        while let Some(event) = watch.next().unwrap() {
            if event.change == LinkChange::Carrier(false) {
                return;
            }
        }
        let fd = watch.as_fd();
        let mut ready = [PollFd::new(&fd, PollFlags::IN)];
        let changes = rustix::event::poll(&mut ready, Some(&patience)).unwrap();
        assert_eq!(changes, 1, "no change came");
    }
});
