//! An IP address as an interface has it: with the length of its prefix.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use thiserror::Error;

/// An address and its prefix, such as `192.168.0.5/24` or `fd00::5/64`. Holding one proves that a single host can have
/// the address and that the prefix is no longer than it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InterfaceAddress {
    ip: IpAddr,
    prefix: u8,
}

/// Why a text is no [`InterfaceAddress`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ParseAddressError {
    /// No slash: without the prefix it is unknown who else is on the wire.
    #[error(
        "`{0}` lacks the length of its prefix: write it after a slash, like 192.168.0.5/24 or fd00::5/64"
    )]
    NoPrefix(String),
    /// What is before the slash is no IP address.
    #[error("`{0}` is not an IP address: write one like 192.168.0.5/24 or fd00::5/64")]
    Malformed(String),
    /// What follows the slash is no number, or too large a one.
    #[error("the prefix of `{text}` must be a number from 1 to {max}")]
    Prefix {
        /// The text.
        text: String,
        /// The length of an address in bits.
        max: u8,
    },
    /// Multicast, unspecified, loopback or IPv4 broadcast.
    #[error("`{0}` is not the address of one host on a network: choose another")]
    NotUnicast(String),
}

impl InterfaceAddress {
    /// None when the prefix is longer than the address.
    pub(crate) fn new(ip: IpAddr, prefix: u8) -> Option<Self> {
        (prefix <= bits(ip)).then_some(Self { ip, prefix })
    }

    /// The address alone.
    pub const fn ip(&self) -> IpAddr {
        self.ip
    }

    /// The length of the prefix in bits.
    pub const fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether `other` is of the network that the prefix spans.
    pub fn contains(&self, other: IpAddr) -> bool {
        let number = |ip| match ip {
            IpAddr::V4(ip) => u128::from(ip.to_bits()),
            IpAddr::V6(ip) => ip.to_bits(),
        };
        let differing = number(self.ip) ^ number(other);
        let shift = bits(self.ip) - self.prefix;
        bits(self.ip) == bits(other) && differing.checked_shr(shift.into()).unwrap_or(0) == 0
    }

    /// The broadcast address of an IPv4 network; None where there is none (IPv6, /31, /32: RFC 3021).
    pub(crate) fn broadcast(&self) -> Option<Ipv4Addr> {
        match self.ip {
            IpAddr::V4(ip) if self.prefix < 31 => {
                let host_part = u32::MAX.checked_shr(self.prefix.into()).unwrap_or(0);
                Some(Ipv4Addr::from_bits(ip.to_bits() | host_part))
            }
            _ => None,
        }
    }
}

const fn bits(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// Whether an address holds on one link only, where every link has its own.
pub(crate) fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

impl FromStr for InterfaceAddress {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Self, ParseAddressError> {
        let (ip, prefix) = match text.split_once('/') {
            Some(parts) => parts,
            None if text.parse::<IpAddr>().is_ok() => {
                return Err(ParseAddressError::NoPrefix(text.to_owned()));
            }
            None => return Err(ParseAddressError::Malformed(text.to_owned())),
        };
        let ip: IpAddr = ip
            .parse()
            .map_err(|_| ParseAddressError::Malformed(text.to_owned()))?;
        let unusable = ip.is_multicast()
            || ip.is_unspecified()
            || ip.is_loopback()
            || ip == IpAddr::V4(Ipv4Addr::BROADCAST)
            || matches!(ip, IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some());
        if unusable {
            return Err(ParseAddressError::NotUnicast(text.to_owned()));
        }
        let max = bits(ip);
        prefix
            .parse()
            .ok()
            .filter(|prefix| (1..=max).contains(prefix))
            .map(|prefix| Self { ip, prefix })
            .ok_or_else(|| ParseAddressError::Prefix {
                text: text.to_owned(),
                max,
            })
    }
}

impl fmt::Display for InterfaceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> InterfaceAddress {
        text.parse().unwrap()
    }

    #[test]
    fn address_with_prefix_parses_back_to_itself() {
        for text in ["192.168.0.5/24", "10.0.0.1/32", "fd00::5/64", "fe80::1/128"] {
            assert_eq!(address(text).to_string(), text);
        }
    }

    #[test]
    fn address_that_no_host_may_have_is_refused_with_its_reason() {
        use ParseAddressError as E;
        let error = |text: &str| text.parse::<InterfaceAddress>().unwrap_err();
        assert!(matches!(error("192.168.0.5"), E::NoPrefix(_)));
        for text in ["", "x", "192.168.0/24", "1.2.3.4.5/8", "/24"] {
            assert!(matches!(error(text), E::Malformed(_)), "{text}");
        }
        for (text, limit) in [
            ("192.0.2.1/33", 32),
            ("192.0.2.1/0", 32),
            ("fd00::1/129", 128),
            ("fd00::1/", 128),
        ] {
            assert!(
                matches!(error(text), E::Prefix { max, .. } if max == limit),
                "{text}"
            );
        }
        for text in [
            "224.0.0.1/4",
            "ff02::1/64",
            "0.0.0.0/8",
            "::/64",
            "127.0.0.1/8",
            "::1/128",
            "255.255.255.255/32",
            "::ffff:192.0.2.1/96",
        ] {
            assert!(matches!(error(text), E::NotUnicast(_)), "{text}");
        }
    }

    #[test]
    fn address_network_holds_its_own_and_no_others() {
        let small = address("192.0.2.5/30");
        assert!(small.contains("192.0.2.6".parse().unwrap()));
        assert!(!small.contains("192.0.2.8".parse().unwrap()));
        assert!(!small.contains("fd00::1".parse().unwrap()));
        assert!(address("fd00::1/64").contains("fd00::ffff".parse().unwrap()));
        assert!(!address("fd00::1/128").contains("fd00::2".parse().unwrap()));
        let all = InterfaceAddress::new("192.0.2.1".parse().unwrap(), 0).unwrap();
        assert!(all.contains("10.0.0.1".parse().unwrap()));
    }

    #[test]
    fn address_broadcast_is_the_last_of_its_network() {
        let broadcast = |text: &str| address(text).broadcast().map(|ip| ip.to_string());
        assert_eq!(broadcast("192.0.2.5/24").as_deref(), Some("192.0.2.255"));
        assert_eq!(broadcast("10.1.2.3/9").as_deref(), Some("10.127.255.255"));
        assert_eq!(broadcast("192.0.2.5/31"), None);
        assert_eq!(broadcast("fd00::1/64"), None);
    }
}
