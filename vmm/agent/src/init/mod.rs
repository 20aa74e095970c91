//! The guest's first process.
//!
//! What the kernel has started in an initramfs becomes what the host asks for, by these steps:
//!
//! | module | what it does |
//! | --- | --- |
//! | `mounts` | /proc, /sys and /dev, and later all else that every guest has |
//! | `modules` | loads modules of the kernel's |
//! | `host` | the boot connection |
//! | `root`, `disk` | finds the root file system, and makes it the root of all processes |
//! | `shares` | mounts directories of the host's |
//! | `usage` | looks how much memory is in use |
//! | `end` | ends processes, file systems and machine |
//! | `console` | texts on the kernel's console, for what the host cannot hear of |
//!
//! 1. /proc, /sys and /dev are mounted, and the modules loaded that the way to the host needs.
//! 2. From the connection on a failure is a message, with the part that failed and the reason. Before, it is a line on the console, and
//!    the guest powers off.
//! 3. The root is mounted beside the initramfs: a share, the first disk's first file system with a root, or an empty one in memory, to
//!    which the host unpacks an archive.
//! 4. The initramfs is emptied, and the root takes its place. What every guest has is mounted on it, with an empty /run, and an empty
//!    /tmp if the root is only read; then the shares, at their paths.
//! 5. The NICs come up. Init says that the guest is ready, and serves sessions.
//! 6. When the host wants the end, or the connection has closed, all processes get SIGTERM and, if they stay, SIGKILL. What is to be kept is
//!    written and unmounted, init says what the guest has used, and the machine powers off as soon as the host has closed the connection.
//!
//! Counted in QEMU with `-icount`, steps 1 to 5 take 50 million instructions of a guest without a NIC, whose root is an overlay on a
//! share; 46 of them load modules.
//!
//! The kernel lets no signal and no lack of memory end its first process: so init and agent are one process, which a command cannot
//! kill. A panic ends the guest, with a text on the console.

mod console;
mod disk;
mod end;
mod host;
mod modules;
mod mounts;
mod root;
mod shares;
mod usage;

use std::io;
use std::panic;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use agent_protocol::boot::{Access, Boot, FromInit, Part, Root, Uptime};
use agent_protocol::{BOOT_PORT, MessageError};

use host::{Host, uptime};
use modules::{ModuleError, Modules};
use mounts::MountError;
use root::RootError;
use usage::Meter;

use crate::children::Children;
use crate::listener::Listener;
use crate::network::{self, Network};
use crate::session;

/// Where the initramfs has modules.
const MODULES: &str = "/modules";

