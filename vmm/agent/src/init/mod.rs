//! The guest's first process.
//!
//! `console` says what the host cannot be told in another way.

mod console;

use std::io;

use agent_protocol::boot::{FromInit, Part, Uptime};
use agent_protocol::{BOOT_PORT, MessageError, VERSION};
use rustix::system::RebootCommand;
use rustix::time::{ClockId, clock_gettime};

use crate::vsock;

/// Why there is no guest, and the host does not know.
#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error("cannot connect to port {BOOT_PORT} of the host by vsock")]
    Connect(#[source] io::Error),
    #[error("cannot talk to the host")]
    Talk(#[from] MessageError),
}

/// Boots the guest, and ends it.
pub fn run() -> ! {
    if let Err(error) = boot() {
        console::say(&error);
    }
    let failed = rustix::system::reboot(RebootCommand::PowerOff);
    // The kernel ends the guest with a panic since its first process ends.
    panic!("cannot power off: {failed:?}");
}

fn boot() -> Result<(), InitError> {
    let host = vsock::connect(BOOT_PORT).map_err(InitError::Connect)?;
    let kernel = rustix::system::uname();
    let hello = FromInit::Hello {
        version: VERSION,
        kernel: kernel.release().to_string_lossy().into_owned(),
        at: uptime(),
    };
    agent_protocol::write(&host, &hello)?;
    let failed = FromInit::Failed {
        part: Part::Other,
        text: "this init makes no guest".into(),
    };
    agent_protocol::write(&host, &failed)?;
    Ok(())
}

fn uptime() -> Uptime {
    let time = clock_gettime(ClockId::Boottime);
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
}
