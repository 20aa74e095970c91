//! What this process may see and do: the directory that it serves, and nothing else of the host.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount,
    open_tree, unmount,
};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, fchdir, getegid, geteuid, getpid, pidfd_open, pivot_root,
    set_parent_process_death_signal, waitpid,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, UnshareFlags, capabilities, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs, unshare_unsafe,
};

use crate::cover::cover_mounts;

/// What serving files as root takes: those of all owners, and giving them to others. Not making device nodes, which
/// others on the host could open.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID);

/// Why the sandbox does not stand.
#[derive(Debug, thiserror::Error)]
#[error("cannot {0}")]
pub struct Error(&'static str, #[source] io::Error);

type Result<T> = std::result::Result<T, Error>;

/// Says what failed.
fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error(what, error.into())
}

/// Whose files can be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owners {
    /// Everybody's: this process is root's.
    All,
    /// Those of this user and group, who run it.
    One { uid: u32, gid: u32 },
}

/// What is served from inside.
#[derive(Debug)]
pub(crate) struct Inside {
    pub owners: Owners,
    /// The directory of this process's descriptors, by which files are opened again.
    pub descriptors: File,
}

/// Goes into the sandbox with the working directory as its root. Returns in a child, which is alone in its PID namespace;
/// this process waits for it and ends with its status.
///
/// # Safety
///
/// This process must have one thread, and whatever is dropped by no one here may close: its descriptors, but for the
/// standard ones, are closed in the process that waits.
pub(crate) unsafe fn enter(read_only: bool) -> Result<Inside> {
    let owners = leave_namespaces()?;
    set_no_new_privs(true).map_err(failed("do without new privileges"))?;
    // The change of namespace is one of credentials, which clears this.
    end_with_parent()?;
    let parent = pidfd_open(getpid(), PidfdFlags::empty()).map_err(failed("find this process"))?;
    // SAFETY: there is one thread, so nothing is locked or half done in the child.
    match unsafe { libc::fork() } {
        -1 => {
            return Err(Error(
                "start the process that serves",
                io::Error::last_os_error(),
            ));
        }
        0 => {
            end_with_parent()?;
            if has_ended(&parent) {
                std::process::exit(1);
            }
        }
        child => wait_for(Pid::from_raw(child)),
    }
    drop(parent);
    let descriptors = own_descriptors()?;
    become_root_directory(read_only)?;
    keep_capabilities(KEPT)?;
    end_with_parent()?;
    Ok(Inside {
        owners,
        descriptors,
    })
}

/// Leaves the host's namespaces: of mounts, of the network, and for children of processes. Whoever may not do so makes a
/// user namespace that has one user.
fn leave_namespaces() -> Result<Owners> {
    let (uid, gid) = (geteuid(), getegid());
    let has = capabilities(None).map_err(failed("read this process's capabilities"))?;
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWPID | UnshareFlags::NEWNET;
    if uid.is_root() && has.effective.contains(CapabilitySet::SYS_ADMIN) && leave_groups() {
        // SAFETY: memory and descriptors stay shared with no one else: there is one thread.
        unsafe { unshare_unsafe(flags) }.map_err(failed("make namespaces"))?;
        return Ok(Owners::All);
    }
    // SAFETY: as above.
    unsafe { unshare_unsafe(flags | UnshareFlags::NEWUSER) }.map_err(failed(
        "make a user namespace, which sharing takes without root (see kernel.unprivileged_userns_clone and \
         user.max_user_namespaces)",
    ))?;
    let (uid, gid) = (uid.as_raw(), gid.as_raw());
    let files = [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("{uid} {uid} 1")),
        ("gid_map", format!("{gid} {gid} 1")),
    ];
    for (file, text) in files {
        let written = std::fs::write(format!("/proc/self/{file}"), text);
        written.map_err(failed("map this user into the user namespace"))?;
    }
    Ok(Owners::One { uid, gid })
}

/// Leaves root's groups. `false` where that is not permitted: in a user namespace of one user, whose root is that user.
fn leave_groups() -> bool {
    // SAFETY: no groups are read from the null pointer.
    unsafe { libc::setgroups(0, std::ptr::null()) == 0 }
}

/// The kernel kills this process when its parent ends.
fn end_with_parent() -> Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(failed("end with the parent"))
}

fn has_ended(process: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())) != Ok(0)
}

/// Waits for the process that serves, with no rights and no descriptors but the standard ones, and ends as it does.
fn wait_for(child: Option<Pid>) -> ! {
    // SAFETY: nothing here uses a descriptor from now on, by the contract of `enter`.
    unsafe { libc::close_range(3, u32::MAX, 0) };
    let _ = keep_capabilities(CapabilitySet::empty());
    let status = loop {
        match waitpid(child, WaitOptions::empty()) {
            Err(Errno::INTR) => {}
            other => break other,
        }
    };
    let status = status.ok().flatten().map(|(_, status)| status);
    if let Some(signal) = status.and_then(|status| status.terminating_signal()) {
        eprintln!("killed by signal {signal}");
    }
    std::process::exit(status.and_then(|status| status.exit_status()).unwrap_or(1))
}

/// The directory of this process's descriptors, without a way up from it to the rest of /proc.
fn own_descriptors() -> Result<File> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let descriptors = open_tree(CWD, "/proc/self/fd", flags);
    descriptors
        .map(File::from)
        .map_err(failed("open /proc/self/fd"))
}

/// Makes the working directory the root, without what is mounted below it.
fn become_root_directory(read_only: bool) -> Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let process = openat(CWD, "/proc/self", flags, Mode::empty());
    let process = process.map_err(failed("open /proc/self"))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(failed("keep mounts to this process"))?;
    let (root, is_alone) = clone_directory().map_err(failed("mount the directory"))?;
    restrict(root.as_fd(), read_only).map_err(failed("restrict the directory's mount"))?;
    move_mount(&root, "", CWD, ".", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(failed("mount the directory"))?;
    fchdir(&root).map_err(failed("enter the directory"))?;
    // The old root comes to lie on the new one, and is taken from it.
    pivot_root(".", ".").map_err(failed("make the directory the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(failed("unmount the old root"))?;
    if !is_alone {
        cover_mounts(process).map_err(failed("cover what is mounted below the directory"))?;
    }
    let root = openat(CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    fchdir(root.map_err(failed("open the root"))?).map_err(failed("enter the root"))
}

/// The working directory as a mount, and whether it is without those below it.
fn clone_directory() -> io::Result<(OwnedFd, bool)> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    match open_tree(CWD, ".", flags) {
        // They must not be left out: see `cover.rs`.
        Err(Errno::INVAL) => Ok((
            open_tree(CWD, ".", flags | OpenTreeFlags::AT_RECURSIVE)?,
            false,
        )),
        alone => Ok((alone?, true)),
    }
}

/// Device nodes on this mount cannot be opened, and programs not run.
pub(crate) fn restrict(mount: BorrowedFd, read_only: bool) -> io::Result<()> {
    let restricted = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    let attributes = libc::mount_attr {
        attr_set: restricted
            | if read_only {
                libc::MOUNT_ATTR_RDONLY
            } else {
                0
            },
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the kernel reads a path and the attributes, both of which outlive the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            AtFlags::EMPTY_PATH.bits(),
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives up all capabilities but these, for good.
fn keep_capabilities(kept: CapabilitySet) -> Result<()> {
    for capability in CapabilitySet::all().difference(kept) {
        match remove_capability_from_bounding_set(capability) {
            // The kernel does not know it.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => return Err(failed("give up capabilities")(error)),
        }
    }
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(failed("give up capabilities"))
}
