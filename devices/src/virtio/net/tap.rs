//! A queue of a tap or macvtap interface as the backend of a network device.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::ioctl::{ioctl_with_ref, ioctl_with_val};

use super::backend::{Backend, HEADER_LEN};
use super::features::Offloads;
use libc::{TUNSETOFFLOAD, TUNSETQUEUE, TUNSETSNDBUF, TUNSETVNETHDRSZ};

/// Why a descriptor cannot be the backend of a network device.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// It is something else.
    #[error("file descriptor {0} is not a queue of a tap or macvtap interface")]
    NotATap(RawFd, #[source] io::Error),
    /// A setting was refused.
    #[error("cannot set {1} on the tap queue (file descriptor {0})")]
    Setting(RawFd, &'static str, #[source] io::Error),
}

/// An open queue of a tap or macvtap, set up for frames with a virtio-net header.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    known_offloads: Offloads,
    /// The kernel refuses to attach what is attached, and to detach what is not.
    enabled: AtomicBool,
}

impl Tap {
    /// Prepares a non-blocking queue with the flags IFF_TAP, IFF_NO_PI and IFF_VNET_HDR: headers of
    /// [`HEADER_LEN`] bytes, no bound on what may be in flight, and no offloads until a driver asks
    /// for them.
    ///
    /// # Errors
    ///
    /// Fails when `fd` is not a tap's, or the kernel refuses a setting.
    pub fn new(fd: OwnedFd) -> Result<Self, TapError> {
        let raw = fd.as_raw_fd();
        let setting = |what| move |error| TapError::Setting(raw, what, error);
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        check(unsafe { ioctl_with_ref(&fd, TUNSETVNETHDRSZ, &(HEADER_LEN as libc::c_int)) })
            .map_err(|error| TapError::NotATap(raw, error))?;
        // In bridge mode a frame stays charged to its sender until the guest that it is for reads
        // it: with a bound, one slow guest would stop its neighbours.
        // SAFETY: TUNSETSNDBUF reads one int.
        check(unsafe { ioctl_with_ref(&fd, TUNSETSNDBUF, &libc::c_int::MAX) })
            .map_err(setting("the send buffer (TUNSETSNDBUF)"))?;
        // Which offloads a kernel knows shows only when they are set. UDP's are the newest.
        let known_offloads = [Offloads::USO | Offloads::UFO, Offloads::UFO]
            .map(|newest| Offloads::USUAL | newest)
            .into_iter()
            .find(|&offloads| set_offloads(&fd, offloads).is_ok())
            .unwrap_or(Offloads::USUAL);
        // Those of the reader before us, and what was tried, would stay.
        set_offloads(&fd, Offloads::empty()).map_err(setting("no offloads (TUNSETOFFLOAD)"))?;
        Ok(Self {
            fd,
            known_offloads,
            enabled: AtomicBool::new(true),
        })
    }

    /// Another descriptor of the same queue.
    ///
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub fn try_clone(&self) -> io::Result<File> {
        self.fd.try_clone().map(File::from)
    }

    /// Moves one frame, by the first of two system calls where its memory is in one piece. Those of
    /// libc are cancellation points, which costs more than all else that they do.
    ///
    /// # Safety
    ///
    /// Each iovec must describe memory that the call may access for as long as it lasts.
    unsafe fn transfer(
        &self,
        [flat, vectored]: [libc::c_long; 2],
        iovecs: &[libc::iovec],
    ) -> io::Result<usize> {
        let (call, start, len) = match iovecs {
            [one] => (flat, one.iov_base.cast_const().cast(), one.iov_len),
            _ => (vectored, iovecs.as_ptr(), iovecs.len()),
        };
        // SAFETY: the caller vouches for the memory; pointer and count are those of one slice.
        let n = unsafe { libc::syscall(call, self.as_raw_fd(), start, len) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Backend for Tap {
    unsafe fn read_frame(&self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller vouches for the memory.
        unsafe { self.transfer([libc::SYS_read, libc::SYS_readv], iovecs) }
    }

    unsafe fn write_frame(&self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller vouches for the memory.
        unsafe { self.transfer([libc::SYS_write, libc::SYS_writev], iovecs) }
    }

    fn known_offloads(&self) -> Offloads {
        self.known_offloads
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        set_offloads(&self.fd, offloads)
    }

    fn set_mac(&self, mac: [u8; 6]) -> io::Result<()> {
        let mut request = ifreq();
        let mut address = libc::sockaddr {
            sa_family: libc::ARPHRD_ETHER,
            sa_data: [0; 14],
        };
        for (to, from) in address.sa_data.iter_mut().zip(mac) {
            *to = from as libc::c_char;
        }
        // The name is ignored: the descriptor says which interface (drivers/net/tap.c, tap_ioctl).
        request.ifr_ifru.ifru_hwaddr = address;
        // SAFETY: SIOCSIFHWADDR reads one ifreq, and `request` is one.
        check(unsafe { ioctl_with_ref(&self.fd, libc::SIOCSIFHWADDR, &request) })
    }

    fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        if self.enabled.load(Ordering::SeqCst) == enabled {
            return Ok(());
        }
        let mut request = ifreq();
        let change = if enabled {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        request.ifr_ifru.ifru_flags = change as libc::c_short;
        // SAFETY: TUNSETQUEUE reads one ifreq, and `request` is one.
        check(unsafe { ioctl_with_ref(&self.fd, TUNSETQUEUE, &request) })?;
        self.enabled.store(enabled, Ordering::SeqCst);
        Ok(())
    }
}

fn ifreq() -> libc::ifreq {
    // SAFETY: all bytes zero is a valid value of `ifreq`, a C struct of integers.
    unsafe { std::mem::zeroed() }
}

fn set_offloads(fd: &OwnedFd, offloads: Offloads) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its bits by value.
    check(unsafe { ioctl_with_val(fd, TUNSETOFFLOAD, offloads.bits().into()) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptor_of_something_else_is_refused() {
        for path in ["/dev/null", "/"] {
            let error = Tap::new(File::open(path).unwrap().into()).unwrap_err();
            assert!(matches!(error, TapError::NotATap(..)), "{error}");
        }
    }
}
