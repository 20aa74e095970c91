//! What a run would make, for a script.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::Path;
use std::str::FromStr;

use net::{MacAddr, MacvtapSpec, Mode, TapInfo, USUAL_MTU};

use super::extras::Extras;
use super::nics::sysfs_of;
use super::script::{self, Origin, ScriptNic};
use super::{Plan, QemuError, args, failed_to};
use crate::cli::QemuArgs;
use crate::config::{Config, NicSource, QmpSocket};
use crate::nic::{Inherited, NicError};

/// The script that does what [`run`](super::run) would do.
///
/// # Errors
///
/// As for [`run`](super::run), as far as it shows without making anything.
pub fn dry_run(args: &QemuArgs, mut inherited: Inherited) -> Result<String, QemuError> {
    let plan = Plan::new(args, false)?;
    let (mut nics, mut script_nics, mut lower) = (Vec::new(), Vec::new(), None);
    for (n, nic) in args.macvtap.iter().enumerate() {
        let (origin, mac, mtu) = match &nic.source {
            NicSource::Macvtap(spec) => {
                // The kernel makes a macvlan on a macvtap on the macvtap's own lower link.
                lower.get_or_insert_with(|| spec.link.to_string());
                sketch(spec)?
            }
            // No --macvtap is one.
            NicSource::UserNet(_) => continue,
            NicSource::Descriptors(fds) => {
                let macvtap = inherited.macvtap(fds).map_err(NicError::from)?;
                let TapInfo {
                    lower: on,
                    mac,
                    mtu,
                    ..
                } = macvtap.info();
                log::info!("NIC on {on}: MAC {mac}");
                lower.get_or_insert_with(|| on.clone());
                (Origin::Open, *mac, *mtu)
            }
        };
        nics.push(plan.nic(n, nic, mac, mtu)?);
        script_nics.push(ScriptNic {
            origin,
            numbers: plan.numbers[n].clone(),
        });
    }
    let mut command = vec![plan.qemu.path.clone().into_os_string()];
    let extras = Extras::of_script(&plan, args)?;
    command.extend(plan.line(&nics, None, &extras.args, &args.args));
    for qmp in &args.qmp {
        match qmp {
            QmpSocket::Path(path) => command.extend(["-qmp".into(), socket(path)]),
            QmpSocket::Descriptor(fd) => log::warn!("the script does not serve QMP on fd {fd}"),
        }
    }
    let host_link = script::HostLink {
        lower: lower.filter(|_| !args.host_link.is_empty()),
        addresses: &args.host_link,
    };
    let mut script = script::script(&script_nics, &host_link, &command);
    if let Some(bytes) = plan.machine.as_ref().and_then(Config::memory_after_balloon) {
        let mib = bytes >> 20;
        script += "# Once it runs, minivmm has it hold memory back, as `balloon ";
        script += &format!("{mib}` in QEMU's monitor does.\n");
    }
    Ok(script)
}

/// A socket of QEMU's own, in place of minivmm's.
fn socket(path: &Path) -> OsString {
    let mut text = OsString::from("unix:");
    text.push(args::escaped(path));
    text.push(",server=on,wait=off");
    text
}

/// What a macvtap would be: its origin, MAC address and MTU.
fn sketch(spec: &MacvtapSpec) -> Result<(Origin, MacAddr, u32), QemuError> {
    if spec.lower_netns.is_some() {
        // What is in another namespace is not looked at.
        let (mac, mtu) = (spec.mac.map_or_else(random_mac, Ok)?, spec.mtu);
        return Ok((new_origin(spec, mac)?, mac, mtu.unwrap_or(USUAL_MTU)));
    }
    let directory = sysfs_of(&spec.link);
    let mtu = read(spec, &directory, "mtu")?;
    if directory.join("macvtap").exists() {
        let mac = read(spec, &directory, "address")?;
        let name = directory.file_name().unwrap_or_default().to_string_lossy();
        return Ok((Origin::Existing(name.into_owned()), mac, mtu));
    }
    let mac = match (spec.mac, spec.mode) {
        (Some(mac), _) => mac,
        (None, Some(Mode::Passthru)) => read(spec, &directory, "address")?,
        (None, _) => random_mac()?,
    };
    Ok((new_origin(spec, mac)?, mac, spec.mtu.unwrap_or(mtu)))
}

/// Reads a file of the link's in sysfs.
fn read<T: FromStr>(
    spec: &MacvtapSpec,
    directory: &Path,
    what: &'static str,
) -> Result<T, QemuError> {
    let text = std::fs::read_to_string(directory.join(what));
    let value = text.and_then(|text| {
        text.trim()
            .parse()
            .map_err(|_| ErrorKind::InvalidData.into())
    });
    value.map_err(|error| QemuError::Link(spec.link.to_string(), what, error))
}

fn random_mac() -> Result<MacAddr, QemuError> {
    MacAddr::random().map_err(failed_to("choose a MAC address"))
}

fn new_origin(spec: &MacvtapSpec, mac: MacAddr) -> Result<Origin, QemuError> {
    let [_, _, a, b, c, d] = random_mac()?.octets();
    // As high as those that minivmm chooses: 2^30 and more.
    let index = u32::from_be_bytes([a & 0x3f | 0x40, b, c, d]);
    Ok(Origin::New {
        spec: Box::new(spec.clone()),
        mac,
        index,
    })
}
