//! In the VM's process: what ties it to the `minivmm run` that has started it.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;

use agent_protocol::BOOT_PORT;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::retry_on_intr;
use rustix::net::{SocketAddrUnix, bind, listen};
use rustix::process::{Signal, getpid, kill_process};

use crate::config::RunnerFds;
use crate::nic::Inherited;
use crate::qmp::socket::SocketError;

/// Connections of the guest's that may wait: it makes one.
const BACKLOG: i32 = 4;
/// Enough for a poll(2) and two kill(2).
const STACK: usize = 64 << 10;

/// The VM's end of a [`RunnerFds`].
#[derive(Debug)]
pub struct Tie {
    leash: OwnedFd,
}

impl Tie {
    /// Takes the descriptors, and gives the boot socket its name beside `vsock`, where the guest's device looks for it. It
    /// goes with the VM's directory.
    ///
    /// # Errors
    ///
    /// See [`SocketError`].
    pub fn new(
        fds: RunnerFds,
        inherited: &mut Inherited,
        vsock: &Path,
    ) -> Result<Self, SocketError> {
        let mut take = |number| {
            let fd = inherited.listener(number);
            fd.ok_or(SocketError::NoListener(number))
        };
        let (leash, boot) = (take(fds.leash)?, take(fds.boot)?);
        let path = port_path(vsock, BOOT_PORT);
        let bound = SocketAddrUnix::new(&path).and_then(|address| {
            bind(&boot, &address)?;
            listen(&boot, BACKLOG)
        });
        bound.map_err(|error| SocketError::Bind(path, error.into()))?;
        Ok(Self { leash })
    }

    /// Ends the guest as two signals do, at once, when `minivmm run` is gone. To be called when this process handles signals.
    ///
    /// # Errors
    ///
    /// When there can be no thread for it.
    pub fn hold(self) -> io::Result<()> {
        let builder = thread::Builder::new()
            .name("leash".into())
            .stack_size(STACK);
        builder.spawn(move || {
            let mut fds = [PollFd::new(&self.leash, PollFlags::IN)];
            if retry_on_intr(|| poll(&mut fds, None)).is_err() {
                return;
            }
            log::warn!("`minivmm run` is gone, and ends the VM");
            for signal in [Signal::TERM, Signal::INT] {
                let _ = kill_process(getpid(), signal);
            }
        })?;
        Ok(())
    }
}

/// The socket of a port of the host's, by the device's own socket (docs/vsock.md).
pub fn port_path(vsock: &Path, port: u32) -> PathBuf {
    let mut path = vsock.as_os_str().to_owned();
    path.push(format!("_{port}"));
    path.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_of_the_host_is_beside_the_devices_socket() {
        let path = port_path(Path::new("/run/x/vsock"), 5);
        assert_eq!(path, Path::new("/run/x/vsock_5"));
    }
}
