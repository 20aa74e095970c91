//! The NICs: what was asked for, and the queues that QEMU gets.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use net::{LinkName, MacAddr, MacvtapSpec, Mode};

use crate::config::{self, ConfigError, NicSource};

/// A value of `--macvtap`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicRequest {
    /// Where the queues come from.
    pub source: NicSource,
    /// `None` for vhost where the host has it.
    pub vhost: Option<bool>,
    /// Properties of the device, as they are.
    pub device: Vec<(String, String)>,
}

impl NicRequest {
    /// How many queues it has.
    pub(super) fn queues(&self) -> usize {
        match &self.source {
            NicSource::Macvtap(spec) => spec.queues as usize,
            NicSource::Descriptors(numbers) => numbers.len(),
        }
    }
}

/// Reads `LINK[,KEY=VALUE...]` or `fd=N[:N...][,KEY=VALUE...]`: keys of a macvtap, `vhost`, and the device's.
///
/// # Errors
///
/// Says which part is wrong.
pub fn parse_nic(text: &str) -> Result<NicRequest, ConfigError> {
    let (first, rest) = text.split_once(',').unwrap_or((text, ""));
    let mut macvtap = vec![first];
    let (mut vhost, mut device) = (None, Vec::<(String, String)>::new());
    let parts = rest.split(',').filter(|_| text.contains(','));
    for part in parts {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        match key {
            "vhost" if vhost.is_some() => return Err(ConfigError::Twice(key.into())),
            "vhost" => vhost = Some(switch(value)?),
            "netdev" | "fd" | "fds" | "vhostfd" | "vhostfds" | "script" | "downscript"
            | "ifname" => {
                return Err(ConfigError::Value(format!(
                    "{key}= is not yours to give: minivmm opens the queues and hands them over"
                )));
            }
            "backend" if vhost.is_some() => return Err(ConfigError::Twice(key.into())),
            "backend" => vhost = backend(value)?,
            _ if config::is_nic_key(key) => {
                return Err(ConfigError::Value(format!(
                    "{key}= is for NICs of the native monitor: QEMU has options of its own for this"
                )));
            }
            _ if part.is_empty() || config::is_macvtap_key(key) => macvtap.push(part),
            _ if !part.contains('=') => return Err(ConfigError::NoValue(part.into())),
            _ if device.iter().any(|(given, _)| given == key) => {
                return Err(ConfigError::Twice(key.into()));
            }
            _ => device.push((key.into(), value.into())),
        }
    }
    let source = match first.strip_prefix("fd=") {
        Some(_) if macvtap.len() > 1 => return Err(ConfigError::NotAlone),
        Some(numbers) => NicSource::Descriptors(config::parse_descriptors(numbers)?),
        None => NicSource::Macvtap(config::parse_macvtap(&macvtap.join(","))?),
    };
    Ok(NicRequest {
        source,
        vhost,
        device,
    })
}

/// The native monitor's word for `vhost`.
fn backend(text: &str) -> Result<Option<bool>, ConfigError> {
    match text {
        "auto" => Ok(None),
        "user" => Ok(Some(false)),
        "vhost" => Ok(Some(true)),
        _ => Err(ConfigError::Value(format!(
            "backend={text} is not auto, user or vhost"
        ))),
    }
}

fn switch(text: &str) -> Result<bool, ConfigError> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(ConfigError::Value(format!(
            "vhost={text} is neither on nor off"
        ))),
    }
}

/// The numbers that a NIC's descriptors have in QEMU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Numbers {
    pub fds: Vec<RawFd>,
    pub vhost: Vec<RawFd>,
}

/// Numbers the descriptors of all NICs from `first` on: a NIC's queues, then its vhost descriptors. In a `script` those
/// that the caller has opened keep their numbers.
pub(super) fn number(
    requests: &[NicRequest],
    vhost: bool,
    first: RawFd,
    script: bool,
) -> Vec<Numbers> {
    let kept = |request: &NicRequest| match &request.source {
        NicSource::Descriptors(numbers) if script => Some(numbers.clone()),
        _ => None,
    };
    let all_kept: Vec<RawFd> = requests.iter().filter_map(kept).flatten().collect();
    let mut free = (first..).filter(|fd| !all_kept.contains(fd));
    let mut take = |count| free.by_ref().take(count).collect();
    requests
        .iter()
        .map(|request| Numbers {
            fds: kept(request).unwrap_or_else(|| take(request.queues())),
            vhost: match request.vhost.unwrap_or(vhost) {
                true => take(request.queues()),
                false => Vec::new(),
            },
        })
        .collect()
}

