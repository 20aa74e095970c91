//! Keys and values of an option such as `--disk PATH[,KEY=VALUE...]`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::ConfigError;

/// How long a rate may be exceeded after a pause, by default.
pub(super) const DEFAULT_BURST: Duration = Duration::from_millis(10);

/// Keys, for people.
pub(super) fn listed(keys: &[&str]) -> String {
    let (last, first) = keys.split_last().unwrap_or((&"", &[]));
    format!("{} and {last}", first.join(", "))
}

/// The parts between single commas; two stand for one.
pub(super) fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        if c == ',' && rest.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts
}

/// Calls `set` with key and value of those of `parts` that have one of `keys`, and returns the others.
/// One key may be repeated.
pub(super) fn take_keys<'a>(
    keys: &[&str],
    may_repeat: &str,
    parts: impl Iterator<Item = &'a str>,
    mut set: impl FnMut(&str, &str) -> Result<(), ConfigError>,
) -> Result<Vec<&'a str>, ConfigError> {
    let (mut seen, mut others) = (Vec::new(), Vec::new());
    for part in parts {
        match part.split_once('=') {
            Some((key, _)) if seen.contains(&key) && key != may_repeat => {
                return Err(ConfigError::Twice(key.to_owned()));
            }
            Some((key, text)) if keys.contains(&key) => {
                set(key, text)?;
                seen.push(key);
            }
            _ => others.push(part),
        }
    }
    Ok(others)
}

/// A value that says itself what is wrong with it.
pub(super) fn value<T: FromStr<Err: fmt::Display>>(text: &str) -> Result<T, ConfigError> {
    text.parse()
        .map_err(|error: T::Err| ConfigError::Value(error.to_string()))
}

/// A number, whatever its bounds.
pub(super) fn number<T: FromStr>(key: &str, text: &str) -> Result<T, ConfigError> {
    let number = text.parse();
    number.map_err(|_| wrong(key, text, "is not a number"))
}

/// A number with the decimal suffix K, M or G.
pub(super) fn scaled(text: &str) -> Option<u64> {
    let (number, factor) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 1000),
        b'm' | b'M' => (&text[..text.len() - 1], 1_000_000),
        b'g' | b'G' => (&text[..text.len() - 1], 1_000_000_000),
        _ => (text, 1),
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

/// How long a rate may be exceeded after a pause.
pub(super) fn burst(key: &str, text: &str) -> Result<Duration, ConfigError> {
    let ms = text.strip_suffix("ms").and_then(|ms| ms.parse().ok());
    let ms = ms.filter(|ms| (1..=10_000).contains(ms));
    let wrong = || wrong(key, text, "is not a time from 1ms to 10000ms");
    Ok(Duration::from_millis(ms.ok_or_else(wrong)?))
}

/// Whether something is on.
pub(super) fn switch(key: &str, text: &str) -> Result<bool, ConfigError> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(wrong(key, text, "is not on or off")),
    }
}

/// The path of a file.
pub(super) fn path(key: &str, text: &str) -> Result<PathBuf, ConfigError> {
    match text {
        "" => Err(wrong(key, text, "is not the path of a file")),
        _ => Ok(text.into()),
    }
}

/// The value of a key is not what it takes.
pub(super) fn wrong(key: &str, text: &str, why: &str) -> ConfigError {
    ConfigError::Value(format!("{key}={text} {why}"))
}
