//! The DHCP client of one NIC: smoltcp's, on a packet socket.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use smoltcp::iface::{self, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::socket::dhcpv4::{self, Event, RetryConfig};
use smoltcp::time;
use smoltcp::wire::{
    DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress, EthernetFrame, IpCidr,
    Ipv4Cidr, Ipv4Packet, UdpPacket,
};

use super::lease::{self, Lease};
use super::packet::PacketSocket;

/// An Ethernet frame of the usual size: messages of DHCP are not longer.
const FRAME: usize = 1514;
/// What is asked for.
const PARAMETERS: &[u8] = &[
    lease::SUBNET_MASK,
    // Before the router, which it replaces (RFC 3442).
    lease::CLASSLESS_ROUTES,
    lease::ROUTER,
    lease::NAME_SERVERS,
    lease::DOMAIN_NAME,
    lease::MTU,
];
/// The client takes the answer to its last DISCOVER alone, so that the next one has to wait for a slow server: these double.
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(8);
/// How often the client runs at most while it waits for time to pass.
const SHORTEST_WAIT: Duration = Duration::from_millis(50);

/// How the NIC's lease has changed.
#[derive(Debug)]
pub(super) enum Change {
    /// The server grants this one, or grants it anew.
    Leased(Lease),
    /// It has expired, or the server takes it back.
    Lost,
}

/// Memory that a client uses.
#[derive(Debug)]
pub(super) struct Memory<'a> {
    options: Vec<DhcpOption<'a>>,
    answer: Vec<u8>,
}

impl<'a> Memory<'a> {
    /// For a client that says this name to the server.
    pub(super) fn new(hostname: &'a str) -> Self {
        let (kind, data) = (lease::HOST_NAME, hostname.as_bytes());
        // A value of an option has up to 255 bytes.
        let name = (!data.is_empty() && data.len() < 256).then_some(DhcpOption { kind, data });
        Self {
            options: name.into_iter().collect(),
            answer: vec![0; FRAME],
        }
    }
}

/// A DHCP client.
pub(super) struct Client<'a> {
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'a>,
    handle: SocketHandle,
}

impl<'a> Client<'a> {
    /// A client on the link `index`. Its first [`poll`](Self::poll) sends a DISCOVER.
    pub(super) fn new(index: u32, mac: [u8; 6], memory: &'a mut Memory<'a>) -> io::Result<Self> {
        let mut wire = Wire {
            socket: PacketSocket::open(index)?,
            mac: EthernetAddress(mac),
            seen: Seen::default(),
            retry: FIRST_RETRY,
            discovered: None,
        };
        let mut config = iface::Config::new(wire.mac.into());
        let mut seed = [0; 8];
        rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())?;
        config.random_seed = u64::from_ne_bytes(seed);
        let interface = Interface::new(config, &mut wire, time::Instant::now());
        let mut socket = dhcpv4::Socket::new();
        socket.set_outgoing_options(&memory.options);
        socket.set_parameter_request_list(PARAMETERS);
        socket.set_receive_packet_buffer(&mut memory.answer);
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(socket);
        Ok(Self {
            wire,
            interface,
            sockets,
            handle,
        })
    }

    /// Takes what has come and sends what is due.
    pub(super) fn poll(&mut self) -> Option<Change> {
        let socket = self.sockets.get_mut::<dhcpv4::Socket<'_>>(self.handle);
        let mut retry = RetryConfig::default();
        retry.discover_timeout = self.wire.retry.into();
        retry.initial_request_timeout = time::Duration::from_millis(500);
        retry.min_renew_timeout = time::Duration::from_secs(1);
        socket.set_retry_config(retry);
        let now = time::Instant::now();
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
        let socket = self.sockets.get_mut::<dhcpv4::Socket<'_>>(self.handle);
        let Event::Configured(config) = socket.poll()? else {
            self.give_address(None);
            return Some(Change::Lost);
        };
        // The socket has memory for the message.
        let lease = Lease::read(&config, config.packet.as_ref()?);
        self.wire.retry = FIRST_RETRY;
        self.give_address(Some(&lease));
        Some(Change::Leased(lease))
    }

    /// Gives smoltcp the address and the router by which it reaches the server to renew the lease.
    fn give_address(&mut self, lease: Option<&Lease>) {
        let address = lease.map(|lease| IpCidr::Ipv4(Ipv4Cidr::new(lease.address, lease.prefix)));
        self.interface.update_ip_addrs(|addresses| {
            addresses.clear();
            addresses.extend(address);
        });
        let routes = self.interface.routes_mut();
        routes.remove_default_ipv4_route();
        let routers = lease.into_iter().flat_map(|lease| &lease.routes);
        let router = routers
            .filter(|route| route.to.1 == 0)
            .find_map(|route| route.via);
        if let Some(std::net::IpAddr::V4(router)) = router {
            // There is room for it.
            let _ = routes.add_default_ipv4_route(router);
        }
    }

    /// How long there is nothing to do unless something comes.
    pub(super) fn wait(&mut self) -> Duration {
        let delay = self
            .interface
            .poll_delay(time::Instant::now(), &self.sockets);
        // What cannot be sent, for lack of a route or of the server's MAC, is always due.
        delay.map_or(LAST_RETRY, Duration::from).max(SHORTEST_WAIT)
    }

    /// What it has done and what came of it.
    pub(super) fn seen(&self) -> &Seen {
        &self.wire.seen
    }
}

