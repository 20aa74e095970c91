//! `--runner LEASH:BOOT[:detached]`, which no one types: what ties a VM's process to the `minivmm run` that has started it.

use std::fmt;
use std::os::fd::RawFd;
use std::str::FromStr;

use super::ConfigError;

const DETACHED: &str = ":detached";

/// The descriptors that `minivmm run` passes to its VM's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunnerFds {
    /// The reading end of a pipe that hangs up when `minivmm run` is gone.
    pub leash: RawFd,
    /// An unbound Unix stream socket. The VM's process gives it its name, and `minivmm run` accepts from it.
    pub boot: RawFd,
    /// The VM is to be remembered after its end, as one of `-d`.
    pub is_detached: bool,
}

impl fmt::Display for RunnerFds {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let detached = if self.is_detached { DETACHED } else { "" };
        write!(f, "{}:{}{detached}", self.leash, self.boot)
    }
}

impl FromStr for RunnerFds {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let number = |text: &str| text.parse().ok().filter(|number| *number > 2);
        let numbers = text.strip_suffix(DETACHED);
        let fds = numbers.unwrap_or(text).split_once(':');
        let fds = fds.and_then(|(leash, boot)| {
            let (leash, boot) = (number(leash)?, number(boot)?);
            Some(Self {
                leash,
                boot,
                is_detached: numbers.is_some(),
            })
        });
        fds.filter(|fds| fds.leash != fds.boot)
            .ok_or_else(|| ConfigError::Value("not two descriptors, as in 3:4".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runner_is_two_descriptors_that_are_not_standard_ones() {
        for (text, is_detached) in [("3:14", false), ("3:14:detached", true)] {
            let fds = RunnerFds {
                leash: 3,
                boot: 14,
                is_detached,
            };
            assert_eq!(text.parse(), Ok(fds));
            assert_eq!(fds.to_string(), text);
        }
        for text in ["", "3", "3:", "2:3", "3:3", "3:4:5", "a:b", "3:detached"] {
            assert!(text.parse::<RunnerFds>().is_err(), "{text}");
        }
    }
}
