//! One NIC, from its MAC address to its addresses.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::SyncSender;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use agent_protocol::boot::{IpConfig, Nic, NicStatus, StaticIp};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::dhcp::{self, Change, Client, Memory};
use super::lease::Lease;
use super::names::{ResolvConf, Resolvers};
use super::rtnetlink::{self, Advertised, Events, Requests, Route};
use super::{Failure, mac_text};
use crate::chain;

/// How long a NIC that has an IPv6 address waits for a server of DHCP.
const LEASE_PATIENCE: Duration = Duration::from_secs(4);
/// The routes of the first NIC win; those by router advertisements have 1024.
const FIRST_METRIC: u32 = 100;

/// What the threads of all NICs share.
#[derive(Debug)]
pub(super) struct Shared {
    hostname: String,
    pub(super) patience: Duration,
    resolv_conf: ResolvConf,
    /// Of NICs by their MAC addresses.
    leases: Mutex<BTreeMap<[u8; 6], Lease>>,
}

impl Shared {
    pub(super) fn new(hostname: &str, patience: Duration) -> Self {
        Self {
            hostname: hostname.to_owned(),
            patience,
            resolv_conf: ResolvConf::default(),
            leases: Mutex::default(),
        }
    }

    /// Gives all leases back.
    pub(super) fn release(&self) {
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        for (mac, lease) in std::mem::take(&mut *leases) {
            // A server that is gone by now takes it back when it expires.
            let _ = dhcp::release(&lease, mac);
        }
    }

    fn keep(&self, mac: [u8; 6], lease: Option<&Lease>) {
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        match lease {
            Some(lease) => leases.insert(mac, lease.clone()),
            None => leases.remove(&mac),
        };
    }
}

/// Where a thread says what came of its NIC.
type Report = SyncSender<Result<NicStatus, Failure>>;

/// Configures a NIC, and says what came of it by `deadline`. With DHCP it goes on for as long as the guest runs.
pub(super) fn run(number: usize, nic: &Nic, shared: &Shared, deadline: Instant, report: &Report) {
    let status = match find(nic.mac, shared.patience, deadline) {
        Ok(link) => {
            let link = Link { number, ..link };
            match &nic.ip {
                IpConfig::None => Ok(link.status(Vec::new())),
                IpConfig::Static(ip) => link.set_static(ip, shared),
                IpConfig::Dhcp => match link.follow(shared, deadline, report) {
                    Ok(never) => match never {},
                    Err(failure) => Err(failure),
                },
            }
        }
        Err(failure) => Err(failure),
    };
    // The channel has room for the one report that there is.
    let _ = report.try_send(status);
}

/// Waits for the NIC: its driver finds it a moment after it is loaded.
fn find(mac: [u8; 6], patience: Duration, deadline: Instant) -> Result<Link, Failure> {
    let failed = |action: &str| {
        let action = action.to_owned();
        |error| Failure::step(action, error)
    };
    let events = Events::of_links().map_err(failed("watch links"))?;
    let requests = Requests::open().map_err(failed("open a socket of rtnetlink"))?;
    loop {
        if let Some((name, index)) = rtnetlink::find(mac) {
            return Ok(Link {
                number: 0,
                name,
                index,
                mac,
                requests,
            });
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Failure::NoNic {
                mac: mac_text(mac),
                seconds: patience.as_secs(),
            });
        }
        wait(&[events.as_fd()], left);
        events.take(0);
    }
}

