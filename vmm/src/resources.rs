//! Everything that is taken from the host, each as a value that gives it back when dropped.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use net::HostLinkGuard;

use crate::config::{Config, ConsoleTarget, MemorySize, NicConfig};
use crate::files::{Files, Role, SharedFile, open_for_writing};
use crate::kvm::vm::{Hypervisor, VmError};
use crate::nic::{self, Inherited, Nic, NicError, host_link};
use crate::tty::console;

/// What the host did not give.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// The kernel's or the initrd's file.
    #[error("cannot open {0} {1:?}")]
    Open(Role, PathBuf, #[source] io::Error),
    /// A directory in place of one of them.
    #[error("{0} {1:?} is a directory: give the path of a file")]
    Directory(Role, PathBuf),
    /// Something else that is no file.
    #[error("{0} {1:?} is not a regular file")]
    NotAFile(Role, PathBuf),
    /// The console's file.
    #[error("cannot write the console to {0:?}")]
    Console(PathBuf, #[source] io::Error),
    /// The file for what passes.
    #[error("cannot record what passes in {0:?}")]
    Capture(PathBuf, #[source] io::Error),
    /// One file for two uses.
    #[error(transparent)]
    Shared(#[from] SharedFile),
    /// stdout.
    #[error("cannot use stdout for the console")]
    Stdout(#[source] io::Error),
    /// More memory than the host's, in MiB.
    #[error(
        "{0} of guest memory is more than this host has ({1} MiB, with swap): choose less with --memory"
    )]
    Memory(MemorySize, u64),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] VmError),
    /// A NIC.
    #[error(transparent)]
    Nic(#[from] NicError),
    /// The host's own access.
    #[error(transparent)]
    HostLink(#[from] host_link::HostLinkError),
}

/// Everything from the host.
#[derive(Debug)]
pub struct Resources {
    /// The kernel's image.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// KVM.
    pub hypervisor: Hypervisor,
    /// Where the console's output goes.
    pub console: Option<File>,
    /// The NICs.
    pub nics: Vec<Nic>,
    /// Lets the host talk to the guest.
    pub host_link: Option<HostLinkGuard>,
}

impl Resources {
    /// Takes it all: the cheapest first, and last what has to be made, so that a typing error is
    /// reported before anything has been.
    ///
    /// # Errors
    ///
    /// Says what could not be had; what had been taken is given back.
    pub fn acquire(config: &Config, inherited: Inherited) -> Result<Self, ResourceError> {
        let kernel = open(Role::Kernel, &config.kernel)?;
        let initrd = config.initrd.as_deref();
        let initrd = initrd.map(|path| open(Role::Initrd, path)).transpose()?;
        check_memory(config.memory)?;
        let hypervisor = Hypervisor::open()?;
        hypervisor.check_cpus(config.cpus)?;
        let mut files = Files::standard(config.console == ConsoleTarget::Stdio);
        add(&mut files, Role::Kernel, &config.kernel, &kernel)?;
        if let (Some(path), Some(file)) = (&config.initrd, &initrd) {
            add(&mut files, Role::Initrd, path, file)?;
        }
        let console = open_console(&config.console, &mut files)?;
        let captures = open_captures(&config.nics, &mut files)?;
        let mut nics = nic::acquire_for_guest(&config.nics, inherited, &config.kernel)?;
        for (nic, capture) in nics.iter_mut().zip(captures) {
            nic.pcap = capture;
        }
        let host_link =
            host_link::make(nics.first().map(|nic| &nic.entry().tap), &config.host_link)?;
        // With all else at hand, so that a failed start leaves an older file as it was.
        if let (Some(file), ConsoleTarget::File(path)) = (&console, &config.console) {
            empty(file).map_err(|source| ResourceError::Console(path.clone(), source))?;
        }
        Ok(Self {
            kernel,
            initrd,
            hypervisor,
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

/// Opens where the console goes. A file is emptied only by [`Resources::acquire`], at its end.
fn open_console(target: &ConsoleTarget, files: &mut Files) -> Result<Option<File>, ResourceError> {
    let path = match target {
        ConsoleTarget::Stdio => {
            return console::stdout_file()
                .map(Some)
                .map_err(ResourceError::Stdout);
        }
        ConsoleTarget::None => return Ok(None),
        ConsoleTarget::File(path) => path,
    };
    let failed = |source| ResourceError::Console(path.clone(), source);
    let file = open_for_writing(path).map_err(failed)?;
    add(files, Role::Console, path, &file)?;
    Ok(Some(file))
}

/// Opens what each NIC is recorded in, emptied only when the guest starts.
fn open_captures(
    nics: &[NicConfig],
    files: &mut Files,
) -> Result<Vec<Option<File>>, ResourceError> {
    let mut open = |path: &PathBuf| {
        let failed = |source| ResourceError::Capture(path.clone(), source);
        let file = open_for_writing(path).map_err(failed)?;
        add(files, Role::Capture, path, &file)?;
        Ok(file)
    };
    let paths = nics.iter().map(|nic| nic.options.pcap.as_ref());
    paths.map(|path| path.map(&mut open).transpose()).collect()
}

/// Empties a console's file that has an end. Pipes and terminals have none.
fn empty(file: &File) -> io::Result<()> {
    if file.metadata()?.is_file() {
        file.set_len(0)
    } else {
        Ok(())
    }
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
