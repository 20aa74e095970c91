//! Hears what the user of a macvtap sends that tells about it, also where the frames pass through the kernel alone, as with
//! vhost-net.
//!
//! A packet socket on the macvtap itself, with a filter: all that the kernel hands over is what names the sender's
//! addresses (ARP, IPv6 neighbour discovery, DHCP), and what comes from another MAC address than the macvtap's.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::{
    BPF_ABS, BPF_B, BPF_H, BPF_IND, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_LDX, BPF_MSH, BPF_RET,
    BPF_W, sock_filter,
};

use crate::mac::MacAddr;
use crate::netns;

/// Bytes of a frame that are handed over: Ethernet, IPv6 and ICMPv6 up to a neighbour's address, or Ethernet, IPv4, UDP
/// and DHCP up to the client's.
pub const HEARD_LEN: usize = 14 + 40 + 24;

/// Where a filter finds the packet's type (linux/filter.h, SKF_AD_OFF and SKF_AD_PKTTYPE).
const PACKET_TYPE: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_PKTTYPE) as u32;

/// A packet socket on one link.
#[derive(Debug)]
pub struct FrameListener {
    socket: OwnedFd,
}

impl FrameListener {
    /// Listens on the link with this index and MAC address in the caller's network namespace.
    ///
    /// # Errors
    ///
    /// Without CAP_NET_RAW, and when there is no such link.
    pub fn new(index: u32, mac: MacAddr) -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: socket takes plain numbers. With protocol 0 it hears nothing yet.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        check(fd)?;
        // SAFETY: the descriptor is new and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        attach(&socket, &filter(mac.octets()))?;
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
            sll_ifindex: index as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        let len = size_of_val(&address) as libc::socklen_t;
        // SAFETY: bind reads `len` bytes of an address, which `address` has.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) })?;
        Ok(Self { socket })
    }

    /// Listens in another network namespace, of which `namespace` is a descriptor.
    ///
    /// # Errors
    ///
    /// As for [`FrameListener::new`], and without CAP_SYS_ADMIN for both namespaces.
    pub fn in_namespace(namespace: BorrowedFd<'_>, index: u32, mac: MacAddr) -> io::Result<Self> {
        netns::on_own_thread(|| {
            netns::enter(namespace)?;
            Self::new(index, mac)
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

/// The filter as a program of the kernel's packet filter (Documentation/networking/filter.rst), which jumps forward only.
fn filter(mac: [u8; 6]) -> Vec<sock_filter> {
    const ETHERNET: u32 = 14;
    let [a, b, c, d, e, f] = mac;
    let load = |size, at| statement(BPF_LD | size | BPF_ABS, at);
    let mut program = Program::default();
    program.push(load(BPF_W, PACKET_TYPE));
    program.unless(libc::PACKET_OUTGOING.into(), Target::Drop);
    program.push(load(BPF_W, 6));
    program.unless(u32::from_be_bytes([a, b, c, d]), Target::Take);
    program.push(load(BPF_H, 10));
    program.unless(u16::from_be_bytes([e, f]).into(), Target::Take);
    program.push(load(BPF_H, 12));
    program.when(0x0806, Target::Take);
    program.when(0x86dd, Target::Ipv6);
    program.unless(0x0800, Target::Drop);
    // IPv4: UDP from the DHCP client's port.
    program.push(load(BPF_B, ETHERNET + 9));
    program.unless(17, Target::Drop);
    program.push(statement(BPF_LDX | BPF_B | BPF_MSH, ETHERNET));
    program.push(statement(BPF_LD | BPF_H | BPF_IND, ETHERNET));
    program.when(68, Target::Take);
    program.push(statement(BPF_RET | BPF_K, 0));
    // ICMPv6: neighbour solicitation and advertisement.
    program.mark(Target::Ipv6);
    program.push(load(BPF_B, ETHERNET + 6));
    program.unless(58, Target::Drop);
    program.push(load(BPF_B, ETHERNET + 40));
    program.when(135, Target::Take);
    program.when(136, Target::Take);
    program.mark(Target::Drop);
    program.push(statement(BPF_RET | BPF_K, 0));
    program.mark(Target::Take);
    program.push(statement(BPF_RET | BPF_K, HEARD_LEN as u32));
    program.finish()
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}

/// Where a jump goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Take,
    Drop,
    Ipv6,
}

/// A program whose jumps are filled in at its end.
#[derive(Default)]
struct Program {
    code: Vec<sock_filter>,
    /// Where a jump stands, whether it is taken on equality, and where it goes.
    jumps: Vec<(usize, bool, Target)>,
    marks: Vec<(Target, usize)>,
}

impl Program {
    fn push(&mut self, statement: sock_filter) {
        self.code.push(statement);
    }

    /// Jumps when what was loaded is `value`.
    fn when(&mut self, value: u32, target: Target) {
        self.jumps.push((self.code.len(), true, target));
        self.push(statement(BPF_JMP | BPF_JEQ | BPF_K, value));
    }

    /// Jumps when what was loaded is not `value`.
    fn unless(&mut self, value: u32, target: Target) {
        self.jumps.push((self.code.len(), false, target));
        self.push(statement(BPF_JMP | BPF_JEQ | BPF_K, value));
    }

    fn mark(&mut self, target: Target) {
        self.marks.push((target, self.code.len()));
    }

    fn finish(mut self) -> Vec<sock_filter> {
        for (at, on_equal, target) in self.jumps {
            let mark = self.marks.iter().find(|(mark, _)| *mark == target);
            // Each target is marked behind all jumps to it, at most a few statements on.
            let distance = mark.map_or(0, |(_, to)| to - at - 1) as u8;
            let jump = &mut self.code[at];
            *if on_equal { &mut jump.jt } else { &mut jump.jf } = distance;
        }
        self.code
    }
}

fn attach(socket: &OwnedFd, program: &[sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    let len = size_of_val(&program) as libc::socklen_t;
    // SAFETY: the kernel reads a sock_fprog of `len` bytes and the `len` statements that it points to; both live here.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            len,
        )
    })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
