//! How the macvlan driver connects the links on one lower link with each other.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// The mode of a macvtap (ip-link(8), "MACVLAN and MACVTAP Type Support"), with the kernel's numbers (MACVLAN_MODE_* in
/// include/uapi/linux/if_link.h).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Links on the same lower reach each other directly. The kernel's own default is [`Mode::Vepa`], not this.
    #[default]
    Bridge = 4,
    /// All frames go out on the wire; links on the same lower reach each other only through a switch that sends frames
    /// back where they came from (hairpin).
    Vepa = 2,
    /// Links on the same lower don't reach each other, unless a switch sends a unicast frame back where it came from: that
    /// alone the driver lets through.
    Private = 1,
    /// The lower belongs to this link alone, which takes over its MAC address and receives everything.
    Passthru = 8,
    /// Only frames from listed senders are received; the list begins empty.
    Source = 16,
}

/// A word that is no [`Mode`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{0}` is not a macvtap mode: choose bridge, vepa, private, passthru or source")]
pub struct ParseModeError(String);

impl Mode {
    pub(crate) const ALL: [Self; 5] = [
        Self::Bridge,
        Self::Vepa,
        Self::Private,
        Self::Passthru,
        Self::Source,
    ];

    /// The word for it, as ip-link(8) has it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Vepa => "vepa",
            Self::Private => "private",
            Self::Passthru => "passthru",
            Self::Source => "source",
        }
    }
}

impl FromStr for Mode {
    type Err = ParseModeError;

    fn from_str(text: &str) -> Result<Self, ParseModeError> {
        let known = Self::ALL.into_iter().find(|mode| mode.as_str() == text);
        known.ok_or_else(|| ParseModeError(text.to_owned()))
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mode_every_word_parses_back_to_itself() {
        for mode in Mode::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        assert_eq!(Mode::default(), Mode::Bridge);
    }

    #[test]
    fn mode_unknown_word_is_refused_with_the_choice() {
        let error = "Bridge".parse::<Mode>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "`Bridge` is not a macvtap mode: choose bridge, vepa, private, passthru or source"
        );
    }
}
