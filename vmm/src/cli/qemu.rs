//! `minivmm qemu`, as typed.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use net::InterfaceAddress;

use super::MachineArgs;
use crate::config::{
    EventsTarget, QemuNic, QmpSocket, RunnerFds, ShareConfig, UserNet, VmName, VsockConfig,
    parse_qemu_user_net,
};
use crate::plan::Transport;

pub(super) const HELP: &str = "\
With --kernel QEMU gets a whole machine like the native monitor's, and ARGS may change it.

Keys of --macvtap besides those of `minivmm --help`:
  queues=N           several queues: fds=, mq=on and vectors= follow from it
  vhost=on|off       the host kernel moves the frames; by default wherever /dev/vhost-net opens
  fd=N[:N...]        instead of LINK: queues that are open already
  id=, bus=, addr=, and any other key: properties of -device virtio-net-pci
The keys of --disk are those of `minivmm --help`; backing= and burst= say nothing here: QEMU opens what
the image names.
With --share or --vsock guest memory is shared; a machine of ARGS has to do so itself. Should the server of
a share end, what the guest has open there waits for ever: QEMU answers nothing in its place.
The n-th --macvtap is QEMU's netdev macvtapN, counted from 0; its descriptors begin at 3.

With --kernel the console and its keys are those of the native monitor: `minivmm console` attaches to it,
and QEMU's own commands are there by `minivmm qmp NAME human-monitor-command`. With the machine of ARGS
its consoles are where ARGS have them.

With --qmp minivmm stands before a monitor of QEMU's: commands go there, answers and events come from
it. Those that ARGS have are not changed.

A signal that ends minivmm is passed on to QEMU, or with --kernel presses the guest's power button. In a
systemd service KillMode=mixed lets it come to minivmm alone, as it has to: QEMU by itself would
end at once.

Exit status: QEMU's own, or 128+N when signal N killed it; 1 when QEMU was not started, 2 when the
command line is wrong. With --kernel as of `minivmm --help`, but a triple fault is a reboot.

Examples:
  The classic command, its two macvtap lines replaced by --macvtap; all else is passed through:
      minivmm qemu --macvtap eno1 -- -M q35 -enable-kvm -cpu host -m 2G -nodefaults \\
          -drive if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd \\
          -serial mon:stdio -drive if=virtio,file=disk.qcow2
  The NIC in a place of its own; keys that are not the macvtap's go to -device:
      minivmm qemu --macvtap eno1,bus=pcie.0,addr=0x4,id=nic2 -- -M q35 ...
  The guest of the native monitor in QEMU instead, on a host without KVM too:
      minivmm qemu --kernel bzImage --initrd initrd.img --macvtap eno1
  What would be done, as a script for sh:
      minivmm qemu --dry-run --macvtap eno1 -- -M q35 ...
  Another model of NIC, which needs the macvtap's MAC address in both places:
      minivmm qemu --macvtap eno1,mac=52:54:00:12:34:56 -- \\
          -device e1000e,netdev=macvtap0,mac=52:54:00:12:34:56 ...";

/// `minivmm qemu`.
#[derive(Clone, Debug, Args)]
#[command(arg_required_else_help = true)]
pub struct QemuArgs {
    /// Name of the VM, for ps and the other commands; the lowest free of vm1, vm2, ... by default
    #[arg(long, value_name = "NAME")]
    pub name: Option<VmName>,

    /// Return when the guest runs, and print its name, as in the native monitor
    #[arg(short, long, conflicts_with = "dry_run")]
    pub detach: bool,

    /// NIC on a new macvtap of the host's interface LINK, or on LINK if that is a
    /// macvtap. May be repeated. The keys are below
    #[arg(long, value_name = "LINK[,KEY=VALUE...]")]
    pub macvtap: Vec<QemuNic>,

    /// NIC on a network of the guest's own, by passt, as in the native monitor. May be repeated; these NICs come
    /// after those of --macvtap
    #[arg(
        long,
        value_name = "KEY=VALUE[,...]",
        num_args = 0..=1,
        default_missing_value = "",
        value_parser = parse_qemu_user_net
    )]
    pub user_net: Vec<UserNet>,

    /// Directory that the guest can mount, as in the native monitor. May be repeated
    #[arg(long, value_name = "DIR:TAG[:ro]", help_heading = "Guest")]
    pub share: Vec<ShareConfig>,

    /// Sockets between the guest and the host, as in the native monitor
    #[arg(long, value_name = "PATH[,cid=N]", help_heading = "Guest")]
    pub vsock: Option<VsockConfig>,

    /// As in the native monitor
    #[arg(long, hide = true, requires = "kernel", conflicts_with = "vsock")]
    pub runner: Option<RunnerFds>,

    /// Lets the host talk to its guests for as long as this one runs, as in the native monitor. May
    /// be repeated
    #[arg(long, value_name = "ADDRESS/PREFIX", requires = "macvtap")]
    pub host_link: Vec<InterfaceAddress>,

    /// Socket by which other programs control the guest, in QEMU's language (QMP): several may at once;
    /// or fd=N, one that listens already. May be repeated
    #[arg(long, value_name = "PATH", help_heading = "Control")]
    pub qmp: Vec<QmpSocket>,

    /// Writes what happens to the guest, a line of JSON for each event, as in the native monitor
    #[arg(long, value_name = "PATH|fd:N", help_heading = "Control")]
    pub events: Option<EventsTarget>,

    /// Print a script that does the same, and do nothing
    #[arg(long)]
    pub dry_run: bool,

    /// The QEMU to run; qemu-system-x86_64 of PATH by default
    #[arg(long, value_name = "PATH")]
    pub qemu: Option<PathBuf>,

    /// What runs the guest's code. auto takes KVM where QEMU really runs with it, else TCG;
    /// it is the default with --kernel. Without --kernel nothing is added by default
    #[arg(long, value_name = "auto|kvm|tcg")]
    pub accel: Option<Accel>,

    /// The guest that the native monitor would run.
    #[command(flatten)]
    pub machine: MachineArgs,

    /// How the guest reaches its NICs: only pci, which QEMU's machine has
    #[arg(long, value_name = "pci", requires = "kernel", value_parser = transport, help_heading = "Guest")]
    pub transport: Option<Transport>,

    /// QEMU's options, passed through
    #[arg(value_name = "ARGS", last = true)]
    pub args: Vec<OsString>,
}

/// The one transport that a guest has in QEMU.
fn transport(text: &str) -> Result<Transport, String> {
    match text.parse() {
        Ok(Transport::Pci) => Ok(Transport::Pci),
        Ok(Transport::Mmio) => Err(
            "in QEMU the NICs are on the PCI bus: omit --transport, or give the native monitor \
             pci too, for which the guest needs the driver virtio_pci"
                .into(),
        ),
        Err(error) => Err(error.to_string()),
    }
}

/// What runs the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// KVM if QEMU runs with it here, else TCG.
    Auto,
    /// The processor.
    Kvm,
    /// QEMU's translator.
    Tcg,
}
