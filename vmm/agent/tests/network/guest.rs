//! A guest's network without the guest: a process of the test binary itself, in namespaces of its own.

use std::io::{self, BufRead, BufReader, Write};
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;
use std::{env, error, fs, iter};

use agent::network;
use agent_protocol::boot::{IpConfig, Nic, NicStatus, StaticIp};
use agent_protocol::{read, write};

use crate::netns::Netns;

/// The guest's name.
pub const NAME: &str = "box";
/// Names the process among the tests, and the file that its root has as resolv.conf.
const PROCESS: &str = "NETWORK_TEST_RESOLV_CONF";

/// What came of a guest's NICs.
pub type Outcome = Result<Vec<NicStatus>, String>;

/// A process that configures the NICs of a namespace. It is killed with this value.
pub struct Guest {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

/// A NIC that gets its addresses from the network.
pub fn dhcp(mac: &str) -> Nic {
    nic(mac, IpConfig::Dhcp)
}

/// A NIC with addresses of its own.
pub fn fixed(mac: &str, addresses: &[&str], gateways: &[&str], dns: &[&str]) -> Nic {
    let ip = |text: &&str| text.parse::<IpAddr>().unwrap();
    let address = |text: &&str| {
        let (address, length) = text.split_once('/').unwrap();
        (address.parse().unwrap(), length.parse().unwrap())
    };
    nic(
        mac,
        IpConfig::Static(StaticIp {
            addresses: addresses.iter().map(address).collect(),
            gateways: gateways.iter().map(ip).collect(),
            dns: dns.iter().map(ip).collect(),
        }),
    )
}

/// A NIC with this MAC address.
pub fn nic(mac: &str, ip: IpConfig) -> Nic {
    let bytes: Vec<u8> = mac
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    let mac = bytes.try_into().unwrap();
    Nic { mac, ip }
}

impl Guest {
    /// Starts one whose resolv.conf leads to a file that is not there, as on a host with systemd-resolved.
    pub fn start(netns: &Netns, nics: &[Nic], patience: Duration) -> Self {
        Self::start_with(
            netns,
            nics,
            patience,
            "../run/systemd/resolve/stub-resolv.conf",
        )
    }

    /// Starts one whose resolv.conf is a symbolic link to `target`, or an empty file without one.
    pub fn start_with(netns: &Netns, nics: &[Nic], patience: Duration, target: &str) -> Self {
        let mut command: Command = netns.command(env::current_exe().unwrap());
        command
            .args(["--exact", "guest::configures_and_waits", "--nocapture"])
            .env(PROCESS, target)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut input = process.stdin.take().unwrap();
        write(&mut input, &(nics, patience)).unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        Self {
            process,
            input,
            output,
        }
    }

    /// Waits until it has configured its NICs.
    pub fn outcome(&mut self) -> Outcome {
        // The test harness puts its own words before.
        let mut line = String::new();
        while !line.ends_with("OUTCOME\n") {
            line.clear();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "it ended");
        }
        read(&mut self.output).unwrap()
    }

    /// A file of its root.
    pub fn file(&self, path: &str) -> String {
        let root = PathBuf::from(format!("/proc/{}/root", self.process.id()));
        fs::read_to_string(root.join(path)).unwrap_or_else(|error| format!("{path}: {error}"))
    }

    /// Has it give back its leases, and end.
    pub fn end(mut self) {
        drop(self.input);
        let status = self.process.wait().unwrap();
        assert!(status.success(), "{status}");
    }

    /// Whether it runs.
    pub fn runs(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }
}

/// The addresses of the one NIC of a guest.
pub fn addresses(outcome: &Outcome) -> Vec<String> {
    let [nic] = &outcome.as_ref().unwrap()[..] else {
        panic!("{outcome:?}")
    };
    let text = |(address, length): &(IpAddr, u8)| format!("{address}/{length}");
    nic.addresses.iter().map(text).collect()
}

/// Not a test by itself: the body of the processes.
#[test]
fn configures_and_waits() {
    let Ok(target) = env::var(PROCESS) else {
        return;
    };
    // Of this thread alone, which names the guest.
    // SAFETY: unshare takes flags, and a new UTS namespace shares no memory.
    let unshared = unsafe { libc::unshare(libc::CLONE_NEWUTS) };
    assert_eq!(unshared, 0, "{}", io::Error::last_os_error());
    // `ip netns exec` has given it a mount namespace.
    for directory in ["/etc", "/run"] {
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", directory, "tmpfs", flags, None).unwrap();
    }
    match &target[..] {
        "" => fs::write("/etc/resolv.conf", "nameserver 127.0.0.53\n").unwrap(),
        target => symlink(target, "/etc/resolv.conf").unwrap(),
    }
    let (nics, patience): (Vec<Nic>, Duration) = read(io::stdin()).unwrap();
    let network = network::configure(NAME, &nics, patience);
    let outcome: Outcome = match &network {
        Ok(network) => Ok(network.nics.clone()),
        Err(failure) => {
            let first: Option<&dyn error::Error> = Some(failure);
            let chain = iter::successors(first, |error| error.source());
            Err(chain
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(": "))
        }
    };
    let mut output = io::stdout();
    output.write_all(b"OUTCOME\n").unwrap();
    write(&mut output, &outcome).unwrap();
    output.flush().unwrap();
    let _ = io::stdin().read_line(&mut String::new());
    if let Ok(network) = network {
        network.release();
    }
}
