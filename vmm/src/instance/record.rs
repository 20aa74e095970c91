//! What a VM says of itself.

use std::io;
use std::path::{PathBuf, absolute};
use std::time::{SystemTime, UNIX_EPOCH};

use net::Owner;
use serde::{Deserialize, Serialize};

use super::{Place, Serves};
use crate::config::{QmpSocket, VmName};
use crate::detach;
use crate::nic::registry::Runs;

/// The version of this format. Keys may be added to it.
const VERSION: u32 = 1;

/// What a VM says of itself, in `vm.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// Its name.
    pub name: VmName,
    /// Its process in its own pid namespace, for people.
    pub pid: u32,
    /// Its process, for good: a number alone is given out again. Empty where /proc does not show it.
    pub owner: String,
    /// When it started, in seconds since 1970.
    pub started: u64,
    /// What it runs.
    #[serde(flatten)]
    pub runs: Runs,
    /// Its control sockets.
    pub qmp: Vec<PathBuf>,
    /// The socket that leads to the guest's own (`--vsock`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<PathBuf>,
    /// The socket of its console.
    pub console: PathBuf,
    /// Its log.
    pub log: PathBuf,
    /// Whether it has outlived the command that has started it (`-d`).
    pub detached: bool,
    /// Its end, if it has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
}

/// How a VM has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// The exit status of its process, as a shell has it.
    pub status: u8,
    /// For people.
    pub reason: String,
    /// When it was, in seconds since 1970.
    pub at: u64,
}

impl Ended {
    /// Now.
    pub(super) fn now(status: u8, reason: String) -> Self {
        let at = now();
        Self { status, reason, at }
    }

    /// One that could say nothing of it.
    pub(super) fn killed() -> Self {
        Self::now(137, "its process was killed".into())
    }
}

impl Record {
    /// Of this process.
    pub(super) fn new(place: &Place, serves: &Serves) -> Self {
        let owner = Owner::this_process().map(|owner| owner.to_string());
        // Whoever reads it is in another directory.
        let elsewhere = |path: &PathBuf| absolute(path).unwrap_or_else(|_| path.clone());
        let vsock = match serves.runner.is_some() {
            true => Some(place.vsock_path()),
            false => serves.vsock.map(|vsock| elsewhere(&vsock.path)),
        };
        let elsewhere = serves.qmp.iter().filter_map(QmpSocket::path).map(elsewhere);
        let qmp = [place.qmp_path()].into_iter().chain(elsewhere).collect();
        Self {
            version: VERSION,
            name: place.name().clone(),
            pid: std::process::id(),
            owner: owner.unwrap_or_default(),
            started: now(),
            runs: serves.runs.clone(),
            qmp,
            vsock,
            console: place.console_path(),
            log: place.log_path(),
            detached: detach::is_wanted() || serves.runner.is_some_and(|runner| runner.is_detached),
            ended: None,
        }
    }

    /// How long it has run, in seconds.
    pub fn uptime(&self) -> u64 {
        let end = self.ended.as_ref().map_or_else(now, |ended| ended.at);
        end.saturating_sub(self.started)
    }

    pub(super) fn to_json(&self) -> io::Result<Vec<u8>> {
        Ok(serde_json::to_vec(self)?)
    }

    pub(super) fn from_json(json: &[u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
