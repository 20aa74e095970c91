//! What came of a run: for the caller, for people on stderr, and for programs in the file of `--result`.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent_protocol::boot::{Part, Uptime};
use serde_json::{Value, json};

use super::follow::Known;
use crate::files;

/// The version of the file's form.
const VERSION: u32 = 1;
/// The status when the VM fails.
pub const FAILED: u8 = 125;
/// The status when the command's time is over.
pub const TIMED_OUT: u8 = 124;

/// Why a run ended, in one word for programs (docs/run.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The command ended by itself.
    Exited,
    /// A signal ended it.
    Signal,
    /// Its time was over.
    Timeout,
    /// There is no such command.
    NotFound,
    /// It cannot be run.
    NotExecutable,
    /// Its user or its directory is missing.
    NotStarted,
    /// A signal of the user's ended it all.
    Interrupted,
    /// There is nothing to start the guest with.
    Setup,
    /// The VM's process could not start the guest.
    Start,
    /// A module of the kernel's.
    Module,
    /// The root file system.
    Root,
    /// A shared directory.
    Share,
    /// A NIC has no address.
    Network,
    /// Another part of the guest's boot.
    Boot,
    /// The guest's kernel panicked.
    Panic,
    /// It panicked since it had no memory.
    OutOfMemory,
    /// It triple-faulted, or KVM cannot run it on.
    Crash,
    /// Nothing comes of it.
    Silent,
    /// It powered off by itself, or was stopped.
    PowerOff,
    /// It rebooted by itself.
    Reboot,
    /// The VM's process was killed.
    Killed,
    /// The agent in the guest cannot be reached any more.
    Agent,
    /// Something is not copied out of the guest.
    CopyOut,
    /// This host refuses something.
    Host,
}

impl Reason {
    /// The word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Exited => "exited",
            Self::Signal => "signal",
            Self::Timeout => "timeout",
            Self::NotFound => "not-found",
            Self::NotExecutable => "not-executable",
            Self::NotStarted => "not-started",
            Self::Interrupted => "interrupted",
            Self::Setup => "setup",
            Self::Start => "start",
            Self::Module => "module",
            Self::Root => "root",
            Self::Share => "share",
            Self::Network => "network",
            Self::Boot => "boot",
            Self::Panic => "panic",
            Self::OutOfMemory => "out-of-memory",
            Self::Crash => "crash",
            Self::Silent => "silent",
            Self::PowerOff => "power-off",
            Self::Reboot => "reboot",
            Self::Killed => "killed",
            Self::Agent => "agent",
            Self::CopyOut => "copy-out",
            Self::Host => "host",
        }
    }
}

impl From<Part> for Reason {
    fn from(part: Part) -> Self {
        match part {
            Part::Module => Self::Module,
            Part::Root => Self::Root,
            Part::Share => Self::Share,
            Part::Network => Self::Network,
            Part::Other => Self::Boot,
        }
    }
}

/// The end of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// The exit status.
    pub status: u8,
    /// Why.
    pub reason: Reason,
    /// For people.
    pub text: String,
}

impl End {
    /// A failure of the VM's.
    pub fn failed(reason: Reason, text: impl Into<String>) -> Self {
        Self {
            status: FAILED,
            reason,
            text: text.into(),
        }
    }
}

/// When what was done.
#[derive(Debug)]
pub struct Stages {
    began: Instant,
    at: SystemTime,
    done: Vec<(&'static str, Duration)>,
}

impl Stages {
    /// Begins now.
    pub fn begin() -> Self {
        Self {
            began: Instant::now(),
            at: SystemTime::now(),
            done: Vec::new(),
        }
    }

    /// A stage is over now.
    pub fn note(&mut self, name: &'static str) {
        self.note_at(name, Instant::now());
    }

    /// A stage was over then.
    pub fn note_at(&mut self, name: &'static str, at: Instant) {
        let took = at.saturating_duration_since(self.began);
        log::debug!("[{:9.3}] {name}", took.as_secs_f64());
        self.done.push((name, took));
    }

