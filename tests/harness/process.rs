//! Processes that a test starts, and what the kernel shows of them.

use std::fmt::Display;
use std::fs;
use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::process::Child;

/// A child process that is killed when dropped.
#[derive(Debug)]
pub struct Killed(pub Child);

impl Deref for Killed {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Killed {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether a process runs; a zombie, which stays where no init reaps orphans, does not.
pub fn is_running(pid: impl Display) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

/// The tap nodes that a process has open.
pub fn tap_nodes(pid: u32) -> Vec<PathBuf> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).expect("minivmm runs");
    fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok())
        .filter(|path| path.to_string_lossy().contains("tap"))
        .collect()
}
