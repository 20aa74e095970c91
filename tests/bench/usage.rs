//! What the threads of a monitor cost, as the kernel counts it.

use std::fs;
use std::iter::Sum;
use std::path::{Path, PathBuf};

/// What threads have used so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Seconds on a CPU.
    pub cpu: f64,
    /// How often one slept and was woken.
    pub wakeups: u64,
}

impl Usage {
    /// Of all threads of a process but its vCPUs, which the guest keeps busy; vhost's threads, which
    /// work for it, are among them.
    pub fn of_workers(pid: u32) -> Self {
        let threads = tasks(pid).into_iter();
        let vhost = vhost_threads(pid).into_iter();
        let workers = threads.filter(|task| !is_vcpu(task)).chain(vhost);
        workers.map(|task| of_task(&task)).sum()
    }

    /// Of all threads of a process.
    pub fn of_process(pid: u32) -> Self {
        tasks(pid).iter().map(|task| of_task(task)).sum()
    }

    /// Of the calling thread.
    pub fn of_this_thread() -> Self {
        of_task(Path::new("/proc/thread-self"))
    }

    /// What came since an earlier look.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            cpu: self.cpu - earlier.cpu,
            wakeups: self.wakeups.saturating_sub(earlier.wakeups),
        }
    }
}

impl Sum for Usage {
    fn sum<I: Iterator<Item = Self>>(each: I) -> Self {
        each.fold(Self::default(), |sum, one| Self {
            cpu: sum.cpu + one.cpu,
            wakeups: sum.wakeups + one.wakeups,
        })
    }
}

fn tasks(pid: u32) -> Vec<PathBuf> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    tasks.map(|task| task.path()).collect()
}

/// Before Linux 6.4 these are kernel threads, named after the process.
fn vhost_threads(pid: u32) -> Vec<PathBuf> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let name = format!("vhost-{pid}");
    let is_one = |path: &PathBuf| name_of(path) == name;
    all.map(|process| process.path()).filter(is_one).collect()
}

fn name_of(task: &Path) -> String {
    let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
    name.trim().to_owned()
}

/// By the names that minivmm and QEMU (with `debug-threads=on`) give them.
fn is_vcpu(task: &Path) -> bool {
    let name = name_of(task);
    name.starts_with("vcpu") || name.starts_with("CPU ")
}

/// A thread that has ended meanwhile counts for nothing.
fn of_task(task: &Path) -> Usage {
    let times = fs::read_to_string(task.join("schedstat")).unwrap_or_default();
    let ns: Option<f64> = times
        .split_whitespace()
        .next()
        .and_then(|ns| ns.parse().ok());
    let status = fs::read_to_string(task.join("status")).unwrap_or_default();
    let switches = status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    Usage {
        cpu: ns.unwrap_or(0.0) / 1e9,
        wakeups: switches
            .and_then(|count| count.trim().parse().ok())
            .unwrap_or(0),
    }
}
