//! What `minivmm wait` waits for, and how long.

use std::num::NonZeroU16;
use std::str::FromStr;
use std::time::Duration;

use regex_lite::Regex;

/// What a running VM is to come to.
#[derive(Clone, Debug)]
pub enum Condition {
    /// It has an address that is not one of its link alone.
    Address,
    /// A TCP port of its takes a connection.
    Port(NonZeroU16),
    /// Its console has shown a line in which this is found.
    Console(Regex),
    /// The agent in its guest answers.
    Agent,
    /// It has ended.
    Exit,
}

/// How long to wait; for ever without a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience(pub Option<Duration>);

/// Why a text is none of these.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseWaitError {
    /// There is no such condition.
    #[error("`{0}` is not address, port=N, console=REGEX, agent or exit")]
    Condition(String),
    /// There is no such port.
    #[error("`{0}` is no TCP port: those are 1 to 65535")]
    Port(String),
    /// The expression cannot be read.
    #[error("`{0}` is no regular expression: {1}")]
    Regex(String, String),
    /// It is not a time.
    #[error("`{0}` is no time: write 60s, 5m or 500ms, or 0 for no limit")]
    Patience(String),
}

impl FromStr for Condition {
    type Err = ParseWaitError;

    fn from_str(text: &str) -> Result<Self, ParseWaitError> {
        match text.split_once('=') {
            None if text == "address" => Ok(Self::Address),
            None if text == "agent" => Ok(Self::Agent),
            None if text == "exit" => Ok(Self::Exit),
            Some(("port", port)) => match port.parse() {
                Ok(port) => Ok(Self::Port(port)),
                Err(_) => Err(ParseWaitError::Port(port.to_owned())),
            },
            Some(("console", regex)) => match Regex::new(regex) {
                Ok(parsed) => Ok(Self::Console(parsed)),
                Err(error) => Err(ParseWaitError::Regex(regex.to_owned(), error.to_string())),
            },
            _ => Err(ParseWaitError::Condition(text.to_owned())),
        }
    }
}

impl FromStr for Patience {
    type Err = ParseWaitError;

    fn from_str(text: &str) -> Result<Self, ParseWaitError> {
        let digits = text.find(|c: char| !c.is_ascii_digit());
        let (number, unit) = text.split_at(digits.unwrap_or(text.len()));
        let milliseconds = match unit {
            "ms" => Some(1),
            "s" | "" => Some(1000),
            "m" => Some(60_000),
            "h" => Some(3_600_000),
            _ => None,
        };
        let number = number.parse::<u64>().ok();
        let time = number
            .zip(milliseconds)
            .and_then(|(n, ms)| n.checked_mul(ms));
        match time {
            Some(0) => Ok(Self(None)),
            Some(time) => Ok(Self(Some(Duration::from_millis(time)))),
            None => Err(ParseWaitError::Patience(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_are_read_or_refused_with_the_reason() {
        let read = |text: &str| text.parse::<Condition>();
        assert!(matches!(read("address"), Ok(Condition::Address)));
        assert!(matches!(read("agent"), Ok(Condition::Agent)));
        assert!(matches!(read("exit"), Ok(Condition::Exit)));
        assert!(matches!(read("port=22"), Ok(Condition::Port(port)) if port.get() == 22));
        let Ok(Condition::Console(regex)) = read("console=a=b$") else {
            panic!("a regular expression");
        };
        assert_eq!(regex.as_str(), "a=b$");
        for (text, error) in [
            ("", "is not address"),
            ("address=1", "is not address"),
            ("port=0", "1 to 65535"),
            ("port=ssh", "1 to 65535"),
            ("console=(", "no regular expression"),
        ] {
            let found = read(text).unwrap_err().to_string();
            assert!(found.contains(error), "{text}: {found}");
        }
    }

    #[test]
    fn times_have_a_unit_or_are_seconds() {
        for (text, ms) in [
            ("60", 60_000),
            ("60s", 60_000),
            ("5m", 300_000),
            ("1h", 3_600_000),
            ("500ms", 500),
        ] {
            let limit = Some(Duration::from_millis(ms));
            assert_eq!(text.parse(), Ok(Patience(limit)), "{text}");
        }
        assert_eq!("0".parse(), Ok(Patience(None)));
        for text in ["", "s", "-1", "1.5s", "5d", "18446744073709551615h"] {
            assert!(text.parse::<Patience>().is_err(), "{text}");
        }
    }
}
