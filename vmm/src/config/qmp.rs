//! Control sockets on the command line.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use super::ConfigError;

/// A socket on which QMP is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QmpSocket {
    /// One that is made here.
    Path(PathBuf),
    /// One that this process was started with and that listens already, as by systemd. Of the
    /// program `minivmm` alone: a library cannot know who owns it.
    Descriptor(RawFd),
}

impl QmpSocket {
    /// Where it is made, if it is.
    pub fn path(&self) -> Option<&PathBuf> {
        match self {
            Self::Path(path) => Some(path),
            Self::Descriptor(_) => None,
        }
    }

    /// The descriptor that it names, if it does.
    pub fn descriptor(&self) -> Option<RawFd> {
        match self {
            Self::Path(_) => None,
            Self::Descriptor(number) => Some(*number),
        }
    }
}

impl FromStr for QmpSocket {
    type Err = ConfigError;

    /// Takes `fd=N`, or the path of a socket.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.strip_prefix("fd=") {
            // The standard streams are the console's and the log's.
            Some(number) => match number.parse() {
                Ok(number @ 3..) => Ok(Self::Descriptor(number)),
                _ => Err(ConfigError::Qmp),
            },
            None if text.is_empty() => Err(ConfigError::Qmp),
            None => Ok(Self::Path(text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_is_a_path_or_a_descriptor_beyond_the_standard_streams() {
        let read = |text: &str| text.parse::<QmpSocket>();
        assert_eq!(read("vm.qmp"), Ok(QmpSocket::Path("vm.qmp".into())));
        assert_eq!(read("./fd=1"), Ok(QmpSocket::Path("./fd=1".into())));
        assert_eq!(read("fd=3"), Ok(QmpSocket::Descriptor(3)));
        for wrong in ["", "fd=", "fd=2", "fd=-1", "fd=x"] {
            assert_eq!(read(wrong), Err(ConfigError::Qmp), "{wrong}");
        }
    }
}
