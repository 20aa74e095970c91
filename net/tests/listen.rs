//! Which of a macvtap's own frames a listener receives. In network namespaces of the tests' own;
//! they need root.

#![allow(
    clippy::unwrap_used,
    reason = "all of this file is tests, and the lint spares #[test] functions alone"
)]

#[path = "../../tests/harness/netns.rs"]
mod netns;
#[allow(dead_code, reason = "other test binaries use the rest")]
mod wire;

use std::os::fd::AsFd;
use std::time::Duration;

use net::{FrameListener, HEARD_LEN, Macvtap, MacvtapSpec, Placement};
use netns::{Netns, root_test};
use rustix::event::{PollFd, PollFlags, Timespec};
use wire::{arp_request, frame, receives, send};

/// The first frame that arrives within a short time.
fn next_frame(listener: &FrameListener) -> Option<Vec<u8>> {
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: Duration::from_millis(300).subsec_nanos().into(),
    };
    let mut ready = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
    rustix::event::poll(&mut ready, Some(&timeout)).unwrap();
    let mut buffer = [0; HEARD_LEN];
    listener.next(&mut buffer).unwrap().map(<[u8]>::to_vec)
}

/// An IPv4 packet with a protocol and a source port, or an IPv6 one with a next header and an
/// ICMPv6 type.
fn packet(mac: [u8; 6], version: u8, protocol: u8, at: u8) -> Vec<u8> {
    let mut frame = [
        &[0xff; 6][..],
        &mac[..],
        if version == 4 { &[8, 0] } else { &[0x86, 0xdd] },
    ]
    .concat();
    frame.resize(100, 0);
    if version == 4 {
        (frame[14], frame[23], frame[35]) = (0x45, protocol, at);
    } else {
        (frame[14], frame[20], frame[54]) = (0x60, protocol, at);
    }
    frame
}

root_test!(listener_receives_what_names_its_sender_alone, || {
    let (host, far) = (Netns::new(), Netns::new());
    host.veth("v0", &far, "v1");
    for placement in [Placement::Private, Placement::Host] {
        let mut spec = MacvtapSpec::new("v0".parse().unwrap());
        spec.netns = placement;
        let macvtap = host.enter(|| Macvtap::open(&spec)).unwrap();
        let listener = host.enter(|| macvtap.listen()).unwrap().unwrap();
        let theirs = far
            .enter(|| Macvtap::open(&MacvtapSpec::new("v1".parse().unwrap())))
            .unwrap();
        let (own, other) = (macvtap.info().mac.octets(), theirs.info().mac.octets());

        for of_interest in [
            arp_request(own, [10, 0, 0, 1], [10, 0, 0, 2]),
            packet(own, 4, 17, 68),
            packet(own, 6, 58, 135),
            packet(own, 6, 58, 136),
            frame(other, [2, 9, 9, 9, 9, 9]),
        ] {
            send(macvtap.queue(), &of_interest);
            let received = next_frame(&listener).expect("the frame arrives");
            assert_eq!(received[..60], of_interest[..60]);
        }
        for ordinary in [
            frame(other, own),
            packet(own, 4, 17, 53),
            packet(own, 4, 6, 68),
            packet(own, 6, 58, 128),
            packet(own, 6, 6, 135),
        ] {
            send(macvtap.queue(), &ordinary);
            assert_eq!(next_frame(&listener), None, "{ordinary:02x?}");
        }
        // What others send is none of its business.
        let question = arp_request(other, [10, 0, 0, 2], [10, 0, 0, 1]);
        send(theirs.queue(), &question);
        assert!(receives(macvtap.queue(), |frame| frame == question));
        assert_eq!(next_frame(&listener), None);
    }
});
