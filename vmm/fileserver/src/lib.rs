//! Serves a directory to a guest by virtio-fs (virtio 1.2 5.11): the process behind `--share`.
//!
//! The file system is that of the crate virtiofsd. The monitor, the front end of vhost-user, starts this process with a
//! connected socket and a record of the requests that are being served; the process ends with that socket, and with the
//! monitor whichever way that ends.
//!
//! | file | what it is |
//! | --- | --- |
//! | `sandbox.rs` | namespaces, mounts, capabilities: what it can see and do |
//! | `cover.rs` | mounts below the directory, which it is not to see either |
//! | `seccomp.rs` | the system calls that it can make |
//! | `backend.rs` | vhost-user: the guest's memory and queues |
//! | `device.rs` | the queues with what serves them |
//! | `ring.rs` | a queue, and the threads that serve it (`hiprio`, `requests`) |
//! | `requests.rs` | a FUSE request |
//! | `files.rs` | the file system: virtiofsd's, with a bound to its descriptors |
//! | `nodes` | the files that the guest remembers |
//! | `state.rs` | what the guest has open |
//! | `inflight.rs` | the record of those that are being served |

mod backend;
mod cover;
mod device;
mod files;
mod inflight;
mod nodes;
mod requests;
mod ring;
mod sandbox;
mod seccomp;
mod state;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use rustix::thread::{UnshareFlags, unshare_unsafe};
use vhost::vhost_user::Error as VhostUserError;
use virtiofsd::limits::setup_rlimit_nofile;
use virtiofsd::passthrough::read_only::PassthroughFsRo;
use virtiofsd::passthrough::{self, MigrationOnError, PassthroughFs};
use virtiofsd::soft_idmap::cmdline::IdMap;

use sandbox::Owners;

pub use cover::unescaped;
pub use device::Device;
pub use files::Numbered;
pub use inflight::{QUEUE_SIZE, RECORD};
pub use sandbox::Error as SandboxError;
pub use seccomp::Error as SeccompError;

/// Descriptors that the guest cannot have open, for what this process opens for a moment.
const RESERVED_DESCRIPTORS: u64 = 64;
/// The queues, by the names of their threads, and how many each has: of the requests so many can wait for the host at once.
const QUEUES: [(&str, usize); inflight::QUEUES] = [("hiprio", 1), ("requests", 4)];
/// How long a guest may rely on what it has read of a name and of attributes, which others may change on the host.
const FRESH: Duration = Duration::from_secs(1);

/// What is served.
#[derive(Debug)]
pub struct Share {
    /// The directory.
    pub directory: PathBuf,
    /// Whether the guest may change nothing in it.
    pub read_only: bool,
    /// The connection with the monitor.
    pub socket: UnixStream,
    /// A file of [`RECORD`] bytes, zeros at first: which requests are being served.
    pub inflight: OwnedFd,
    /// Closed when the directory is being served, with a byte before.
    pub ready: OwnedFd,
}

/// Why a directory is not served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be entered.
    #[error("cannot enter {0}")]
    Enter(PathBuf, #[source] io::Error),
    /// The limit of open files cannot be set.
    #[error("cannot set the limit of open files: {0}")]
    Limit(String),
    /// The sandbox does not stand.
    #[error("cannot leave the rest of the host")]
    Sandbox(#[from] SandboxError),
    /// System calls are not filtered.
    #[error("cannot restrict system calls")]
    Seccomp(#[from] SeccompError),
    /// Something of the server cannot be made.
    #[error("cannot make {0}")]
    Make(&'static str, #[source] io::Error),
    /// What the monitor says makes no sense.
    #[error("cannot understand the monitor")]
    Protocol(#[source] VhostUserError),
}

/// Serves a directory until the monitor closes its socket.
///
/// # Errors
///
/// See [`Error`].
///
/// # Safety
///
/// This process must have one thread, and own no descriptors but the standard ones and those of `share`: one of two
/// processes closes them all.
pub unsafe fn serve(share: Share) -> Result<(), Error> {
    // A thread that is gone would leave the guest waiting.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("{panic}");
        std::process::exit(101);
    }));
    std::env::set_current_dir(&share.directory)
        .map_err(|error| Error::Enter(share.directory.clone(), error))?;
    let limit = setup_rlimit_nofile(None).map_err(Error::Limit)?;
    // SAFETY: by the contract of this function.
    let inside = unsafe { sandbox::enter(share.read_only) }?;
    let squash = |id: u32| {
        vec![IdMap::SquashGuest {
            from_guest: 0,
            to_host: id,
            count: u32::MAX,
        }]
    };
    let (uid_map, gid_map) = match inside.owners {
        Owners::All => (None, None),
        Owners::One { uid, gid } => (Some(squash(uid)), Some(squash(gid))),
    };
    let budget = limit.saturating_sub(RESERVED_DESCRIPTORS);
    let config = passthrough::Config {
        entry_timeout: FRESH,
        attr_timeout: FRESH,
        proc_sfd_rawfd: Some(inside.descriptors),
        guest_fd_limit: budget,
        uid_map,
        gid_map,
        // A file that has gone is no reason not to restore the others.
        migration_on_error: MigrationOnError::GuestError,
        ..Default::default()
    };
    let failed = |error| Error::Make("the file system", error);
    match share.read_only {
        true => {
            let files = PassthroughFsRo::new(config).map_err(failed)?;
            serve_files(files, budget, share)
        }
        false => {
            let files = PassthroughFs::new(config).map_err(failed)?;
            serve_files(files, budget, share)
        }
    }
}

fn serve_files<F>(files: F, budget: u64, share: Share) -> Result<(), Error>
where
    F: Numbered + Send + Sync + 'static,
{
    let threads = QUEUES.map(|(_, threads)| threads);
    let device = Device::new(files, budget, threads, share.inflight);
    let device = Arc::new(device.map_err(|error| Error::Make("its queues", error))?);
    let started = Arc::new(Barrier::new(threads.iter().sum::<usize>() + 1));
    for (queue, (name, threads)) in QUEUES.into_iter().enumerate() {
        for thread in 0..threads {
            let (device, started) = (device.clone(), started.clone());
            let run = move || {
                // SAFETY: the working directory and the umask become this thread's own, which files are made with.
                let unshared = unsafe { unshare_unsafe(UnshareFlags::FS) };
                started.wait();
                match unshared {
                    Ok(()) => device.run(queue, thread),
                    Err(error) => panic!("cannot have a working directory of its own: {error}"),
                }
            };
            let thread = thread::Builder::new().name(name.to_owned()).spawn(run);
            thread.map_err(|error| Error::Make("a thread", error))?;
        }
    }
    started.wait();
    seccomp::restrict()?;
    let mut handle = device.messages(share.socket);
    let _ = rustix::io::write(&share.ready, b"\n");
    drop(share.ready);
    loop {
        match handle() {
            Ok(()) => {}
            Err(VhostUserError::Disconnected | VhostUserError::PartialMessage) => return Ok(()),
            Err(error) => return Err(Error::Protocol(error)),
        }
    }
}
