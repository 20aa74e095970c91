//! The guest's network: its NICs, their addresses and routes, name servers, and the guest's name.
//!
//! Each NIC has a thread, so that all get their addresses at the same time. A thread whose NIC has a
//! lease goes on and renews it; what routers advertise later is taken too.
//!
//! | module | what it is |
//! | --- | --- |
//! | `nic` | one NIC: found by its MAC, brought up, given its addresses |
//! | `dhcp`, `lease` | the DHCP client, by smoltcp; what a server grants |
//! | `packet` | the client's socket |
//! | `rtnetlink` | links, addresses and routes of the kernel's; what it hears from routers |
//! | `names` | resolv.conf, hosts, hostname |

mod dhcp;
mod lease;
mod names;
mod nic;
mod packet;
mod rtnetlink;

use std::io;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use agent_protocol::boot::{Nic, NicStatus};

use nic::Shared;

/// The loopback's index in every network namespace.
const LOOPBACK: u32 = 1;

/// The network of a guest. Its NICs' threads go on when it is dropped.
#[derive(Debug)]
pub struct Network {
    /// What came of each NIC, in the order in which they were given.
    pub nics: Vec<NicStatus>,
    shared: Arc<Shared>,
}

/// Why a guest has no network.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The kernel refuses a step.
    #[error("cannot {action}")]
    Step {
        /// What was tried on what.
        action: String,
        /// Why that failed.
        #[source]
        source: io::Error,
    },
    /// No driver has found the NIC.
    #[error("no NIC with the MAC address {mac} came up within {seconds} s")]
    NoNic {
        /// Its MAC address.
        mac: String,
        /// How long it had.
        seconds: u64,
    },
    /// A NIC that gets its addresses from the network has none.
    #[error("{nic} has no address after {seconds} s: {dhcp}; IPv6: {ipv6}")]
    NoAddress {
        /// Its name and MAC address.
        nic: String,
        /// How long it had.
        seconds: u64,
        /// What a DHCP client has tried and seen.
        dhcp: String,
        /// What routers have advertised.
        ipv6: &'static str,
    },
}

impl Failure {
    fn step(action: String, source: io::Error) -> Self {
        Self::Step { action, source }
    }
}

/// Names the guest, brings up the loopback and these NICs, and waits until each NIC has what it is to
/// have: for those with [`IpConfig::Dhcp`](agent_protocol::boot::IpConfig::Dhcp) that is a lease, or an IPv6 address where no server of
/// DHCP answers. Needs /proc, /sys and a /run that can be written. Called once.
///
/// # Errors
///
/// The first NIC that has not got that after `patience`, or a step that fails.
pub fn configure(hostname: &str, nics: &[Nic], patience: Duration) -> Result<Network, Failure> {
    names::name_host(hostname)?;
    let requests = rtnetlink::Requests::open()
        .map_err(|error| Failure::step("open a socket of rtnetlink".to_owned(), error))?;
    requests
        .bring_up(LOOPBACK)
        .map_err(|error| Failure::step("bring up the loopback".to_owned(), error))?;
    let shared = Arc::new(Shared::new(hostname, patience));
    let started: Vec<_> = nics
        .iter()
        .enumerate()
        .map(|(number, nic)| start(number, nic.clone(), Arc::clone(&shared)))
        .collect::<Result<_, _>>()?;
    let nics = started.into_iter().map(|status| {
        // A thread says what came of its NIC before it ends.
        let ended = || {
            Failure::step(
                "configure a NIC".to_owned(),
                io::ErrorKind::BrokenPipe.into(),
            )
        };
        status.recv().unwrap_or_else(|_| Err(ended()))
    });
    let nics = nics.collect::<Result<_, _>>()?;
    Ok(Network { nics, shared })
}

/// Starts a NIC's thread, which says once what came of it.
fn start(
    number: usize,
    nic: Nic,
    shared: Arc<Shared>,
) -> Result<mpsc::Receiver<Result<NicStatus, Failure>>, Failure> {
    let (report, status) = mpsc::sync_channel(1);
    let deadline = Instant::now() + shared.patience;
    let thread = thread::Builder::new().name(format!("nic{number}"));
    thread
        .spawn(move || nic::run(number, &nic, &shared, deadline, &report))
        .map_err(|error| Failure::step("start a thread".to_owned(), error))?;
    Ok(status)
}

impl Network {
    /// Gives the leases back to their servers: before the guest ends, so that many guests do not
    /// take all that a server has.
    pub fn release(&self) {
        self.shared.release();
    }
}

/// A MAC address as it is written.
fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