impl AsFd for Client<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wire.socket.as_fd()
    }
}

/// Gives a lease back to its server (RFC 2131 4.4.6), which says nothing to that.
pub(super) fn release(lease: &Lease, mac: [u8; 6]) -> io::Result<()> {
    let message = DhcpRepr {
        message_type: DhcpMessageType::Release,
        transaction_id: 1,
        secs: 0,
        client_hardware_address: EthernetAddress(mac),
        client_ip: lease.address,
        your_ip: Ipv4Addr::UNSPECIFIED,
        server_ip: Ipv4Addr::UNSPECIFIED,
        router: None,
        subnet_mask: None,
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: false,
        requested_ip: None,
        client_identifier: Some(EthernetAddress(mac)),
        server_identifier: Some(lease.server_id),
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    };
    let mut bytes = vec![0; message.buffer_len()];
    let mut packet = DhcpPacket::new_unchecked(&mut bytes[..]);
    message.emit(&mut packet).map_err(io::Error::other)?;
    let socket = UdpSocket::bind((lease.address, 68))?;
    socket.send_to(&bytes, (lease.server, 67))?;
    Ok(())
}

/// What a client has done and what came of it.
#[derive(Debug, Default)]
pub(super) struct Seen {
    discovers: u32,
    last: Option<(Ipv4Addr, Reply)>,
}

/// What a server has said.
#[derive(Debug)]
enum Reply {
    Offered(Ipv4Addr),
    Acknowledged,
    Refused,
    Unusable(&'static str),
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((server, reply)) = &self.last else {
            let plural = if self.discovers == 1 { "" } else { "s" };
            let discovers = self.discovers;
            return write!(f, "no DHCP server answered {discovers} DISCOVER{plural}");
        };
        write!(f, "the DHCP server {server} ")?;
        match reply {
            Reply::Offered(address) => write!(f, "offered {address} and did not acknowledge it"),
            Reply::Acknowledged => f.write_str("granted a lease that is over"),
            Reply::Refused => f.write_str("refused what it had offered (NAK)"),
            Reply::Unusable(why) => write!(f, "sent what cannot be used: {why}"),
        }
    }
}

/// The link as smoltcp sees it.
struct Wire {
    socket: PacketSocket,
    mac: EthernetAddress,
    seen: Seen,
    /// When the next DISCOVER is sent after the last one at the earliest, also when a server refuses all.
    retry: Duration,
    discovered: Option<Instant>,
}

impl Wire {
    /// Takes note of a frame from the network. Returns whether smoltcp may have it.
    fn note(&mut self, frame: &[u8]) -> bool {
        let reply = message(frame, |server, message| {
            let own = message.client_hardware_address == self.mac;
            Some((server, reply(message).filter(|_| own)?))
        });
        let usable = !matches!(reply, Some((_, Reply::Unusable(_))));
        self.seen.last = reply.or(self.seen.last.take());
        usable
    }

    /// Sends a frame of smoltcp's, but for a DISCOVER that comes too soon.
    fn send(&mut self, frame: &[u8]) {
        let kind = message(frame, |_, message| Some(message.message_type));
        if kind == Some(DhcpMessageType::Discover) {
            let due = self
                .discovered
                .is_none_or(|at| at.elapsed() * 2 >= self.retry);
            if !due {
                return;
            }
            if self.discovered.is_some() {
                self.retry = (self.retry * 2).min(LAST_RETRY);
            }
            self.discovered = Some(Instant::now());
            self.seen.discovers += 1;
        }
        self.socket.send(frame);
    }
}

