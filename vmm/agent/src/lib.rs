//! The program `minivmm-agent`, which runs in guests of minivmm's.
//!
//! As the guest's first process it is its init: it makes of a kernel and an initramfs what the host asks for, serves
//! sessions, and ends the guest. In a guest that has another init it serves sessions alone.
//! It is linked statically, so that it needs nothing of the guest's, and is a part of
//! the program minivmm: `vmm/build.rs` builds it.
//!
//! `init` boots and ends a guest. `listener` accepts the host's connections, and `session` does what each of them is for; `children` starts
//! processes and reaps them. [`network`] brings up the guest's NICs. `vsock` has the sockets to the host.

use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::io;
use std::iter;
use std::path::PathBuf;
use std::process;

use children::Children;
use listener::Listener;

mod children;
mod init;
mod listener;
pub mod network;
mod session;
mod vsock;

/// How to start it.
const USAGE: &str = "\
Usage: minivmm-agent [--unix PATH]

Serves the commands and copies of the host's minivmm, by vsock, or for programs on the same machine
by a Unix socket. As a guest's first process it is its init.
";

/// An error with its causes.
fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = iter::successors(Some(error), |error| (*error).source());
    let texts: Vec<String> = causes.map(|error| error.to_string()).collect();
    texts.join(": ")
}

/// The result of a call of the C library's.
fn check(result: i32) -> io::Result<i32> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// Does what the command line says, and returns the exit status.
pub fn main() -> u8 {
    if process::id() == 1 {
        init::run();
    }
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    let listener = match &arguments[..] {
        [] => Listener::vsock(),
        [option, path] if option == "--unix" => Listener::unix(&PathBuf::from(path)),
        _ => {
            eprint!("{USAGE}");
            return 2;
        }
    };
    let served = listener.and_then(|listener| session::serve(&listener, &Children::start()?));
    match served {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("minivmm-agent: cannot serve the host: {error}");
            1
        }
    }
}
