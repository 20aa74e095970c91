//! What a running VM says of itself, by QMP.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use net::TapInfo;
use serde_json::{Value, json};

use crate::instance::Found;
use crate::nic::registry;
use crate::qmp::client::{Client, ClientError};
use crate::qmp::commands::info::{Info, QUERY_INFO};

/// How long the VM's control thread may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long the last event of a VM that has ended may take.
const LAST_EVENT: Duration = Duration::from_secs(2);

/// The exit status of a process that could not say its own: of SIGKILL, as of a shell.
const KILLED: u8 = 128 + 9;

/// A VM and what is known of it.
#[derive(Debug)]
pub(super) struct Vm {
    client: Client,
    /// Its NICs, in order.
    pub nics: Vec<Nic>,
    /// It has ended.
    pub has_ended: bool,
    /// Its exit status, and how it ended.
    exit: Option<(u8, String)>,
}

/// A NIC.
#[derive(Debug)]
pub(super) struct Nic {
    /// What the guest has said its addresses are, the oldest first.
    pub addresses: Vec<IpAddr>,
    /// Its macvtap, if there is a record of it.
    pub tap: Option<TapInfo>,
    /// It is on a user network, whose addresses the host does not reach.
    pub user_net: bool,
}

impl Vm {
    /// Asks the VM for what it knows now, and has it say what comes.
    pub fn connect(vm: &Found) -> Result<Self, ClientError> {
        let mut client = vm.connect(ANSWER)?;
        let info = client.execute(QUERY_INFO, json!({}))?;
        let info: Info = serde_json::from_value(info).map_err(|_| ClientError::NoQmp)?;
        let recorded = registry::running().into_iter();
        let mut recorded = recorded.filter(|entry| entry.owner == vm.record.owner);
        let taps = recorded.next().map_or_else(Vec::new, |entry| entry.nics);
        let nic = |nic: crate::qmp::commands::info::NicInfo| Nic {
            tap: taps
                .iter()
                .map(|entry| &entry.tap)
                .find(|tap| Some(tap.mac) == nic.mac)
                .cloned(),
            addresses: nic.addresses,
            user_net: nic.user_net,
        };
        Ok(Self {
            client,
            nics: info.nics.into_iter().map(nic).collect(),
            has_ended: false,
            exit: None,
        })
    }

    /// Takes what it has said, or waits until then for the next that it says.
    pub fn listen(&mut self, until: Instant) -> Result<(), ClientError> {
        let mut until = until;
        loop {
            match self.client.next_event(until) {
                Ok(Some((name, data))) => self.note(&name, &data),
                Ok(None) => return Ok(()),
                Err(ClientError::Closed) => {
                    self.has_ended = true;
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
            until = Instant::now();
        }
    }

    fn note(&mut self, name: &str, data: &Value) {
        let text = |key: &str| data[key].as_str().unwrap_or_default();
        match name {
            "SHUTDOWN" => self.exit = Some(end(text("reason"))),
            "X_MINIVMM_EXIT" => {
                let status = data["status"].as_u64();
                let status = status.and_then(|status| status.try_into().ok());
                self.exit = Some((status.unwrap_or(1), text("text").to_owned()));
            }
            "X_MINIVMM_ADDRESS" => {
                // `net0` is the first.
                let number = text("nic").strip_prefix("net").and_then(|n| n.parse().ok());
                let nic = number.and_then(|n: usize| self.nics.get_mut(n));
                if let (Some(nic), Ok(address)) = (nic, text("address").parse()) {
                    nic.addresses.push(address);
                }
            }
            _ => {}
        }
    }

    /// Takes the last that it says: its console has ended.
    pub fn await_end(&mut self) {
        let deadline = Instant::now() + LAST_EVENT;
        while !self.has_ended && Instant::now() < deadline {
            if let Err(error) = self.listen(deadline) {
                log::debug!("no last event: {error}");
                break;
            }
        }
        self.has_ended = true;
    }

    /// The exit status of its process and how it has ended, once it has.
    pub fn exit(&self) -> (u8, String) {
        let unknown = || (KILLED, "it was killed".to_owned());
        self.exit.clone().unwrap_or_else(unknown)
    }

    /// All addresses that reach further than its link.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let all = self
            .nics
            .iter()
            .flat_map(|nic| nic.addresses.iter().copied());
        all.filter(|address| !is_of_link(address))
    }
}

/// The exit status that goes with a reason for the end (ShutdownCause of QEMU), and the reason in
/// words: where QEMU runs the guest, nothing says more.
fn end(reason: &str) -> (u8, String) {
    let (status, how) = match reason {
        "guest-shutdown" => (0, "the guest powered off"),
        "guest-reset" => (0, "the guest asked for a reboot"),
        "guest-panic" => (4, "the guest's kernel panicked"),
        "host-signal" => (128 + 15, "ended by a signal"),
        "host-error" => (3, "the guest crashed"),
        _ => (0, "ended on request"),
    };
    (status, how.to_owned())
}

/// Readable when it has said something more than [`Vm::listen`] has taken.
impl AsFd for Vm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.client.as_fd()
    }
}

/// Whether an address reaches its own link alone (RFC 3927, RFC 4291).
pub(super) fn is_of_link(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}
