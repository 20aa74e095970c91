//! passt, the program at the other end of a user network: its start, and its end while the guest runs.

use std::fs::{self, Permissions};
use std::io::{self, ErrorKind, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::time::Duration;

use devices::virtio::net::NetConfig;
use devices::virtio::net::config::ConfigSpace;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use net::MacAddr;
use rustix::net::sockopt;

use crate::config::{Forward, Protocol, UserNet};
use crate::service::{Service, ServiceError};

/// The largest IP packet that passt takes and announces.
const MTU: u16 = 65520;
/// What a burst of frames may need: one that finds no room in the socket is lost.
const SOCKET_BUFFER: usize = 8 << 20;
/// A protocol that is no one's (IEEE 802a).
const LOCAL_EXPERIMENT: u16 = 0x88b5;
const SHORTEST_FRAME: usize = 60;
/// How long it may take to start on a host that is busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// Its number of the socket.
const SOCKET: RawFd = 3;
/// Its number of the pipe that it writes its process id to when it is ready: later versions close all other
/// descriptors before.
const READY: RawFd = 0;

/// What it gives the guest where the host has no route for it to go by; the addresses of QEMU's user network.
const ISOLATED: [&str; 10] = [
    "-a",
    "10.0.2.15",
    "-n",
    "24",
    "-g",
    "10.0.2.2",
    "-i",
    "lo",
    "-M",
    "52:55:0a:00:02:02",
];

/// Where systemd's resolver says which ones it asks itself.
const UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";

/// Why there is no user network.
#[derive(Debug, thiserror::Error)]
pub enum PasstError {
    /// It is not installed.
    #[error("there is no program passt, which makes the network of --user-net")]
    Missing,
    /// It does not know an option.
    #[error("the host's passt is too old for --user-net: {said}")]
    TooOld {
        /// What it said last.
        said: String,
    },
    /// It cannot do what it is to do.
    #[error(
        "passt, which makes the network of --user-net, has ended at its start ({status}): {said}"
    )]
    Ended {
        /// Its status.
        status: ExitStatus,
        /// What it said last.
        said: String,
    },
    /// It does not start, or does not get ready.
    #[error(transparent)]
    Service(ServiceError),
    /// Another program has the port, or this user may not have it.
    #[error("cannot forward {0} to the guest")]
    Port(Forward, #[source] io::Error),
    /// The host refuses something small.
    #[error("cannot {0} for passt")]
    Host(&'static str, #[source] io::Error),
}

impl PasstError {
    /// What to do about it, where the text does not say it.
    pub fn remedy(&self) -> Option<String> {
        let remedy = match self {
            Self::Missing => "install the package passt",
            Self::TooOld { .. } => "update the package passt (2022_11_16 or later)",
            Self::Port(_, error) if error.kind() == ErrorKind::AddrInUse => {
                "choose another port with hostfwd="
            }
            Self::Port(_, error) if error.kind() == ErrorKind::PermissionDenied => {
                "choose a port from 1024 on with hostfwd="
            }
            _ => return None,
        };
        Some(remedy.to_owned())
    }
}

/// A passt that has been started.
#[derive(Debug)]
pub struct Passt {
    /// Our end.
    pub socket: UnixStream,
    /// Ends it when dropped.
    pub service: Service,
    /// The guest's MAC address.
    pub mac: MacAddr,
}

/// The same before it is ready.
#[derive(Debug)]
pub struct Starting {
    passt: Passt,
    ready: io::PipeReader,
    forwards: Vec<Forward>,
}

impl Starting {
    /// Starts it for `net`, in the calling thread's network namespace. It is ended with this thread.
    ///
    /// # Errors
    ///
    /// See [`PasstError`].
    pub fn new(net: &UserNet) -> Result<Self, PasstError> {
        net.forwards.iter().try_for_each(must_be_free)?;
        let failed_to = |what| move |error| PasstError::Host(what, error);
        let mac = net.mac.map_or_else(MacAddr::random, Ok);
        let mac = mac.map_err(failed_to("choose a MAC address"))?;
        let (socket, its) = UnixStream::pair().map_err(failed_to("make a socket"))?;
        enlarge(&socket);
        enlarge(&its);
        introduce(mac, &socket).map_err(failed_to("write to a socket"))?;
        let (ready, its_ready) = io::pipe().map_err(failed_to("make a pipe"))?;
        // It opens it by its path, as another user where root starts it.
        fs::set_permissions(path_of(&its_ready), Permissions::from_mode(0o622))
            .map_err(failed_to("change the mode of a pipe"))?;
        let placed = vec![(SOCKET, its.into()), (READY, its_ready.into())];
        let service = Service::start("passt", command(net), placed);
        let service = service.map_err(|error| match error {
            ServiceError::Start(_, why) if why.kind() == ErrorKind::NotFound => PasstError::Missing,
            error => PasstError::Service(error),
        });
        let passt = Passt {
            socket,
            service: service?,
            mac,
        };
        Ok(Self {
            passt,
            ready,
            forwards: net.forwards.clone(),
        })
    }

    /// Waits until it forwards.
    ///
    /// # Errors
    ///
    /// See [`PasstError`].
    pub fn finish(mut self) -> Result<Passt, PasstError> {
        let ready = self.ready.as_fd();
        match self.passt.service.wait_ready(ready, PATIENCE) {
            Ok(()) => Ok(self.passt),
            Err(ServiceError::Ended { status, said, .. }) => {
                // Another program may have been quicker.
                self.forwards.iter().try_for_each(must_be_free)?;
                Err(ended(status, &said))
            }
            Err(error) => Err(PasstError::Service(error)),
        }
    }
}

impl Passt {
    /// What the guest finds in its NIC.
    pub fn config(&self) -> NetConfig {
        NetConfig {
            mac: self.mac.octets(),
            mtu: MTU,
        }
    }
}

fn command(net: &UserNet) -> Command {
    let mut command = Command::new("passt");
    command.args(["--foreground", "--fd", &SOCKET.to_string()]);
    command.args(["--pid", &format!("/proc/self/fd/{READY}")]);
    command.args(["--mtu", &MTU.to_string()]);
    // By the gateway's address the guest would reach what listens on the host's loopback alone.
    command.arg("--no-map-gw");
    if !has_default_route() {
        log::warn!(
            "the host has no default route: the guest gets the address 10.0.2.15/24 and can be reached by the ports of \
             hostfwd= alone"
        );
        command.args(ISOLATED);
    }
    for server in name_servers() {
        command.args(["--dns", &server.to_string()]);
    }
    for forward in &net.forwards {
        let option = match forward.protocol {
            Protocol::Tcp => "--tcp-ports",
            Protocol::Udp => "--udp-ports",
        };
        let address = forward.address.map(|address| format!("{address}/"));
        let address = address.unwrap_or_default();
        let (port, guest_port) = (forward.port, forward.guest_port);
        command.args([option, &format!("{address}{port}:{guest_port}")]);
    }
    command
}

/// Why it has ended, by what it `said`.
fn ended(status: ExitStatus, said: &str) -> PasstError {
    log::debug!("passt: {said}");
    // Beside that it cannot log, and how it is used.
    let lines = said.lines().map(str::trim);
    let mut lines = lines.filter(|line| !line.starts_with("Failed to send"));
    let unknown =
        |line: &&str| line.contains("unrecognized option") || line.contains("invalid option");
    match lines.clone().find(unknown) {
        Some(line) => PasstError::TooOld {
            said: line.to_owned(),
        },
        None => PasstError::Ended {
            status,
            said: lines
                .rfind(|line| !line.is_empty())
                .unwrap_or("nothing")
                .to_owned(),
        },
    }
}

/// Refuses a port that another program has. passt binds what it can, of IPv4 and IPv6.
fn must_be_free(forward: &Forward) -> Result<(), PasstError> {
    let all = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    let addresses = forward
        .address
        .map_or(all.to_vec(), |address| vec![address]);
    for address in addresses {
        let at = (address, forward.port);
        let bound = match forward.protocol {
            Protocol::Tcp => TcpListener::bind(at).map(drop),
            Protocol::Udp => UdpSocket::bind(at).map(drop),
        };
        let is_free = match &bound {
            // The host may lack one of the two.
            Err(error) if forward.address.is_none() => {
                let kind = error.kind();
                kind != ErrorKind::AddrInUse && kind != ErrorKind::PermissionDenied
            }
            bound => bound.is_ok(),
        };
        if !is_free {
            return bound.map_err(|error| PasstError::Port(*forward, error));
        }
    }
    Ok(())
}

/// Without rights it becomes as large as the host allows everybody.
fn enlarge(socket: &UnixStream) {
    let _ = sockopt::set_socket_send_buffer_size_force(socket, SOCKET_BUFFER)
        .or_else(|_| sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER));
}

