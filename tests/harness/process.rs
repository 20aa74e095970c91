//! Processes that a test starts, and what the kernel shows of them.

use std::fmt::Display;
use std::fs;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

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

/// The processes that a process's first thread has started.
pub fn children(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.unwrap_or_default();
    let children = children.split_whitespace();
    children.filter_map(|pid| pid.parse().ok()).collect()
}

/// The processes that any of a process's threads has started.
pub fn all_children(pid: u32) -> Vec<u32> {
    children_left(pid).expect("the process runs")
}

/// The same of one that may have ended: `None` if it has.
pub fn children_left(pid: u32) -> Option<Vec<u32>> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let children = threads.filter_map(|entry| {
        let children = entry.ok()?.path().join("children");
        fs::read_to_string(children).ok()
    });
    let children: Vec<_> = children.collect();
    let children = children.iter().flat_map(|list| list.split_whitespace());
    Some(children.filter_map(|pid| pid.parse().ok()).collect())
}

/// The file server of a directory that a VM's process has started.
pub fn file_server(vm: u32, directory: &str) -> u32 {
    let serves = |pid: &u32| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split('\0').skip(1);
        words.next() == Some("file-server") && words.next() == Some(directory)
    };
    let found = all_children(vm).into_iter().find(serves);
    found.unwrap_or_else(|| panic!("process {vm} has no file server of {directory}"))
}

/// A thread, as the kernel shows it.
#[derive(Debug)]
pub struct Task {
    /// What it calls itself.
    pub name: String,
    /// The letter of its state: R when it runs or would, S when it waits.
    pub state: char,
    /// How long it has run.
    pub cpu: Duration,
    /// How often it has begun to wait.
    pub voluntary_switches: u64,
}

impl Task {
    /// Reads one from its directory below /proc; `None` where it has ended.
    pub fn read(directory: &Path) -> Option<Self> {
        let status = fs::read_to_string(directory.join("status")).ok()?;
        let times = fs::read_to_string(directory.join("schedstat")).ok()?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim()
        };
        let ns = times.split_whitespace().next().unwrap_or_default();
        Some(Self {
            name: field("Name:").to_owned(),
            state: field("State:").chars().next().unwrap_or_default(),
            cpu: Duration::from_nanos(ns.parse().unwrap_or(0)),
            voluntary_switches: field("voluntary_ctxt_switches:").parse().unwrap_or(0),
        })
    }
}

/// The threads of a process.
pub fn tasks(pid: u32) -> Vec<Task> {
    let directory = fs::read_dir(format!("/proc/{pid}/task")).expect("the process runs");
    // One may have ended meanwhile.
    directory
        .filter_map(|entry| Task::read(&entry.ok()?.path()))
        .collect()
}