/// Waits until one of these can be read.
fn wait(descriptors: &[BorrowedFd<'_>], timeout: Duration) {
    let mut ready: Vec<_> = descriptors
        .iter()
        .map(|descriptor| PollFd::new(descriptor, PollFlags::IN))
        .collect();
    let timeout = Timespec {
        tv_sec: timeout.as_secs() as i64,
        tv_nsec: timeout.subsec_nanos().into(),
    };
    // When a signal interrupts it, what there is to do is looked for all the same.
    let _ = poll(&mut ready, Some(&timeout));
}

/// A link of the kernel's.
struct Link {
    /// Which one of the guest's NICs it is.
    number: usize,
    name: String,
    index: u32,
    mac: [u8; 6],
    requests: Requests,
}

impl Link {
    fn status(&self, addresses: Vec<(IpAddr, u8)>) -> NicStatus {
        NicStatus {
            name: self.name.clone(),
            mac: self.mac,
            addresses,
        }
    }

    fn described(&self) -> String {
        format!("{} ({})", self.name, mac_text(self.mac))
    }

    /// Says on the guest's console what has come to it later.
    fn say(&self, text: &str) {
        let _ = writeln!(io::stderr(), "minivmm-agent: {}: {text}", self.described());
    }

    fn bring_up(&self) -> Result<(), Failure> {
        self.requests
            .bring_up(self.index)
            .map_err(|error| Failure::step(format!("bring up {}", self.described()), error))
    }

    fn add_address(&self, address: (IpAddr, u8)) -> Result<(), Failure> {
        self.requests
            .add_address(self.index, address)
            .map_err(|error| {
                let (address, length) = address;
                let action = format!("give {} the address {address}/{length}", self.described());
                Failure::step(action, error)
            })
    }

    fn add_route(&self, route: &Route, on_link: bool) -> Result<(), Failure> {
        let metric = FIRST_METRIC + self.number as u32;
        self.requests
            .add_route(self.index, route, metric, on_link)
            .map_err(|error| {
                let (to, length) = route.to;
                let mut action = format!("add a route to {to}/{length} by {}", self.described());
                if let Some(router) = route.via {
                    action += &format!(" and {router}");
                }
                Failure::step(action, error)
            })
    }

    /// Gives it these addresses alone: what routers advertise is not taken.
    fn set_static(&self, ip: &StaticIp, shared: &Shared) -> Result<NicStatus, Failure> {
        // A kernel without IPv6 has no such file.
        let accept = format!("/proc/sys/net/ipv6/conf/{}/accept_ra", self.name);
        let _ = fs::write(accept, "0");
        self.bring_up()?;
        for address in &ip.addresses {
            self.add_address(*address)?;
        }
        for gateway in &ip.gateways {
            let of_family = |(address, _): &&(IpAddr, u8)| address.is_ipv4() == gateway.is_ipv4();
            let mut own = ip.addresses.iter().filter(of_family);
            let on_link = own.all(|(address, length)| is_whole(*address, *length));
            self.add_route(&Route::default_by(*gateway), on_link)?;
        }
        let resolvers = Resolvers {
            given: ip.dns.clone(),
            ..Resolvers::default()
        };
        shared.resolv_conf.set(self.number, resolvers)?;
        Ok(self.status(ip.addresses.clone()))
    }

    /// Gets addresses from the network, and keeps them as long as the network says.
    fn follow(
        &self,
        shared: &Shared,
        deadline: Instant,
        report: &Report,
    ) -> Result<Infallible, Failure> {
        let failed = |error| Failure::step(format!("listen on {}", self.described()), error);
        let events = Events::of_ipv6().map_err(failed)?;
        self.bring_up()?;
        let mut memory = Memory::new(&shared.hostname);
        let client = Client::new(self.index, self.mac, &mut memory).map_err(failed)?;
        let mut state = Dhcp {
            link: self,
            shared,
            lease: None,
            resolvers: Resolvers::default(),
            advertised: false,
        };
        state.run(client, &events, deadline, report)
    }
}

/// Whether an address has no network around it, as some providers' have.
fn is_whole(address: IpAddr, length: u8) -> bool {
    length == if address.is_ipv4() { 32 } else { 128 }
}

/// What the network has given to a NIC.
struct Dhcp<'a> {
    link: &'a Link,
    shared: &'a Shared,
    lease: Option<Lease>,
    resolvers: Resolvers,
    /// Whether a router has advertised a prefix.
    advertised: bool,
}

