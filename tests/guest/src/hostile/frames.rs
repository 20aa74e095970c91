//! Frames to send whose header or length is wrong (virtio 1.2, 5.1.6.2). The device must complete
//! each, and live on without a reset.

use alloc::format;

use super::rig::{Bench, FRAME, Rig, TX_ROOM};
use super::{Failure, Runner};
use crate::virtio::net::{GSO_TCPV4, GSO_TCPV6, HEADER, Header, NEEDS_CSUM, feature};

const LARGE: usize = 30_000;
const GSO_UDP: u8 = 3;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// A header in order for a TCP segment to be cut.
const GSO: Header = Header {
    flags: NEEDS_CSUM,
    gso_type: GSO_TCPV4,
    hdr_len: 54,
    gso_size: 1448,
    csum_start: 34,
    csum_offset: 16,
    num_buffers: 0,
};
/// A header in order for a checksum.
const CSUM: Header = Header {
    gso_type: 0,
    gso_size: 0,
    ..GSO
};
/// A header without any request.
const NONE: Header = Header {
    flags: 0,
    gso_type: 0,
    hdr_len: 0,
    gso_size: 0,
    csum_start: 0,
    csum_offset: 0,
    num_buffers: 0,
};

const FRAMES: &[(&str, Header, usize)] = &[
    (
        "csum-start-beyond",
        Header {
            csum_start: 2000,
            ..CSUM
        },
        FRAME,
    ),
    (
        "csum-start-at-end",
        Header {
            csum_start: FRAME as u16,
            ..CSUM
        },
        FRAME,
    ),
    (
        "csum-offset-beyond",
        Header {
            csum_offset: 2000,
            ..CSUM
        },
        FRAME,
    ),
    (
        "csum-overflow",
        Header {
            csum_start: u16::MAX,
            csum_offset: u16::MAX,
            ..CSUM
        },
        FRAME,
    ),
    (
        "hdr-len-beyond",
        Header {
            hdr_len: 5000,
            ..CSUM
        },
        FRAME,
    ),
    (
        "hdr-len-largest",
        Header {
            hdr_len: u16::MAX,
            ..GSO
        },
        LARGE,
    ),
    ("hdr-len-0", Header { hdr_len: 0, ..GSO }, LARGE),
    ("gso-not-ip", GSO, LARGE),
    (
        "gso-other-family",
        Header {
            gso_type: GSO_TCPV6,
            ..GSO
        },
        LARGE,
    ),
    (
        "gso-udp",
        Header {
            gso_type: GSO_UDP,
            ..GSO
        },
        LARGE,
    ),
    (
        "gso-udp-l4",
        Header {
            gso_type: GSO_UDP_L4,
            ..GSO
        },
        LARGE,
    ),
    (
        "gso-ecn-only",
        Header {
            gso_type: GSO_ECN,
            ..GSO
        },
        LARGE,
    ),
    (
        "gso-unknown",
        Header {
            gso_type: 0x7f,
            ..GSO
        },
        LARGE,
    ),
    ("gso-size-0", Header { gso_size: 0, ..GSO }, LARGE),
    ("gso-size-1", Header { gso_size: 1, ..GSO }, LARGE),
    (
        "gso-size-largest",
        Header {
            gso_size: u16::MAX,
            ..GSO
        },
        LARGE,
    ),
    ("gso-without-csum", Header { flags: 0, ..GSO }, LARGE),
    ("gso-on-small-frame", GSO, FRAME),
    (
        "flags-all",
        Header {
            flags: 0xff,
            ..CSUM
        },
        FRAME,
    ),
    (
        "header-all-ones",
        Header {
            flags: 0xff,
            gso_type: 0xff,
            hdr_len: !0,
            gso_size: !0,
            csum_start: !0,
            csum_offset: !0,
            num_buffers: !0,
        },
        FRAME,
    ),
    (
        "num-buffers",
        Header {
            num_buffers: 7,
            ..NONE
        },
        FRAME,
    ),
    ("empty", NONE, 0),
    ("one-byte", NONE, 1),
    ("13-bytes", NONE, 13),
    ("14-bytes", NONE, 14),
    ("beyond-mtu", NONE, 9000),
    ("65535-bytes", NONE, 65_535),
    ("largest-ip-packet", GSO, 65_549),
    ("65562-bytes", GSO, 65_562),
    ("150000-bytes", GSO, TX_ROOM - HEADER - 8192),
];

/// Sends each with the offloads negotiated, and without.
pub fn run(runner: &mut Runner<'_>) {
    for (name, header, length) in FRAMES {
        for (variant, features) in [("offloads", feature::OFFLOADS), ("plain", feature::PLAIN)] {
            runner.attack(&format!("frame-{name}-{variant}"), |bench| {
                send(bench, features, *header, *length)
            });
        }
    }
}

/// Whether the checksum that is asked for is not in the frame.
fn lies_outside(header: Header, length: usize) -> bool {
    let end = header.csum_start.wrapping_add(header.csum_offset);
    header.flags & NEEDS_CSUM != 0 && usize::from(end.wrapping_add(2)) > length
}

fn send(bench: &Bench, features: u64, header: Header, length: usize) -> Result<(), Failure> {
    let mut rig = Rig::start(bench, features)?;
    rig.offer_buffers();
    let request = bench.arp_request();
    for _ in 0..3 {
        // From our own address, but to an unknown one, so that what gets through disturbs no host.
        let mut frame = request;
        frame[..6].copy_from_slice(&[0x02, 0, 0, 0, 0, 0x77]);
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        rig.send(header, &frame, length);
        if bench.vhost && lies_outside(header, length) {
            // Linux's vhost-net tries such a frame for ever (net.c, vhost_net_build_xdp): only a
            // reset helps.
            return Ok(());
        }
        if !rig.sent() {
            return Err("the device does not give the frame back".into());
        }
    }
    if rig.arp() {
        Ok(())
    } else {
        Err("the device died of it: no answer to ARP without a reset".into())
    }
}
