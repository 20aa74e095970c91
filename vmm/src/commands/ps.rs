//! `minivmm ps`: the VMs that run.

use std::io::ErrorKind;
use std::thread;
use std::time::Duration;

use serde::Serialize;
use serde_json::json;

use super::{json, report, table};
use crate::cli::PsArgs;
use crate::instance::{self, FindError, Found, Record};
use crate::qmp::client::ClientError;
use crate::qmp::commands::info::{Info, NicInfo, QUERY_INFO};

/// How long a VM may take for each answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// VMs that are asked at once.
const AT_ONCE: usize = 64;

/// A VM, as JSON shows it.
#[derive(Debug, Serialize)]
struct Vm {
    #[serde(flatten)]
    record: Record,
    /// In seconds.
    uptime: u64,
    /// As QMP has it in query-status; `starting` or `unresponsive` where the VM does not say it, and `ended`.
    state: String,
    nics: Vec<NicInfo>,
}

/// The report.
pub fn run(args: &PsArgs) -> Result<String, FindError> {
    let found = match &args.name[..] {
        [] if args.all => instance::all_also_ended(),
        [] => instance::all(),
        names if args.all => {
            let found = names.iter().map(instance::find_also_ended);
            found.collect::<Result<_, _>>()?
        }
        names => names.iter().map(instance::find).collect::<Result<_, _>>()?,
    };
    let vms: Vec<_> = found.chunks(AT_ONCE).flat_map(ask_all).collect();
    Ok(match (args.json, vms.is_empty()) {
        (true, _) => json(&vms),
        (false, true) => report(["no VM runs".to_owned()]),
        (false, false) => report(to_table(&vms)),
    })
}

/// Asks them side by side, so that one that does not answer delays no other.
fn ask_all(found: &[Found]) -> Vec<Vm> {
    thread::scope(|scope| {
        let threads: Vec<_> = found.iter().map(|vm| scope.spawn(|| Vm::ask(vm))).collect();
        let answers = threads.into_iter().filter_map(|thread| thread.join().ok());
        answers.flatten().collect()
    })
}

impl Vm {
    /// None when it has just ended.
    fn ask(found: &Found) -> Option<Self> {
        let answer = found.record.ended.is_none().then(|| info(found));
        let (state, nics) = match answer {
            None => ("ended".to_owned(), Vec::new()),
            Some(Ok(info)) => (info.status, info.nics),
            Some(Err(_)) if found.await_end(Duration::ZERO) => return None,
            Some(Err(ClientError::Connect(_, error))) if error.kind() == ErrorKind::NotFound => {
                ("starting".to_owned(), Vec::new())
            }
            Some(Err(_)) => ("unresponsive".to_owned(), Vec::new()),
        };
        Some(Self {
            record: found.record.clone(),
            uptime: found.record.uptime(),
            state,
            nics,
        })
    }

    /// For people.
    fn state(&self) -> String {
        match &self.record.ended {
            Some(ended) => format!("{}({})", self.state, ended.status),
            None => self.state.clone(),
        }
    }
}

fn info(found: &Found) -> Result<Info, ClientError> {
    let mut client = found.connect(PATIENCE)?;
    let info = client.execute(QUERY_INFO, json!({}))?;
    serde_json::from_value(info).map_err(|_| ClientError::NoQmp)
}

fn to_table(vms: &[Vm]) -> Vec<String> {
    let head = [
        "NAME",
        "PID",
        "UPTIME",
        "STATE",
        "MAC",
        "ADDRESSES",
        "QMP",
        "RUNS",
    ];
    let rows = vms.iter().flat_map(rows);
    table([head.map(str::to_owned)].into_iter().chain(rows))
}

/// A line for each NIC or control socket, whichever are more.
fn rows(vm: &Vm) -> Vec<[String; 8]> {
    let Vm { record, nics, .. } = vm;
    let lines = nics.len().max(record.qmp.len()).max(1);
    let row = |line: usize| {
        let first = |text: String| if line == 0 { text } else { String::new() };
        let nic = nics.get(line);
        let mac = nic.and_then(|nic| nic.mac).map(|mac| mac.to_string());
        let addresses = nic.map(|nic| &nic.addresses[..]).unwrap_or_default();
        let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
        let qmp = record.qmp.get(line).map(|path| path.display().to_string());
        [
            first(record.name.to_string()),
            first(record.pid.to_string()),
            first(duration(vm.uptime)),
            first(vm.state()),
            mac.unwrap_or_default(),
            addresses.join(","),
            qmp.unwrap_or_default(),
            first(record.runs.path().to_owned()),
        ]
    };
    (0..lines).map(row).collect()
}

/// The two largest units of a time.
fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, ..) => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duration_has_two_units_at_most() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m0s"),
            (3599, "59m59s"),
            (7384, "2h3m"),
            (86400 * 41 + 3600 * 5 + 60, "41d5h"),
        ] {
            assert_eq!(duration(seconds), text);
        }
    }
}
