//! The private network namespace that a macvtap is made in.
//!
//! It has no name and no process in it: an open descriptor alone keeps it. So when the process ends, in whatever way,
//! the kernel takes the namespace down, and the macvtap in it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::thread;

use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

/// Runs `work` on a thread of its own, which may move to other namespaces without taking the caller along.
pub(crate) fn on_own_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let worker = thread::Builder::new()
            .name("net".to_owned())
            .spawn_scoped(scope, work)?;
        Ok(worker
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Moves the calling thread into a new, empty network namespace, and returns the descriptor that keeps it.
pub(crate) fn enter_new() -> io::Result<OwnedFd> {
    // SAFETY: the obligation concerns CLONE_FILES alone, and this is CLONE_NEWNET.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
    current()
}

/// The descriptor of the calling thread's network namespace.
pub(crate) fn current() -> io::Result<OwnedFd> {
    Ok(File::open("/proc/thread-self/ns/net")?.into())
}

/// The inode of the calling thread's network namespace.
pub(crate) fn inode_of_current() -> io::Result<u64> {
    inode(current()?)
}

/// The inode of a network namespace.
pub(crate) fn inode(namespace: impl AsFd) -> io::Result<u64> {
    Ok(rustix::fs::fstat(namespace)?.st_ino)
}

/// Moves the calling thread into an existing network namespace.
pub(crate) fn enter(namespace: impl AsFd) -> io::Result<()> {
    Ok(rustix::thread::move_into_link_name_space(
        namespace.as_fd(),
        Some(LinkNameSpaceType::Network),
    )?)
}

/// Opens a namespace by its path, and nothing else: opening a FIFO would wait for its other end, and opening a device may
/// do anything.
pub(crate) fn open(path: &Path) -> io::Result<OwnedFd> {
    let place = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    if rustix::fs::fstatfs(&place)?.f_type != libc::NSFS_MAGIC {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok(File::open(format!("/proc/self/fd/{}", place.as_raw_fd()))?.into())
}

/// Keeps a link of the calling thread's namespace free of IPv6 addresses, or with the name `default` all links that will
/// be made there. With one, the macvtap would filter multicast for the host's groups, and neighbour discovery for the
/// addresses of its user would die.
///
/// # Errors
///
/// When /proc/sys cannot be written. A kernel without IPv6 is not an error.
pub(crate) fn forbid_ipv6(link: &str) -> io::Result<()> {
    // /proc/sys/net shows the namespace of the thread that looks.
    for (setting, value) in [("disable_ipv6", "1"), ("addr_gen_mode", "1")] {
        match fs::write(format!("/proc/sys/net/ipv6/conf/{link}/{setting}"), value) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}