/// What a server says, in its own words; None where a client says that.
fn reply(message: &DhcpRepr<'_>) -> Option<Reply> {
    let host = message.your_ip;
    let is_host = !(host.is_unspecified() || host.is_multicast() || host.is_broadcast());
    let flaw = if !is_host || host.is_loopback() {
        Some("its address is none of a host's")
    } else if message.server_identifier.is_none() {
        Some("it has no server identifier")
    } else if message.message_type == DhcpMessageType::Ack && message.subnet_mask.is_none() {
        Some("it has no subnet mask")
    } else if message.lease_duration == Some(0) {
        Some("it is for 0 seconds")
    } else {
        None
    };
    match (message.message_type, flaw) {
        (DhcpMessageType::Nak, _) => Some(Reply::Refused),
        (DhcpMessageType::Offer | DhcpMessageType::Ack, Some(flaw)) => Some(Reply::Unusable(flaw)),
        (DhcpMessageType::Offer, None) => Some(Reply::Offered(host)),
        (DhcpMessageType::Ack, None) => Some(Reply::Acknowledged),
        _ => None,
    }
}

/// Reads the message of DHCP in a frame, if there is one.
fn message<T>(frame: &[u8], read: impl FnOnce(Ipv4Addr, &DhcpRepr<'_>) -> Option<T>) -> Option<T> {
    let ethernet = EthernetFrame::new_checked(frame).ok()?;
    let ip = Ipv4Packet::new_checked(ethernet.payload()).ok()?;
    let udp = UdpPacket::new_checked(ip.payload()).ok()?;
    let dhcp = DhcpPacket::new_checked(udp.payload()).ok()?;
    read(ip.src_addr(), &DhcpRepr::parse(&dhcp).ok()?)
}

impl phy::Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _: time::Instant) -> Option<(Received, Sender<'_>)> {
        loop {
            let frame = self.socket.receive()?;
            if self.note(&frame) {
                return Some((Received(frame), Sender(self)));
            }
        }
    }

    fn transmit(&mut self, _: time::Instant) -> Option<Sender<'_>> {
        Some(Sender(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME;
        capabilities.checksum = ChecksumCapabilities::default();
        // A server on the same host leaves its checksum to a NIC that the frame never comes by.
        capabilities.checksum.udp = Checksum::Tx;
        capabilities
    }
}

struct Received(Vec<u8>);

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

struct Sender<'a>(&'a mut Wire);

impl phy::TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, write: F) -> R {
        let mut frame = vec![0; length];
        let result = write(&mut frame);
        self.0.send(&frame);
        result
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A frame with a message of a server's, of these options.
    fn frame(options: &[u8]) -> Vec<u8> {
        let mut dhcp = vec![0; 240];
        dhcp[..3].copy_from_slice(&[2, 1, 6]);
        dhcp[16..20].copy_from_slice(&[10, 0, 0, 2]);
        dhcp[236..].copy_from_slice(&[0x63, 0x82, 0x53, 0x63]);
        dhcp.extend(options);
        let [high, low] = (8 + dhcp.len() as u16).to_be_bytes();
        let udp = [&[0, 67, 0, 68, high, low, 0, 0], &dhcp[..]].concat();
        let [high, low] = (20 + udp.len() as u16).to_be_bytes();
        let ip = [
            0x45, 0, high, low, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ];
        [&[0; 12][..], &[8, 0], &ip, &udp].concat()
    }

    /// What the server says in it.
    fn said(options: &[u8]) -> Option<String> {
        let reply = message(&frame(options), |server, message| {
            Some((server, reply(message)?))
        });
        let last = Some(reply?);
        let seen = Seen { discovers: 1, last };
        Some(seen.to_string())
    }

    #[test]
    fn server_is_quoted_with_what_is_wrong() {
        let offer = [53, 1, 2, 54, 4, 10, 0, 0, 1];
        let expected = "the DHCP server 10.0.0.1 offered 10.0.0.2 and did not acknowledge it";
        assert_eq!(said(&offer).as_deref(), Some(expected));
        let for_no_time = [&offer[..], &[51, 4, 0, 0, 0, 0]].concat();
        let expected = "the DHCP server 10.0.0.1 sent what cannot be used: it is for 0 seconds";
        assert_eq!(said(&for_no_time).as_deref(), Some(expected));
        let none = Seen::default();
        assert_eq!(none.to_string(), "no DHCP server answered 0 DISCOVERs");
    }

    #[test]
    fn other_clients_are_not_servers() {
        assert_eq!(said(&[53, 1, 1]), None);
        assert_eq!(said(&[53, 1, 99]), None);
        assert_eq!(said(&[]), None);
    }

    proptest! {
        #[test]
        fn any_frame_is_a_message_or_none(options: Vec<u8>, frame: Vec<u8>) {
            let _ = said(&options);
            let _ = message(&frame, |_, _| Some(()));
        }
    }
}
