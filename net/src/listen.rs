//! Listens for frames that show the addresses of a macvtap's user, also where the kernel alone moves the frames, as with
//! vhost-net.
//!
//! A packet socket on the macvtap itself, with a filter: the kernel passes on what names the sender's addresses (ARP, IPv6
//! neighbour discovery, DHCP), and what comes from another MAC address than the macvtap's.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::{
    BPF_ABS, BPF_B, BPF_H, BPF_IND, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_LDX, BPF_MSH, BPF_RET,
    BPF_W, sock_filter,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::mac::MacAddr;
use crate::netns;

/// Bytes of a frame that are passed on: Ethernet, IPv6 and ICMPv6 up to a neighbour's address, or Ethernet, IPv4, UDP and
/// DHCP up to the client's.
pub const HEARD_LEN: usize = 14 + 40 + 24;

/// Where a filter finds the packet's type (linux/filter.h, SKF_AD_OFF and SKF_AD_PKTTYPE).
const PACKET_TYPE: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_PKTTYPE) as u32;

/// A packet socket on one link.
#[derive(Debug)]
pub struct FrameListener {
    socket: OwnedFd,
}

impl FrameListener {
    /// Listens on the link with this index and MAC address, in the caller's network namespace or in the one that
    /// `namespace` is a descriptor of.
    pub(crate) fn new(
        namespace: Option<BorrowedFd<'_>>,
        index: u32,
        mac: MacAddr,
    ) -> io::Result<Self> {
        netns::on_own_thread(|| {
            namespace.map_or(Ok(()), netns::enter)?;
            let filter = filter(mac.octets());
            let socket = packet_socket(index, libc::ETH_P_ALL as u16, &filter)?;
            Ok(Self { socket })
        })?
    }

    /// The beginning of the next frame, with its Ethernet header, up to [`HEARD_LEN`] bytes; `None` when there is none
    /// for now. When they come faster than they are fetched, the kernel drops some.
    ///
    /// # Errors
    ///
    /// When the link is gone or down.
    pub fn next<'a>(&self, buffer: &'a mut [u8; HEARD_LEN]) -> io::Result<Option<&'a [u8]>> {
        match rustix::io::read(&self.socket, &mut buffer[..]) {
            Ok(len) => Ok(Some(&buffer[..len])),
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for FrameListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The filter as a program of the kernel's packet filter (Documentation/networking/filter.rst).
fn filter(mac: [u8; 6]) -> Vec<sock_filter> {
    const BYTE: u32 = BPF_LD | BPF_B | BPF_ABS;
    const HALF: u32 = BPF_LD | BPF_H | BPF_ABS;
    const WORD: u32 = BPF_LD | BPF_W | BPF_ABS;
    const EQUAL: u32 = BPF_JMP | BPF_JEQ | BPF_K;
    const RETURN: u32 = BPF_RET | BPF_K;
    const IP: u32 = 14;
    let (ipv6, drop, take) = (15, 20, 21);
    let [a, b, c, d, e, f] = mac;
    let (start, end) = (u32::from_be_bytes([a, b, c, d]), u16::from_be_bytes([e, f]));
    // Code, operand, and after a comparison the statement that follows if it holds, and if not.
    let program = [
        (WORD, PACKET_TYPE, 0, 0),
        (EQUAL, libc::PACKET_OUTGOING.into(), 2, drop),
        (WORD, 6, 0, 0),
        (EQUAL, start, 4, take),
        (HALF, 10, 0, 0),
        (EQUAL, end.into(), 6, take),
        (HALF, 12, 0, 0),
        (EQUAL, 0x0806, take, 8),
        (EQUAL, 0x86dd, ipv6, 9),
        (EQUAL, 0x0800, 10, drop),
        // IPv4: UDP from the DHCP client's port.
        (BYTE, IP + 9, 0, 0),
        (EQUAL, 17, 12, drop),
        (BPF_LDX | BPF_B | BPF_MSH, IP, 0, 0),
        (BPF_LD | BPF_H | BPF_IND, IP, 0, 0),
        (EQUAL, 68, take, drop),
        // ICMPv6: neighbour solicitation and advertisement.
        (BYTE, IP + 6, 0, 0),
        (EQUAL, 58, 17, drop),
        (BYTE, IP + 40, 0, 0),
        (EQUAL, 135, take, 19),
        (EQUAL, 136, take, drop),
        (RETURN, 0, 0, 0),
        (RETURN, HEARD_LEN as u32, 0, 0),
    ];
    let statement = |(at, (code, k, yes, no)): (usize, (u32, u32, usize, usize))| sock_filter {
        code: code as u16,
        // The kernel counts from the next statement.
        jt: yes.saturating_sub(at + 1) as u8,
        jf: no.saturating_sub(at + 1) as u8,
        k,
    };
    program.into_iter().enumerate().map(statement).collect()
}

/// A packet socket on the link with this index that receives what has this protocol (of `ETH_P_*`, or 0 for nothing) and
/// passes `filter`.
pub(crate) fn packet_socket(
    index: u32,
    protocol: u16,
    filter: &[sock_filter],
) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None)?;
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    let len = size_of_val(&program) as libc::socklen_t;
    if !filter.is_empty() {
        // SAFETY: the kernel reads a sock_fprog of `len` bytes and the `len` statements that it points to; both live here.
        check(unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const program).cast(),
                len,
            )
        })?;
    }
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol.to_be(),
        sll_ifindex: index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: bind reads `len` bytes of an address, which `address` has.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) })?;
    Ok(socket)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
