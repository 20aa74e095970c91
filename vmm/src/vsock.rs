//! The socket device of a machine, and its socket on the host.

use std::io;
use std::path::{PathBuf, absolute};

use devices::events::EventSink;
use devices::virtio::vsock::{Vsock, VsockHandle};

use crate::config::VsockConfig;
use crate::machine::{Machine, MachineError};
use crate::qmp::socket::{LONGEST, Listener, SocketError};

/// Bytes of `_` and the longest port.
const SUFFIX: usize = 11;
/// The longest path of a socket after which a port has room.
const MAX_PATH: usize = LONGEST - SUFFIX;

/// Why there is no socket for the guest's.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The socket of a port could not be connected to.
    #[error(
        "the socket {0:?} of --vsock is too long: with its directory it may have {MAX_PATH} bytes, since a port of the \
         host is the socket of this name with _PORT at its end, and sockets have {LONGEST}"
    )]
    TooLong(PathBuf),
    /// It cannot be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
}

/// The host's side of a guest's socket device.
#[derive(Debug)]
pub struct VsockSocket {
    listener: Listener,
    path: PathBuf,
    cid: u32,
}

impl VsockSocket {
    /// Makes the socket that programs of the host connect to.
    ///
    /// # Errors
    ///
    /// See [`VsockError`].
    pub fn open(config: &VsockConfig) -> Result<Self, VsockError> {
        // This process may go to another directory before the guest connects.
        let path = absolute(&config.path).unwrap_or_else(|_| config.path.clone());
        if path.as_os_str().len() > MAX_PATH {
            return Err(VsockError::TooLong(path));
        }
        Ok(Self {
            listener: Listener::bind(&path)?,
            path,
            cid: config.cid,
        })
    }
}

/// The device that passes connections between a guest and this socket, which is to be kept as long as it.
///
/// # Errors
///
/// Fails when the process may not have another thread or descriptor.
pub fn device(socket: VsockSocket, events: EventSink) -> io::Result<(Vsock, Listener)> {
    let VsockSocket {
        listener,
        path,
        cid,
    } = socket;
    let device = Vsock::new("vsock", cid, listener.try_clone()?, path, events)?;
    Ok((device, listener))
}

/// Puts a socket device into the machine. Returns what reads its counters, and the socket, which is to
/// be kept as long as the machine.
///
/// # Errors
///
/// See [`MachineError`].
pub fn add(
    machine: &mut Machine,
    socket: VsockSocket,
) -> Result<(VsockHandle, Listener), MachineError> {
    let events = machine.event_sink("vsock");
    let (device, listener) = device(socket, events).map_err(MachineError::Device)?;
    let handle = device.handle();
    machine.add_virtio(device)?;
    Ok((handle, listener))
}
