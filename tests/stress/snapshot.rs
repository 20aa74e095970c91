//! What is there, and what a run has left.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use rustix::process::{WaitOptions, wait};

use crate::harness::process::is_running;
use crate::harness::{PATIENCE, eventually};

/// What there is, by kind.
pub type Snapshot = BTreeMap<&'static str, Vec<String>>;

/// What is there that was not there before, once there has been time for it to go.
pub fn left(before: &Snapshot, leaves: bool) -> Option<String> {
    let mut now = Snapshot::new();
    let is_gone = eventually(|| {
        // Orphans are this process's.
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        if leaves {
            // What is left when both are killed, the next minivmm finds.
            let minivmm = std::env::var_os("MINIVMM_BIN").expect("make stress sets it");
            for words in [&["ps"][..], &["net", "list"]] {
                let _ = Command::new(&minivmm).args(words).output();
            }
        }
        now = snapshot();
        now == *before
    });
    let differs = |kind: &str| {
        let (then, now) = (&before[kind], &now[kind]);
        let new = now.iter().filter(|entry| !then.contains(entry));
        let gone = then.iter().filter(|entry| !now.contains(entry));
        format!(
            "{kind}: {:?} (gone: {:?})",
            new.collect::<Vec<_>>(),
            gone.collect::<Vec<_>>()
        )
    };
    let kinds = before.keys().filter(|kind| before[*kind] != now[*kind]);
    (!is_gone).then(|| {
        format!(
            "{} after {PATIENCE:?}",
            kinds
                .map(|kind| differs(kind))
                .collect::<Vec<_>>()
                .join("; ")
        )
    })
}

pub fn snapshot() -> Snapshot {
    let lines = |path: &str| {
        fs::read_to_string(path)
            .unwrap_or_default()
            .lines()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let last_word = |line: &String| line.split(' ').next_back().unwrap_or_default().to_owned();
    let name = |line: &String| line.split(':').next().unwrap_or_default().trim().to_owned();
    let cgroups = lines("/proc/self/cgroup").into_iter().flat_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1).map(str::to_owned);
        let (controller, path) = (
            parts.next().unwrap_or_default(),
            parts.next().unwrap_or_default(),
        );
        below(
            Path::new(&format!("/sys/fs/cgroup/{controller}{path}")),
            true,
        )
    });
    BTreeMap::from([
        ("processes", processes()),
        ("mounts", lines("/proc/self/mountinfo")),
        ("links", lines("/proc/net/dev").iter().map(name).collect()),
        (
            "sockets",
            lines("/proc/net/unix").iter().map(last_word).collect(),
        ),
        (
            "packet sockets",
            lines("/proc/net/packet").iter().map(last_word).collect(),
        ),
        ("cgroups", cgroups.collect()),
        (
            "files",
            ["/tmp", "/run", "/dev/shm"]
                .iter()
                .flat_map(|path| below(Path::new(path), false))
                .collect(),
        ),
        ("nodes", names(Path::new("/dev"))),
    ])
}

/// All processes of the namespace but this one.
fn processes() -> Vec<String> {
    let own = std::process::id().to_string();
    let pids = names(Path::new("/proc")).into_iter();
    let pids = pids.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()) && *name != own);
    let command = |pid: String| {
        let words = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        is_running(&pid).then(|| format!("{pid} {}", words.replace('\0', " ")))
    };
    pids.filter_map(command).collect()
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// What is below a directory: its directories alone, or all.
fn below(directory: &Path, directories_alone: bool) -> Vec<String> {
    let paths = names(directory)
        .into_iter()
        .map(|name| directory.join(name));
    let entries = paths.flat_map(|path| {
        let is_directory = path.is_dir() && !path.is_symlink();
        let own = (is_directory || !directories_alone).then(|| path.display().to_string());
        let rest = if is_directory {
            below(&path, directories_alone)
        } else {
            Vec::new()
        };
        own.into_iter().chain(rest)
    });
    entries.collect()
}
