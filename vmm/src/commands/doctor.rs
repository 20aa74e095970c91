//! `minivmm doctor`: what stands in the way of a guest on this host.

use net::{Check, Neighbour, Status};

use crate::cli::DoctorArgs;
use crate::commands::{json, report};
use crate::control::exit::chain;
use crate::kvm::probe::{self, Privileged};
use crate::nic::registry::{self, NicEntry};

/// The report, and whether nothing failed.
pub fn run(args: &DoctorArgs) -> (String, bool) {
    let mut checks = vec![kvm()];
    checks.extend(net::diagnose_host(args.link.as_ref(), &neighbours()));
    for check in &mut checks {
        // The library does not know of this program.
        if check.name == Check::LEAKED_LINKS
            && let Some(remedy) = &mut check.remedy
        {
            remedy.insert_str(0, "`minivmm net gc`, or ");
        }
    }
    let healthy = checks.iter().all(|check| check.status != Status::Fail);
    let text = match args.json {
        true => json(&checks),
        false => report(checks.iter().map(line)),
    };
    (text, healthy)
}

/// The macvtaps of running guests. A private one shows nowhere else.
fn neighbours() -> Vec<Neighbour> {
    let of = |pid: u32, nic: &NicEntry| {
        let wrong_mac = nic.link.and_then(|link| link.wrong_mac);
        let mut tap = nic.tap.clone();
        let guest_mac = wrong_mac.map_or(tap.mac, |wrong| wrong.guest);
        tap.mac = wrong_mac.map_or(tap.mac, |wrong| wrong.link);
        Neighbour {
            tap,
            guest_mac,
            filters_multicast: nic.link.is_some_and(|link| link.filters_multicast),
            pid,
        }
    };
    let guests = registry::running();
    let nics = guests
        .iter()
        .filter(|guest| guest.is_certain)
        .flat_map(|guest| guest.nics.iter().map(|nic| (guest.pid, nic)))
        .filter(|(_, nic)| nic.tap.lower_id.is_some());
    nics.map(|(pid, nic)| of(pid, nic)).collect()
}

fn kvm() -> Check {
    let name = "kvm";
    match probe::probe() {
        Ok(Privileged::Native) => Check::ok(name, "/dev/kvm runs guests on the processor"),
        Ok(Privileged::Emulated {
            instructions_per_second,
        }) => {
            let millions = instructions_per_second as f64 / 1e6;
            let message = format!(
                "/dev/kvm emulates a guest's kernel, at {millions:.1} million instructions a second"
            );
            let remedy = "small guests run; for a stock Linux take a machine with hardware \
                          virtualization (svm or vmx in /proc/cpuinfo)";
            Check::warn(name, message, remedy)
        }
        Err(error) => {
            let mut check = Check::fail(name, chain(&error), "");
            check.remedy = error.remedy().map(str::to_owned);
            check
        }
    }
}

fn line(check: &Check) -> String {
    let Check {
        name,
        status,
        message,
        remedy,
        ..
    } = check;
    let remedy = remedy.as_ref().map(|remedy| format!(" ({remedy})"));
    let remedy = remedy.unwrap_or_default();
    format!("{:4}  {name}: {message}{remedy}", status.as_str())
}
