//! A host without other VMs than a test's own.

use std::fs;
use std::process::{Output, Stdio};

use serde_json::Value;

use crate::harness::eventually;
use crate::harness::runtime::Runtime;
use crate::harness::vm::Vm;
use crate::tiny::Tiny;

/// A host, and what its commands show.
#[derive(Debug)]
pub struct Host {
    pub runtime: Runtime,
}

impl Host {
    pub fn new() -> Self {
        let runtime = Runtime::new();
        Self { runtime }
    }

    /// Starts a VM with `-d`; returns its name.
    pub fn detach(&self, guest: Tiny, args: &[&str]) -> String {
        let kernel = self.kernel(guest);
        let args = [&["-d", "--memory", "32M", "--kernel", &kernel], args].concat();
        self.show(&args).trim_end().to_owned()
    }

    /// Starts a VM with a guest that echoes, as soon as it does.
    pub fn start(&self, args: &[&str]) -> Vm {
        self.start_with(Tiny::Echo, "ready\n", args)
    }

    /// Starts a VM with another guest, as soon as it has written `text`.
    pub fn start_with(&self, guest: Tiny, text: &str, args: &[&str]) -> Vm {
        let kernel = self.kernel(guest);
        let mut command = self.runtime.minivmm(&["--kernel", &kernel]);
        command.args(args).stdin(Stdio::piped());
        let mut vm = Vm::spawn(command);
        vm.wait_for(text);
        vm
    }

    /// The file of a guest.
    pub fn kernel(&self, guest: Tiny) -> String {
        let path = self.runtime.directory.path().join(format!("{guest:?}"));
        if !path.exists() {
            guest.write(&path);
        }
        path.to_str().unwrap().to_owned()
    }

    /// Runs minivmm to its end.
    pub fn run(&self, args: &[&str]) -> Output {
        let mut command = self.runtime.minivmm(args);
        command.stdin(Stdio::null());
        command.output().expect("minivmm starts")
    }

    /// What it writes on stdout when it succeeds.
    pub fn show(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {log}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Its exit status and what it writes on stderr when it fails.
    pub fn fail(&self, args: &[&str]) -> (i32, String) {
        let output = self.run(args);
        assert!(!output.status.success(), "{args:?}");
        let log = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap(), log)
    }

    /// What `ps --json` shows of each VM.
    pub fn ps(&self) -> Vec<Value> {
        serde_json::from_str(&self.show(&["ps", "--json"])).unwrap()
    }

    /// Waits until the only VM is in this state. On a busy machine it may be late to answer.
    pub fn await_state(&self, state: &str) {
        let has_state = || self.ps()[0]["state"] == state;
        assert!(eventually(has_state), "not {state}: {:?}", self.ps());
    }

    /// The names that are left in the directory of all VMs.
    pub fn left(&self) -> Vec<String> {
        let entries = fs::read_dir(self.runtime.directory.path().join("vms"));
        let entries = entries.into_iter().flatten().flatten();
        entries
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect()
    }
}

/// Nothing goes on that was detached.
impl Drop for Host {
    fn drop(&mut self) {
        let names = self.left().into_iter();
        let names: Vec<_> = names.filter(|name| !name.starts_with('.')).collect();
        for name in names {
            let _ = self.runtime.minivmm(&["-qqq", "kill", &name]).status();
        }
    }
}
