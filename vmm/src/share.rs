//! Shared directories: starting the file server of one, a process without rights outside of it, and being it.
//!
//! The crate `fileserver` has what it does. It is this program again, with a subcommand that no one types: a program that
//! uses minivmm as a library needs `minivmm` for it.

use std::env;
use std::fs::File;
use std::io::{self, PipeReader};
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use fileserver::{RECORD, Share};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use crate::control::exit::chain;
use crate::service::{Service, ServiceError};

// The descriptors that the file server finds.
const SOCKET: RawFd = 3;
const INFLIGHT: RawFd = 4;
const READY: RawFd = 5;

const SUBCOMMAND: &str = "file-server";
/// How long its start may take on a host that does much else.
const START: Duration = Duration::from_secs(60);

/// Whether the running executable is minivmm.
static IS_MINIVMM: AtomicBool = AtomicBool::new(false);

/// The running executable is minivmm: it can serve directories. Called by its `main`.
pub(crate) fn is_minivmm() {
    IS_MINIVMM.store(true, Ordering::Relaxed);
}

/// `minivmm file-server`.
#[derive(Clone, Debug, Args)]
pub struct FileServerArgs {
    /// The directory
    directory: PathBuf,
    /// The guest may change nothing
    #[arg(long)]
    read_only: bool,
}

/// Serves a directory, as the process that [`start`] has started.
///
/// # Safety
///
/// This process must have one thread, and own no descriptor yet: those that [`start`] has passed are taken.
pub(crate) unsafe fn serve(args: &FileServerArgs) -> ExitCode {
    env_logger::Builder::new()
        .filter_level(log::LevelFilter::Warn)
        // A lower limit of open files than the crate would like.
        .filter_module("virtiofsd::limits", log::LevelFilter::Error)
        .format_timestamp(None)
        .init();
    let name = rustix::thread::set_name(c"minivmm-share");
    name.unwrap_or_else(|error| log::warn!("cannot name this process: {error}"));
    for fd in [SOCKET, INFLIGHT, READY] {
        // SAFETY: this asks for the flags of whatever it may be.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } == -1 {
            eprintln!("minivmm itself starts the file server of a share: see --share");
            return ExitCode::from(2);
        }
    }
    // SAFETY: it is open, and by the contract of this function nothing owns it.
    let take = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
    let share = Share {
        directory: args.directory.clone(),
        read_only: args.read_only,
        socket: take(SOCKET).into(),
        inflight: take(INFLIGHT),
        ready: take(READY),
    };
    // SAFETY: by the contract of this function.
    match unsafe { fileserver::serve(share) } {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// Why a directory is not shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// It is missing, no directory, or not readable.
    #[error("cannot open the directory {0} to share it")]
    Open(PathBuf, #[source] io::Error),
    /// There is no file server.
    #[error("cannot share {0}: the file server is the program minivmm, which is not in PATH")]
    NoProgram(PathBuf),
    /// What the file server works with cannot be made.
    #[error("cannot make what the file server of {0} needs")]
    Make(PathBuf, #[source] io::Error),
    /// It does not start.
    #[error("cannot share {0}")]
    Start(PathBuf, #[source] ServiceError),
}

impl ShareError {
    /// What to do about it, where the text does not say it.
    pub fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::NoProgram(_) => {
                Some("put minivmm into a directory of PATH, or name it in the config")
            }
            _ => None,
        }
    }
}

/// A directory that is being served.
#[derive(Debug)]
pub struct Server {
    /// The connection: the file server is the back end of vhost-user, with the queue of high priority and one of requests.
    pub socket: UnixStream,
    /// The record of the requests that are being served, as the vhost-user specification lays it out for split queues;
    /// each queue's part has as many entries as [`fileserver::QUEUE_SIZE`], and cannot shrink.
    pub inflight: File,
    /// The process.
    pub service: Service,
    directory: PathBuf,
    ready: PipeReader,
}

impl Server {
    /// Waits until the directory is being served.
    ///
    /// # Errors
    ///
    /// The file server has ended, or takes longer than it ever should: its words are in the error.
    pub fn wait_ready(&mut self) -> Result<(), ShareError> {
        let ready = self.service.wait_ready(self.ready.as_fd(), START);
        ready.map_err(|error| ShareError::Start(self.directory.clone(), error))
    }
}

/// Starts the file server of a directory, without waiting for it. `program` is minivmm; by default the running executable
/// where it is that, or else the one in `PATH`.
///
/// # Errors
///
/// See [`ShareError`].
pub fn start(
    directory: &Path,
    read_only: bool,
    program: Option<&Path>,
) -> Result<Server, ShareError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(directory, flags, Mode::empty())
        .map_err(|error| ShareError::Open(directory.to_owned(), error.into()))?;
    let program = match program {
        Some(program) => program.to_owned(),
        None => find_program().ok_or_else(|| ShareError::NoProgram(directory.to_owned()))?,
    };
    let failed = |error| ShareError::Make(directory.to_owned(), error);
    let (socket, its) = UnixStream::pair().map_err(failed)?;
    let inflight = record().map_err(failed)?;
    let (ready, its_ready) = io::pipe().map_err(failed)?;
    let passed = vec![
        (SOCKET, its.into()),
        (INFLIGHT, inflight.try_clone().map_err(failed)?.into()),
        (READY, its_ready.into()),
    ];
    let mut command = Command::new(program);
    command.arg0("minivmm").arg(SUBCOMMAND).arg(directory);
    command.args(read_only.then_some("--read-only"));
    let name = format!("the file server of {}", directory.display());
    let service = Service::start(name, command, passed)
        .map_err(|error| ShareError::Start(directory.to_owned(), error))?;
    Ok(Server {
        socket,
        inflight,
        service,
        directory: directory.to_owned(),
        ready,
    })
}

/// The record of requests: neither side can shrink it under the other.
fn record() -> io::Result<File> {
    let record = memfd_create(c"inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&record, RECORD as u64)?;
    fcntl_add_seals(
        &record,
        SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
    )?;
    Ok(record.into())
}

/// The program that can serve directories.
fn find_program() -> Option<PathBuf> {
    if IS_MINIVMM.load(Ordering::Relaxed) {
        // Also when its file has been replaced meanwhile.
        return Some("/proc/self/exe".into());
    }
    let path = env::var_os("PATH")?;
    let candidates = env::split_paths(&path).map(|directory| directory.join("minivmm"));
    candidates.into_iter().find(|program| program.is_file())
}
