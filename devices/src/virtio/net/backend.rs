//! Where a network device's frames come from and go to: a tap, of which the kernel may take the data
//! path over (`vhost`), or a program that forwards them.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;

use super::features::Offloads;

/// Length of the header before each frame: `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).
pub const HEADER_LEN: usize = 12;

/// A non-blocking source and sink of frames, each with a virtio-net header before it.
///
/// Its descriptor polls readable and writable as a socket does; both calls return `WouldBlock`
/// when there is nothing to read or no room.
pub trait Backend: AsRawFd + Send + Sync + fmt::Debug + 'static {
    /// Reads one frame into `iovecs` and returns its length with the header; a frame that is
    /// longer than the buffers is cut. `num_buffers` of the header is left as it is.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when there is no frame; others as the kernel says.
    ///
    /// # Safety
    ///
    /// Each iovec must describe memory that may be written for as long as the call lasts.
    unsafe fn read_frame(&self, iovecs: &[libc::iovec]) -> io::Result<usize>;

    /// Writes the one frame that lies in `iovecs`, or takes it, to write it by
    /// [`Backend::flush`] at the latest.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when there is no room now, `InvalidInput` for a frame that the backend does
    /// not take.
    ///
    /// # Safety
    ///
    /// Each iovec must describe memory that may be read for as long as the call lasts.
    unsafe fn write_frame(&self, iovecs: &[libc::iovec]) -> io::Result<usize>;

    /// Writes what was taken and not written yet; called when there is no other frame for now.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when there is no room now; the descriptor then polls writable later.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    /// What may be left to the reader of frames.
    fn known_offloads(&self) -> Offloads;

    /// What may be left to the backend, of frames that are written.
    fn write_offloads(&self) -> Offloads {
        self.known_offloads()
    }

    /// Says what may be left to the reader of frames.
    ///
    /// # Errors
    ///
    /// Fails when the interface is gone or the kernel does not know an offload.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;

    /// Lets this queue of several take its share of the received frames, or none.
    ///
    /// # Errors
    ///
    /// Fails when the interface is gone.
    fn set_enabled(&self, enabled: bool) -> io::Result<()>;

    /// Gives the interface another MAC address, by which it receives from now on.
    ///
    /// # Errors
    ///
    /// Fails when the address is taken, or the interface gone.
    fn set_mac(&self, mac: [u8; 6]) -> io::Result<()>;
}