    fn json(&self) -> Value {
        let stage = |(name, at): &(&str, Duration)| json!({"name": name, "at": at.as_secs_f64()});
        self.done.iter().map(stage).collect()
    }
}

/// The file's text. `known` is of the VM, if there was one; `kernel` and `accel` are what it was started with.
pub fn json(
    end: &End,
    stages: &Stages,
    known: Option<&Known>,
    started: [Option<&str>; 2],
) -> Value {
    let none = Known::default();
    let known = known.unwrap_or(&none);
    let guest = |(name, at): &(String, Uptime)| json!({"name": name, "at": *at as f64 / 1e6});
    let mac = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
    let nics: Value = match &known.ready {
        Some(nics) => nics
            .iter()
            .map(|nic| {
                let addresses = nic.addresses.iter();
                let addresses = addresses.map(|(address, length)| format!("{address}/{length}"));
                let addresses: Vec<_> = addresses.collect();
                json!({"name": nic.name, "mac": mac(nic.mac), "addresses": addresses})
            })
            .collect(),
        None => known
            .nics
            .iter()
            .map(|(_, found)| json!({"name": null, "mac": mac(*found), "addresses": []}))
            .collect(),
    };
    let usage = known.usage;
    let began = stages.at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let [kernel, accel] = started;
    json!({
        "version": VERSION,
        "status": end.status,
        "reason": end.reason.word(),
        "text": end.text,
        "name": known.name,
        "kernel": known.kernel.as_deref().or(kernel),
        "accel": accel,
        "began": began.as_secs_f64(),
        "stages": stages.json(),
        "guest-stages": known.stages.iter().map(guest).collect::<Value>(),
        "nics": nics,
        "warnings": known.warnings,
        "peak-memory": usage.map(|usage| usage.peak_memory).filter(|bytes| *bytes > 0),
        "oom-kills": usage.map(|usage| usage.oom_kills),
    })
}

/// Writes the file at once.
///
/// # Errors
///
/// It cannot be written.
pub fn write(path: &Path, report: &Value) -> io::Result<()> {
    let text = serde_json::to_string_pretty(report)? + "\n";
    files::replace(path, 0o644, text.as_bytes()).map(drop)
}

#[cfg(test)]
mod tests {
    use agent_protocol::boot::{NicStatus, Usage};

    use super::*;

    #[test]
    fn report_says_what_came_of_a_vm() {
        let end = End {
            status: 37,
            reason: Reason::Exited,
            text: "the command has ended with status 37".into(),
        };
        let mut stages = Stages::begin();
        stages.note("planned");
        let known = Known {
            name: Some("vm1".into()),
            kernel: Some("6.1".into()),
            stages: vec![("init".into(), 250_000)],
            ready: Some(vec![NicStatus {
                name: "eth0".into(),
                mac: [0x52, 0x54, 0, 0, 0, 9],
                addresses: vec![("10.0.2.15".parse().unwrap(), 24)],
            }]),
            usage: Some(Usage {
                peak_memory: 0,
                oom_kills: 2,
            }),
            ..Known::default()
        };
        let report = json(&end, &stages, Some(&known), [Some("6.0"), Some("kvm")]);
        assert_eq!(report["status"], 37);
        assert_eq!(report["reason"], "exited");
        assert_eq!(report["kernel"], "6.1");
        assert_eq!(report["stages"][0]["name"], "planned");
        assert_eq!(report["guest-stages"][0]["at"], 0.25);
        assert_eq!(report["nics"][0]["mac"], "52:54:00:00:00:09");
        assert_eq!(report["nics"][0]["addresses"][0], "10.0.2.15/24");
        assert_eq!(report["peak-memory"], Value::Null);
        assert_eq!(report["oom-kills"], 2);
    }

    #[test]
    fn report_without_a_vm_is_whole_too() {
        let end = End::failed(Reason::Setup, "no kernel");
        let mut report = json(&end, &Stages::begin(), None, [None, None]);
        // Of most others the reader's last bit is another.
        report["began"] = json!(1.5);
        assert_eq!(report["status"], 125);
        assert_eq!(report["nics"], json!([]));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("result.json");
        write(&path, &report).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), report);
    }
}