/// Has passt know the guest's MAC address by a frame that means nothing. It takes it from what the guest sends, and a guest
/// that waits for connections may send nothing before the first one.
fn introduce(mac: MacAddr, mut socket: &UnixStream) -> io::Result<()> {
    let header = [
        &[0xff; 6][..],
        &mac.octets(),
        &LOCAL_EXPERIMENT.to_be_bytes(),
    ]
    .concat();
    let mut frame = vec![0; 4 + SHORTEST_FRAME];
    frame[..4].copy_from_slice(&(SHORTEST_FRAME as u32).to_be_bytes());
    frame[4..][..header.len()].copy_from_slice(&header);
    socket.write_all(&frame)
}

/// Whether packets of either IP leave the host. Where that cannot be seen, they do.
fn has_default_route() -> bool {
    // Of this thread's network namespace.
    let read = |table| fs::read_to_string(format!("/proc/thread-self/net/{table}"));
    let Ok(ipv4) = read("route") else {
        return true;
    };
    is_default_in_ipv4(&ipv4) || read("ipv6_route").is_ok_and(|table| is_default_in_ipv6(&table))
}

/// Whether the kernel's table has a default route: destination and mask are 0.
fn is_default_in_ipv4(table: &str) -> bool {
    table.lines().any(|line| {
        let columns: Vec<_> = line.split_whitespace().collect();
        (columns.get(1), columns.get(7)) == (Some(&"00000000"), Some(&"00000000"))
    })
}

