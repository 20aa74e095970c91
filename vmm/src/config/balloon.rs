//! `--balloon`: what a guest gives back of its memory.

use std::str::FromStr;

use super::{Config, ConfigError, MemorySize, bytes};

/// A balloon that the guest's memory cannot have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BalloonError {
    /// It takes what a guest needs.
    #[error("cannot hold back {0} of {1} of memory: a guest needs {min}", min = MemorySize::MIN)]
    TooLarge(MemorySize, MemorySize),
    /// Its pages may not come back.
    #[error(
        "a balloon cannot be had with huge pages: those that the guest gives back may be another's when it needs them \
         again. Omit --balloon or --hugepages"
    )]
    HugePages,
}

/// How much of its memory a guest is asked not to use, in whole pages; also nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldBack(MemorySize);

impl HeldBack {
    /// A balloon that takes only what the guest has free.
    pub const NOTHING: Self = Self(MemorySize(0));

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        self.0.bytes()
    }
}

impl FromStr for HeldBack {
    type Err = ConfigError;

    /// Takes what [`MemorySize`] does, and less.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bytes = bytes(text).ok_or(ConfigError::MemorySyntax)?;
        match MemorySize(bytes / MemorySize::PAGE * MemorySize::PAGE) {
            size if size <= MemorySize::MAX => Ok(Self(size)),
            _ => Err(ConfigError::MemoryTooLarge),
        }
    }
}

impl Config {
    /// What the guest is to use of its memory, in bytes, if a balloon holds some back from the start.
    pub(crate) fn memory_after_balloon(&self) -> Option<u64> {
        let held_back = self.balloon?.bytes();
        (held_back > 0).then(|| self.memory.bytes().saturating_sub(held_back))
    }

    /// Refuses a balloon that the memory cannot have.
    pub(crate) fn check_balloon(&self) -> Result<(), BalloonError> {
        let min = MemorySize::MIN.bytes();
        match self.balloon {
            Some(_) if self.hugepages => Err(BalloonError::HugePages),
            Some(HeldBack(size)) if self.memory_after_balloon().is_some_and(|rest| rest < min) => {
                Err(BalloonError::TooLarge(size, self.memory))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn balloon_leaves_the_guest_what_it_needs() {
        let mut config = Config::new("bzImage");
        let size = |text: &str| text.parse::<MemorySize>().unwrap();
        for (held_back, memory, hugepages, expected) in [
            ("0", "16M", false, Ok(())),
            ("496M", "512M", false, Ok(())),
            (
                "497M",
                "512M",
                false,
                Err(BalloonError::TooLarge(size("497M"), size("512M"))),
            ),
            (
                "1T",
                "512M",
                false,
                Err(BalloonError::TooLarge(size("1T"), size("512M"))),
            ),
            ("0", "512M", true, Err(BalloonError::HugePages)),
        ] {
            config.balloon = Some(held_back.parse().unwrap());
            (config.memory, config.hugepages) = (size(memory), hugepages);
            assert_eq!(config.check_balloon(), expected, "{held_back} of {memory}");
        }
        config.balloon = None;
        assert_eq!(config.check_balloon(), Ok(()));
        for text in ["", "lots", "-1", "64T"] {
            assert!(text.parse::<HeldBack>().is_err(), "{text}");
        }
    }
}
