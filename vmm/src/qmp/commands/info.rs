//! What `minivmm ps` shows of a virtual machine besides its record.

use std::net::IpAddr;

use devices::virtio::net::NetHandle;
use net::MacAddr;
use serde::{Deserialize, Serialize};

use super::run::status;
use super::{Command, NoArguments};
use crate::control::event_loop::Control;

/// The command.
pub const QUERY_INFO: &str = "x-minivmm-info";

pub(super) const COMMANDS: &[Command] = &[Command {
    name: QUERY_INFO,
    run: |control, arguments, reply| {
        arguments.answer(reply, |NoArguments {}| Ok(Info::of(control)));
    },
}];

/// What changes while a virtual machine runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Info {
    /// RunState of QEMU: `running`, `paused` and so on.
    pub status: String,
    /// How many seconds it has to power off by itself when it is asked to.
    pub stop_timeout: u64,
    /// Its NICs, in order.
    pub nics: Vec<NicInfo>,
}

/// A NIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicInfo {
    /// Its MAC address, if it has a proper one.
    pub mac: Option<MacAddr>,
    /// The addresses that the guest has shown.
    pub addresses: Vec<IpAddr>,
    /// It is on a user network, where the host does not reach them.
    #[serde(default)]
    pub user_net: bool,
}

impl Info {
    fn of(control: &Control) -> Self {
        Self {
            status: status(control.state()).to_owned(),
            stop_timeout: control.grace().as_secs(),
            nics: control
                .nics
                .iter()
                .map(|nic| NicInfo::of(nic, control))
                .collect(),
        }
    }
}

impl NicInfo {
    fn of(nic: &NetHandle, control: &Control) -> Self {
        Self {
            mac: MacAddr::try_from(nic.config().mac()).ok(),
            addresses: nic.observer().addresses(),
            user_net: control.user_nets.iter().any(|name| name == nic.name()),
        }
    }
}
