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

/// How many system calls there were so far.
#[derive(Debug, Default)]
pub struct Calls {
    /// Those that run a vCPU (KVM_RUN), of which each ends with an exit to the monitor.
    pub runs: u64,
    /// All others, but those in which threads wait for each other: their number depends on which
    /// of them comes first.
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
        let mut calls = Calls::default();
        for line in text.lines() {
            // `PID name(...`. A call that another thread's interrupts has a second line.
            let call = line
                .split_once(' ')
                .map_or("", |(_, rest)| rest.trim_start());
            let waits = ["futex(", "sched_yield("];
            match call {
                _ if call.starts_with(['<', '+']) => {}
                _ if waits.iter().any(|name| call.starts_with(name)) => {}
                _ if call.contains("KVM_RUN") => calls.runs += 1,
                _ => calls.others += 1,
            }
        }
        calls
    }
}
