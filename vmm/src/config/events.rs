//! Where events are written for other programs.

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use super::ConfigError;

/// Where events go, a line of JSON each (docs/events.md).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventsTarget {
    /// A file, which is made or emptied, or a FIFO.
    File(PathBuf),
    /// A descriptor that this process was started with. Of the program `minivmm` alone: a library
    /// cannot know who owns it.
    Descriptor(RawFd),
}

impl EventsTarget {
    /// The descriptor that it names, if it does.
    pub fn descriptor(&self) -> Option<RawFd> {
        match self {
            Self::File(_) => None,
            Self::Descriptor(number) => Some(*number),
        }
    }
}

/// As people know it.
impl fmt::Display for EventsTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{path:?}"),
            Self::Descriptor(number) => write!(f, "fd {number}"),
        }
    }
}

impl FromStr for EventsTarget {
    type Err = ConfigError;

    /// Takes `fd:N`, or the path of a file.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.strip_prefix("fd:") {
            // The standard streams are the console's and the log's.
            Some(number) => match number.parse() {
                Ok(number @ 3..) => Ok(Self::Descriptor(number)),
                _ => Err(ConfigError::Events),
            },
            None if text.is_empty() => Err(ConfigError::Events),
            None => Ok(Self::File(text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_go_to_a_file_or_to_a_descriptor_of_their_own() {
        let parse = |text: &str| text.parse::<EventsTarget>();
        assert_eq!(parse("fd:7"), Ok(EventsTarget::Descriptor(7)));
        assert_eq!(parse("a/fd:7"), Ok(EventsTarget::File("a/fd:7".into())));
        for text in ["", "fd:", "fd:x", "fd:1", "fd:-3", "fd:99999999999"] {
            assert_eq!(parse(text), Err(ConfigError::Events), "{text}");
        }
    }
}
