//! `--runner LEASH:BOOT`, which no one types: what ties a VM's process to the `minivmm run` that has started it.

use std::os::fd::RawFd;
use std::str::FromStr;

use super::ConfigError;

/// The descriptors that `minivmm run` passes to its VM's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunnerFds {
    /// The reading end of a pipe that hangs up when `minivmm run` is gone.
    pub leash: RawFd,
    /// An unbound Unix stream socket. The VM's process gives it its name, and `minivmm run` accepts from it.
    pub boot: RawFd,
}

impl FromStr for RunnerFds {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let number = |text: &str| text.parse().ok().filter(|number| *number > 2);
        let fds = text.split_once(':').and_then(|(leash, boot)| {
            let (leash, boot) = (number(leash)?, number(boot)?);
            Some(Self { leash, boot })
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
        let fds = RunnerFds { leash: 3, boot: 14 };
        assert_eq!("3:14".parse(), Ok(fds));
        for text in ["", "3", "3:", "2:3", "3:3", "3:4:5", "a:b"] {
            assert!(text.parse::<RunnerFds>().is_err(), "{text}");
        }
    }
}
