//! What a DHCP server grants.

use std::net::{IpAddr, Ipv4Addr};

use smoltcp::socket::dhcpv4::Config;
use smoltcp::wire::DhcpPacket;

use super::rtnetlink::Route;

// Options of RFC 2132, and the classless routes of RFC 3442.
pub(super) const SUBNET_MASK: u8 = 1;
pub(super) const ROUTER: u8 = 3;
pub(super) const NAME_SERVERS: u8 = 6;
pub(super) const HOST_NAME: u8 = 12;
pub(super) const DOMAIN_NAME: u8 = 15;
pub(super) const MTU: u8 = 26;
pub(super) const CLASSLESS_ROUTES: u8 = 121;

/// The smallest MTU that a server may set: that of RFC 791, below which nothing works.
const SMALLEST_MTU: u16 = 576;
/// The most routes of one lease.
const MOST_ROUTES: usize = 64;

/// An address for a time, and what comes with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lease {
    pub(super) address: Ipv4Addr,
    /// The length of the network's prefix.
    pub(super) prefix: u8,
    pub(super) routes: Vec<Route>,
    pub(super) name_servers: Vec<Ipv4Addr>,
    pub(super) domain: Option<String>,
    pub(super) mtu: Option<u16>,
    /// Where the server answers.
    pub(super) server: Ipv4Addr,
    /// By which it knows itself.
    pub(super) server_id: Ipv4Addr,
}

impl Lease {
    /// What the server's acknowledgement says, of which `packet` is the message.
    pub(super) fn read<T: AsRef<[u8]>>(config: &Config<'_>, packet: &DhcpPacket<T>) -> Self {
        let classless = option(packet, CLASSLESS_ROUTES).and_then(|bytes| classless_routes(&bytes));
        let routes = classless.unwrap_or_else(|| {
            let routers = option(packet, ROUTER).unwrap_or_default();
            let router = addresses(&routers).find(|router| is_host(*router));
            let default = router.map(|router| Route::default_by(router.into()));
            default.into_iter().collect()
        });
        let mtu =
            option(packet, MTU).and_then(|bytes| Some(u16::from_be_bytes(bytes.try_into().ok()?)));
        Self {
            address: config.address.address(),
            prefix: config.address.prefix_len(),
            routes,
            name_servers: config.dns_servers.iter().copied().collect(),
            domain: option(packet, DOMAIN_NAME).and_then(|bytes| domain(&bytes)),
            mtu: mtu.filter(|mtu| *mtu >= SMALLEST_MTU),
            server: config.server.address,
            server_id: config.server.identifier,
        }
    }
}

/// The value of an option. One that is there more than once is in parts (RFC 3396).
pub(super) fn option<T: AsRef<[u8]>>(packet: &DhcpPacket<T>, kind: u8) -> Option<Vec<u8>> {
    let parts = packet.options().filter(|option| option.kind == kind);
    parts
        .map(|option| option.data.to_vec())
        .reduce(|all, part| [all, part].concat())
}

fn addresses(bytes: &[u8]) -> impl Iterator<Item = Ipv4Addr> + '_ {
    let quads = bytes.chunks_exact(4);
    quads.map(|quad| Ipv4Addr::new(quad[0], quad[1], quad[2], quad[3]))
}

fn is_host(address: Ipv4Addr) -> bool {
    !(address.is_unspecified() || address.is_multicast() || address.is_broadcast())
}

/// Each is the length of a prefix, as many bytes of the network as that takes, and the router: 0.0.0.0 where there is none. None if
/// these are not all like that.
fn classless_routes(mut bytes: &[u8]) -> Option<Vec<Route>> {
    let mut routes = Vec::new();
    while let Some((&prefix, rest)) = bytes.split_first() {
        let (network, rest) = rest.split_at_checked(usize::from(prefix).div_ceil(8))?;
        let (router, rest) = rest.split_at_checked(4)?;
        bytes = rest;
        let mut to = [0; 4];
        to.get_mut(..network.len())?.copy_from_slice(network);
        // The kernel refuses a route with bits beyond its prefix.
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
        let to = Ipv4Addr::from(u32::from_be_bytes(to) & mask);
        let router = addresses(router).next().filter(|router| is_host(*router));
        if routes.len() < MOST_ROUTES {
            routes.push(Route {
                to: (to.into(), prefix),
                via: router.map(IpAddr::from),
            });
        }
    }
    Some(routes)
}

