//! `minivmm doctor`: what stands in the way of a guest on this host.

use net::{Check, Neighbour, Status};
use serde::Serialize;

use crate::cli::DoctorArgs;
use crate::commands::{json, report};
use crate::control::exit::chain;
use crate::kvm::probe::{self, Privileged};
use crate::nic::registry::{self, NicEntry};

/// A check, as JSON shows it.
#[derive(Debug, Serialize)]
struct Line {
    check: &'static str,
    status: &'static str,
    message: String,
    remedy: Option<String>,
}

impl From<Check> for Line {
    fn from(check: Check) -> Self {
        let Check {
            name,
            status,
            message,
            remedy,
            ..
        } = check;
        Self {
            check: name,
            status: status.as_str(),
            message,
            // The library does not know of this program.
            remedy: remedy.map(|remedy| match name {
                Check::LEAKED_LINKS => format!("`minivmm net gc`, or {remedy}"),
                _ => remedy,
            }),
        }
    }
}

/// The report, and whether nothing failed.
pub fn run(args: &DoctorArgs) -> (String, bool) {
    let network = net::diagnose_host(args.link.as_ref(), &neighbours())
        .into_iter()
        .map(Line::from);
    let lines: Vec<Line> = std::iter::once(kvm()).chain(network).collect();
    let healthy = lines
        .iter()
        .all(|line| line.status != Status::Fail.as_str());
    (
        if args.json {
            json(&lines)
        } else {
            to_text(&lines)
        },
        healthy,
    )
}

/// The macvtaps of running guests. A private one shows nowhere else.
fn neighbours() -> Vec<Neighbour> {
    let of = |pid: u32, nic: &NicEntry| {
        let wrong_mac = nic.link.and_then(|link| link.wrong_mac);
        let tap = &nic.tap;
        let mac = tap.mac;
        Some(Neighbour {
            name: tap.name.clone(),
            id: tap.id,
            lower: tap.lower_id?,
            mac: wrong_mac.map_or(mac, |wrong| wrong.link),
            guest_mac: wrong_mac.map_or(mac, |wrong| wrong.guest),
            filters_multicast: nic.link.is_some_and(|link| link.filters_multicast),
            mode: tap.mode,
            pid,
        })
    };
    let guests = registry::running();
    let nics = guests
        .iter()
        .filter(|guest| guest.is_certain)
        .flat_map(|guest| guest.nics.iter().map(|nic| (guest.pid, nic)));
    nics.filter_map(|(pid, nic)| of(pid, nic)).collect()
}

fn kvm() -> Line {
    let line = |status: Status, message: &str, remedy: Option<String>| Line {
        check: "kvm",
        status: status.as_str(),
        message: message.to_owned(),
        remedy,
    };
    match probe::probe() {
        Ok(Privileged::Native) => line(Status::Ok, "/dev/kvm runs guests on the processor", None),
        Ok(Privileged::Emulated {
            instructions_per_second,
        }) => {
            let millions = instructions_per_second as f64 / 1e6;
            let message = format!(
                "/dev/kvm emulates a guest's kernel, at {millions:.1} million instructions a second"
            );
            let remedy = "small guests run; for a stock Linux take a machine with hardware \
                          virtualization (svm or vmx in /proc/cpuinfo)";
            line(Status::Warn, &message, Some(remedy.to_owned()))
        }
        Err(error) => {
            let remedy = error.remedy().map(str::to_owned);
            line(Status::Fail, &chain(&error), remedy)
        }
    }
}

fn to_text(lines: &[Line]) -> String {
    report(lines.iter().map(|line| {
        let Line {
            check,
            status,
            message,
            remedy,
        } = line;
        let remedy = remedy.as_ref().map(|remedy| format!(" ({remedy})"));
        let remedy = remedy.unwrap_or_default();
        format!("{status:4}  {check}: {message}{remedy}")
    }))
}
