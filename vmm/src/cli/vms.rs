//! The commands that find running VMs, as typed.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use serde_json::{Map, Value};

use crate::config::{Condition, ConfigError, Patience, VmName};

pub(super) const WAIT_HELP: &str = "\
Conditions, by what the guest shows without any agent in it:
  address        it uses an IPv4 address, or an IPv6 one that is not of its link alone; printed on stdout
  port=N         it takes a connection on this TCP port. This host's own addresses are tried, which reach
                 guests by a host link or a router; and beside a guest in bridge mode, with root's rights,
                 a link of this program's own, which reaches the guest's link-local IPv6 address
  console=REGEX  a line of its console has this in it, also of the 64 KiB that it said last. The last
                 line counts before it has ended, but has no end ($) then
  exit           it has ended

And by what is in it:
  agent          minivmm's agent answers, so that `minivmm exec` and `minivmm cp` work

Exit status:
    0  all conditions were met; of the VM, where one is exit
    1  the VM ended before, or there is none
  124  the time is over

Example:
  minivmm -d --name web --kernel bzImage --macvtap eno1 && minivmm wait web --for port=22";

/// `minivmm qmp`.
#[derive(Clone, Debug, Args)]
pub struct QmpArgs {
    /// The VM, or the path of a QMP socket: with a slash, as in ./vm.qmp
    #[arg(value_name = "NAME|PATH")]
    pub target: Target,

    /// The command, as in query-status
    pub command: String,

    /// Its arguments
    #[arg(value_name = "JSON", default_value = "{}", hide_default_value = true, value_parser = object)]
    pub arguments: Map<String, Value>,
}

/// `minivmm stats`.
#[derive(Clone, Debug, Args)]
pub struct StatsArgs {
    /// The VM, or the path of a QMP socket: with a slash, as in ./vm.qmp
    #[arg(value_name = "NAME|PATH")]
    pub target: Target,

    /// Again and again, each time so many seconds later, 1 by default: what came a second, until the
    /// VM ends
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        default_missing_value = "1",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub watch: Option<u32>,

    /// As JSON, with --watch a line each time: totals, as x-minivmm-stats has them
    #[arg(long)]
    pub json: bool,
}

/// Whom `minivmm qmp` speaks to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A VM of this name.
    Vm(VmName),
    /// Whoever serves this socket.
    Socket(PathBuf),
}

impl FromStr for Target {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.contains('/') {
            true => Ok(Self::Socket(text.into())),
            false => text.parse().map(Self::Vm),
        }
    }
}

/// The arguments of a command of QMP's.
fn object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text)
        .map_err(|error| format!("not a JSON object, as in {{\"id\": \"disk0\"}}: {error}"))
}

pub(super) const PS_HELP: &str = "\
--json shows a list with an object for each VM. Its keys stay what they are; others may be added:
  name, pid
  state      running, paused or another status of QMP's query-status; starting, unresponsive when
             it does not answer within 2 seconds, and ended
  started    in seconds since 1970
  uptime     in seconds
  kernel     what it runs, or
  program    what it runs as QEMU without a kernel of minivmm's
  nics       a list of objects: mac, and addresses, a list of those that the guest has shown
  qmp        the paths of its control sockets, a list
  vsock      with --vsock: the path of that socket
  console    the path of the socket of its console
  log        the path of its log
  detached   whether it was started with -d
  ended      with --all: an object with status, the exit status of its process, reason, a text,
             and at, in seconds since 1970
  owner      its process, as on the links that it makes
  version    of all this: 1";

/// `minivmm ps`.
#[derive(Clone, Debug, Args)]
pub struct PsArgs {
    /// Only these VMs
    pub name: Vec<VmName>,

    /// Those of -d that have ended too, of which the last 16 are known
    #[arg(short, long)]
    pub all: bool,

    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// `minivmm console`.
#[derive(Clone, Debug, Args)]
pub struct ConsoleArgs {
    /// The VM, as `minivmm ps` shows it
    pub name: VmName,

    /// Only shows what the VM said last, up to 64 KiB
    #[arg(long)]
    pub dump: bool,
}

/// `minivmm logs`.
#[derive(Clone, Debug, Args)]
pub struct LogsArgs {
    /// The VM
    pub name: VmName,
}

/// `minivmm stop`.
#[derive(Clone, Debug, Args)]
pub struct StopArgs {
    /// The VMs
    #[arg(required = true)]
    pub name: Vec<VmName>,

    /// How long they may take to power off; what their --stop-timeout says by default
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u32>,
}

/// `minivmm kill`.
#[derive(Clone, Debug, Args)]
pub struct KillArgs {
    /// The VMs
    #[arg(required = true)]
    pub name: Vec<VmName>,
}

/// `minivmm wait`.
#[derive(Clone, Debug, Args)]
pub struct WaitArgs {
    /// The VM, as `minivmm ps` shows it
    pub name: VmName,

    /// What it is to come to; of several all, one after the other
    #[arg(long = "for", value_name = "CONDITION", required = true)]
    pub conditions: Vec<Condition>,

    /// How long to wait at most, as in 500ms, 60s or 5m; 0 is for ever
    #[arg(long, value_name = "TIME", default_value = "60s")]
    pub timeout: Patience,
}
