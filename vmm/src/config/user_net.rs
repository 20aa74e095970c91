//! User networks on the command line.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

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
    /// Where its addresses are.
    pub network: Network,
    /// The host's ports that reach the guest.
    pub forwards: Vec<Forward>,
}

/// The addresses of a user network: a /24 of IPv4, laid out as QEMU lays out its own, and a /64 of IPv6 (RFC 4193)
/// whose groups show the same digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network([u8; 3]);

/// QEMU's, 10.0.2.0/24.
impl Default for Network {
    fn default() -> Self {
        Self([10, 0, 2])
    }
}

impl Network {
    /// The length of its IPv4 prefix.
    pub const PREFIX: u8 = 24;

    /// The guest's address, by DHCP.
    pub fn guest(self) -> Ipv4Addr {
        self.host(15)
    }

    /// The guest's IPv6 address, by DHCPv6; its prefix is announced too.
    pub fn guest_v6(self) -> Ipv6Addr {
        let digits =
            |n: u8| u16::from(n / 100) << 8 | u16::from(n / 10 % 10) << 4 | u16::from(n % 10);
        let [a, b, c] = self.0.map(digits);
        Ipv6Addr::new(0xfd00, a, b, c, 0, 0, 0, digits(15))
    }

    /// The router.
    pub fn gateway(self) -> Ipv4Addr {
        self.host(2)
    }

    /// The router's MAC address, which QEMU's has too.
    pub fn gateway_mac(self) -> String {
        let [a, b, c] = self.0;
        format!("52:55:{a:02x}:{b:02x}:{c:02x}:02")
    }

    /// Where passt asks the host's name server for the guest.
    pub fn name_server(self) -> Ipv4Addr {
        self.host(3)
    }

    fn host(self, number: u8) -> Ipv4Addr {
        let [a, b, c] = self.0;
        Ipv4Addr::new(a, b, c, number)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host(0), Self::PREFIX)
    }
}

/// As it is displayed.
impl FromStr for Network {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let address = text.split_once('/').filter(|(_, length)| *length == "24");
        let address = address.and_then(|(address, _)| address.parse::<Ipv4Addr>().ok());
        match address.map(|address| address.octets()) {
            // Neither the loopback's nor a group's.
            Some([a @ 1..224, b, c, 0]) if a != 127 => Ok(Self([a, b, c])),
            _ => Err(super::keys::wrong(
                NET,
                text,
                "is not a network such as 10.0.3.0/24",
            )),
        }
    }
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

/// The network's addresses.
const NET: &str = "net";
/// May be repeated.
const HOSTFWD: &str = "hostfwd";
/// The keys of a user network.
pub(super) const USER_NET_KEYS: [&str; 3] = [HOSTFWD, "mac", NET];
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
            NET => self.network = text.parse()?,
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
        assert_eq!(net.network, Network::default());
        // One port of two protocols is two.
        assert!(parse("hostfwd=tcp::53-:53,hostfwd=udp::53-:53").is_ok());
    }

    #[test]
    fn user_networks_addresses_follow_from_its_net() {
        let (net, _) = parse("net=172.20.105.0/24").unwrap();
        let network = net.network;
        assert_eq!(network.to_string(), "172.20.105.0/24");
        assert_eq!(network.guest().to_string(), "172.20.105.15");
        assert_eq!(network.guest_v6().to_string(), "fd00:172:20:105::15");
        assert_eq!(network.gateway().to_string(), "172.20.105.2");
        assert_eq!(network.gateway_mac(), "52:55:ac:14:69:02");
        assert_eq!(network.name_server().to_string(), "172.20.105.3");
        assert_eq!(Network::default().to_string(), "10.0.2.0/24");
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
            (
                "net=10.0.3.0",
                "net=10.0.3.0 is not a network such as 10.0.3.0/24",
            ),
            ("net=10.0.3.0/16", "is not a network"),
            ("net=10.0.3.1/24", "is not a network"),
            ("net=127.0.0.0/24", "is not a network"),
            ("net=224.0.0.0/24", "is not a network"),
            ("net=0.0.0.0/24", "is not a network"),
            ("net=fd00::/64", "is not a network"),
            ("mac=01:00:5e:00:00:01", "01:00:5e:00:00:01"),
            ("mac=52:54:00:12:34:56,mac=52:54:00:12:34:57", "given twice"),
            ("eno1", "`eno1` is not KEY=VALUE"),
            ("mac=52:54:00:12:34:56,", "empty item"),
            ("burst=5ms", "without rx-rate"),
            (
                "backend=vhost",
                "unknown key `backend`: the keys are hostfwd, mac, net, rx-rate",
            ),
            ("queues=2", "unknown key `queues`"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(needle), "{text}: {error}");
        }
    }
}
