//! Frames as they arrive on a link, and whether their TCP checksums are right.

use std::io::Read;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::eventually;
use super::guest::SOURCE;
use super::netns::Netns;

const ETHERNET: usize = 14;
const TCP: u8 = 6;
/// Room for all that comes while the reader waits for a CPU.
const BUFFER: libc::c_int = 64 << 20;

/// linux/ethtool.h: switch the link's own checksums and segmentation.
const ETHTOOL_STXCSUM: u32 = 0x17;
const ETHTOOL_STSO: u32 = 0x1f;

/// `struct ethtool_value`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// Makes the kernel itself cut and sum what leaves by a link, as it must for a NIC without
/// offloads.
pub fn disable_offloads(netns: &Netns, link: &str) {
    netns.enter(|| {
        let socket = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
        for command in [ETHTOOL_STSO, ETHTOOL_STXCSUM] {
            let mut value = EthtoolValue { command, data: 0 };
            // SAFETY: all zeros is a valid ifreq.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(link.bytes()) {
                *to = from as libc::c_char;
            }
            request.ifr_ifru.ifru_data = (&raw mut value).cast();
            // SAFETY: SIOCETHTOOL takes an ifreq whose data is an ethtool command; both live until
            // it returns.
            let done =
                unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
            assert_eq!(
                done,
                0,
                "ethtool on {link}: {}",
                std::io::Error::last_os_error()
            );
        }
    });
}

/// The frames seen on a link while `work` runs.
pub fn during(netns: &Netns, link: &str, work: impl FnOnce() -> u64) -> Vec<Vec<u8>> {
    let socket = netns.enter(|| packet_socket(link));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut file = std::fs::File::from(socket);
            let mut frames = Vec::new();
            let mut buffer = vec![0; 1 << 17];
            loop {
                match file.read(&mut buffer) {
                    Ok(length) => frames.push(buffer[..length].to_vec()),
                    Err(_) if done.load(Ordering::Relaxed) => return frames,
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            }
        });
        // Also when the work panics, or the reader would go on for ever.
        let result = catch_unwind(AssertUnwindSafe(work));
        done.store(true, Ordering::Relaxed);
        let frames = reader.join().expect("the reader does not panic");
        match result {
            Ok(_) => frames,
            Err(panic) => resume_unwind(panic),
        }
    })
}

/// Whether a frame that is `wanted` comes by a link after `prompt` has run.
pub fn sees(
    netns: &Netns,
    link: &str,
    prompt: impl FnOnce(),
    wanted: impl Fn(&[u8]) -> bool,
) -> bool {
    let mut file = std::fs::File::from(netns.enter(|| packet_socket(link)));
    prompt();
    let mut buffer = vec![0; 1 << 17];
    eventually(|| {
        let mut frames = std::iter::from_fn(|| {
            file.read(&mut buffer)
                .ok()
                .map(|length| wanted(&buffer[..length]))
        });
        frames.any(|is_wanted| is_wanted)
    })
}

fn packet_socket(link: &str) -> OwnedFd {
    let all = (libc::ETH_P_ALL as u16).to_be();
    let socket = socket(
        libc::AF_PACKET,
        libc::SOCK_RAW | libc::SOCK_NONBLOCK,
        all.into(),
    );
    let name = std::ffi::CString::new(link).expect("a link's name");
    // SAFETY: a C string.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    // SAFETY: all zeros is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = all;
    address.sll_ifindex = index as i32;
    let length = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: a sockaddr_ll of that length.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    assert_eq!(
        bound,
        0,
        "bind to {link}: {}",
        std::io::Error::last_os_error()
    );
    let (level, option) = (libc::SOL_SOCKET, libc::SO_RCVBUFFORCE);
    let (size, length) = (BUFFER, size_of::<libc::c_int>() as u32);
    // SAFETY: the option takes an int.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const size).cast(),
            length,
        )
    };
    assert_eq!(
        set,
        0,
        "SO_RCVBUFFORCE: {}",
        std::io::Error::last_os_error()
    );
    socket
}

fn socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> OwnedFd {
    // SAFETY: plain numbers.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    assert!(fd >= 0, "socket: {}", std::io::Error::last_os_error());
    // SAFETY: it was just opened, for this owner alone.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A TCP segment from a guest's source.
#[derive(Debug)]
pub struct Segment {
    /// The length of the whole frame.
    pub frame: usize,
    /// The length of what it carries.
    pub payload: usize,
    /// Whether the checksum in it is the sum of what arrived.
    pub checksum_is_right: bool,
}

impl Segment {
    /// Reads a frame, if it is such a segment.
    pub fn from_source(frame: &[u8]) -> Option<Self> {
        let ip = frame.get(ETHERNET..)?;
        let (addresses, header, end) = match (ip.first()? >> 4, frame.get(12..14)?) {
            (4, [0x08, 0x00]) if ip.get(9) == Some(&TCP) => (
                ip.get(12..20)?,
                usize::from(ip[0] & 15) * 4,
                usize::from(u16_at(ip, 2)?),
            ),
            (6, [0x86, 0xdd]) if ip.get(6) == Some(&TCP) => {
                (ip.get(8..40)?, 40, 40 + usize::from(u16_at(ip, 4)?))
            }
            _ => return None,
        };
        let segment = ip.get(header..end)?;
        if u16_at(segment, 0)? != SOURCE {
            return None;
        }
        // With its own checksum in it, the sum of a right segment and its pseudo-header is all ones
        // (RFC 1071).
        let mut sum = sum(addresses) + u32::from(TCP) + segment.len() as u32 + sum(segment);
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        let payload = segment.len() - usize::from(segment.get(12)? >> 4) * 4;
        Some(Self {
            frame: frame.len(),
            payload,
            checksum_is_right: sum == 0xffff,
        })
    }
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_be_bytes(
        bytes.get(offset..offset + 2)?.try_into().ok()?,
    ))
}

fn sum(bytes: &[u8]) -> u32 {
    let word = |pair: &[u8]| {
        u32::from(u16::from_be_bytes([
            pair[0],
            pair.get(1).copied().unwrap_or(0),
        ]))
    };
    bytes.chunks(2).map(word).sum()
}
