//! The name of a VM.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// The name by which other programs find a running VM. It is good for a file's name, and a shell leaves it
/// as it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct VmName(String);

impl VmName {
    /// The most bytes.
    pub const MAX: usize = 63;

    /// The n-th of the names for VMs that were given none.
    pub(crate) fn numbered(n: u32) -> Self {
        Self(format!("vm{n}"))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let first = |byte: &u8| byte.is_ascii_alphanumeric();
        let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        let is_name = text.as_bytes().first().is_some_and(first)
            && text.bytes().all(is_good)
            && text.len() <= Self::MAX;
        match is_name {
            true => Ok(Self(text.to_owned())),
            false => Err(ConfigError::Name),
        }
    }
}

impl TryFrom<String> for VmName {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_is_a_plain_word() {
        let longest = "x".repeat(VmName::MAX);
        for text in ["vm1", "a", "7", "web.example", "A_b-c", &longest] {
            assert_eq!(text.parse::<VmName>().unwrap().as_str(), text);
        }
        let too_long = "x".repeat(VmName::MAX + 1);
        for text in [
            "", ".", "..", ".vm1", "-q", "_a", "a/b", "a b", "a\n", "\u{e4}", &too_long,
        ] {
            assert_eq!(text.parse::<VmName>(), Err(ConfigError::Name), "{text:?}");
        }
    }

    #[test]
    fn name_in_json_is_checked_as_well() {
        let read = serde_json::from_str::<VmName>;
        assert_eq!(read(r#""vm1""#).unwrap(), VmName::numbered(1));
        assert!(read(r#""../vm1""#).is_err());
    }
}
