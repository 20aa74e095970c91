//! User networks on the command line.

use std::fmt;
use std::net::IpAddr;

use net::MacAddr;

use super::ConfigError;
use super::keys::{take_keys, value};
use super::nic::{NIC_KEYS, NicConfig, NicOptions, NicSource};

/// A network for one guest, without a macvtap and without root: passt forwards what the guest sends, by sockets of the
/// host's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserNet {
    /// The guest's MAC address, if not a random one.
    pub mac: Option<MacAddr>,
    /// The host's ports that reach the guest.
    pub forwards: Vec<Forward>,
}

/// A port of the host that reaches one of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// The protocol.
    pub protocol: Protocol,
    /// The host's address; all that it has by default.
    pub address: Option<IpAddr>,
    /// The host's port.
    pub port: u16,
    /// The guest's port.
    pub guest_port: u16,
}

/// A protocol that has ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// May be repeated.
const HOSTFWD: &str = "hostfwd";
/// The keys of a user network.
pub(super) const USER_NET_KEYS: [&str; 2] = [HOSTFWD, "mac"];
/// Those of the guest's NIC that are for macvtaps alone.
const MACVTAP_ONLY: [&str; 2] = ["backend", "trust-mac"];

/// The NIC of `--user-net [KEY=VALUE[,KEY=VALUE...]]`, whose value is empty where there is none.
///
/// # Errors
///
/// Says which part is wrong.
pub fn parse_user_net(text: &str) -> Result<NicConfig, ConfigError> {
    let mut net = UserNet::default();
    let mut options = NicOptions::default();
    let parts = text.split(',').filter(|_| !text.is_empty());
    let others = take_keys(&USER_NET_KEYS, HOSTFWD, parts, |key, text| {
        net.set(key, text)
    })?;
    let others = take_keys(&nic_keys(), "", others.into_iter(), |key, text| {
        options.set(key, text)
    })?;
    options.check()?;
    match others.first() {
        Some(&"") => Err(ConfigError::Empty),
        Some(part) => Err(match part.split_once('=') {
            Some((key, _)) => ConfigError::UnknownUserNetKey(key.to_owned()),
            None => ConfigError::NoValue((*part).to_owned()),
        }),
        None => Ok(NicConfig {
            source: NicSource::UserNet(net),
            options,
        }),
    }
}

/// The keys of the guest's NIC that a user network has too.
pub(super) fn nic_keys() -> Vec<&'static str> {
    let keys = NIC_KEYS.into_iter();
    keys.filter(|key| !MACVTAP_ONLY.contains(key)).collect()
}

impl UserNet {
    fn set(&mut self, key: &str, text: &str) -> Result<(), ConfigError> {
        match key {
            HOSTFWD => {
                let new = Forward::parse(text)?;
                let is_same =
                    |other: &Forward| (other.protocol, other.port) == (new.protocol, new.port);
                if self.forwards.iter().any(is_same) {
                    return Err(wrong(
                        text,
                        "forwards a port that another hostfwd= forwards too",
                    ));
                }
                self.forwards.push(new);
            }
            _ => self.mac = Some(value(text)?),
        }
        Ok(())
    }
}

impl Forward {
    /// Reads `[PROTOCOL]:[ADDRESS]:PORT-[ADDRESS]:PORT`, the host's side first, as QEMU has it.
    fn parse(text: &str) -> Result<Self, ConfigError> {
        let syntax = || {
            wrong(
                text,
                "is not PROTOCOL:[ADDRESS]:PORT-:PORT, as in tcp::2222-:22",
            )
        };
        let (protocol, rest) = text.split_once(':').ok_or_else(syntax)?;
        let protocol = match protocol {
            "tcp" | "" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => {
                return Err(wrong(
                    text,
                    "has an unknown protocol: there are tcp and udp",
                ));
            }
        };
        let (host, guest) = rest.rsplit_once('-').ok_or_else(syntax)?;
        let (address, port) = host.rsplit_once(':').ok_or_else(syntax)?;
        let (guest, guest_port) = guest.rsplit_once(':').ok_or_else(syntax)?;
        if !guest.is_empty() {
            let why = "names an address of the guest, which has only the one that it gets from passt: \
                       write :PORT, as in tcp::2222-:22";
            return Err(wrong(text, why));
        }
        let no_address = || {
            wrong(
                text,
                "has an address that is none, as 127.0.0.1 and [::1] are",
            )
        };
        let address = match address {
            "" => None,
            address => Some(parse_address(address).ok_or_else(no_address)?),
        };
        let parse_port = |port: &str| match port.parse() {
            Ok(port @ 1..) => Ok(port),
            _ => Err(wrong(
                text,
                "has a port that is not a number from 1 to 65535",
            )),
        };
        Ok(Self {
            protocol,
            address,
            port: parse_port(port)?,
            guest_port: parse_port(guest_port)?,
        })
    }
}

