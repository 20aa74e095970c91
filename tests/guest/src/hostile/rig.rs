//! What attacks need: who is who on the network, and a NIC brought up by hand whose every part can
//! be spoilt.

use smoltcp::time::Duration;
use smoltcp::wire::{IpAddress, IpCidr, Ipv4Address};

use super::{Failure, Subject};
use crate::boot::Boot;
use crate::cpu;
use crate::memory::Shared;
use crate::options::Options;
use crate::virtio::Kind;
use crate::virtio::device::VirtioDevice;
use crate::virtio::net::{Config, HEADER, Header, RX, TX, bring_up, feature, go};
use crate::virtio::ring::{Descriptor, Ring, WRITE};

/// The least size of a frame on Ethernet.
pub const FRAME: usize = 60;
/// How many descriptors attacked queues have.
pub const RING: u16 = 16;

const BROADCAST: [u8; 6] = [0xff; 6];
const ARP: [u8; 2] = [0x08, 0x06];
const REQUEST: u8 = 1;
const REPLY: u8 = 2;
/// How often to ask before giving up, and how long to wait for an answer each time.
const TRIES: u32 = 5;
const PATIENCE: Duration = Duration::from_millis(200);
const RX_BUFFERS: u16 = 8;
/// Together they hold the largest frame, which the device may want before it gives us any (virtio
/// 1.2, 5.1.6.3.1).
const RX_BUFFER: usize = 16 * 1024;
/// Where in the scratch memory the frame to send lies; the receive buffers are before it.
const TX_FRAME: usize = RX_BUFFERS as usize * RX_BUFFER;
/// The largest frame that can be sent from scratch memory, with its header.
pub const TX_ROOM: usize = 160 * 1024;

/// The NIC under attack, and its surroundings.
pub struct Bench {
    /// The device.
    pub nic: VirtioDevice,
    /// The first address after RAM.
    pub ram_end: u64,
    /// The host's kernel moves the frames.
    pub vhost: bool,
    mac: [u8; 6],
    own: Ipv4Address,
    peer: Ipv4Address,
}

impl Bench {
    /// Looks for the NIC, and for the addresses in the options.
    pub fn new(options: &Options, boot: &Boot) -> Result<Self, &'static str> {
        let nic = VirtioDevice::find(Kind::Net, options.index)?;
        let own = options.addresses.iter().find_map(|address| match address {
            IpCidr::Ipv4(own) => Some(own.address()),
            IpCidr::Ipv6(_) => None,
        });
        let IpAddress::Ipv4(peer) = options.peer()? else {
            return Err("guest.peer must be of IPv4");
        };
        Ok(Self {
            nic,
            ram_end: boot.ram.end,
            vhost: options.vhost,
            mac: Config::read(nic).mac,
            own: own.ok_or("guest.ip is missing")?,
            peer,
        })
    }

    /// An ARP request for the peer (RFC 826), padded to the least size of a frame.
    pub fn arp_request(&self) -> [u8; FRAME] {
        let mut frame = [0; FRAME];
        frame[..6].copy_from_slice(&BROADCAST);
        frame[6..12].copy_from_slice(&self.mac);
        frame[12..14].copy_from_slice(&ARP);
        frame[14..22].copy_from_slice(&[0, 1, 0x08, 0, 6, 4, 0, REQUEST]);
        frame[22..28].copy_from_slice(&self.mac);
        frame[28..32].copy_from_slice(&self.own.octets());
        frame[38..42].copy_from_slice(&self.peer.octets());
        frame
    }

    fn is_answer(&self, frame: &[u8]) -> bool {
        frame[12..14] == ARP && frame[21] == REPLY && frame[28..32] == self.peer.octets()
    }
}

impl Subject for Bench {
    /// Resets the device, brings it up and asks the peer for its address.
    fn prove(&self) -> Result<(), Failure> {
        let mut rig = Rig::start(self, feature::PLAIN)?;
        rig.offer_buffers();
        let alive = rig.arp();
        self.nic.reset();
        if alive {
            Ok(())
        } else {
            Err("no answer to ARP".into())
        }
    }
}

/// The NIC brought up by hand. It is reset when dropped, before its memory is freed.
pub struct Rig<'a> {
    /// Where it is.
    pub bench: &'a Bench,
    /// The receive ring.
    pub rx: Ring,
    /// The transmit ring.
    pub tx: Ring,
    scratch: Shared,
}

impl<'a> Rig<'a> {
    /// Brings the NIC up with those of the features that it offers, and rings of [`RING`]
    /// descriptors.
    pub fn start(bench: &'a Bench, features: u64) -> Result<Self, &'static str> {
        let (_, rx, tx) = bring_up(bench.nic, features, RING)?;
        Ok(Self::running(bench, rx, tx))
    }

    /// Starts the NIC, whose queues have been set up.
    pub fn run(bench: &'a Bench, rx: Ring, tx: Ring) -> Self {
        go(bench.nic);
        Self::running(bench, rx, tx)
    }

    fn running(bench: &'a Bench, rx: Ring, tx: Ring) -> Self {
        Self {
            bench,
            rx,
            tx,
            scratch: Shared::new(TX_FRAME + TX_ROOM),
        }
    }

    /// The address of memory that may be read and written, at least 64 KiB.
    pub fn scratch(&self) -> u64 {
        self.scratch.address()
    }

    /// Gives the device good buffers to receive into.
    pub fn offer_buffers(&mut self) {
        for index in 0..RX_BUFFERS {
            let address = self.scratch.address() + u64::from(index) * RX_BUFFER as u64;
            self.rx
                .describe(index, Descriptor::new(address, RX_BUFFER as u32, WRITE));
            self.rx.offer(index);
        }
        self.bench.nic.notify(RX);
    }

    /// Sends `length` bytes after the header: the frame, and then whatever is in the scratch
    /// memory.
    pub fn send(&mut self, header: Header, frame: &[u8], length: usize) {
        self.scratch.put(TX_FRAME, &header.bytes());
        self.scratch.put(TX_FRAME + HEADER, frame);
        let address = self.scratch.address() + TX_FRAME as u64;
        self.tx
            .describe(0, Descriptor::new(address, (HEADER + length) as u32, 0));
        self.tx.offer(0);
        self.bench.nic.notify(TX);
    }

    /// Whether the device completes something on the transmit queue in time.
    pub fn sent(&mut self) -> bool {
        let end = cpu::now() + PATIENCE;
        while cpu::now() < end {
            if self.tx.take().is_some() {
                return true;
            }
        }
        false
    }

    /// Asks the peer for its address, so that a frame comes in; does not wait for it.
    pub fn prompt(&mut self) {
        let request = self.bench.arp_request();
        self.send(Header::default(), &request, FRAME);
    }

    /// Asks the peer for its address, a few times. Whether it answers.
    pub fn arp(&mut self) -> bool {
        (0..TRIES).any(|_| {
            self.prompt();
            self.answered() && self.sent()
        })
    }

    fn answered(&mut self) -> bool {
        let end = cpu::now() + PATIENCE;
        while cpu::now() < end {
            if let Some((head, length)) = self.rx.take() {
                let mut frame = [0; FRAME];
                let buffer = usize::from(head % RX_BUFFERS) * RX_BUFFER;
                self.scratch.get(buffer + HEADER, &mut frame);
                self.rx.offer(head);
                self.bench.nic.notify(RX);
                if length as usize >= HEADER + 42 && self.bench.is_answer(&frame) {
                    return true;
                }
            }
        }
        false
    }
}

impl Drop for Rig<'_> {
    fn drop(&mut self) {
        self.bench.nic.reset();
    }
}
