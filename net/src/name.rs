//! Names of network interfaces.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// A name by which a network interface can be found: its own, or one of its alternative names (`ip link property add
/// dev LINK altname NAME`). 1 to [`LinkName::MAX`] bytes, not `.` or `..`, no slash, colon or white space. Whether there
/// is such an interface is another question.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LinkName(String);

/// A name that a network interface can be given (`dev_valid_name` in net/core/dev.c): 1 to [`NewLinkName::MAX`] bytes.
/// `%d` in it stands for the first number that makes it a free name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NewLinkName(LinkName);

/// Why a text cannot name an interface.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ParseLinkNameError {
    /// No text at all.
    #[error(
        "the name of the network interface is empty: `ip link` lists the interfaces that there are"
    )]
    Empty,
    /// More bytes than the kernel keeps.
    #[error("`{name}` is too long for the name of a network interface: {len} bytes, and the kernel allows {max}", len = .name.len())]
    TooLong {
        /// The text.
        name: String,
        /// How many bytes would do.
        max: usize,
    },
    /// A character, or the whole name, that would not make a file name in sysfs.
    #[error(
        "`{0}` cannot be the name of a network interface: no `/`, no `:`, no white space, and not `.` or `..`"
    )]
    Character(String),
    /// What the kernel keeps for itself, in the name of a new interface.
    #[error(
        "`{0}` cannot be the name of a new interface: `all` and `default` are directories of /proc/sys/net, and a `%` stands for nothing but, once, in `%d` for a number"
    )]
    Reserved(String),
}

impl LinkName {
    /// The longest name in bytes (ALTIFNAMSIZ without its closing zero).
    pub const MAX: usize = 127;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl NewLinkName {
    /// The longest name in bytes (IFNAMSIZ without its closing zero).
    pub const MAX: usize = libc::IFNAMSIZ - 1;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    /// Whether the kernel puts a number into it.
    pub fn counts(&self) -> bool {
        self.as_str().contains('%')
    }
}

impl FromStr for LinkName {
    type Err = ParseLinkNameError;

    fn from_str(text: &str) -> Result<Self, ParseLinkNameError> {
        let forbidden = |c: char| matches!(c, '/' | ':' | '\0') || c.is_whitespace();
        if text.is_empty() {
            Err(ParseLinkNameError::Empty)
        } else if text == "." || text == ".." || text.contains(forbidden) {
            Err(ParseLinkNameError::Character(text.to_owned()))
        } else {
            bounded(text, Self::MAX).map(Self)
        }
    }
}

impl FromStr for NewLinkName {
    type Err = ParseLinkNameError;

    fn from_str(text: &str) -> Result<Self, ParseLinkNameError> {
        bounded(text, Self::MAX)?;
        let besides_number = text.replacen("%d", "", 1);
        if besides_number.contains('%') || ["all", "default"].contains(&text) {
            return Err(ParseLinkNameError::Reserved(text.to_owned()));
        }
        text.parse().map(Self)
    }
}

fn bounded(name: &str, max: usize) -> Result<String, ParseLinkNameError> {
    let name = name.to_owned();
    if name.len() > max {
        return Err(ParseLinkNameError::TooLong { name, max });
    }
    Ok(name)
}

impl fmt::Display for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for NewLinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_up_to_the_limit_is_accepted() {
        let longest = "x".repeat(127);
        for text in ["a", "eno1", "enp0s31f6", "wlan0.100", &longest] {
            assert_eq!(text.parse::<LinkName>().unwrap().as_str(), text);
        }
        for text in ["a", "abcdefghijklmno", "hl%d", "%d", "alls"] {
            assert_eq!(text.parse::<NewLinkName>().unwrap().as_str(), text);
        }
    }

    #[test]
    fn name_that_is_too_long_is_refused_with_the_limit() {
        let error = "abcdefghijklmnop".parse::<NewLinkName>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "`abcdefghijklmnop` is too long for the name of a network interface: 16 bytes, and the kernel allows 15"
        );
        // Bytes count, not characters.
        assert!(matches!(
            "éééééééé".parse::<NewLinkName>(),
            Err(ParseLinkNameError::TooLong { max: 15, .. })
        ));
        assert!(matches!(
            "é".repeat(64).parse::<LinkName>(),
            Err(ParseLinkNameError::TooLong { max: 127, .. })
        ));
    }

    #[test]
    fn name_that_the_kernel_rejects_is_refused() {
        for text in [".", "..", "a/b", "eth0:1", "a b", "a\tb", "a\0b"] {
            let refusal = ParseLinkNameError::Character(text.to_owned());
            assert_eq!(text.parse::<LinkName>(), Err(refusal.clone()));
            assert_eq!(text.parse::<NewLinkName>(), Err(refusal));
        }
        assert_eq!("".parse::<LinkName>(), Err(ParseLinkNameError::Empty));
        assert_eq!("".parse::<NewLinkName>(), Err(ParseLinkNameError::Empty));
    }

    #[test]
    fn new_name_that_means_something_else_to_the_kernel_is_refused() {
        for text in ["all", "default", "vm%", "vm%s", "%d%d", "vm%%d"] {
            let refusal = ParseLinkNameError::Reserved(text.to_owned());
            assert_eq!(text.parse::<NewLinkName>(), Err(refusal));
        }
    }
}