/// One of IPv6 stands in brackets, or its end could not be seen.
fn parse_address(text: &str) -> Option<IpAddr> {
    match text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'))
    {
        Some(text) => text.parse().ok().map(IpAddr::V6),
        None => text.parse().ok().map(IpAddr::V4),
    }
}

fn wrong(text: &str, why: &str) -> ConfigError {
    super::keys::wrong(HOSTFWD, text, why)
}

/// The host's side.
impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} port {}", self.protocol, self.port)?;
        match self.address {
            Some(address) => write!(f, " of {address}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(UserNet, NicOptions), String> {
        match parse_user_net(text) {
            Ok(NicConfig {
                source: NicSource::UserNet(net),
                options,
            }) => Ok((net, options)),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn user_network_needs_no_key() {
        assert_eq!(parse(""), Ok(Default::default()));
    }

    #[test]
    fn user_network_keys_of_every_kind_are_understood() {
        let text = "hostfwd=tcp::2222-:22,rx-rate=1Gbit,hostfwd=udp:127.0.0.1:5353-:53,\
                    mac=52:54:00:12:34:56,hostfwd=:[::1]:80-:8080,pcap=x";
        let (net, options) = parse(text).unwrap();
        let forward = |protocol, address: Option<&str>, port, guest_port| Forward {
            protocol,
            address: address.map(|address| address.parse().unwrap()),
            port,
            guest_port,
        };
        let forwards = [
            forward(Protocol::Tcp, None, 2222, 22),
            forward(Protocol::Udp, Some("127.0.0.1"), 5353, 53),
            forward(Protocol::Tcp, Some("::1"), 80, 8080),
        ];
        assert_eq!(net.forwards, forwards);
        assert_eq!(net.mac, Some("52:54:00:12:34:56".parse().unwrap()));
        assert_eq!(options.needs_frames(), Some("rx-rate"));
        assert_eq!(options.pcap, Some("x".into()));
        // One port of two protocols is two.
        assert!(parse("hostfwd=tcp::53-:53,hostfwd=udp::53-:53").is_ok());
    }

    #[test]
    fn user_network_errors_name_the_part() {
        for (text, needle) in [
            (
                "hostfwd=sctp::1-:1",
                "hostfwd=sctp::1-:1 has an unknown protocol: there are tcp and udp",
            ),
            ("hostfwd=2222", "is not PROTOCOL:"),
            ("hostfwd=tcp:2222", "is not PROTOCOL:"),
            ("hostfwd=tcp::2222", "is not PROTOCOL:"),
            ("hostfwd=tcp:2222-:22", "is not PROTOCOL:"),
            ("hostfwd=tcp::2222-22", "is not PROTOCOL:"),
            (
                "hostfwd=tcp::2222-10.0.2.15:22",
                "only the one that it gets from passt",
            ),
            (
                "hostfwd=tcp:localhost:2222-:22",
                "has an address that is none",
            ),
            ("hostfwd=tcp:::1:2222-:22", "has an address that is none"),
            (
                "hostfwd=tcp:[1.2.3.4]:2222-:22",
                "has an address that is none",
            ),
            ("hostfwd=tcp::0-:22", "from 1 to 65535"),
            ("hostfwd=tcp::1-:65536", "from 1 to 65535"),
            ("hostfwd=tcp::1-:", "from 1 to 65535"),
            (
                "hostfwd=tcp::1-:2,hostfwd=tcp:127.0.0.1:1-:3",
                "another hostfwd=",
            ),
            ("mac=01:00:5e:00:00:01", "01:00:5e:00:00:01"),
            ("mac=52:54:00:12:34:56,mac=52:54:00:12:34:57", "given twice"),
            ("eno1", "`eno1` is not KEY=VALUE"),
            ("mac=52:54:00:12:34:56,", "empty item"),
            ("burst=5ms", "without rx-rate"),
            (
                "backend=vhost",
                "unknown key `backend`: the keys are hostfwd, mac, rx-rate",
            ),
            ("queues=2", "unknown key `queues`"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(needle), "{text}: {error}");
        }
    }
}