/// Why there is no guest, where the host cannot hear of it.
#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    #[error("cannot connect to port {BOOT_PORT} of the host by vsock, since a module is missing")]
    Module(#[from] ModuleError),
    #[error("cannot connect to port {BOOT_PORT} of the host by vsock")]
    Connect(#[source] io::Error),
}

/// Why the guest is not what it should be.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Module(#[from] ModuleError),
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error("cannot mount the root")]
    Root(#[from] RootError),
    #[error("cannot mount the share {tag}")]
    Share {
        tag: String,
        #[source]
        source: MountError,
    },
    #[error(transparent)]
    Network(#[from] network::Failure),
    #[error("cannot listen on vsock")]
    Listen(#[source] io::Error),
    #[error("the host says something else than how to boot")]
    Host(#[from] MessageError),
}

impl Failure {
    fn part(&self) -> Part {
        match self {
            Self::Module(_)
            | Self::Root(RootError::Module(_) | RootError::Mount(MountError::Unknown(_)))
            | Self::Share {
                source: MountError::Unknown(_),
                ..
            } => Part::Module,
            Self::Root(_) => Part::Root,
            Self::Share { .. } => Part::Share,
            Self::Network(_) => Part::Network,
            Self::Mount(_) | Self::Listen(_) | Self::Host(_) => Part::Other,
        }
    }
}

/// Boots the guest, and ends it.
pub fn run() -> ! {
    let started = uptime();
    panic::set_hook(Box::new(|panic| {
        console::say_text(&format!("the guest's init has failed: {panic}"));
        end::power_off();
    }));
    if let Err(error) = boot_to_end(started) {
        console::say_text(&crate::chain(&error));
    }
    end::power_off()
}

/// From the first mount to the last message.
fn boot_to_end(started: Uptime) -> Result<(), InitError> {
    mounts::mount_first()?;
    let loaded = Modules::read(Path::new(MODULES)).and_then(|mut modules| {
        modules.load_all()?;
        Ok(modules)
    });
    let loaded_at = uptime();
    let children = Children::start().map_err(InitError::Thread)?;
    let host = match (Host::connect(), &loaded) {
        (Ok(host), _) => host,
        (Err(_), Err(_)) => return loaded.map(drop).map_err(InitError::from),
        (Err(error), Ok(_)) => return Err(InitError::Connect(error)),
    };
    host.stage("init", started);
    host.stage("modules", loaded_at);
    let mut meter = Meter::new();
    let booted = loaded
        .map_err(Failure::from)
        .and_then(|modules| boot(&host, modules, &children));
    if let Err(failure) = &booted {
        host.say(&FromInit::Failed {
            part: failure.part(),
            text: crate::chain(failure),
        });
    }
    host.wait_for_end(&mut meter);
    end::end_processes(&children);
    if let Ok(network) = booted {
        network.release();
    }
    end::end_file_systems();
    host.end(meter.usage(children.largest()));
    Ok(())
}

/// Makes the guest what the host asks for.
fn boot(host: &Host, mut modules: Modules, children: &Arc<Children>) -> Result<Network, Failure> {
    let boot = host.boot()?;
    if !boot.shares.is_empty() {
        modules.load("virtiofs")?;
    }
    // The initramfs, which has them, goes with the switch of roots.
    if boot
        .shares
        .iter()
        .any(|share| share.access == Access::Overlay)
    {
        modules.load("overlay")?;
    }
    root::mount_root(&boot.root, boot.access, &mut modules)?;
    let from_archive = boot.root == Root::Archive;
    if from_archive {
        listen(children)?;
        host.unpack(root::ROOT)?;
    }
    root::switch_root()?;
    // Programs need to write there.
    mounts::mount_second(boot.access == Access::ReadOnly)?;
    host.stage("root", uptime());
    mount_shares(host, &boot)?;
    let patience = Duration::from_millis(boot.network_patience);
    let network = network::configure(&boot.hostname, &boot.nics, patience)?;
    host.stage("network", uptime());
    if !from_archive {
        listen(children)?;
    }
    host.say(&FromInit::Ready {
        nics: network.nics.clone(),
        at: uptime(),
    });
    Ok(network)
}

fn mount_shares(host: &Host, boot: &Boot) -> Result<(), Failure> {
    for share in &boot.shares {
        let missing = shares::mount_share(share).map_err(|source| Failure::Share {
            tag: share.tag.clone(),
            source,
        })?;
        if let Some(error) = missing {
            host.say(&FromInit::Warning(crate::chain(&error)));
        }
    }
    if !boot.shares.is_empty() {
        host.stage("shares", uptime());
    }
    Ok(())
}

/// The stack of the thread of sessions, which starts their commands.
const SESSIONS_STACK: usize = 256 << 10;

/// Serves sessions from now on.
fn listen(children: &Arc<Children>) -> Result<(), Failure> {
    let listener = Listener::vsock().map_err(Failure::Listen)?;
    let children = children.clone();
    let serve = move || match session::serve(&listener, &children) {
        Ok(never) => match never {},
        Err(error) => console::say_text(&format!("cannot serve the host: {error}")),
    };
    let thread = thread::Builder::new()
        .stack_size(SESSIONS_STACK)
        .spawn(serve);
    thread.map(drop).map_err(Failure::Listen)
}
