//! What a server knows of its guest, in a form of its own ("Migrating back-end state" in the
//! specification): for a guest that is saved and goes on with another server.
//!
//! It passes through a memfd, which neither side has to wait for as it would for a pipe.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection as Direction, VhostTransferStatePhase as Phase,
    VhostUserTransferDeviceState,
};
use vm_memory::ByteValued;

use super::front_end::{FrontEnd, VhostUserError, failed_to};

/// Bytes of a state at most: a million files that the guest remembers take 45 MiB, if their names
/// have 30 bytes.
const MOST: u64 = 64 << 20;
/// The reply of a server that takes the file: it has none of its own to pass.
const TAKEN: u64 = 1 << 8;

impl FrontEnd {
    /// Whether the server can be asked for its state.
    ///
    /// # Errors
    ///
    /// Says that it has gone, or does not know the request.
    pub fn check_state(&self) -> Result<(), VhostUserError> {
        if self.is_dead() {
            let gone = io::ErrorKind::NotConnected.into();
            return Err(failed_to("say what the guest has open")(gone));
        }
        match self.protocol.contains(Protocol::DEVICE_STATE) {
            true => Ok(()),
            false => Err(VhostUserError::NoState),
        }
    }

    /// Asks the server, whose queues have been stopped, for its state.
    ///
    /// # Errors
    ///
    /// Says what the server did not do.
    pub fn save_state(&mut self) -> Result<Vec<u8>, VhostUserError> {
        self.check_state()?;
        let state = memfd().and_then(|file| {
            self.transfer(Direction::SAVE, &file)?;
            let len = file.metadata()?.len();
            if len > MOST {
                return Err(io::Error::other(format!("it says {len} bytes")));
            }
            let mut state = vec![0; len as usize];
            file.read_exact_at(&mut state, 0)?;
            Ok(state)
        });
        state.map_err(failed_to("say what the guest has open"))
    }

    /// Has the server, whose queues have not been started or have been stopped, take the state of
    /// another one in place of its own.
    ///
    /// # Errors
    ///
    /// Says what the server did not do.
    pub fn restore_state(&mut self, state: &[u8]) -> Result<(), VhostUserError> {
        self.check_state()?;
        let restored = memfd().and_then(|mut file| {
            file.write_all(state)?;
            file.rewind()?;
            self.transfer(Direction::LOAD, &file)
        });
        restored.map_err(failed_to("open again what the guest had open"))
    }

    fn transfer(&mut self, direction: Direction, file: &File) -> io::Result<()> {
        let body = VhostUserTransferDeviceState::new(direction, Phase::STOPPED);
        let request = FrontendReq::SET_DEVICE_STATE_FD;
        let fds = [file.as_raw_fd()];
        let (taken, _) = self
            .channel
            .ask_file::<u64>(request, body.as_slice(), &fds)?;
        if taken != TAKEN {
            return Err(io::Error::other(format!("it refuses that ({taken:#x})")));
        }
        match self.channel.ask(FrontendReq::CHECK_DEVICE_STATE, &[])? {
            0_u64 => Ok(()),
            code => Err(io::Error::other(format!("it has failed ({code})"))),
        }
    }
}

fn memfd() -> io::Result<File> {
    Ok(memfd_create("share-state", MemfdFlags::CLOEXEC)?.into())
}
