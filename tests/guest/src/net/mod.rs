//! The modes that use the network as it should be used.

pub mod echo;
pub mod info;
pub mod interrupts;
pub mod link;
pub mod ping;
pub mod stream;
pub mod tcp;

use alloc::string::String;
use alloc::vec;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::{icmp, tcp as socket_tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress};

use crate::nic::Nic;
use crate::options::Options;
use crate::virtio::Kind;
use crate::virtio::device::VirtioDevice;
use crate::{cpu, report};

/// A TCP socket's buffers: enough for a window that keeps large segments coming.
const TCP_BUFFER: usize = 1 << 20;
const DATAGRAM_BUFFER: usize = 64 * 1024;
const DATAGRAMS: usize = 64;

/// smoltcp on a NIC.
pub struct Stack {
    nic: Nic,
    interface: Interface,
    /// The sockets, by handle.
    pub sockets: SocketSet<'static>,
    deadline: Instant,
}

impl Stack {
    /// Brings the NIC up and gives it the addresses of the options.
    pub fn start(options: &Options) -> Result<Self, String> {
        Self::start_on(VirtioDevice::find(Kind::Net, options.index)?, options)
    }

    /// The same for a NIC that the options need not name.
    pub fn start_on(nic: VirtioDevice, options: &Options) -> Result<Self, String> {
        let mut nic = Nic::start(nic, options.driver)?;
        let address = options.mac.unwrap_or(EthernetAddress(nic.mac()));
        let mut config = Config::new(HardwareAddress::Ethernet(address));
        config.random_seed = cpu::now().total_micros() as u64;
        let mut interface = Interface::new(config, &mut nic, cpu::now());
        let mut fit = true;
        interface.update_ip_addrs(|own| fit = own.extend_from_slice(&options.addresses).is_ok());
        if !fit {
            return Err("too many addresses".into());
        }
        Ok(Self {
            nic,
            interface,
            sockets: SocketSet::new(vec![]),
            deadline: cpu::now() + cpu::PATIENCE,
        })
    }

    /// Moves frames and sockets on by one step.
    pub fn poll(&mut self) {
        self.interface
            .poll(cpu::now(), &mut self.nic, &mut self.sockets);
    }

    /// Polls until `done` has a result, or reports that it took too long.
    pub fn poll_until<T>(
        &mut self,
        mut done: impl FnMut(&mut Self) -> Option<T>,
    ) -> Result<T, &'static str> {
        loop {
            self.poll();
            if let Some(result) = done(self) {
                return Ok(result);
            }
            if cpu::now() > self.deadline {
                return Err("took too long");
            }
        }
    }

    /// Lets what is queued go out, for `millis` or until the device has taken the last frame: on a
    /// busy host it may come to that late, and not at all once the guest has ended.
    pub fn linger(&mut self, millis: u64) {
        let end = cpu::now() + smoltcp::time::Duration::from_millis(millis);
        while cpu::now() < end || (self.nic.is_sending() && cpu::now() < self.deadline) {
            self.poll();
        }
    }

    /// Adds a TCP socket.
    pub fn add_tcp(&mut self) -> SocketHandle {
        let buffer = || socket_tcp::SocketBuffer::new(vec![0; TCP_BUFFER]);
        let mut socket = socket_tcp::Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        self.sockets.add(socket)
    }

    /// Adds a UDP socket.
    pub fn add_udp(&mut self) -> SocketHandle {
        let buffer = || {
            udp::PacketBuffer::new(
                vec![udp::PacketMetadata::EMPTY; DATAGRAMS],
                vec![0; DATAGRAM_BUFFER],
            )
        };
        self.sockets.add(udp::Socket::new(buffer(), buffer()))
    }

    /// Adds an ICMP socket.
    pub fn add_icmp(&mut self) -> SocketHandle {
        let buffer = || {
            icmp::PacketBuffer::new(
                vec![icmp::PacketMetadata::EMPTY; DATAGRAMS],
                vec![0; DATAGRAM_BUFFER],
            )
        };
        self.sockets.add(icmp::Socket::new(buffer(), buffer()))
    }

    /// A TCP socket and what [`socket_tcp::Socket::connect`] needs besides.
    pub fn tcp(
        &mut self,
        handle: SocketHandle,
    ) -> (
        &mut socket_tcp::Socket<'static>,
        &mut smoltcp::iface::Context,
    ) {
        (self.sockets.get_mut(handle), self.interface.context())
    }
}

/// Runs a mode on a stack and reports its result by name.
fn with_stack(
    name: &str,
    options: &Options,
    mode: impl FnOnce(&mut Stack) -> Result<String, String>,
) {
    match Stack::start(options).and_then(|mut stack| mode(&mut stack)) {
        Ok(detail) => report::ok(name, detail),
        Err(why) => report::fail(name, why),
    }
}