/// What is known of the address of a macvtap that is still to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    Known(MacAddr),
    Random,
    /// It is the link's, which cannot be looked at from here.
    Unknown,
}

/// The directory of a link in sysfs, which knows none of its alternative names.
pub(super) fn sysfs_of(link: &LinkName) -> PathBuf {
    let name = net::current_name(link).ok().flatten();
    Path::new("/sys/class/net").join(name.as_deref().unwrap_or(link.as_str()))
}

/// The address that a macvtap will have.
pub(super) fn expected_mac(spec: &MacvtapSpec) -> Expected {
    if let Some(mac) = spec.mac {
        return Expected::Known(mac);
    }
    if spec.lower_netns.is_some() {
        return Expected::Unknown;
    }
    let link = sysfs_of(&spec.link);
    if spec.mode == Some(Mode::Passthru) || link.join("macvtap").exists() {
        let address = std::fs::read_to_string(link.join("address"));
        let mac = address.ok().and_then(|mac| mac.trim().parse().ok());
        return mac.map_or(Expected::Unknown, Expected::Known);
    }
    // What does not exist is told by its own error.
    if link.exists() {
        Expected::Random
    } else {
        Expected::Unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_go_to_the_macvtap_or_to_the_device() {
        let text = "eno1,bus=pcie.0,mode=private,addr=0x4,queues=2,id=nic2,vhost=off";
        let nic = parse_nic(text).unwrap();
        let NicSource::Macvtap(spec) = &nic.source else {
            panic!("{nic:?}")
        };
        assert_eq!((spec.link.as_str(), spec.queues), ("eno1", 2));
        assert_eq!(spec.mode, Some(net::Mode::Private));
        assert_eq!(nic.vhost, Some(false));
        let device = [("bus", "pcie.0"), ("addr", "0x4"), ("id", "nic2")];
        assert_eq!(
            nic.device,
            device.map(|(k, v)| (k.to_owned(), v.to_owned()))
        );
    }

    #[test]
    fn descriptors_may_be_several_and_take_keys_of_the_device() {
        let nic = parse_nic("fd=3:4,addr=0x4").unwrap();
        assert_eq!(nic.source, NicSource::Descriptors(vec![3, 4]));
        assert_eq!(nic.queues(), 2);
        assert_eq!(parse_nic("fd=3,mode=bridge"), Err(ConfigError::NotAlone));
    }

    #[test]
    fn keys_that_break_the_netdev_are_refused() {
        for key in [
            "script=no",
            "downscript=no",
            "ifname=x",
            "vhostfds=4",
            "fds=3:4",
            "netdev=x",
            "vhost=maybe",
            "addr",
            "",
            "addr=1,addr=2",
            "mode=hub",
        ] {
            assert!(parse_nic(&format!("eno1,{key}")).is_err(), "{key}");
        }
    }

    #[test]
    fn numbers_follow_one_another() {
        let nics = ["a,queues=2", "b,vhost=off", "c"].map(|text| parse_nic(text).unwrap());
        let numbers = number(&nics, true, 3, false);
        assert_eq!(numbers[0].fds, [3, 4]);
        assert_eq!(numbers[0].vhost, [5, 6]);
        assert_eq!(
            (numbers[1].fds.as_slice(), numbers[1].vhost.len()),
            (&[7][..], 0)
        );
        assert_eq!((numbers[2].fds[0], numbers[2].vhost[0]), (8, 9));
        assert!(number(&nics, false, 3, false)[0].vhost.is_empty());
    }

    #[test]
    fn numbers_of_a_script_leave_open_descriptors_where_they_are() {
        let nics = ["a", "fd=4:3", "c"].map(|text| parse_nic(text).unwrap());
        let numbers = number(&nics, false, 3, true);
        let fds: Vec<_> = numbers.iter().map(|numbers| numbers.fds.clone()).collect();
        assert_eq!(fds, [vec![5], vec![4, 3], vec![6]]);
    }
}
