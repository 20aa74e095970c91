//! What the threads of a monitor cost, as the kernel counts it.

use std::fs;
use std::iter::Sum;
use std::path::Path;

use crate::harness::process::{Task, all_children, tasks};

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
        let workers = threads.filter(|task| !is_vcpu(task));
        workers.chain(vhost_threads(pid)).map(Self::of).sum()
    }

    /// Of all threads but vCPUs of these processes and of those that they have started.
    pub fn of_families(pids: &[u32]) -> Self {
        let family = |&pid: &u32| {
            let own = tasks(pid).into_iter().filter(|task| !is_vcpu(task));
            let own: Self = own.map(Self::of).sum();
            [own, Self::of_families(&all_children(pid))]
                .into_iter()
                .sum()
        };
        pids.iter().map(family).sum()
    }

    /// Of all threads of a process.
    pub fn of_process(pid: u32) -> Self {
        tasks(pid).into_iter().map(Self::of).sum()
    }

    /// Of the calling thread.
    pub fn of_this_thread() -> Self {
        let thread = Task::read(Path::new("/proc/thread-self"));
        thread.map_or_else(Self::default, Self::of)
    }

    /// What came since an earlier look.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            cpu: self.cpu - earlier.cpu,
            wakeups: self.wakeups.saturating_sub(earlier.wakeups),
        }
    }

    fn of(task: Task) -> Self {
        Self {
            cpu: task.cpu.as_secs_f64(),
            wakeups: task.voluntary_switches,
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

/// Before Linux 6.4 these are kernel threads, named after the process.
fn vhost_threads(pid: u32) -> Vec<Task> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let name = format!("vhost-{pid}");
    let is_one = |path: &Path| {
        let its_own = fs::read_to_string(path.join("comm")).unwrap_or_default();
        its_own.trim() == name
    };
    let paths = all.map(|process| process.path());
    let mine = paths.filter(|path| is_one(path));
    mine.filter_map(|path| Task::read(&path)).collect()
}

/// By the names that minivmm and QEMU (with `debug-threads=on`) give them.
fn is_vcpu(task: &Task) -> bool {
    task.name.starts_with("vcpu") || task.name.starts_with("CPU ")
}
