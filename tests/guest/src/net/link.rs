//! Reports each change of a NIC's link, as the device shows it, while every NIC serves and sends.

use alloc::string::String;
use alloc::vec::Vec;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::udp;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{IpAddress, IpEndpoint};

use super::Stack;
use super::echo::{ECHO, echo_datagrams};
use crate::options::Options;
use crate::serial::println;
use crate::virtio::Kind;
use crate::virtio::device::VirtioDevice;
use crate::virtio::net::Config;
use crate::{cpu, report};

/// The bit of the interrupt status that says that the configuration has changed (virtio 1.2, 4.2.2
/// and 4.1.4.5).
const CONFIG_CHANGED: u32 = 2;
/// How often a datagram leaves for the peer, from each NIC.
const PERIOD: Duration = Duration::from_millis(10);
/// What leaves.
const CHATTER: &[u8] = b"still here";

/// Prints a `LINK` line for each NIC at the start and after each change, until `quit` comes.
pub fn run(options: &Options) {
    match watch(options) {
        Ok(()) => report::ok("link", "quit"),
        Err(why) => report::fail("link", why),
    }
}

fn watch(options: &Options) -> Result<(), String> {
    let mut nics = Vec::new();
    for (index, nic) in VirtioDevice::all(Kind::Net).into_iter().enumerate() {
        nics.push(Watched::start(index, nic, options)?);
    }
    println!("READY link");
    let end = cpu::now() + cpu::PATIENCE;
    let mut quit = false;
    while !quit {
        for nic in &mut nics {
            nic.report_changes();
            quit |= nic.serve(options.peer);
        }
        if cpu::now() > end {
            return Err("took too long".into());
        }
    }
    for nic in &mut nics {
        nic.stack.linger(20);
    }
    Ok(())
}

/// A NIC that is up.
struct Watched {
    index: usize,
    nic: VirtioDevice,
    stack: Stack,
    socket: SocketHandle,
    datagrams: u64,
    next_chatter: Instant,
    /// What was reported last: the link's state and the configuration's generation.
    reported: (u16, u32),
    /// How often the device has said that its configuration changed.
    changes: u32,
}

impl Watched {
    fn start(index: usize, nic: VirtioDevice, options: &Options) -> Result<Self, String> {
        let mut stack = Stack::start_on(nic, options)?;
        let socket = stack.add_udp();
        let bound = stack.sockets.get_mut::<udp::Socket<'_>>(socket).bind(ECHO);
        bound.map_err(|error| alloc::format!("bind: {error}"))?;
        nic.enable_interrupts();
        let nic = Self {
            index,
            nic,
            stack,
            socket,
            datagrams: 0,
            next_chatter: cpu::now(),
            reported: state(nic),
            changes: 0,
        };
        nic.report();
        Ok(nic)
    }

    fn report_changes(&mut self) {
        let pending = self.nic.interrupt_status();
        let changed = pending & CONFIG_CHANGED;
        if changed != 0 {
            self.nic.acknowledge(changed);
            self.changes += 1;
        }
        // Read without an interrupt too: so an unannounced change shows.
        let state = state(self.nic);
        if state != self.reported || changed != 0 {
            self.reported = state;
            self.report();
        }
    }

    fn report(&self) {
        let (status, generation) = self.reported;
        println!(
            "LINK {} status={status} generation={generation} changes={} interrupts={}",
            self.index,
            self.changes,
            cpu::interrupts(self.nic.line())
        );
    }

    /// Moves the NIC's frames on. True when `quit` came.
    fn serve(&mut self, peer: Option<IpAddress>) -> bool {
        self.stack.poll();
        let socket = self.stack.sockets.get_mut::<udp::Socket<'_>>(self.socket);
        if let Some(peer) = peer
            && cpu::now() > self.next_chatter
        {
            self.next_chatter = cpu::now() + PERIOD;
            // Without a link the socket's buffer fills up, and what does not fit is lost, as UDP
            // may.
            let _ = socket.send_slice(CHATTER, IpEndpoint::new(peer, 9));
        }
        echo_datagrams(socket, &mut self.datagrams)
    }
}

/// The link's state and the generation of the configuration that it was read from.
fn state(nic: VirtioDevice) -> (u16, u32) {
    loop {
        let before = nic.generation();
        let status = Config::read(nic).status;
        if nic.generation() == before {
            return (status, before);
        }
    }
}
