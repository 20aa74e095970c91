//! The modes that load the NIC and measure it: send, receive, ping-pong, and reflect, the other side
//! of that. They fill rings by hand, poll them, and print what came of it as one line.
//!
//! Frames of a flood come from the Ethernet address [`SENDER`] and have the type [`FLOOD`]; a ping
//! has the type [`PING`], and whoever gets one sends it back with the addresses exchanged. With
//! more than 1,514 bytes a frame is one of TCP that is left to be cut.

pub mod ping;
pub mod receive;
pub mod reflect;
mod rig;
pub mod send;

use alloc::string::String;

use crate::options::Options;
use crate::report;
use crate::serial::println;
use crate::virtio::net::{GSO_TCPV4, HEADER, Header, NEEDS_CSUM};
use rig::Rig;

/// Who floods a guest.
const SENDER: [u8; 6] = [0x02, 0, 0, 0, 0x0b, 0x01];
/// Ethernet types for experiments (IEEE 802).
const FLOOD: u16 = 0x88b5;
const PING: u16 = 0x88b6;

/// Where things are in a frame.
const SOURCE: usize = 6;
const KIND: usize = 12;
const ETHERNET: usize = 14;
const NUMBER: usize = ETHERNET;
/// The length of a frame's headers down to TCP's, and what a cut frame carries besides.
const HEADERS: usize = ETHERNET + 20 + 20;
const SEGMENT: u16 = 1448;

/// Brings the NIC up, says that a mode begins, and reports its result.
fn with_rig(
    name: &str,
    options: &Options,
    mode: impl FnOnce(&mut Rig) -> Result<String, &'static str>,
) {
    let result = Rig::start(options).and_then(|mut rig| {
        println!("READY {name}");
        mode(&mut rig)
    });
    match result {
        Ok(detail) => report::ok(name, detail),
        Err(why) => report::fail(name, why),
    }
}

/// A frame of `size` bytes after its virtio header.
fn frame(to: [u8; 6], from: [u8; 6], kind: u16, size: usize) -> alloc::vec::Vec<u8> {
    let is_large = size > crate::nic::FRAME;
    let header = match is_large {
        true => Header {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV4,
            hdr_len: HEADERS as u16,
            gso_size: SEGMENT,
            csum_start: (ETHERNET + 20) as u16,
            csum_offset: 16,
            num_buffers: 0,
        },
        false => Header::default(),
    };
    let mut bytes = alloc::vec![0; HEADER + size.max(HEADERS)];
    let (head, frame) = bytes.split_at_mut(HEADER);
    head.copy_from_slice(&header.bytes());
    frame[..SOURCE].copy_from_slice(&to);
    frame[SOURCE..KIND].copy_from_slice(&from);
    frame[KIND..ETHERNET].copy_from_slice(&kind.to_be_bytes());
    if is_large {
        let length = ((size - ETHERNET) as u16).to_be_bytes();
        frame[KIND..ETHERNET].copy_from_slice(&[0x08, 0x00]);
        let (ip, tcp) = frame[ETHERNET..].split_at_mut(20);
        (ip[0], ip[2], ip[3], ip[8], ip[9]) = (0x45, length[0], length[1], 64, 6);
        (tcp[12], tcp[13]) = (5 << 4, 0x10);
    }
    bytes.truncate(HEADER + size);
    bytes
}
