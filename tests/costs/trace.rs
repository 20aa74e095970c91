//! The system calls of a traced monitor, from strace's record.

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

/// Where strace writes.
#[derive(Debug)]
pub struct Trace {
    _directory: TempDir,
    path: PathBuf,
}

/// How many system calls there were so far. Those in which threads wait for each other are left out:
/// their number depends on which of them comes first.
#[derive(Debug, Default)]
pub struct Calls {
    /// Those that run a vCPU (KVM_RUN), of which each ends with an exit to the monitor.
    pub runs: u64,
    /// Those of the threads of queue pairs, whose number depends on how many of a driver's
    /// notifications one wake-up serves.
    pub of_pairs: u64,
    /// All others.
    pub others: u64,
}

impl Trace {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("trace");
        Self {
            _directory: directory,
            path,
        }
    }

    /// What a program's command line begins with, to be traced.
    pub fn command(&self) -> [&str; 7] {
        let path = self.path.to_str().unwrap();
        ["strace", "-f", "-qq", "-e", "signal=none", "-o", path]
    }

    /// What is recorded so far.
    pub fn read(&self) -> Calls {
        let text = fs::read_to_string(&self.path).unwrap();
        let (mut calls, mut pairs) = (Calls::default(), Vec::new());
        for line in text.lines() {
            // `PID name(...`. A call that another thread's interrupts has a second line.
            let (thread, call) = line.split_once(' ').unwrap_or_default();
            let call = call.trim_start();
            if call.starts_with("prctl(PR_SET_NAME, \"net0\"") {
                pairs.push(thread);
            }
            let left_out = ["<", "+", "futex(", "sched_yield("];
            match call {
                _ if left_out.iter().any(|start| call.starts_with(start)) => {}
                _ if call.contains("KVM_RUN") => calls.runs += 1,
                _ if pairs.contains(&thread) => calls.of_pairs += 1,
                _ => calls.others += 1,
            }
        }
        calls
    }
}
