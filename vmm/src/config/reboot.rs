//! What a reboot of the guest does.

use std::str::FromStr;

use super::ConfigError;

/// What a reset of the guest's machine does. A panic, known by the default command line's
/// `reboot=panic_warm`, ends the guest either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reboot {
    /// It ends the guest.
    #[default]
    Exit,
    /// The guest begins again, on the same NICs and disks: its kernel and initrd are loaded anew, from
    /// the files that were opened at the start.
    Restart,
}

impl FromStr for Reboot {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "exit" => Ok(Self::Exit),
            "restart" => Ok(Self::Restart),
            _ => Err(ConfigError::Reboot),
        }
    }
}
