//! The boot connection.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use agent_protocol::boot::{Boot, FromInit, ToInit, Uptime, Usage};
use agent_protocol::{BOOT_PORT, MessageError, VERSION};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::time::{ClockId, Timespec, clock_gettime};

use super::console;
use super::usage::Meter;
use crate::vsock;

/// How often it is looked how much memory is in use.
const SAMPLE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000_000,
};
/// How long the host may take to close the connection after the last message.
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);

/// The host, at the other end of the boot connection.
#[derive(Debug)]
pub struct Host {
    stream: UnixStream,
}

impl Host {
    /// Connects to it, and says hello.
    ///
    /// # Errors
    ///
    /// Those of [`vsock::connect`]. What is wrong later is seen by [`boot`](Self::boot).
    pub fn connect() -> io::Result<Self> {
        let host = Self {
            stream: vsock::connect(BOOT_PORT)?,
        };
        let kernel = rustix::system::uname();
        host.say(&FromInit::Hello {
            version: VERSION,
            kernel: kernel.release().to_string_lossy().into_owned(),
            at: uptime(),
        });
        Ok(host)
    }

    /// Says something. That the host is gone is seen where it is to say something.
    pub fn say(&self, message: &FromInit) {
        let _ = agent_protocol::write(&self.stream, message);
    }

    /// Says that a part of the work was done at this time.
    pub fn stage(&self, name: &str, at: Uptime) {
        let name = name.to_owned();
        self.say(&FromInit::Stage { name, at });
    }

    /// Waits for what the guest is to be.
    ///
    /// # Errors
    ///
    /// The host says something else.
    pub fn boot(&self) -> Result<Boot, MessageError> {
        match agent_protocol::read(&self.stream)? {
            ToInit::Boot(boot) => Ok(*boot),
            ToInit::Unpacked | ToInit::PowerOff => Err(MessageError::Closed),
        }
    }

    /// Has it unpack its archive there.
    ///
    /// # Errors
    ///
    /// It says something else.
    pub fn unpack(&self, path: &str) -> Result<(), MessageError> {
        self.say(&FromInit::Unpack {
            path: path.as_bytes().to_vec(),
        });
        match agent_protocol::read(&self.stream)? {
            ToInit::Unpacked => Ok(()),
            ToInit::Boot(_) | ToInit::PowerOff => Err(MessageError::Closed),
        }
    }

    /// Waits until it wants the guest to end, or is gone, and looks from time to time how much memory is in use.
    pub fn wait_for_end(&self, meter: &mut Meter) {
        loop {
            let mut ready = [PollFd::new(&self.stream, PollFlags::IN)];
            match poll(&mut ready, Some(&SAMPLE)) {
                Ok(0) => meter.sample(),
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        // All but PowerOff is an error of the host's, or of the guest's own: a command has taken the device away.
        if let Err(error) = agent_protocol::read::<ToInit>(&self.stream) {
            console::say_text(&format!("the connection to the host is lost: {error}"));
        }
    }

    /// Says that all is over, and waits until the host has read it: what is on the way is lost when the machine powers off.
    pub fn end(self, usage: Usage) {
        self.say(&FromInit::Ended(usage));
        // It is closed already.
        let _ = self.stream.shutdown(Shutdown::Write);
        let _ = self.stream.set_read_timeout(Some(CLOSE_PATIENCE));
        while agent_protocol::read::<ToInit>(&self.stream).is_ok() {}
    }
}

/// The time since the kernel started.
pub fn uptime() -> Uptime {
    let time = clock_gettime(ClockId::Boottime);
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
}
