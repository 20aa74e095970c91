//! The ioctls that this crate needs, and nearly all of its unsafe code.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

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
    ifreq_ioctl(socket, libc::SIOCGIWNAME, &mut ifreq_for(link)).is_ok()
}

/// Whether a namespace belongs to a user namespace that is neither the caller's nor under it (NS_GET_USERNS, which hands
/// out no other), so that the caller's capabilities do not count for it.
pub(crate) fn is_owned_elsewhere(namespace: BorrowedFd<'_>) -> bool {
    // SAFETY: the request takes no argument and touches no memory; the descriptor is open as long as it is borrowed.
    let result = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS) };
    if result < 0 {
        return io::Error::last_os_error().raw_os_error() == Some(libc::EPERM);
    }
    // SAFETY: the kernel has just opened this descriptor for the caller, and nothing else owns it.
    drop(unsafe { OwnedFd::from_raw_fd(result) });
    false
}

/// include/uapi/linux/nsfs.h
const NS_GET_USERNS: libc::c_ulong = 0xb701;

// include/uapi/linux/ethtool.h
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETH_SS_FEATURES: u32 = 4;
/// Words in a name (ETH_GSTRING_LEN is 32 bytes).
const NAME_WORDS: usize = 8;

/// Whether a feature of `link`, in the namespace of `socket`, is on. The kernel numbers features anew in each version, so
/// it goes by the name that `ethtool -k` shows.
pub(crate) fn has_feature(socket: BorrowedFd<'_>, link: &str, feature: &str) -> io::Result<bool> {
    // struct ethtool_sset_info: command, reserved, a mask of 64 bits with the lower half first, and room for one count.
    let mut info = [ETHTOOL_GSSET_INFO, 0, 1 << ETH_SS_FEATURES, 0, 0];
    ethtool_ioctl(socket, link, &mut info)?;
    let count = info[4] as usize;

    // struct ethtool_gstrings: command, set, count, names.
    let mut names = vec![0; 3 + count * NAME_WORDS];
    names[..2].copy_from_slice(&[ETHTOOL_GSTRINGS, ETH_SS_FEATURES]);
    ethtool_ioctl(socket, link, &mut names)?;
    let is_it = |name: &[u32]| {
        let bytes: Vec<u8> = name.iter().flat_map(|word| word.to_ne_bytes()).collect();
        CStr::from_bytes_until_nul(&bytes).is_ok_and(|name| name.to_bytes() == feature.as_bytes())
    };
    let Some(index) = names[3..].chunks(NAME_WORDS).position(is_it) else {
        return Ok(false);
    };

    // struct ethtool_gfeatures: command, count of blocks, and for each 32 features what is available, requested, active
    // and never changed.
    let blocks = count.div_ceil(32);
    let mut states = vec![0; 2 + blocks * 4];
    states[..2].copy_from_slice(&[ETHTOOL_GFEATURES, blocks as u32]);
    ethtool_ioctl(socket, link, &mut states)?;
    let active = states[2 + index / 32 * 4 + 2];
    Ok(active >> (index % 32) & 1 == 1)
}

/// `argument` has room for all that the command in its first word, with the counts in it, writes back.
fn ethtool_ioctl(socket: BorrowedFd<'_>, link: &str, argument: &mut [u32]) -> io::Result<()> {
    let mut request = ifreq_for(link);
    request.ifr_ifru.ifru_data = argument.as_mut_ptr().cast();
    ifreq_ioctl(socket, SIOCETHTOOL, &mut request)
}

/// include/uapi/linux/sockios.h
const SIOCETHTOOL: libc::c_ulong = 0x8946;

fn ifreq_for(link: &str) -> libc::ifreq {
    let mut request = empty_ifreq();
    // One byte stays zero to close the name.
    let room = request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1);
    room.zip(link.bytes())
        .for_each(|(to, from)| *to = from as libc::c_char);
    request
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
    // `argument` is, and keep no pointer to it; the descriptor is open as long as it is borrowed. What SIOCETHTOOL
    // finds at the pointer in it is a slice that `has_feature` has sized for the command, and outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use super::*;
    use crate::harness::{self as netns, Netns, root_test};

    root_test!(feature_is_read_by_its_name, || {
        let netns = Netns::new();
        netns.wire("v0");
        let has = |link, feature| {
            netns.enter(|| {
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                has_feature(socket.as_fd(), link, feature)
            })
        };
        for (feature, expected) in [
            ("highdma", true),
            ("rx-vlan-hw-parse", true),
            ("rx-vlan-stag-hw-parse", true),
            // It is no NIC that could filter.
            ("rx-vlan-filter", false),
        ] {
            assert_eq!(has("v0", feature).unwrap(), expected, "{feature}");
        }
        assert!(!has("v0", "no-such-feature").unwrap());
        let absent = has("absent", "highdma").unwrap_err();
        assert_eq!(absent.raw_os_error(), Some(libc::ENODEV));
    });
}
