//! The limit of open files: as high as this process may have it, and for other programs as it was.
//!
//! The soft limit is usually 1,024, since programs that use select(2) break beyond it. A guest with many CPUs and queues
//! needs more.

use std::io;
use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What [`raise`] has found.
static INHERITED: OnceLock<Rlimit> = OnceLock::new();

/// Raises the limit to the hard one. Once, at the start of `main`. A kernel that refuses leaves it as it is.
pub fn raise() {
    let inherited = INHERITED.get_or_init(|| getrlimit(Resource::Nofile));
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: inherited.maximum,
            ..*inherited
        },
    );
}

/// Gives a program the limit that this process was started with, between fork and exec (it is async-signal-safe).
pub fn restore() -> io::Result<()> {
    let Some(inherited) = INHERITED.get() else {
        return Ok(());
    };
    Ok(setrlimit(Resource::Nofile, *inherited)?)
}
