//! `minivmm ps`: the VMs that run.

use serde::Serialize;

use super::{json, report, table};
use crate::cli::PsArgs;
use crate::instance::{self, FindError, Found, Record};

/// A VM, as JSON shows it.
#[derive(Debug, Serialize)]
struct Vm {
    #[serde(flatten)]
    record: Record,
    /// In seconds.
    uptime: u64,
}

/// The report.
pub fn run(args: &PsArgs) -> Result<String, FindError> {
    let found = match &args.name[..] {
        [] => instance::all(),
        names => names.iter().map(instance::find).collect::<Result<_, _>>()?,
    };
    let vms: Vec<_> = found.into_iter().map(Vm::new).collect();
    Ok(match (args.json, vms.is_empty()) {
        (true, _) => json(&vms),
        (false, true) => report(["no VM runs".to_owned()]),
        (false, false) => report(to_table(&vms)),
    })
}

impl Vm {
    fn new(Found { record }: Found) -> Self {
        let uptime = record.uptime();
        Self { record, uptime }
    }
}

fn to_table(vms: &[Vm]) -> Vec<String> {
    let head = ["NAME", "PID", "UPTIME", "RUNS"].map(str::to_owned);
    let row = |vm: &Vm| {
        let Vm { record, uptime } = vm;
        [
            record.name.to_string(),
            record.pid.to_string(),
            duration(*uptime),
            record.runs.path().to_owned(),
        ]
    };
    table([head].into_iter().chain(vms.iter().map(row)))
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
