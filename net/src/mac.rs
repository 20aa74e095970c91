//! The address of one Ethernet NIC.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// The MAC address of one station: holding it proves that it is unicast and not all zero.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(into = "String", try_from = "String")]
pub struct MacAddr([u8; 6]);

/// Why a text or six bytes are no [`MacAddr`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ParseMacError {
    /// Not six pairs of hexadecimal digits.
    #[error(
        "`{0}` is not a MAC address: write six pairs of hexadecimal digits, like 52:54:00:12:34:56"
    )]
    Malformed(String),
    /// The lowest bit of the first byte is set.
    #[error(
        "{} is a multicast MAC address, which no single NIC may have: make the first byte even, like 52",
        Bytes(.0)
    )]
    Multicast([u8; 6]),
    /// 00:00:00:00:00:00.
    #[error(
        "00:00:00:00:00:00 is not the address of any NIC: choose another, like 52:54:00:12:34:56"
    )]
    Zero,
}

impl MacAddr {
    /// Its six bytes, in the order in which they go over the wire.
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }

    /// Whether it was chosen by software rather than burnt in by a maker (IEEE 802-2014, 8.2.2: the U/L bit).
    pub const fn is_local(self) -> bool {
        self.0[0] & 2 != 0
    }

    /// A random, locally administered address.
    ///
    /// # Errors
    ///
    /// When the kernel has no random bytes to give.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 6];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        bytes[0] = bytes[0] & !1 | 2;
        Ok(Self(bytes))
    }
}

impl TryFrom<[u8; 6]> for MacAddr {
    type Error = ParseMacError;

    fn try_from(bytes: [u8; 6]) -> Result<Self, ParseMacError> {
        match bytes {
            [0, 0, 0, 0, 0, 0] => Err(ParseMacError::Zero),
            [first, ..] if first & 1 != 0 => Err(ParseMacError::Multicast(bytes)),
            _ => Ok(Self(bytes)),
        }
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for MacAddr {
    type Error = ParseMacError;

    fn try_from(text: String) -> Result<Self, ParseMacError> {
        text.parse()
    }
}

impl FromStr for MacAddr {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, ParseMacError> {
        parse_bytes(text)
            .ok_or_else(|| ParseMacError::Malformed(text.to_owned()))?
            .try_into()
    }
}

fn parse_bytes(text: &str) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut pairs = text.split(':');
    for byte in &mut bytes {
        let pair = pairs.next()?;
        // from_str_radix alone would take "+1" too.
        let hexadecimal = pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit());
        *byte = u8::from_str_radix(pair, 16).ok().filter(|_| hexadecimal)?;
    }
    pairs.next().is_none().then_some(bytes)
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Bytes(&self.0).fmt(f)
    }
}

struct Bytes<'a>(&'a [u8; 6]);

impl fmt::Display for Bytes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_valid_text_comes_back_in_lower_case() {
        let mac: MacAddr = "52:54:00:AB:cd:0f".parse().unwrap();
        assert_eq!(mac.octets(), [0x52, 0x54, 0, 0xab, 0xcd, 0x0f]);
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:0f");
        assert!(mac.is_local());
    }

    #[test]
    fn mac_malformed_text_is_refused_with_an_example() {
        for text in [
            "",
            "52",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:5g",
            "5:2:54:00:12:34",
            "52-54-00-12-34-56",
            "+1:54:00:12:34:56",
            "52:54:00:12:34:é",
        ] {
            let error = text.parse::<MacAddr>().unwrap_err();
            assert_eq!(error, ParseMacError::Malformed(text.to_owned()));
            assert!(error.to_string().contains("52:54:00:12:34:56"));
        }
    }

    #[test]
    fn mac_multicast_or_broadcast_is_refused() {
        let error = "01:00:5e:00:00:01".parse::<MacAddr>().unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("01:00:5e:00:00:01 is a multicast MAC address")
        );
        assert!(matches!(
            "ff:ff:ff:ff:ff:ff".parse::<MacAddr>(),
            Err(ParseMacError::Multicast(_))
        ));
    }

    #[test]
    fn mac_all_zero_is_refused() {
        assert_eq!(
            "00:00:00:00:00:00".parse::<MacAddr>(),
            Err(ParseMacError::Zero)
        );
    }

    #[test]
    fn mac_random_is_local_unicast_and_new_each_time() {
        let (one, two) = (MacAddr::random().unwrap(), MacAddr::random().unwrap());
        assert!(one.is_local() && MacAddr::try_from(one.octets()).is_ok());
        assert_ne!(one, two);
    }
}
