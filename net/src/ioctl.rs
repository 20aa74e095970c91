//! The ioctls that this crate needs, and nearly all of its unsafe code.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The name of the interface that a tap descriptor belongs to, and the descriptor's flags, such as IFF_TAP (TUNGETIFF).
pub(crate) fn tap_interface(tap: BorrowedFd<'_>) -> io::Result<(String, libc::c_int)> {
    let mut request = empty_ifreq();
    ifreq_ioctl(tap, libc::TUNGETIFF, &mut request)?;
    let bytes = request.ifr_name.map(|c| c as u8);
    let name = CStr::from_bytes_until_nul(&bytes).map_err(io::Error::other)?;
    // SAFETY: the union is plain bytes, and the ioctl has filled in `ifru_flags`.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((
        name.to_string_lossy().into_owned(),
        // Sixteen bits, of which the highest is no sign.
        libc::c_int::from(flags as u16),
    ))
}

/// Sets the flags of a macvtap's descriptor (TUNSETIFF). The driver ignores the request's name.
pub(crate) fn set_tap_flags(tap: BorrowedFd<'_>, flags: libc::c_int) -> io::Result<()> {
    let mut request = empty_ifreq();
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    ifreq_ioctl(tap, libc::TUNSETIFF, &mut request)
}

/// The MAC address of the interface that a tap descriptor belongs to. The tap driver answers SIOCGIFHWADDR itself
/// (`tap_ioctl` in drivers/net/tap.c), so neither name nor namespace matters.
pub(crate) fn tap_mac(tap: BorrowedFd<'_>) -> io::Result<[u8; 6]> {
    let mut request = empty_ifreq();
    ifreq_ioctl(tap, libc::SIOCGIFHWADDR, &mut request)?;
    // SAFETY: the union is plain bytes, and the ioctl has filled in `ifru_hwaddr`.
    let address = unsafe { request.ifr_ifru.ifru_hwaddr };
    let [a, b, c, d, e, f, ..] = address.sa_data.map(|c| c as u8);
    Ok([a, b, c, d, e, f])
}

/// Whether `link`, in the namespace of `socket`, answers the old wireless ioctls (SIOCGIWNAME).
pub(crate) fn has_wireless_extensions(socket: BorrowedFd<'_>, link: &str) -> bool {
    let mut request = empty_ifreq();
    // One byte stays zero to close the name.
    let room = request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1);
    room.zip(link.bytes())
        .for_each(|(to, from)| *to = from as libc::c_char);
    ifreq_ioctl(socket, libc::SIOCGIWNAME, &mut request).is_ok()
}

fn empty_ifreq() -> libc::ifreq {
    // SAFETY: ifreq is made of integers, arrays of them and pointers, for all of which zero is a value.
    unsafe { std::mem::zeroed() }
}

fn ifreq_ioctl(
    fd: BorrowedFd<'_>,
    request: libc::c_ulong,
    argument: &mut libc::ifreq,
) -> io::Result<()> {
    // SAFETY: the requests of this file read and write at most one ifreq (SIOCGIWNAME's iwreq is smaller), which
    // `argument` is, and keep no pointer to it; the descriptor is open as long as it is borrowed.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
