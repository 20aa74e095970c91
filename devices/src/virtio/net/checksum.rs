//! Completes the checksum of a DHCP server's answer.
//!
//! A frame from another guest or the host itself may come with its checksum left to the receiver
//! ([`NEEDS_CSUM`]). Drivers know that; DHCP clients that read raw frames, some of them
//! still in use, check the unfinished sum and drop the answer. QEMU completes it too.

use libc::iovec as IoVec;
use virtio_bindings::virtio_net;

use super::backend::HEADER_LEN;
use crate::virtio::iovec::{self, scatter};

// `struct virtio_net_hdr` (virtio 1.2, 5.1.6): flags, gso_type, hdr_len, gso_size, csum_start,
// csum_offset.
pub(super) const FLAGS: usize = 0;
pub(super) const GSO_TYPE: usize = 1;
const CSUM_START: usize = 6;
const CSUM_OFFSET: usize = 8;

/// The flag that leaves the checksum to whoever gets the frame.
pub(super) const NEEDS_CSUM: u8 = virtio_net::VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;

const ETHERNET_LEN: usize = 14;
const IPV4: [u8; 2] = [8, 0];
const UDP: u8 = 17;
const DHCP_SERVER_PORT: [u8; 2] = [0, 67];
/// Longer frames are no DHCP answers.
const MAX_LEN: usize = HEADER_LEN + ETHERNET_LEN + 1500;

/// Whether the header at the beginning of a frame leaves the checksum to the driver.
pub fn needs_csum(head: &[u8]) -> bool {
    head[FLAGS] & NEEDS_CSUM != 0
}

/// Completes the checksum of a received frame of `len` bytes with its header, if it is a DHCP
/// server's. Says whether it was.
///
/// # Safety
///
/// Each iovec must describe memory that may be read and written for as long as the call lasts.
pub unsafe fn complete_dhcp(iovecs: &[IoVec], len: usize) -> bool {
    let mut buffer = [0; MAX_LEN];
    let Some(frame) = buffer.get_mut(..len) else {
        return false;
    };
    // SAFETY: as for this function.
    let copied = unsafe { iovec::gather(iovecs, 0, frame) };
    let Some((at, sum)) = dhcp_checksum(&frame[..copied]) else {
        return false;
    };
    // SAFETY: as for this function.
    unsafe { scatter(iovecs, at, &sum.to_be_bytes()) };
    let flags = frame[FLAGS] & !NEEDS_CSUM;
    // SAFETY: as for this function.
    unsafe { scatter(iovecs, FLAGS, &[flags]) };
    true
}

/// Where the checksum of a DHCP server's frame stands, and what it has to be.
fn dhcp_checksum(frame: &[u8]) -> Option<(usize, u16)> {
    let word = |at: usize| Some(u16::from_le_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
    let ip = frame.get(HEADER_LEN + ETHERNET_LEN..)?;
    let ip_header_len = usize::from(ip.first()? & 0xf) * 4;
    let is_dhcp = frame[HEADER_LEN + 12..HEADER_LEN + ETHERNET_LEN] == IPV4
        && *ip.get(9)? == UDP
        && ip.get(ip_header_len..ip_header_len + 2)? == DHCP_SERVER_PORT;
    if !is_dhcp {
        return None;
    }
    let start = HEADER_LEN + usize::from(word(CSUM_START)?);
    let at = start + usize::from(word(CSUM_OFFSET)?);
    // The sum of the pseudo-header stands where the checksum will.
    let summed = frame.get(start..)?;
    frame.get(at..at + 2)?;
    let sum = summed.chunks(2).fold(0u32, |sum, pair| {
        sum + u32::from(pair[0]) * 256 + pair.get(1).map_or(0, |&low| u32::from(low))
    });
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    // In UDP 0 would mean "none" (RFC 768).
    Some((at, if checksum == 0 { 0xffff } else { checksum }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A datagram of a few bytes from `port`, whose checksum is left open.
    fn datagram(port: u16, payload: &[u8]) -> Vec<u8> {
        let udp_len = 8 + payload.len() as u16;
        let (from, to) = ([10, 0, 0, 1], [10, 0, 0, 2]);
        let mut frame = vec![1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 1, 0];
        frame.extend([0; 12]);
        frame.extend(IPV4);
        frame.extend([0x45, 0, 0, 0, 0, 0, 0, 0, 64, UDP, 0, 0]);
        frame.extend(from);
        frame.extend(to);
        let pseudo = [&from[..], &to, &[0, UDP], &udp_len.to_be_bytes()].concat();
        frame.extend(port.to_be_bytes());
        frame.extend([0, 68]);
        frame.extend(udp_len.to_be_bytes());
        frame.extend((sum(&pseudo) as u16).to_be_bytes());
        frame.extend(payload);
        frame
    }

    /// The ones' complement sum (RFC 1071), the slow way.
    fn sum(bytes: &[u8]) -> u32 {
        let mut sum = 0;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum
    }

    fn complete(frame: &mut [u8], piece: usize) -> bool {
        let len = frame.len();
        let iovecs: Vec<IoVec> = frame
            .chunks_mut(piece)
            .map(|chunk| IoVec {
                iov_base: chunk.as_mut_ptr().cast(),
                iov_len: chunk.len(),
            })
            .collect();
        // SAFETY: the iovecs describe parts of `frame`.
        unsafe { complete_dhcp(&iovecs, len) }
    }

    #[test]
    fn dhcp_answers_checksum_is_completed_however_it_lies() {
        for payload in [&[][..], b"odd", b"even"] {
            for piece in [1, 7, 40, 1000] {
                let mut frame = datagram(67, payload);
                assert!(needs_csum(&frame));
                assert!(complete(&mut frame, piece));
                assert!(!needs_csum(&frame));
                let (pseudo, udp) = ([10, 0, 0, 1, 10, 0, 0, 2, 0, UDP], &frame[46..]);
                let whole = [&pseudo[..], &(udp.len() as u16).to_be_bytes(), udp].concat();
                assert_eq!(sum(&whole), 0xffff, "{payload:?} in {piece}s");
            }
        }
    }

    #[test]
    fn other_frames_stay_as_they_are() {
        let long = vec![0; 1600];
        for mut frame in [datagram(53, b"dns"), datagram(67, &long), vec![1; 20]] {
            let before = frame.clone();
            assert!(!complete(&mut frame, 100));
            assert_eq!(frame, before);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_frame_is_too_odd(mut frame: Vec<u8>, start: u8, offset: u8) {
            complete(&mut frame, 10);
            let mut lying = datagram(67, &frame);
            lying[CSUM_START] = start;
            lying[CSUM_OFFSET] = offset;
            complete(&mut lying, 10);
        }
    }
}
