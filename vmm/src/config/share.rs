//! Shares on the command line.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use devices::virtio::fs::MAX_TAG;

use super::ConfigError;
use super::keys::{path, split, take_keys};

/// A directory of the host's that the guest can mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareConfig {
    /// What serves it.
    pub source: ShareSource,
    /// What the guest mounts it by.
    pub tag: Tag,
}

/// What serves a share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShareSource {
    /// A process of minivmm's own serves this directory.
    Directory {
        /// The directory.
        path: PathBuf,
        /// The guest may change nothing in it.
        read_only: bool,
    },
    /// A vhost-user server for virtio-fs, such as virtiofsd, that listens on this socket.
    Socket(PathBuf),
}

/// The tag of a share: 1 to 36 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tag(String);

impl Tag {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Tag {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.len() {
            0 => Err(ConfigError::Value("the tag of the share is missing".into())),
            1..=MAX_TAG => Ok(Self(text.into())),
            len => Err(ConfigError::Value(format!(
                "the tag {text} has {len} bytes, and a share's has at most {MAX_TAG}"
            ))),
        }
    }
}

/// The keys of a share.
pub(super) const SHARE_KEYS: [&str; 2] = ["socket", "tag"];

impl FromStr for ShareConfig {
    type Err = ConfigError;

    /// Takes the value of `--share`: `DIR:TAG[:ro]`, or `socket=PATH,tag=TAG`, where a comma in either is
    /// doubled.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let begins = |key: &&str| {
            text.strip_prefix(key)
                .is_some_and(|rest| rest.starts_with('='))
        };
        match SHARE_KEYS.iter().any(begins) {
            true => Self::of_server(text),
            false => Self::of_directory(text),
        }
    }
}

impl ShareConfig {
    fn of_directory(text: &str) -> Result<Self, ConfigError> {
        let read_only = text.strip_suffix(":ro").filter(|rest| rest.contains(':'));
        let Some((path, tag)) = read_only.unwrap_or(text).rsplit_once(':') else {
            return Err(ConfigError::Value(
                "it has no tag, by which the guest mounts it: write DIR:TAG".into(),
            ));
        };
        if path.is_empty() {
            return Err(ConfigError::Value("the directory is missing".into()));
        }
        Ok(Self {
            source: ShareSource::Directory {
                path: path.into(),
                read_only: read_only.is_some(),
            },
            tag: tag.parse()?,
        })
    }

    fn of_server(text: &str) -> Result<Self, ConfigError> {
        let parts = split(text);
        let (mut socket, mut tag) = (None, None);
        let parts = parts.iter().map(String::as_str);
        let others = take_keys(&SHARE_KEYS, "", parts, |key, text| {
            match key {
                "socket" => socket = Some(path(key, text)?),
                _ => tag = Some(text.parse()?),
            }
            Ok(())
        })?;
        match others.first() {
            None => {}
            Some(&"") => return Err(ConfigError::Empty),
            Some(part) => {
                return Err(match part.split_once('=') {
                    Some((key, _)) => ConfigError::UnknownShareKey(key.to_owned()),
                    None => ConfigError::NoValue((*part).to_owned()),
                });
            }
        }
        let missing = |what: &str| ConfigError::Value(format!("{what} is missing"));
        Ok(Self {
            source: ShareSource::Socket(socket.ok_or_else(|| missing("socket=PATH"))?),
            tag: tag.ok_or_else(|| missing("tag=TAG"))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(text: &str) -> Result<ShareConfig, String> {
        text.parse().map_err(|error: ConfigError| error.to_string())
    }

    #[test]
    fn shares_socket_and_tag_are_understood() {
        let longest = "t".repeat(MAX_TAG);
        for (text, socket, tag) in [
            ("socket=/run/fs.sock,tag=src", "/run/fs.sock", "src"),
            ("tag=a=b:c,socket=a,,b", "a,b", "a=b:c"),
            (&format!("socket=s,tag={longest}"), "s", &longest),
        ] {
            let expected = ShareConfig {
                source: ShareSource::Socket(socket.into()),
                tag: Tag(tag.into()),
            };
            assert_eq!(share(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn shares_directory_and_tag_are_understood() {
        for (text, path, tag, read_only) in [
            ("/srv/src:src", "/srv/src", "src", false),
            ("src:src:ro", "src", "src", true),
            ("a:b:c", "a:b", "c", false),
            ("a:ro", "a", "ro", false),
            ("a=b,c:t", "a=b,c", "t", false),
        ] {
            let expected = ShareConfig {
                source: ShareSource::Directory {
                    path: path.into(),
                    read_only,
                },
                tag: Tag(tag.into()),
            };
            assert_eq!(share(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn shares_errors_name_the_part() {
        let long = format!("socket=s,tag={}", "t".repeat(MAX_TAG + 1));
        for (text, needle) in [
            ("/srv/src", "it has no tag"),
            ("/srv/src:", "the tag of the share is missing"),
            (":src", "the directory is missing"),
            ("socket=s,", "empty item"),
            ("socket=s", "tag=TAG is missing"),
            ("tag=t", "socket=PATH is missing"),
            ("socket=,tag=t", "is not the path of a file"),
            ("socket=s,tag=", "the tag of the share is missing"),
            ("socket=s,tag=t,tag=u", "`tag` is given twice"),
            ("socket=s,tag=t,ro", "`ro` is not KEY=VALUE"),
            (
                "socket=s,tag=t,dax=on",
                "unknown key `dax`: the keys are socket and tag",
            ),
            (&long, "has 37 bytes, and a share's has at most 36"),
        ] {
            let error = share(text).unwrap_err();
            assert!(error.contains(needle), "{text}: {error}");
        }
    }
}
