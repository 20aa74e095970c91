//! `minivmm net`, as typed.

use std::ffi::OsString;

use clap::{Args, Subcommand};
use net::{InterfaceAddress, LinkName, MacvtapSpec, NewLinkName};

use crate::config::parse_macvtap;

/// The subcommands of `minivmm net`.
#[derive(Clone, Debug, Subcommand)]
pub enum NetCommand {
    /// Makes a macvtap and runs a program with its queue as file descriptor 3
    #[command(after_help = OPEN_HELP)]
    Open(OpenArgs),
    /// Makes the macvlan by which the host itself can talk to its guests, or deletes it
    HostLink(HostLinkArgs),
    /// Lists the macvtaps and macvlans of each interface, and the addresses of running guests
    List(ListArgs),
    /// Deletes stale macvtaps, which killed programs have left
    Gc,
}

const OPEN_HELP: &str = "\
The program finds in its environment:
  MINIVMM_NET_FDS    the queues' file descriptors, as in 3 or 3:4
  MINIVMM_NET_MAC    the MAC address that the guest has to use
  MINIVMM_NET_MTU    the MTU in bytes
  MINIVMM_NET_MODE   the macvtap's mode
  MINIVMM_NET_NAME   the macvtap's name
  MINIVMM_NET_LOWER  its lower interface
  MINIVMM_NET_LOWER_ID  the inode of that one's network namespace, and its index there, as in
                     4026531840:2
  MINIVMM_NET_ID     the same of the macvtap
  MINIVMM_NET_WATCH  file descriptor of a netlink socket (rtnetlink, group link) in the macvtap's
                     network namespace, subscribed to its link state

Example, a guest without any right but to /dev/kvm:
    minivmm net open eno1 --user me -- minivmm --kernel bzImage --macvtap fd=3
There minivmm takes from the environment what the descriptor does not have, the MTU
above all, and watches the link by the socket.

With --user, HOME, USER, LOGNAME and XDG_RUNTIME_DIR are that user's. The program has no
capability, cannot get any (no_new_privs: sudo does not work in it), and inherits no other
descriptor. Where the terminal is another user's, it gets one of its own.
The macvtap is gone when the program ends. The exit status is the program's, or 128+N when signal
N killed it; 127 when there is no such program, 126 when it cannot be run, 1 for all else.";

/// `minivmm net open`.
#[derive(Clone, Debug, Args)]
pub struct OpenArgs {
    /// The interface and the macvtap's keys, as for --macvtap
    #[arg(value_name = "LINK[,KEY=VALUE...]", value_parser = parse_macvtap)]
    pub macvtap: MacvtapSpec,

    /// Run the program as this user, with all its groups; who called sudo by default. Names or
    /// numbers
    #[arg(long, value_name = "USER[:GROUP]", allow_hyphen_values = true)]
    pub user: Option<String>,

    /// The program and its arguments
    #[arg(value_name = "COMMAND", required = true, last = true)]
    pub command: Vec<OsString>,
}

/// `minivmm net host-link`.
#[derive(Clone, Debug, Args)]
pub struct HostLinkArgs {
    /// The interface of the guests; with --delete also the macvlan itself, or nothing if there is
    /// only one
    #[arg(required_unless_present = "delete")]
    pub link: Option<LinkName>,

    /// An address of the host on the new macvlan. May be repeated
    #[arg(
        long,
        value_name = "ADDRESS/PREFIX",
        required_unless_present_any = ["move_address", "delete"]
    )]
    pub address: Vec<InterfaceAddress>,

    /// Name of the macvlan; the first free macvlanN by default
    #[arg(long)]
    pub name: Option<NewLinkName>,

    /// Move the interface's own addresses and routes onto the macvlan, with neighbour entries, policy
    /// rules and sysctls. Firewall rules that name the interface stay as they are: a warning shows
    /// them
    #[arg(long)]
    pub move_address: bool,

    /// Delete the macvlan, and give addresses and routes that had been moved back
    #[arg(long, conflicts_with_all = ["address", "name", "move_address"])]
    pub delete: bool,
}

/// `minivmm net list`.
#[derive(Clone, Debug, Args)]
pub struct ListArgs {
    /// Only this interface
    pub link: Option<LinkName>,

    /// As JSON
    #[arg(long)]
    pub json: bool,
}
