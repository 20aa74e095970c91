//! A place among the macvtaps on a wire. In network namespaces of the tests' own; they need root.

#![allow(
    clippy::unwrap_used,
    reason = "all of this file is tests, and the lint spares #[test] functions alone"
)]

#[path = "../../tests/harness/netns.rs"]
mod netns;

use std::net::{Ipv6Addr, SocketAddrV6, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use net::{LinkId, Station, StationError};
use netns::{Netns, root_test};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{connect, sockopt};

/// How long a test waits for what has to come.
const PATIENCE: Duration = Duration::from_secs(120);

fn id_of(host: &Netns, link: &str) -> LinkId {
    let links = host.enter(net::links_here).unwrap();
    let found = links.into_iter().find(|(_, (name, _))| name == link);
    found.unwrap().0
}

/// The address that a link has given itself.
fn link_local(guest: &Netns, link: &str) -> Ipv6Addr {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let shown = guest.ip(&format!("-6 -o address show dev {link} scope link"));
        let mut words = shown.split_whitespace().skip_while(|word| *word != "inet6");
        if let Some(address) = words.nth(1).and_then(|text| text.split('/').next()) {
            return address.parse().unwrap();
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("{link} has no address");
}

/// What comes of a connection from the station.
fn outcome(station: &Station, address: Ipv6Addr, port: u16) -> Result<(), Errno> {
    let socket = station.socket().unwrap();
    let to = SocketAddrV6::new(address, port, 0, station.scope());
    match connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => {}
        Err(error) => return Err(error),
    }
    let limit = Timespec::try_from(PATIENCE).unwrap();
    let ready = poll(&mut [PollFd::new(&socket, PollFlags::OUT)], Some(&limit));
    assert_eq!(ready, Ok(1), "an answer");
    sockopt::socket_error(&socket).unwrap()
}

root_test!(guest_on_the_wire_takes_a_connection_or_refuses_it, || {
    let (host, guest, far) = (Netns::new(), Netns::new(), Netns::new());
    host.veth("v0", &far, "v1");
    guest.macvlan("eth0", &host, "v0");
    let address = link_local(&guest, "eth0");
    let listener = guest.enter(|| TcpListener::bind("[::]:0")).unwrap();
    let port = listener.local_addr().unwrap().port();
    // The host itself does not reach it.
    let scope = id_of(&host, "v0").index;
    let direct = SocketAddrV6::new(address, port, 0, scope).into();
    let soon = Duration::from_millis(300);
    assert!(
        host.enter(|| TcpStream::connect_timeout(&direct, soon))
            .is_err()
    );

    let before = host.links();
    let station = host.enter(|| Station::on(id_of(&host, "v0"))).unwrap();
    let mac = guest.mac("eth0").parse().unwrap();
    station.introduce(address, mac).unwrap();
    assert_eq!(outcome(&station, address, port), Ok(()));
    drop(listener);
    assert_eq!(outcome(&station, address, port), Err(Errno::CONNREFUSED));
    assert_eq!(host.links(), before);
});

root_test!(link_of_another_namespace_has_no_place, || {
    let (host, far) = (Netns::new(), Netns::new());
    host.veth("v0", &far, "v1");
    let elsewhere = id_of(&far, "v1");
    let error = host.enter(|| Station::on(elsewhere)).unwrap_err();
    assert!(matches!(error, StationError::Elsewhere), "{error}");
});
