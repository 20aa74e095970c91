//! Sockets between guest and host.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use crate::check;

/// How long the host may take to accept a connection. The kernel's own 2 s pass on a host that is busy.
const CONNECT_SECONDS: i64 = 60;

/// Connects to a port of the host's.
///
/// A stream socket of any family serves as [`UnixStream`], but for its addresses.
///
/// # Errors
///
/// Those of socket(2) and connect(2): ENODEV without a socket device, ECONNRESET where nothing listens.
pub fn connect(port: u32) -> io::Result<UnixStream> {
    let socket = stream()?;
    let timeout = libc::timeval {
        tv_sec: CONNECT_SECONDS,
        tv_usec: 0,
    };
    // SAFETY: the value is a timeval, which lasts for the call, as is its size.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            SO_VM_SOCKETS_CONNECT_TIMEOUT,
            (&raw const timeout).cast(),
            size_of::<libc::timeval>() as u32,
        )
    })?;
    let address = address(libc::VMADDR_CID_HOST, port);
    // SAFETY: the address is a sockaddr_vm, which lasts for the call, as is its size.
    check(unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as u32,
        )
    })?;
    Ok(socket.into())
}

/// Listens on a port of the guest's.
///
/// # Errors
///
/// Those of socket(2), bind(2) and listen(2).
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = stream()?;
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address is a sockaddr_vm, which lasts for the call, as is its size.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as u32,
        )
    })?;
    rustix::net::listen(&socket, 128)?;
    Ok(socket)
}

/// Whether it is the host that has connected, and no program of the guest's.
pub fn is_of_host(stream: impl AsFd) -> bool {
    let mut address = address(0, 0);
    let mut size = size_of::<libc::sockaddr_vm>() as u32;
    // SAFETY: the kernel writes a sockaddr_vm at most, the size of which it gets, and both last for the call.
    let named = unsafe {
        libc::getpeername(
            stream.as_fd().as_raw_fd(),
            (&raw mut address).cast(),
            &raw mut size,
        )
    };
    named == 0 && address.svm_cid == libc::VMADDR_CID_HOST
}

/// From linux/vm_sockets.h; libc has no name for it.
const SO_VM_SOCKETS_CONNECT_TIMEOUT: i32 = 6;

fn stream() -> io::Result<OwnedFd> {
    // SAFETY: socket takes no memory.
    let fd =
        check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor is new, and nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: a sockaddr_vm is numbers, which may all be 0.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as u16;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}
