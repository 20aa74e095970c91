//! NICs on the command line of `minivmm qemu`.

use std::str::FromStr;

use super::ConfigError;
use super::keys::wrong;
use super::nic::{MACVTAP_KEYS, NIC_KEYS, NicConfig, NicOptions, NicSource, parse_source};
use super::user_net::{UserNet, parse_user_net};

/// A value of `--macvtap`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuNic {
    /// Where the queues come from.
    pub source: NicSource,
    /// `None` for vhost where the host has it.
    pub vhost: Option<bool>,
    /// Properties of the device, as they are.
    pub device: Vec<(String, String)>,
}

impl FromStr for QemuNic {
    type Err = ConfigError;

    /// Takes `LINK[,KEY=VALUE...]` or `fd=N[:N...][,KEY=VALUE...]`: keys of a macvtap, `vhost`, and the device's.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let mut parts = text.split(',');
        let first = parts.next().unwrap_or_default();
        let mut macvtap = Vec::new();
        let (mut vhost, mut device) = (None, Vec::<(String, String)>::new());
        for part in parts {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            match key {
                "vhost" | "backend" if vhost.is_some() => {
                    return Err(ConfigError::Twice(key.into()));
                }
                "vhost" | "backend" => vhost = in_kernel(key, value)?,
                "netdev" | "fd" | "fds" | "vhostfd" | "vhostfds" | "script" | "downscript"
                | "ifname" => {
                    return Err(ConfigError::Value(format!(
                        "{key}= is not yours to give: minivmm opens the queues and passes them on"
                    )));
                }
                _ if NIC_KEYS.contains(&key) => {
                    return Err(ConfigError::Value(format!(
                        "{key}= is for NICs of the native monitor: QEMU has options of its own for this"
                    )));
                }
                _ if part.is_empty() || MACVTAP_KEYS.contains(&key) => macvtap.push(part),
                _ if !part.contains('=') => return Err(ConfigError::NoValue(part.into())),
                _ if device.iter().any(|(given, _)| given == key) => {
                    return Err(ConfigError::Twice(key.into()));
                }
                _ => device.push((key.into(), value.into())),
            }
        }
        Ok(Self {
            source: parse_source(first, &macvtap)?,
            vhost,
            device,
        })
    }
}

/// The value of `--user-net`, whose rates and captures are the native monitor's.
///
/// # Errors
///
/// Says which part is wrong.
pub fn parse_qemu_user_net(text: &str) -> Result<UserNet, ConfigError> {
    match parse_user_net(text)? {
        NicConfig {
            source: NicSource::UserNet(net),
            options,
        } if options == NicOptions::default() => Ok(net),
        _ => Err(ConfigError::Value(
            "rx-rate=, tx-rate=, burst= and pcap= are for NICs of the native monitor: QEMU has options of its own for this"
                .into(),
        )),
    }
}

/// Whether the kernel is to move the frames, in QEMU's word for it or in the native monitor's.
fn in_kernel(key: &str, text: &str) -> Result<Option<bool>, ConfigError> {
    match (key, text) {
        ("backend", "auto") => Ok(None),
        ("backend", "user") | ("vhost", "off") => Ok(Some(false)),
        ("backend", "vhost") | ("vhost", "on") => Ok(Some(true)),
        ("backend", _) => Err(wrong(key, text, "is not auto, user or vhost")),
        _ => Err(wrong(key, text, "is neither on nor off")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_network_takes_no_option_of_the_native_monitors_nic() {
        let net = parse_qemu_user_net("hostfwd=tcp::2222-:22").unwrap();
        assert_eq!(net.forwards.len(), 1);
        for text in ["rx-rate=1Gbit", "pcap=x"] {
            let error = parse_qemu_user_net(text).unwrap_err().to_string();
            assert!(error.contains("native monitor"), "{error}");
        }
    }

    fn parse_qemu_nic(text: &str) -> Result<QemuNic, ConfigError> {
        text.parse()
    }

    #[test]
    fn keys_go_to_the_macvtap_or_to_the_device() {
        let text = "eno1,bus=pcie.0,mode=private,addr=0x4,queues=2,id=nic2,vhost=off";
        let nic = parse_qemu_nic(text).unwrap();
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
        let nic = parse_qemu_nic("fd=3:4,addr=0x4").unwrap();
        assert_eq!(nic.source, NicSource::Descriptors(vec![3, 4]));
        assert_eq!(nic.source.queues(), 2);
        assert_eq!(
            parse_qemu_nic("fd=3,mode=bridge"),
            Err(ConfigError::NotAlone)
        );
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
            assert!(parse_qemu_nic(&format!("eno1,{key}")).is_err(), "{key}");
        }
    }
}
