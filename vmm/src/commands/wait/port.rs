//! Whether a guest takes a TCP connection.
//!
//! The host's own addresses reach a guest by a host link or a router. Beside a guest in bridge mode a
//! [`Station`] of this program's own reaches its link-local IPv6 address, if this program may make
//! one; none of that leaves the host, but for the guest's own question who that is.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::num::NonZeroU16;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use net::{Mode, Station};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

use super::vm::{Nic, Vm, is_of_link};
use super::{Deadline, Met};
use crate::control::exit::chain;
use crate::qmp::client::ClientError;

/// How often a connection is tried. Each is a new one: the kernel itself would only try again after a second.
const INTERVAL: Duration = Duration::from_millis(50);
/// How long one may take to be answered.
const ANSWER: Duration = Duration::from_secs(1);
/// As many addresses of a NIC are tried, the latest: a guest can make up any number.
const MOST: usize = 4;

/// Where a connection is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Target {
    /// The number of the NIC whose station it is tried from.
    station: Option<usize>,
    address: IpAddr,
}

/// A connection that is on its way.
#[derive(Debug)]
struct Attempt {
    target: Target,
    socket: OwnedFd,
    since: Instant,
}

/// The ways to a guest.
#[derive(Debug)]
struct Ways {
    port: NonZeroU16,
    /// For each NIC one, or why there is none.
    stations: Vec<Result<Station, String>>,
    attempts: Vec<Attempt>,
    /// What came of the last attempt for each target.
    results: BTreeMap<Target, String>,
}

/// Why a guest on user networks alone is not waited for: a connection that is taken would be no sign of it.
const USER_NET: &str = "on a user network the host does not reach the guest's addresses, and passt takes connections to \
                        the ports of hostfwd= whether the guest does or not";

/// Waits until a connection is taken.
pub(super) fn wait(vm: &mut Vm, port: NonZeroU16, deadline: Deadline) -> Result<Met, ClientError> {
    if !vm.nics.is_empty() && vm.nics.iter().all(|nic| nic.user_net) {
        return Ok(Met::Not(USER_NET.into()));
    }
    let mut ways = Ways {
        port,
        stations: vm.nics.iter().map(station).collect(),
        attempts: Vec::new(),
        results: BTreeMap::new(),
    };
    let mut next = Instant::now();
    loop {
        vm.listen(Instant::now())?;
        let now = Instant::now();
        if vm.has_ended || deadline.is_over() {
            return Ok(Met::Not(ways.describe()));
        }
        if now >= next {
            next = now + INTERVAL;
            ways.begin(vm);
        }
        let wait = deadline.cap(next).saturating_duration_since(now);
        if ways.look(vm, wait) {
            return Ok(Met::Yes);
        }
    }
}

fn station(nic: &Nic) -> Result<Station, String> {
    let tap = nic
        .tap
        .as_ref()
        .ok_or("there is no record of its macvtap")?;
    if tap.mode != Some(Mode::Bridge) {
        return Err("its macvtap is not in bridge mode".into());
    }
    let lower = tap.lower_id.ok_or("its interface is not known")?;
    Station::on(lower).map_err(|error| chain(&error))
}

impl Ways {
    /// Begins a connection to each address.
    fn begin(&mut self, vm: &Vm) {
        let on_wires = vm.nics.iter().enumerate().filter(|(_, nic)| !nic.user_net);
        for (n, nic) in on_wires {
            for &address in nic.addresses.iter().rev().take(MOST) {
                let station = is_of_link(&address).then_some(n);
                let target = Target { station, address };
                match self.connect(target, nic) {
                    Ok(Some(socket)) => self.attempts.push(Attempt {
                        target,
                        socket,
                        since: Instant::now(),
                    }),
                    Ok(None) => {}
                    Err(error) => drop(self.results.insert(target, error.to_string())),
                }
            }
        }
    }

    /// Begins a connection, if there is a way.
    fn connect(&self, target: Target, nic: &Nic) -> io::Result<Option<OwnedFd>> {
        let (socket, to) = match (target.station, target.address) {
            (None, address) => {
                let family = match address {
                    IpAddr::V4(_) => AddressFamily::INET,
                    IpAddr::V6(_) => AddressFamily::INET6,
                };
                let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                let socket = socket_with(family, SocketType::STREAM, flags, None)?;
                (socket, SocketAddr::new(address, self.port.get()))
            }
            (Some(n), IpAddr::V6(address)) => {
                let Some(Ok(station)) = self.stations.get(n) else {
                    return Ok(None);
                };
                if let Some(tap) = &nic.tap
                    && !self.results.contains_key(&target)
                {
                    station.introduce(address, tap.mac)?;
                }
                let to = SocketAddrV6::new(address, self.port.get(), 0, station.scope());
                (station.socket()?, to.into())
            }
            (Some(_), IpAddr::V4(_)) => return Ok(None),
        };
        match connect(&socket, &to) {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(Some(socket)),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for an answer, and says whether it is a connection.
    fn look(&mut self, vm: &Vm, time: Duration) -> bool {
        let sockets = self.attempts.iter().map(|attempt| attempt.socket.as_fd());
        let watch = |fd| PollFd::from_borrowed_fd(fd, PollFlags::OUT);
        let mut watched: Vec<_> = sockets.map(watch).collect();
        watched.push(PollFd::from_borrowed_fd(vm.as_fd(), PollFlags::IN));
        let _ = poll(&mut watched, Timespec::try_from(time).ok().as_ref());
        let ready: Vec<_> = watched.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut is_met = false;
        for (attempt, is_ready) in std::mem::take(&mut self.attempts).into_iter().zip(ready) {
            if is_ready {
                match sockopt::socket_error(&attempt.socket) {
                    Ok(Ok(())) => is_met = true,
                    Ok(Err(error)) | Err(error) => {
                        self.results
                            .insert(attempt.target, io::Error::from(error).to_string());
                    }
                }
            } else if attempt.since.elapsed() < ANSWER {
                self.attempts.push(attempt);
            } else {
                self.results.insert(attempt.target, "no answer".into());
            }
        }
        is_met
    }

    /// What was seen of the guest.
    fn describe(&self) -> String {
        let result = |(target, result): (&Target, &String)| format!("{}: {result}", target.address);
        let mut seen: Vec<_> = self.results.iter().map(result).collect();
        let pending = self.attempts.iter().map(|attempt| attempt.target);
        let pending = pending.filter(|target| !self.results.contains_key(target));
        let pending: BTreeSet<_> = pending.map(|target| target.address).collect();
        seen.extend(
            pending
                .iter()
                .map(|address| format!("{address}: no answer")),
        );
        if seen.is_empty() {
            seen.push("the guest has shown no address that can be reached".into());
        }
        let why = self
            .stations
            .iter()
            .find_map(|station| station.as_ref().err());
        seen.extend(why.map(|why| {
            format!(
                "this program has no link of its own beside the guest's ({why}), and without one this host reaches \
                 its guests by a host link alone: --host-link, or `minivmm net host-link`"
            )
        }));
        seen.join("; ")
    }
}
