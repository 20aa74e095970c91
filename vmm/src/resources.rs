//! Everything that is taken from the host, each as a value that gives it back when dropped.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use devices::disk::{self, OpenError, Storage};
use net::HostLinkGuard;

use crate::config::{BalloonError, Config, ConsoleTarget, EventsTarget, MemorySize};
use crate::files::{Files, Role, SharedFile, empty, open_for_events, open_for_writing};
use crate::kvm::vm::{Hypervisor, VmError};
use crate::nic::{self, Inherited, Nic, NicError, host_link};
use crate::qmp::socket::{Listener, SocketError};
use crate::shares::{self, ShareError};
use crate::tty::output;
use crate::vsock::{VsockError, VsockSocket};

/// What the host did not give.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    #[error("cannot open {0} {1:?}")]
    Open(Role, PathBuf, #[source] io::Error),
    #[error("{0} {1:?} is a directory: give the path of a file")]
    Directory(Role, PathBuf),
    #[error("{0} {1:?} is not a regular file")]
    NotAFile(Role, PathBuf),
    #[error("cannot write {0} to {1:?}")]
    Write(Role, PathBuf, #[source] io::Error),
    #[error(transparent)]
    Shared(#[from] SharedFile),
    #[error("cannot use stdout for the console")]
    Stdout(#[source] io::Error),
    #[error(
        "{0} of guest memory is more than this host has ({1} MiB, with swap): choose less with --memory"
    )]
    Memory(MemorySize, u64),
    #[error(transparent)]
    Disk(#[from] OpenError),
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    #[error(transparent)]
    Kvm(#[from] VmError),
    #[error(transparent)]
    Nic(#[from] NicError),
    #[error(transparent)]
    HostLink(#[from] host_link::HostLinkError),
    #[error("cannot write events to fd {0}, which this process was not started with")]
    Closed(RawFd),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Vsock(#[from] VsockError),
}

/// What is open already. Nothing has been made for it, or changed, so that a typing error is
/// reported before anything has been.
#[derive(Debug)]
pub struct Opened {
    pub kernel: File,
    pub initrd: Option<File>,
    pub hypervisor: Hypervisor,
    /// Locked.
    pub disks: Vec<Storage>,
    /// The server of each share.
    pub shares: Vec<shares::Opened>,
    pub qmp: Vec<Listener>,
    pub console_socket: Option<Listener>,
    pub vsock: Option<VsockSocket>,
    /// Where events go, and what that is called.
    pub events: Option<(File, String)>,
    pub outputs: Outputs,
}

/// The files that a guest fills.
#[derive(Debug)]
pub struct Outputs {
    console: Option<File>,
    /// One for each NIC.
    captures: Vec<Option<File>>,
}

impl Opened {
    /// Opens it all.
    ///
    /// # Errors
    ///
    /// Says what could not be had.
    pub fn open(config: &Config, inherited: &mut Inherited) -> Result<Self, ResourceError> {
        let kernel = open(Role::Kernel, &config.kernel)?;
        let initrd = config.initrd.as_deref();
        let initrd = initrd.map(|path| open(Role::Initrd, path)).transpose()?;
        check_memory(config.memory)?;
        config.check_balloon()?;
        let hypervisor = Hypervisor::open()?;
        hypervisor.check_cpus(config.cpus)?;
        let mut files = Files::standard(config.console == ConsoleTarget::Stdio);
        add(&mut files, Role::Kernel, &config.kernel, &kernel)?;
        if let (Some(path), Some(file)) = (&config.initrd, &initrd) {
            add(&mut files, Role::Initrd, path, file)?;
        }
        for disk in &config.disks {
            // One that cannot be opened is named below.
            if let Ok(metadata) = fs::metadata(&disk.image.path) {
                files.add(Role::Disk, &disk.image.path, &metadata)?;
            }
        }
        let disks = config.disks.iter().map(|disk| disk::open(&disk.image));
        let disks = disks.collect::<Result<_, _>>()?;
        let shares = shares::open(config)?;
        let qmp = config.qmp.iter();
        let qmp = qmp.map(|socket| Listener::open(socket, inherited));
        let qmp = qmp.collect::<Result<_, _>>()?;
        let socket = config.console_socket.as_deref();
        let socket = socket.filter(|_| config.console.has_port());
        let console_socket = socket.map(Listener::bind).transpose()?;
        let vsock = config.vsock.as_ref().map(VsockSocket::open).transpose()?;
        let console = match &config.console {
            ConsoleTarget::Stdio => Some(output::stdout_file().map_err(ResourceError::Stdout)?),
            ConsoleTarget::None => None,
            ConsoleTarget::File(path) => Some(open_to_write(&mut files, Role::Console, path)?),
        };
        let captures = config.nics.iter().map(|nic| {
            let path = nic.options.pcap.as_deref();
            path.map(|path| open_to_write(&mut files, Role::Capture, path))
                .transpose()
        });
        let captures = captures.collect::<Result<_, _>>()?;
        let events = config.events.as_ref();
        let events = events.map(|target| open_events(&mut files, target, inherited));
        let events = events.transpose()?;
        Ok(Self {
            kernel,
            initrd,
            hypervisor,
            disks,
            shares,
            qmp,
            console_socket,
            vsock,
            events,
            outputs: Outputs { console, captures },
        })
    }
}

/// What is made on the host, or changed, for a guest.
#[derive(Debug)]
pub struct Resources {
    /// Where the console's output goes.
    pub console: Option<File>,
    pub nics: Vec<Nic>,
    /// Lets the host talk to the guest.
    pub host_link: Option<HostLinkGuard>,
}

impl Resources {
    /// Makes it all, in the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// Says what could not be had; what had been made is gone again.
    pub fn make(
        config: &Config,
        inherited: Inherited,
        outputs: Outputs,
    ) -> Result<Self, ResourceError> {
        let Outputs { console, captures } = outputs;
        let mut nics = nic::acquire_for_guest(&config.nics, inherited, &config.kernel)?;
        for (nic, capture) in nics.iter_mut().zip(captures) {
            nic.pcap = capture;
        }
        let host_link = host_link::make(nics.iter().find_map(Nic::tap), &config.host_link)?;
        // With all else at hand, so that a failed start leaves an older file as it was.
        if let (Some(file), ConsoleTarget::File(path)) = (&console, &config.console) {
            let failed = |source| ResourceError::Write(Role::Console, path.clone(), source);
            empty(file).map_err(failed)?;
        }
        Ok(Self {
            console,
            nics,
            host_link,
        })
    }
}

fn open(role: Role, path: &Path) -> Result<File, ResourceError> {
    let path = path.to_owned();
    // Non-blocking: opening a FIFO would otherwise wait for a writer.
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .and_then(|file| Ok((file.metadata()?, file)));
    match opened {
        Ok((metadata, file)) if metadata.is_file() => Ok(file),
        Ok((metadata, _)) if metadata.is_dir() => Err(ResourceError::Directory(role, path)),
        Ok(_) => Err(ResourceError::NotAFile(role, path)),
        Err(source) => Err(ResourceError::Open(role, path, source)),
    }
}

/// Adds an open file, of which a stat cannot fail.
fn add(files: &mut Files, role: Role, path: &Path, file: &File) -> Result<(), SharedFile> {
    file.metadata()
        .map_or(Ok(()), |metadata| files.add(role, path, &metadata))
}

/// Opens a file that is to be written, and leaves what is in it.
fn open_to_write(files: &mut Files, role: Role, path: &Path) -> Result<File, ResourceError> {
    let file = open_for_writing(path)
        .map_err(|source| ResourceError::Write(role, path.to_owned(), source))?;
    add(files, role, path, &file)?;
    Ok(file)
}

/// Opens what events are written to, with nothing in it, and says what it is called.
pub fn open_events(
    files: &mut Files,
    target: &EventsTarget,
    inherited: &mut Inherited,
) -> Result<(File, String), ResourceError> {
    let file = match target {
        EventsTarget::Descriptor(number) => {
            let fd = inherited.events();
            fd.map(File::from).ok_or(ResourceError::Closed(*number))?
        }
        EventsTarget::File(path) => {
            let failed = |source| ResourceError::Write(Role::Events, path.to_owned(), source);
            let file = open_for_events(path).map_err(failed)?;
            add(files, Role::Events, path, &file)?;
            empty(&file).map_err(failed)?;
            file
        }
    };
    Ok((file, target.to_string()))
}

/// Refuses what the host could never back. Memory is promised, not taken, so that guests may
/// together have more than there is, but none by itself.
fn check_memory(wanted: MemorySize) -> Result<(), ResourceError> {
    let info = rustix::system::sysinfo();
    let unit = u64::from(info.mem_unit.max(1));
    let have = (info.totalram + info.totalswap).saturating_mul(unit);
    if wanted.bytes() > have {
        return Err(ResourceError::Memory(wanted, have >> 20));
    }
    Ok(())
}