/// A domain that may stand in resolv.conf.
fn domain(bytes: &[u8]) -> Option<String> {
    // Some servers end it as a text of C's.
    let name = std::str::from_utf8(bytes).ok()?.trim_end_matches('\0');
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (!name.is_empty() && name.chars().all(fits)).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smoltcp::socket::dhcpv4::ServerInfo;
    use smoltcp::wire::Ipv4Cidr;

    use super::*;

    /// What is read of an acknowledgement with these options.
    fn read(options: &[u8]) -> Lease {
        let message = [&[0; 240], options].concat();
        let server = Ipv4Addr::new(10, 0, 0, 1);
        let config = Config {
            server: ServerInfo {
                address: server,
                identifier: server,
            },
            address: Ipv4Cidr::new(Ipv4Addr::new(10, 0, 0, 2), 24),
            router: None,
            dns_servers: [server].into_iter().collect(),
            packet: None,
        };
        Lease::read(&config, &DhcpPacket::new_unchecked(&message))
    }

    fn route(to: [u8; 4], prefix: u8, via: Option<[u8; 4]>) -> Route {
        Route {
            to: (to.into(), prefix),
            via: via.map(IpAddr::from),
        }
    }

    #[test]
    fn first_of_several_routers_is_the_default_gateway() {
        let lease = read(&[ROUTER, 8, 10, 0, 0, 1, 10, 0, 0, 9]);
        assert_eq!(lease.routes, [route([0; 4], 0, Some([10, 0, 0, 1]))]);
        assert_eq!(read(&[ROUTER, 4, 0, 0, 0, 0]).routes, []);
    }

    #[test]
    fn classless_routes_replace_the_router() {
        let routers = [ROUTER, 4, 10, 0, 0, 1];
        let routes = [
            &[CLASSLESS_ROUTES, 20][..],
            &[0, 10, 0, 0, 2],
            &[12, 172, 31, 10, 0, 0, 3],
            &[24, 192, 0, 2, 0, 0, 0, 0],
        ];
        let lease = read(&[&routers[..], &routes.concat()].concat());
        let expected = [
            route([0; 4], 0, Some([10, 0, 0, 2])),
            route([172, 16, 0, 0], 12, Some([10, 0, 0, 3])),
            route([192, 0, 2, 0], 24, None),
        ];
        assert_eq!(lease.routes, expected);
    }

    #[test]
    fn classless_routes_that_are_broken_leave_the_router() {
        for routes in [&[0, 10, 0, 0][..], &[33, 1, 2, 3, 4, 5, 10, 0, 0, 3], &[8]] {
            let option = [&[CLASSLESS_ROUTES, routes.len() as u8], routes].concat();
            let lease = read(&[&option[..], &[ROUTER, 4, 10, 0, 0, 1]].concat());
            assert_eq!(lease.routes, [route([0; 4], 0, Some([10, 0, 0, 1]))]);
        }
    }

    #[test]
    fn option_in_parts_is_one() {
        let lease = read(b"\x0f\x04exam\x0f\x08ple.test\xff\x0f\x01x");
        assert_eq!(lease.domain.as_deref(), Some("example.test"));
    }

    #[test]
    fn domain_cannot_add_lines_to_a_file() {
        assert_eq!(read(b"\x0f\x0cx\nnameserver").domain, None);
        assert_eq!(read(b"\x0f\x02x\0").domain.as_deref(), Some("x"));
    }

    #[test]
    fn mtu_below_the_smallest_of_ip_is_left_out() {
        assert_eq!(read(&[MTU, 2, 5, 120]).mtu, Some(1400));
        assert_eq!(read(&[MTU, 2, 0, 68]).mtu, None);
        assert_eq!(read(&[MTU, 1, 5]).mtu, None);
    }

    proptest! {
        #[test]
        fn any_options_are_a_lease_with_routes_that_fit(options: Vec<u8>) {
            let lease = read(&options);
            prop_assert!(lease.routes.len() <= MOST_ROUTES);
            prop_assert!(lease.routes.iter().all(|route| route.to.1 <= 32));
        }
    }
}
