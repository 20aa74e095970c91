//! `--vsock PATH[,cid=N]`: sockets between the guest and the host.

use std::path::PathBuf;
use std::str::FromStr;

use super::ConfigError;
use super::keys::{number, split, take_keys, wrong};

/// The lowest CID that a guest can have. Below are any, the host itself and hosts (VMADDR_CID_HOST).
const FIRST_CID: u32 = 3;
/// Not one that a guest can have (VMADDR_CID_ANY).
const ANY_CID: u32 = u32::MAX;

/// A guest's socket device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockConfig {
    /// The Unix socket by which programs of the host reach the guest. Port N of the host is, for the
    /// guest, the Unix socket of this name with `_N` at its end.
    pub path: PathBuf,
    /// The guest's address. Guests of one host may have the same.
    pub cid: u32,
}

impl VsockConfig {
    /// A device with the usual CID, whose socket is `path`.
    pub(crate) fn at(path: PathBuf) -> Self {
        let cid = FIRST_CID;
        Self { path, cid }
    }
}

impl FromStr for VsockConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        // A comma in the path is doubled.
        let parts = split(text);
        let mut parts = parts.iter().map(String::as_str);
        let path = parts.next().unwrap_or_default();
        if path.is_empty() {
            return Err(ConfigError::Vsock);
        }
        let mut config = Self::at(path.into());
        let others = take_keys(&["cid"], "", parts, |key, text| {
            config.cid = cid(key, text)?;
            Ok(())
        })?;
        match others.first() {
            None => Ok(config),
            Some(&"") => Err(ConfigError::Empty),
            Some(other) => match other.split_once('=') {
                Some((key, _)) => Err(ConfigError::UnknownVsockKey(key.to_owned())),
                None => Err(ConfigError::NoValue((*other).to_owned())),
            },
        }
    }
}

fn cid(key: &str, text: &str) -> Result<u32, ConfigError> {
    match number::<u64>(key, text)? {
        0 => Err(wrong(key, text, "is reserved")),
        1 => Err(wrong(key, text, "is the guest itself, to the guest")),
        2 => Err(wrong(key, text, "is the host")),
        cid => match u32::try_from(cid) {
            Ok(cid) if cid < ANY_CID => Ok(cid),
            _ => Err(wrong(
                key,
                text,
                "is more than 4294967294, the last there is",
            )),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_and_cid_are_read() {
        for (text, path, cid) in [
            ("vm.vsock", "vm.vsock", 3),
            ("/run/vm.vsock,cid=3", "/run/vm.vsock", 3),
            ("a,cid=4294967294", "a", u32::MAX - 1),
            ("a,,b,cid=4", "a,b", 4),
        ] {
            let expected = VsockConfig {
                path: path.into(),
                cid,
            };
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn cid_that_no_guest_can_have_is_refused_with_the_reason() {
        for (text, why) in [
            ("0", "reserved"),
            ("1", "the guest itself"),
            ("2", "the host"),
            ("4294967295", "more than"),
            ("18446744073709551616", "not a number"),
            ("-1", "not a number"),
            ("x", "not a number"),
            ("", "not a number"),
        ] {
            let error = format!("a,cid={text}").parse::<VsockConfig>().unwrap_err();
            assert!(error.to_string().contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn other_keys_are_refused() {
        for (text, error) in [
            ("", ConfigError::Vsock),
            (",cid=3", ConfigError::Vsock),
            ("a,", ConfigError::Empty),
            ("a,cid", ConfigError::NoValue("cid".into())),
            ("a,port=1", ConfigError::UnknownVsockKey("port".into())),
            ("a,cid=3,cid=4", ConfigError::Twice("cid".into())),
        ] {
            assert_eq!(text.parse::<VsockConfig>(), Err(error), "{text}");
        }
    }
}
