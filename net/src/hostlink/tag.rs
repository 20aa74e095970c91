//! How a host link was made. It stands in the link's alias, where `ip link` shows it: no file can be lost or out of date.

use std::net::IpAddr;

use super::settings::Paused;

/// How the alias begins.
const MARK: &str = "host-link";

/// The kernel keeps 255 bytes (IFALIASZ).
const ROOM: usize = 255;

/// How a host link was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tag {
    /// The lower's addresses and routes were moved onto it.
    pub moved: bool,
    /// The lower's settings that are off meanwhile, and their values before.
    pub paused: Vec<(Paused, u8)>,
    /// The addresses that were not the lower's, and go away with the link.
    pub own: Vec<IpAddr>,
}

impl Tag {
    /// The alias; None when it is too long for the kernel.
    pub(crate) fn to_alias(&self) -> Option<String> {
        let mut alias = MARK.to_owned();
        if self.moved {
            alias += " moved";
        }
        for (what, value) in &self.paused {
            alias += &format!(" {}={value}", what.name());
        }
        for ip in &self.own {
            alias += &format!(" own={ip}");
        }
        (alias.len() <= ROOM).then_some(alias)
    }

    /// The tag in an alias; None when the link is no host link.
    pub(crate) fn from_alias(alias: &str) -> Option<Self> {
        let mut words = alias.split(' ');
        if words.next() != Some(MARK) {
            return None;
        }
        let mut tag = Self::default();
        for word in words {
            match word.split_once('=') {
                None if word == "moved" => tag.moved = true,
                Some(("own", ip)) => tag.own.push(ip.parse().ok()?),
                Some((name, value)) => {
                    let mut all = Paused::ALL.into_iter();
                    let what = all.find(|what| what.name() == name)?;
                    tag.paused.push((what, value.parse().ok()?));
                }
                None => return None,
            }
        }
        Some(tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tag_of_every_shape_is_read_back() {
        let own = ["192.0.2.1", "fd00::1"]
            .map(|ip| ip.parse().unwrap())
            .to_vec();
        let shapes = [
            Tag::default(),
            Tag {
                moved: true,
                paused: vec![(Paused::AcceptRa, 2), (Paused::ProxyArp, 1)],
                ..Tag::default()
            },
            Tag {
                own,
                ..Tag::default()
            },
        ];
        for tag in shapes {
            let alias = tag.to_alias().unwrap();
            assert_eq!(Tag::from_alias(&alias), Some(tag), "{alias}");
        }
    }

    #[test]
    fn alias_that_is_no_tag_is_none() {
        for alias in [
            "",
            "uplink to rack 7",
            "host-links",
            "host-link of mine",
            "host-link own=x",
            "host-link mtu=9",
        ] {
            assert_eq!(Tag::from_alias(alias), None, "{alias}");
        }
    }

    #[test]
    fn tag_that_the_kernel_would_cut_is_refused() {
        let own = vec!["2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff".parse().unwrap(); 6];
        assert_eq!(
            Tag {
                own,
                ..Tag::default()
            }
            .to_alias(),
            None
        );
    }
}
