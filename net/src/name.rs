//! Names of network interfaces.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// A name that the kernel would accept for a network interface (`dev_valid_name` in net/core/dev.c): 1 to
/// [`LinkName::MAX`] bytes, not `.` or `..`, no slash, colon or white space. Whether there is such an interface is
/// another question.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LinkName(String);

/// Why a text cannot name an interface.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ParseLinkNameError {
    /// No text at all.
    #[error(
        "the name of the network interface is empty: `ip link` lists the interfaces that there are"
    )]
    Empty,
    /// More bytes than the kernel keeps.
    #[error("`{0}` is too long for the name of a network interface: {len} bytes, and the kernel allows {max}", len = .0.len(), max = LinkName::MAX)]
    TooLong(String),
    /// A character, or the whole name, that would not make a file name in sysfs.
    #[error(
        "`{0}` cannot be the name of a network interface: no `/`, no `:`, no white space, and not `.` or `..`"
    )]
    Character(String),
}

impl LinkName {
    /// The longest name in bytes (IFNAMSIZ without its closing zero).
    pub const MAX: usize = libc::IFNAMSIZ - 1;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for LinkName {
    type Err = ParseLinkNameError;

    fn from_str(text: &str) -> Result<Self, ParseLinkNameError> {
        let forbidden = |c: char| matches!(c, '/' | ':' | '\0') || c.is_whitespace();
        if text.is_empty() {
            Err(ParseLinkNameError::Empty)
        } else if text.len() > Self::MAX {
            Err(ParseLinkNameError::TooLong(text.to_owned()))
        } else if text == "." || text == ".." || text.contains(forbidden) {
            Err(ParseLinkNameError::Character(text.to_owned()))
        } else {
            Ok(Self(text.to_owned()))
        }
    }
}

impl fmt::Display for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_up_to_fifteen_bytes_is_accepted() {
        for text in ["a", "eno1", "enp0s31f6", "wlan0.100", "abcdefghijklmno"] {
            assert_eq!(text.parse::<LinkName>().unwrap().as_str(), text);
        }
    }

    #[test]
    fn name_of_sixteen_bytes_is_refused_with_the_limit() {
        let error = "abcdefghijklmnop".parse::<LinkName>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "`abcdefghijklmnop` is too long for the name of a network interface: 16 bytes, and the kernel allows 15"
        );
        // Bytes count, not characters.
        assert!(matches!(
            "éééééééé".parse::<LinkName>(),
            Err(ParseLinkNameError::TooLong(_))
        ));
    }

    #[test]
    fn name_that_the_kernel_rejects_is_refused() {
        for text in [".", "..", "a/b", "eth0:1", "a b", "a\tb", "a\0b"] {
            assert_eq!(
                text.parse::<LinkName>(),
                Err(ParseLinkNameError::Character(text.to_owned()))
            );
        }
        assert_eq!("".parse::<LinkName>(), Err(ParseLinkNameError::Empty));
    }
}
