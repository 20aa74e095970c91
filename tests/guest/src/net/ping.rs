//! Pings the peer.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use smoltcp::iface::SocketHandle;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::icmp;
use smoltcp::time::Duration;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, Icmpv6Packet, Icmpv6Repr, IpAddress};

use super::{Stack, with_stack};
use crate::cpu;
use crate::options::Options;

/// Marks our echo requests.
const IDENT: u16 = 0x4d56;
const DATA: &[u8] = b"A ping of a guest without an operating system.";
/// How long an answer may take.
pub const PATIENCE: Duration = Duration::from_millis(500);

/// Pings `count` times; no answer at all, or not to every ping, is a failure.
pub fn run(options: &Options) {
    with_stack("ping", options, |stack| pings(stack, options));
}

/// Sends the pings one after another and sums up.
pub fn pings(stack: &mut Stack, options: &Options) -> Result<String, String> {
    let peer = options.peer()?;
    let mut pinger = Pinger::start(stack, peer)?;
    let times: Vec<u64> = (0..options.count as u16)
        .filter_map(|n| pinger.ping(stack, n))
        .collect();
    let (sent, received) = (options.count, times.len());
    let least = times.iter().min().copied().unwrap_or(0);
    let average = times.iter().sum::<u64>() / received.max(1) as u64;
    let summary = format!("sent={sent} received={received} min_us={least} avg_us={average}");
    if received == sent as usize {
        Ok(summary)
    } else {
        Err(summary)
    }
}

/// An ICMP socket and where to ping.
pub struct Pinger {
    socket: SocketHandle,
    own: IpAddress,
    peer: IpAddress,
}

impl Pinger {
    /// Makes the socket.
    pub fn start(stack: &mut Stack, peer: IpAddress) -> Result<Self, String> {
        let own = stack
            .interface
            .get_source_address(&peer)
            .ok_or("no address to ping from")?;
        let socket = stack.add_icmp();
        let bound = stack
            .sockets
            .get_mut::<icmp::Socket<'_>>(socket)
            .bind(icmp::Endpoint::Ident(IDENT));
        bound.map_err(|error| format!("bind: {error}"))?;
        Ok(Self { socket, own, peer })
    }

    /// Pings once: the time in microseconds, or none when there is no answer.
    pub fn ping(&mut self, stack: &mut Stack, number: u16) -> Option<u64> {
        let start = cpu::now();
        self.send(stack, number)?;
        self.wait(stack, number)
            .then(|| (cpu::now() - start).total_micros())
    }

    /// Queues a ping for the next poll.
    pub fn send(&mut self, stack: &mut Stack, number: u16) -> Option<()> {
        let message = self.request(number);
        stack
            .sockets
            .get_mut::<icmp::Socket<'_>>(self.socket)
            .send_slice(&message, self.peer)
            .ok()
    }

    /// Polls until the answer to ping `number` comes. False when it does not in time.
    pub fn wait(&mut self, stack: &mut Stack, number: u16) -> bool {
        let end = cpu::now() + PATIENCE;
        while cpu::now() < end {
            stack.poll();
            if self.answered(stack, number) {
                return true;
            }
        }
        false
    }

    fn request(&self, seq_no: u16) -> Vec<u8> {
        let checksum = ChecksumCapabilities::default();
        match (self.own, self.peer) {
            (IpAddress::Ipv6(own), IpAddress::Ipv6(peer)) => {
                let request = Icmpv6Repr::EchoRequest {
                    ident: IDENT,
                    seq_no,
                    data: DATA,
                };
                let mut bytes = alloc::vec![0; request.buffer_len()];
                request.emit(
                    &own,
                    &peer,
                    &mut Icmpv6Packet::new_unchecked(&mut bytes),
                    &checksum,
                );
                bytes
            }
            _ => {
                let request = Icmpv4Repr::EchoRequest {
                    ident: IDENT,
                    seq_no,
                    data: DATA,
                };
                let mut bytes = alloc::vec![0; request.buffer_len()];
                request.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes), &checksum);
                bytes
            }
        }
    }

    /// Whether the answer to ping `number` has come. Echo replies of both families keep the number
    /// in bytes 6 and 7.
    fn answered(&self, stack: &mut Stack, number: u16) -> bool {
        let socket = stack.sockets.get_mut::<icmp::Socket<'_>>(self.socket);
        while let Ok((message, _)) = socket.recv() {
            let is_reply = matches!(message.first(), Some(0 | 129));
            if is_reply
                && message.get(6..8) == Some(&number.to_be_bytes())
                && message.ends_with(DATA)
            {
                return true;
            }
        }
        false
    }
}
