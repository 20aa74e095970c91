//! A place for a file server: a thread whose root is a small file system in memory. Whatever the fuzzer makes it
//! do, it finds no other file and fills no disk. The fuzzer itself keeps the host's files, where it writes artifacts.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, open_tree,
    unmount,
};
use rustix::process::{
    DumpableBehavior, chdir, getegid, geteuid, pivot_root, set_dumpable_behavior,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Where the new root is mounted first, in the thread's own namespace.
const PLACE: &str = "/tmp";
const LIMITS: &CStr = c"size=4m,nr_inodes=256";

type Work = Box<dyn FnOnce(File) + Send>;

/// The thread.
#[derive(Debug)]
pub struct Jail {
    work: Sender<Work>,
    done: Receiver<()>,
}

impl Jail {
    /// Makes it, in a process with one thread, which changes into a user namespace.
    ///
    /// # Errors
    ///
    /// Fails where the kernel permits no user namespaces.
    pub fn new() -> io::Result<Self> {
        become_user()?;
        let (work, todo) = channel::<Work>();
        let (finished, done) = channel();
        let (entered, result) = channel();
        thread::spawn(move || {
            let descriptors = match enter() {
                Ok(descriptors) => descriptors,
                Err(error) => return entered.send(Err(error)).unwrap_or_default(),
            };
            let _ = entered.send(Ok(()));
            while let Ok(work) = todo.recv() {
                work(descriptors.try_clone().expect("a descriptor can be had"));
                if finished.send(()).is_err() {
                    return;
                }
            }
        });
        let gone = |_| io::Error::other("the thread has ended");
        result.recv().map_err(gone)??;
        Ok(Self { work, done })
    }

    /// Does `work` in there, with the directory of this process's descriptors in /proc.
    pub fn run(&self, work: impl FnOnce(File) + Send + 'static) {
        let sent = self.work.send(Box::new(work));
        sent.expect("the thread waits for work");
        self.done.recv().expect("the work is done");
    }
}

/// Makes a user namespace in which this user is root, and has no rights outside.
fn become_user() -> io::Result<()> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    // SAFETY: memory and descriptors stay as they are, and there is one thread.
    unsafe { unshare_unsafe(UnshareFlags::NEWUSER) }?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    // The sanitizer's search for leaks traces this process, which a change of credentials forbids.
    Ok(set_dumpable_behavior(DumpableBehavior::Dumpable)?)
}

/// Leaves all of the host's files but the directory of descriptors, which it returns.
fn enter() -> io::Result<File> {
    // SAFETY: the root and the mounts become this thread's own. Memory and descriptors stay shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tmpfs", PLACE, "tmpfs", flags, LIMITS)?;
    // As the server's sandbox has it: without a way up to the rest of /proc.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let descriptors = File::from(open_tree(CWD, "/proc/self/fd", flags)?);
    chdir(PLACE)?;
    // The old root comes to lie on the new one, and is taken from it.
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    Ok(descriptors)
}

/// Deletes all that is in the root directory.
pub fn clear() {
    for entry in fs::read_dir("/").expect("it can be read").flatten() {
        let path = entry.path();
        let removed = match entry.file_type() {
            Ok(kind) if kind.is_dir() => fs::remove_dir_all(&path),
            _ => fs::remove_file(&path),
        };
        removed.expect("it can be deleted");
    }
}