impl Dhcp<'_> {
    fn run(
        &mut self,
        mut client: Client<'_>,
        events: &Events,
        deadline: Instant,
        report: &Report,
    ) -> Result<Infallible, Failure> {
        let start = Instant::now();
        let mut reported = false;
        loop {
            let changed = match client.poll() {
                Some(Change::Leased(lease)) => self.take(lease),
                Some(Change::Lost) => {
                    self.drop_lease();
                    Ok(())
                }
                None => Ok(()),
            };
            match changed.and_then(|()| self.hear(events)) {
                Err(failure) if !reported => return Err(failure),
                // The guest runs, and may have taken away what this needs. The next renewal tries again.
                Err(failure) => self.link.say(&chain(&failure)),
                Ok(()) => {}
            }
            let now = Instant::now();
            let mut timeout = client.wait();
            if !reported {
                let addresses = self.addresses();
                let lease_due = start + LEASE_PATIENCE;
                let without_lease = now >= lease_due.min(deadline) && !addresses.is_empty();
                if self.lease.is_some() || without_lease {
                    let _ = report.try_send(Ok(self.link.status(addresses)));
                    reported = true;
                } else if now >= deadline {
                    return Err(self.no_address(&client));
                } else {
                    let next = if now < lease_due {
                        lease_due.min(deadline)
                    } else {
                        deadline
                    };
                    timeout = timeout.min(next - now);
                }
            }
            wait(&[client.as_fd(), events.as_fd()], timeout);
        }
    }

    fn addresses(&self) -> Vec<(IpAddr, u8)> {
        let own = self
            .lease
            .as_ref()
            .map(|lease| (lease.address.into(), lease.prefix));
        let global = rtnetlink::global_addresses(self.link.index);
        own.into_iter().chain(global).collect()
    }

    /// Makes a lease the NIC's own.
    fn take(&mut self, lease: Lease) -> Result<(), Failure> {
        if self.lease.as_ref() == Some(&lease) {
            return Ok(());
        }
        self.delete_address();
        if let Some(mtu) = lease.mtu {
            // A server may say more than the NIC can.
            let _ = self.link.requests.set_mtu(self.link.index, mtu);
        }
        let address = lease.address.into();
        self.link.add_address((address, lease.prefix))?;
        let on_link = is_whole(address, lease.prefix);
        // Without a router first, by which the others may be reached.
        let (direct, routed): (Vec<_>, _) = lease.routes.iter().partition(|r| r.via.is_none());
        for route in direct.into_iter().chain(routed) {
            // A router that is not in the NIC's network is the server's mistake, and not the end of the NIC.
            let added = self.link.add_route(route, on_link);
            let _ = added.or_else(|_| self.link.add_route(route, true));
        }
        self.resolvers.given = lease
            .name_servers
            .iter()
            .copied()
            .map(IpAddr::from)
            .collect();
        self.resolvers.domain.clone_from(&lease.domain);
        self.shared.keep(self.link.mac, Some(&lease));
        self.lease = Some(lease);
        self.resolve()
    }

    /// Gives up a lease that is over. Name servers stay: others may reach them.
    fn drop_lease(&mut self) {
        if let Some(lease) = &self.lease {
            let address = lease.address;
            self.link.say(&format!("the lease of {address} is over"));
        }
        self.delete_address();
        self.shared.keep(self.link.mac, None);
    }

    fn delete_address(&mut self) {
        if let Some(lease) = self.lease.take() {
            let address = (lease.address.into(), lease.prefix);
            // It may be deleted already: root in the guest can.
            let _ = self.link.requests.delete_address(self.link.index, address);
        }
    }

    /// Takes what routers advertise.
    fn hear(&mut self, events: &Events) -> Result<(), Failure> {
        for advertised in events.take(self.link.index) {
            match advertised {
                Advertised::Prefix => self.advertised = true,
                Advertised::NameServers(servers, lifetime) => {
                    self.resolvers
                        .advertise(&servers, lifetime, &self.link.name);
                }
            }
        }
        self.resolve()
    }

    fn resolve(&self) -> Result<(), Failure> {
        let resolvers = self.resolvers.clone();
        self.shared.resolv_conf.set(self.link.number, resolvers)
    }

    fn no_address(&self, client: &Client<'_>) -> Failure {
        let ipv6 = if self.advertised {
            "a router advertised a prefix, and no address came of it"
        } else {
            "no router advertised a prefix"
        };
        Failure::NoAddress {
            nic: self.link.described(),
            seconds: self.shared.patience.as_secs(),
            dhcp: client.seen().to_string(),
            ipv6,
        }
    }
}