/// The same: the length of the prefix is 0. That by the loopback refuses all.
fn is_default_in_ipv6(table: &str) -> bool {
    table.lines().any(|line| {
        let columns: Vec<_> = line.split_whitespace().collect();
        columns.get(1) == Some(&"00") && columns.last() != Some(&"lo")
    })
}

/// The name servers for the guest, if passt is not to take those of the host's resolv.conf: a guest reaches none on the
/// host's loopback.
fn name_servers() -> Vec<IpAddr> {
    let servers = |path| fs::read_to_string(path).map_or(Vec::new(), |text| servers_of(&text));
    let is_reached = |server: &IpAddr| !server.is_loopback();
    let hosts = servers("/etc/resolv.conf");
    if hosts.is_empty() || hosts.iter().any(is_reached) {
        return Vec::new();
    }
    let upstream: Vec<_> = servers(UPSTREAM).into_iter().filter(is_reached).collect();
    if upstream.is_empty() {
        log::warn!(
            "the host's name server is on its loopback ({}), where the guest does not reach it: it gets none",
            hosts[0]
        );
    }
    upstream
}

fn servers_of(resolv_conf: &str) -> Vec<IpAddr> {
    let lines = resolv_conf.lines().map(str::split_whitespace);
    let servers =
        lines.filter_map(|mut words| (words.next()? == "nameserver").then(|| words.next())?);
    servers.filter_map(|server| server.parse().ok()).collect()
}

fn path_of(fd: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Takes the guest's link down when passt has hung up.
#[derive(Debug)]
pub struct HangUp {
    /// The NIC, in logs.
    pub label: String,
    /// Has the NIC's link state.
    pub guest: Arc<ConfigSpace>,
    /// Our end.
    pub socket: UnixStream,
}

impl MutEventSubscriber for HangUp {
    fn init(&mut self, ops: &mut EventOps) {
        // A hang-up is always reported.
        if let Err(error) = ops.add(Events::new(&self.socket, EventSet::empty())) {
            log::warn!("{}: cannot follow its passt: {error}", self.label);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let _ = ops.remove(events);
        self.guest.set_carrier(false);
        log::warn!(
            "{}: passt has hung up: the guest runs on without this NIC's link",
            self.label
        );
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn default_routes_are_seen() {
        let head =
            "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";
        let local = "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        let default = "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n";
        assert!(!is_default_in_ipv4(&format!("{head}{local}")));
        assert!(is_default_in_ipv4(&format!("{head}{local}{default}")));
        let route = |prefix, interface| {
            let zeros = "0".repeat(32);
            format!("{zeros} {prefix} {zeros} 00 {zeros} 00000400 1 0 00000003 {interface}\n")
        };
        assert!(is_default_in_ipv6(&route("00", "eth0")));
        assert!(!is_default_in_ipv6(
            &(route("00", "lo") + &route("40", "eth0"))
        ));
    }

    #[test]
    fn name_servers_are_read() {
        let text = "# made\nnameserver 127.0.0.53\noptions edns0\n nameserver  fd00::1\nnameserver fe80::1%2\nsearch x\n";
        let servers = servers_of(text);
        let expected: [IpAddr; 2] = ["127.0.0.53", "fd00::1"].map(|text| text.parse().unwrap());
        assert_eq!(servers, expected);
    }

    #[test]
    fn passt_that_has_ended_is_quoted_without_its_noise() {
        let status = ExitStatus::from_raw(1 << 8);
        let text = |said| ended(status, said).to_string();
        let said = "Failed to send 47 bytes to syslog\nDon't run as root. Changing to nobody...\n\
                    Failed to bind any port for '-t 22', exiting\nFailed to send 40 bytes to syslog\n\n";
        assert!(
            text(said).ends_with("(exit status: 1): Failed to bind any port for '-t 22', exiting")
        );
        let said = "passt: unrecognized option '--fd'\nUsage: passt [OPTION]...\n";
        let old = ended(status, said);
        assert!(
            old.to_string()
                .ends_with("too old for --user-net: passt: unrecognized option '--fd'")
        );
        assert!(old.remedy().unwrap().contains("the package passt"));
        assert!(text("").ends_with(": nothing"));
    }

    #[test]
    fn port_that_is_taken_is_named() {
        let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let mut forward = Forward {
            protocol: Protocol::Tcp,
            address: None,
            port,
            guest_port: 22,
        };
        let error = must_be_free(&forward).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("cannot forward tcp port {port} to the guest")
        );
        assert!(error.remedy().unwrap().contains("another port"));
        forward.address = Some(Ipv4Addr::new(192, 0, 2, 77).into());
        let error = must_be_free(&forward).unwrap_err();
        assert!(error.to_string().contains("of 192.0.2.77"), "{error}");
        forward.protocol = Protocol::Udp;
        forward.address = Some(Ipv4Addr::LOCALHOST.into());
        let taken = UdpSocket::bind(("127.0.0.1", port)).unwrap();
        assert!(must_be_free(&forward).is_err());
        drop(taken);
        assert!(must_be_free(&forward).is_ok());
    }
}
