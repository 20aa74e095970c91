//! What has the kernel kill a program once minivmm is gone, whichever way that ended.
//!
//! The parent-death signal of prctl(2) does so no longer once a program has become another user, as passt does that root
//! has started. A leash is a pipe that nothing passes, of which minivmm alone has the ends, each in asynchronous
//! mode (fcntl(2), O_ASYNC). They are closed one after the other when it ends, and for the first the kernel signals
//! who owns the second.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::process::getpid;

/// Chooses the signal (include/uapi/asm-generic/fcntl.h).
const F_SETSIG: c_int = 10;

/// A leash for one program.
#[derive(Debug)]
pub struct Leash([OwnedFd; 2]);

impl Leash {
    /// One that has no program yet.
    ///
    /// # Errors
    ///
    /// Fails when the process may not have more descriptors.
    pub fn new() -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        Ok(Self([reader.into(), writer.into()]))
    }

    /// Puts this process on it, a new child of minivmm's. Runs between fork and exec: should minivmm end meanwhile,
    /// exec closes the last copies, and the program does not start.
    pub fn take(&self) -> io::Result<()> {
        let pid = getpid().as_raw_nonzero().get();
        for end in &self.0 {
            for (command, value) in [
                (libc::F_SETOWN, pid),
                (F_SETSIG, libc::SIGKILL),
                (libc::F_SETFL, libc::O_ASYNC),
            ] {
                // SAFETY: the commands take a number, and change whom the kernel signals for this file alone.
                if unsafe { libc::fcntl(end.as_raw_fd(), command, value) } < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
        }
        Ok(())
    }
}
