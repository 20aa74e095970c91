//! A socket for the frames of a DHCP client, below the kernel's own IP.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

const ETH_P_ALL: u16 = libc::ETH_P_ALL as u16;
const ETH_P_ARP: u32 = libc::ETH_P_ARP as u32;
const ETH_P_IP: u32 = libc::ETH_P_IP as u32;
const ARP_REPLY: u32 = 2;
const DHCP_CLIENT: u32 = 68;

/// A packet socket on one link (packet(7)), which gets DHCP for clients and replies of ARP alone.
#[derive(Debug)]
pub(super) struct PacketSocket {
    fd: OwnedFd,
}

impl PacketSocket {
    /// Opens one on the link `index`.
    pub(super) fn open(index: u32) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // Of no protocol: until it is bound, and has its filter by then, it gets nothing.
        let fd = rustix::net::socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None)?;
        filter(fd.as_fd())?;
        bind(fd.as_fd(), index)?;
        Ok(Self { fd })
    }

    /// The next frame, if there is one. Also when the link is down there is none.
    pub(super) fn receive(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 2048];
        let receive = || rustix::net::recv(&self.fd, &mut frame[..], RecvFlags::empty());
        let (length, _) = rustix::io::retry_on_intr(receive).ok()?;
        frame.truncate(length);
        Some(frame)
    }

    /// Sends a frame. What cannot be sent is lost, as on a wire.
    pub(super) fn send(&self, frame: &[u8]) {
        let _ =
            rustix::io::retry_on_intr(|| rustix::net::send(&self.fd, frame, SendFlags::empty()));
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Has the kernel drop all other frames: a guest may get very many of them.
fn filter(fd: BorrowedFd<'_>) -> io::Result<()> {
    // Codes of linux/filter.h; offsets are those in an Ethernet frame, and a jump says how many it leaves out.
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    const LOAD_HALF_INDEXED: u16 = 0x48;
    const LOAD_IP_HEADER_LENGTH: u16 = 0xb1;
    const IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let op = |code, k, (jt, jf)| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        op(LOAD_HALF, 12, (0, 0)),
        op(IF_EQUAL, ETH_P_ARP, (0, 2)),
        op(LOAD_HALF, 20, (0, 0)),
        // A request for the guest's address is the kernel's alone to answer.
        op(IF_EQUAL, ARP_REPLY, (6, 7)),
        op(IF_EQUAL, ETH_P_IP, (0, 6)),
        op(LOAD_BYTE, 23, (0, 0)),
        op(IF_EQUAL, libc::IPPROTO_UDP as u32, (0, 4)),
        op(LOAD_IP_HEADER_LENGTH, 14, (0, 0)),
        op(LOAD_HALF_INDEXED, 16, (0, 0)),
        op(IF_EQUAL, DHCP_CLIENT, (0, 1)),
        op(RETURN, u32::MAX, (0, 0)),
        op(RETURN, 0, (0, 0)),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: SO_ATTACH_FILTER reads one sock_fprog, which this is, and the instructions that it points to.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of_val(&program) as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Binds it to a link: from here on it gets frames.
fn bind(fd: BorrowedFd<'_>, index: u32) -> io::Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: ETH_P_ALL.to_be(),
        sll_ifindex: index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: bind reads an address of this length, which is that of `address`.
    if unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
