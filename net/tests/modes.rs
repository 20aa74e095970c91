//! Who receives from whom in each mode, as the kernel defines it (drivers/net/macvlan.c,
//! `macvlan_queue_xmit` and `macvlan_handle_frame`): two macvtaps A and B on one lower, and a
//! listener on the wire outside that receives everything.

#![allow(
    clippy::unwrap_used,
    reason = "all of this file is tests, and the lint spares #[test] functions alone"
)]

#[path = "../../tests/harness/netns.rs"]
mod netns;
#[allow(dead_code, reason = "other test binaries use the rest")]
mod wire;

use std::time::Duration;

use net::{MacAddr, Macvtap, MacvtapSpec, Mode, Placement};
use netns::{Netns, root_test};
use wire::{collect, send};

const BROADCAST: [u8; 6] = [0xff; 6];
/// A group without members.
const MULTICAST: [u8; 6] = [0x33, 0x33, 0xff, 1, 2, 3];
const STRANGER: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];

/// A lower with its macvtaps, and the outside.
struct Wire {
    host: Netns,
    _peer: Netns,
    a: Macvtap,
    b: Option<Macvtap>,
    outside: Macvtap,
}

impl Wire {
    fn new(mode: Mode) -> Self {
        Self::with_sources(mode, false)
    }

    /// With the outside in the list of senders that A receives, if it `lists_outside`.
    fn with_sources(mode: Mode, lists_outside: bool) -> Self {
        let (host, peer) = (Netns::new(), Netns::new());
        host.veth("v0", &peer, "v1");
        let open = |netns: &Netns, link: &str, mode, sources: &[MacAddr]| {
            let mut spec = MacvtapSpec::new(link.parse().unwrap());
            spec.mode = Some(mode);
            spec.source_macs = sources.to_vec();
            spec.netns = Placement::Host;
            netns.enter(|| Macvtap::open(&spec)).unwrap()
        };
        let outside = open(&peer, "v1", Mode::Passthru, &[]);
        let sources = Vec::from_iter(lists_outside.then(|| outside.info().mac));
        Self {
            a: open(&host, "v0", mode, &sources),
            b: (mode != Mode::Passthru).then(|| open(&host, "v0", mode, &[])),
            outside,
            host,
            _peer: peer,
        }
    }

    /// The address of who is called A, B, O(utside) or L(ower), and of groups.
    fn address(&self, who: &str) -> [u8; 6] {
        match who {
            "A" => self.a.info().mac.octets(),
            "B" => self
                .b
                .as_ref()
                .map_or([2, 0, 0, 0, 0, 0xb], |b| b.info().mac.octets()),
            "O" => self.outside.info().mac.octets(),
            "L" => self
                .host
                .mac("v0")
                .parse::<net::MacAddr>()
                .unwrap()
                .octets(),
            "stranger" => STRANGER,
            "broadcast" => BROADCAST,
            "multicast" => MULTICAST,
            other => panic!("{other}"),
        }
    }

    /// Sends the frame of each case and returns who received it, as the letters of the listeners.
    fn listeners(&self, cases: &[(&str, &str, &str)]) -> Vec<String> {
        let frames = cases.iter().enumerate().map(|(number, (_, from, to))| {
            let mut frame = wire::frame(self.address(to), self.address(from));
            frame[20] = number as u8;
            frame
        });
        let frames: Vec<Vec<u8>> = frames.collect();
        // More than once, as a fresh link may drop its first.
        for _ in 0..3 {
            for ((sender, ..), frame) in cases.iter().zip(&frames) {
                let sender = if *sender == "A" {
                    &self.a
                } else {
                    &self.outside
                };
                send(sender.queue(), frame);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let mut received = vec![String::new(); cases.len()];
        let b = self.b.as_ref().map(|b| ("B", b));
        for (name, link) in [("A", &self.a)]
            .into_iter()
            .chain(b)
            .chain([("O", &self.outside)])
        {
            let all = collect(link.queue(), Duration::from_millis(300));
            for (frame, received) in frames.iter().zip(&mut received) {
                if all.contains(frame) {
                    received.push_str(name);
                }
            }
        }
        received
    }
}

root_test!(each_mode_lets_hear_whom_the_kernel_says, || {
    // Who sends, from which address, to which; who receives it in bridge, vepa, private, source
    // (empty list) and passthru mode. The O of a sender outside is a frame come back to it.
    let table: &[(&str, &str, &str, [&str; 5])] = &[
        // Among siblings: by themselves in bridge mode alone, and then unicast does not even reach
        // the wire.
        ("A", "A", "B", ["B", "O", "O", "O", "O"]),
        ("A", "A", "broadcast", ["BO", "O", "O", "O", "O"]),
        ("A", "A", "multicast", ["BO", "O", "O", "O", "O"]),
        // To the outside, and to the lower itself: that never reaches the host.
        ("A", "A", "O", ["O", "O", "O", "O", "O"]),
        ("A", "A", "L", ["O", "O", "O", "O", "O"]),
        // From the outside.
        ("O", "O", "A", ["A", "A", "A", "", "A"]),
        ("O", "O", "broadcast", ["AB", "AB", "AB", "", "A"]),
        ("O", "O", "multicast", ["AB", "AB", "AB", "", "A"]),
        ("O", "O", "stranger", ["", "", "", "", "A"]),
        // What A sent, sent back by a switch (hairpin): what makes vepa siblings hear each other.
        ("O", "A", "B", ["B", "B", "B", "", "A"]),
        // Private and source mode give a group's frame to its own sender, and private mode does not
        // keep B from a unicast that comes by this way.
        ("O", "A", "broadcast", ["", "B", "A", "A", "A"]),
        ("O", "A", "multicast", ["", "B", "A", "A", "A"]),
    ];
    let cases: Vec<_> = table
        .iter()
        .map(|(sender, from, to, _)| (*sender, *from, *to))
        .collect();
    let modes = [
        Mode::Bridge,
        Mode::Vepa,
        Mode::Private,
        Mode::Source,
        Mode::Passthru,
    ];
    let mut wrong = Vec::new();
    for (column, mode) in modes.into_iter().enumerate() {
        let received = Wire::new(mode).listeners(&cases);
        for ((sender, from, to, expected), received) in table.iter().zip(received) {
            if received != expected[column] {
                wrong.push(format!(
                    "{mode}: {sender} sends from {from} to {to}: received by `{received}`, not `{}`",
                    expected[column]
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
});

root_test!(source_mode_receives_all_of_the_listed_sender, || {
    for from_the_start in [true, false] {
        let wire = Wire::with_sources(Mode::Source, from_the_start);
        if !from_the_start {
            let (name, outside) = (wire.a.info().name.as_str(), wire.outside.info().mac);
            wire.host.ip(&format!(
                "link set {name} type macvtap macaddr add {outside}"
            ));
        }
        let received = wire.listeners(&[
            ("O", "O", "A"),
            ("O", "O", "broadcast"),
            ("O", "O", "stranger"),
            ("O", "stranger", "A"),
            ("O", "stranger", "broadcast"),
        ]);
        assert_eq!(received, ["A", "A", "A", "", ""]);
    }
});
