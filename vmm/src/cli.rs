//! The command line, as typed. What it means is in [`crate::config`].

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use ::net::{InterfaceAddress, LinkName};
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{
    ArgAction, ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum,
};

use crate::config::{
    Config, ConsoleTarget, Cpus, DiskConfig, EventsTarget, HeldBack, MemorySize, NicConfig,
    NicSource, QmpSocket, Reboot, RunnerFds, ShareConfig, VmName, VsockConfig, parse_user_net,
};
use crate::plan::Transport;
use crate::share::FileServerArgs;

mod agent;
mod initramfs;
mod net;
mod package;
mod qemu;
mod run;
mod targets;
mod vms;

pub use self::net::{HostLinkArgs, ListArgs, NetCommand, OpenArgs};
pub use agent::{CopyPath, CpArgs, ExecArgs};
pub use initramfs::InitramfsArgs;
pub use package::AgentArgs;
pub use qemu::{Accel, QemuArgs};
pub use run::RunArgs;
pub use targets::{RunTarget, TargetsError, read_targets};
pub use vms::{
    ConsoleArgs, KillArgs, LogsArgs, PsArgs, QmpArgs, StatsArgs, StopArgs, Target, WaitArgs,
};

const EXAMPLES: &str = "\
At a terminal, Ctrl-A x ends the guest and Ctrl-A h shows the other keys.
The host itself cannot talk to the guest over the same interface: that is how macvtap works.
--host-link, or `minivmm net host-link`, makes the macvlan that it takes.

Keys of --macvtap:
  mode=MODE          bridge (default: guests of one interface talk to each other), private,
                     vepa (through a switch that sends frames back), passthru, source
  mac=ADDRESS        the guest's MAC address; a random one by default
  mtu=BYTES          the interface's by default
  txqueuelen=FRAMES  room for frames that the guest has not received yet, 500 by default
  bcqueuelen=FRAMES  room for broadcasts on their way to all guests, 1000 by default
  source-mac=ADDRESS  a sender whose frames the guest gets in mode=source; may be repeated
  name=NAME          of the macvtap
  netns=private      in a network namespace of its own, gone with minivmm (default), or
  netns=host         in this one, where `ip link` shows it
  lower-netns=PATH   network namespace of LINK, as in /run/netns/NAME
  queues=N           queue pairs, each with a thread of its own; as many as CPUs is best
  backend=user       threads of minivmm move the frames, or
  backend=vhost      the kernel does (vhost-net); auto, the default, takes it where it can be had
  trust-mac=on       the guest may change its MAC address, and the macvtap's follows
  rx-rate=RATE       what the guest may receive a second: 100Mbit, 20Kframes, 1Gbit:100Kframes
  tx-rate=RATE       what the guest may send
  burst=TIME         how long a rate may be exceeded after a pause, 10ms by default
  pcap=FILE          records what passes, for tshark or Wireshark (pcapng)
  fd=N[:N...]        instead of LINK: queues that are open already, as by N<>/dev/tapM in a shell

Keys of --user-net, besides rx-rate=, tx-rate=, burst= and pcap=, which are as above:
  hostfwd=tcp|udp:[ADDRESS]:PORT-:GUESTPORT
                     the host's PORT reaches the guest, as in hostfwd=tcp::2222-:22; may be repeated
  net=A.B.C.0/24     where the addresses are: 10.0.2.0/24 by default, with the guest at 10.0.2.15
  mac=ADDRESS        the guest's MAC address; a random one by default

Keys of --disk:
  format=raw|qcow2   how the image is read; never found out from what is in it
  readonly=on        the guest cannot write it, and other guests may read it too
  ephemeral=on       what the guest writes is gone when it ends, and the image as it was
  backing=PATH       the backing file that a qcow2 image names, if it lies in another directory
  serial=TEXT        20 characters at most: the guest's /dev/disk/by-id/virtio-TEXT
  queues=N           queues, each with a thread of its own; 1 by default
  direct=on          not through the host's page cache (O_DIRECT)
  io=uring|threads   how a raw image is read and written; auto, the default, takes io_uring where
                     that is quicker and allowed
  iops=N             requests a second, as in 500 or 20K
  bandwidth=BYTES    bytes a second, as in 100M
  burst=TIME         how long these may be exceeded after a pause, 10ms by default
A comma in a path is doubled.

Exit status:
    0  the guest powered off or rebooted (the log says which), or Ctrl-A x
    1  minivmm could not start the guest, or failed while it ran
    2  the command line is wrong
    3  the guest crashed: a triple fault, or something that KVM cannot run
    4  the guest's kernel panicked (known by the default command line's reboot=panic_warm)
128+N  ended by signal N, before the guest powered off by itself

Examples:
  A guest on the network of eno1, with a MAC address of its own:
      minivmm --kernel bzImage --initrd initrd.img --macvtap eno1
  Two NICs, four CPUs, more memory:
      minivmm --kernel vmlinux --cpus 4 --memory 2G --macvtap eno1 --macvtap eno2,mode=private
  With addresses of its own for the host, so that it can talk to its guest:
      minivmm --kernel bzImage --macvtap eno1 --host-link 192.168.0.5/24
  Without root: a macvtap for an ordinary user
      sudo minivmm net open eno1 -- minivmm --kernel bzImage --macvtap fd=3
  Without root and without a macvtap: a network by passt, and ssh to the guest at port 2222
      minivmm --kernel bzImage --initrd initrd.img --user-net hostfwd=tcp:127.0.0.1:2222-:22
  What minivmm leaves out (UEFI, graphics, USB), on the same NIC:
      minivmm qemu --macvtap eno1 -- -M q35 -accel kvm -m 2G disk.qcow2
  An installed system, with the kernel and the initrd that are in its image:
      minivmm --kernel vmlinuz --initrd initrd.img --cmdline root=/dev/vda1 --disk disk.qcow2
  In a CI job: console to a file, log of warnings only, ended by SIGTERM (power button):
      minivmm --kernel bzImage --initrd test.img --console file:console.log -q
  By itself, found by its name:
      minivmm -d --name web --kernel bzImage --initrd initrd.img --macvtap eno1
      minivmm ps; minivmm console web; minivmm stop web";

/// Boots a Linux kernel whose NIC is a macvtap on one of the host's interfaces, so that
/// the guest stands on the host's own Ethernet as a peer.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "minivmm",
    version,
    about,
    long_about = None,
    after_help = EXAMPLES,
    max_term_width = 100,
    override_usage = "minivmm [OPTIONS] --kernel <PATH>\n       minivmm [-v|-q] <COMMAND>",
    subcommand_negates_reqs = true,
    mut_arg("kernel", |kernel| kernel.required(true))
)]
pub struct Cli {
    /// The guest, where no subcommand is given.
    #[command(flatten)]
    pub guest: GuestArgs,

    /// How much is logged.
    #[command(flatten)]
    pub log: LogArgs,

    /// What to do instead of running a guest.
    #[command(subcommand)]
    pub command: Option<Command>,
}

impl Cli {
    /// Whether the guest is to outlive the command.
    pub fn detaches(&self) -> bool {
        match &self.command {
            Some(Command::Qemu(args)) => args.detach,
            Some(Command::Run(args)) => args.detach,
            _ => self.guest.detach,
        }
    }

    /// The number of the descriptor that events go to, if one is named.
    pub fn events_descriptor(&self) -> Option<RawFd> {
        let events = match &self.command {
            Some(Command::Qemu(args)) => &args.events,
            _ => &self.guest.events,
        };
        events.as_ref()?.descriptor()
    }

    /// The numbers of the sockets that it names, and of what `minivmm run` passes.
    pub fn listeners(&self) -> Vec<RawFd> {
        let qemu = match &self.command {
            Some(Command::Qemu(args)) => &args.qmp[..],
            _ => &[],
        };
        let sockets = self.guest.qmp.iter().chain(qemu);
        let runner = match &self.command {
            Some(Command::Qemu(args)) => args.runner,
            _ => self.guest.runner,
        };
        let of_runner = runner.into_iter().flat_map(|fds| [fds.leash, fds.boot]);
        let sockets = sockets.filter_map(QmpSocket::descriptor);
        sockets.chain(of_runner).collect()
    }

    /// The numbers of the queues that it names.
    pub fn descriptors(&self) -> Vec<RawFd> {
        let native = self.guest.macvtap.iter().map(|nic| &nic.source);
        let qemu = match &self.command {
            Some(Command::Qemu(args)) => &args.macvtap[..],
            _ => &[],
        };
        let sources = native.chain(qemu.iter().map(|nic| &nic.source));
        sources.flat_map(NicSource::descriptors).copied().collect()
    }

    /// Reads the command line. The options of a guest do not go with a subcommand; those of the log go with all, where
    /// clap's own `args_conflicts_with_subcommands` would refuse them too.
    ///
    /// # Errors
    ///
    /// What to print, and the exit status.
    pub fn read<T: Into<OsString> + Clone>(
        words: impl IntoIterator<Item = T>,
    ) -> Result<Self, clap::Error> {
        let mut command = Self::command();
        let matches = command.try_get_matches_from_mut(words)?;
        let typed = |arg: &&clap::Arg| {
            let typed =
                matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine);
            typed && !arg.is_global_set()
        };
        let option = command.get_arguments().find(typed).map(ToString::to_string);
        if let (Some(option), Some(name)) = (option, matches.subcommand_name()) {
            let text =
                format!("the argument '{option}' cannot be used with the subcommand '{name}'");
            return Err(command.error(ErrorKind::ArgumentConflict, text));
        }
        if let Some(("run", matches)) = matches.subcommand() {
            run::check(&mut command, matches)?;
        }
        let mut cli = Self::from_arg_matches(&matches)?;
        if let (Some(Command::Run(args)), Some(("run", matches))) =
            (&mut cli.command, matches.subcommand())
        {
            let options = [("macvtap", &args.macvtap), ("user_net", &args.user_net)];
            args.nics = in_order(matches, options);
        }
        cli.guest.nics = in_order(
            &matches,
            [
                ("macvtap", &cli.guest.macvtap),
                ("user_net", &cli.guest.user_net),
            ],
        );
        Ok(cli)
    }
}

/// The NICs of several options in the order of the command line.
fn in_order<T: Clone>(matches: &ArgMatches, options: [(&str, &Vec<T>); 2]) -> Vec<T> {
    let of = |(id, nics)| matches.indices_of(id).into_iter().flatten().zip(nics);
    let mut all: Vec<(usize, &T)> = options.into_iter().flat_map(of).collect();
    all.sort_by_key(|(index, _)| *index);
    all.into_iter().map(|(_, nic)| nic.clone()).collect()
}

/// The guest to run.
#[derive(Clone, Debug, Args)]
pub struct GuestArgs {
    /// Name of the VM, for ps and the other commands; the lowest free of vm1, vm2, ... by default
    #[arg(long, value_name = "NAME", help_heading = "Guest")]
    pub name: Option<VmName>,

    /// Return when the guest runs, and print its name. It runs on by itself: `minivmm console NAME`,
    /// `minivmm logs NAME` and `minivmm stop NAME` go on with it
    #[arg(short, long, help_heading = "Guest")]
    pub detach: bool,

    /// All but its NICs.
    #[command(flatten)]
    pub machine: MachineArgs,

    /// NIC on a new macvtap of the host's interface LINK, or on LINK if that is a
    /// macvtap; or fd=N, a macvtap queue that is open already. May be repeated. The keys are below
    #[arg(long, value_name = "LINK[,KEY=VALUE...]", help_heading = "Network")]
    pub macvtap: Vec<NicConfig>,

    /// Directory of the host that the guest can mount, as in `mount -t virtiofs TAG /mnt`, with :ro
    /// read-only (virtio-fs). Or socket=PATH,tag=TAG: what a server that listens there serves, such as
    /// virtiofsd. May be repeated
    #[arg(long, value_name = "DIR:TAG[:ro]", help_heading = "Guest")]
    pub share: Vec<ShareConfig>,

    /// NIC on a network of the guest's own, by passt, without root and without a macvtap: the guest gets
    /// 10.0.2.15, and the host's ports of hostfwd= reach it. May be repeated. The keys are below
    #[arg(
        long,
        value_name = "KEY=VALUE[,...]",
        num_args = 0..=1,
        default_missing_value = "",
        value_parser = parse_user_net,
        help_heading = "Network"
    )]
    pub user_net: Vec<NicConfig>,

    /// The NICs of both kinds, as [`Cli::read`] has found them.
    #[arg(skip)]
    pub nics: Vec<NicConfig>,

    /// Socket by which other programs control the guest, in QEMU's language (QMP); or fd=N, one that
    /// listens already, as systemd passes it. May be repeated
    #[arg(long, value_name = "PATH", help_heading = "Control")]
    pub qmp: Vec<QmpSocket>,

    /// Writes what happens to the guest, a line of JSON for each event, to a file or FIFO, or to a
    /// descriptor that is open already. docs/events.md has the events
    #[arg(long, value_name = "PATH|fd:N", help_heading = "Control")]
    pub events: Option<EventsTarget>,

    /// How the guest reaches its virtio devices: pci with an MSI-X vector per queue, or mmio
    #[arg(
        long,
        value_name = "pci|mmio",
        default_value = "pci",
        help_heading = "Network"
    )]
    pub transport: Transport,

    /// Sockets between the guest and the host (virtio-vsock). A program of the host connects to the
    /// Unix socket PATH and writes "CONNECT PORT"; port N of the host is, for the guest, the Unix
    /// socket PATH_N. The guest's CID is N, 3 by default; guests may have the same
    #[arg(long, value_name = "PATH[,cid=N]", help_heading = "Guest")]
    pub vsock: Option<VsockConfig>,

    /// What `minivmm run` passes to its VM's process: the socket device is in the VM's directory then
    #[arg(long, hide = true, conflicts_with = "vsock")]
    pub runner: Option<RunnerFds>,

    /// Lets the host talk to its guests for as long as this one runs: a macvlan with this address
    /// on the interface of the first NIC. May be repeated
    #[arg(
        long,
        value_name = "ADDRESS/PREFIX",
        requires = "macvtap",
        help_heading = "Network"
    )]
    pub host_link: Vec<InterfaceAddress>,
}

/// A guest but for its NICs: of the native monitor, which requires the kernel, or in QEMU.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Guest")]
pub struct MachineArgs {
    /// Kernel to boot: a bzImage or an ELF vmlinux, for x86-64
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk, in any form that the kernel takes
    #[arg(long, value_name = "PATH", requires = "kernel")]
    pub initrd: Option<PathBuf>,

    /// Appended to the kernel's command line, which is "console=ttyS0 reboot=panic_warm panic=-1
    /// cryptomgr.notests", with --console none without its first word. cryptomgr.notests=0 brings
    /// the kernel's self-tests of its crypto algorithms back, which take most of a small guest's
    /// boot
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        allow_hyphen_values = true,
        hide_default_value = true,
        requires = "kernel"
    )]
    pub cmdline: String,

    /// Number of CPUs, 1 to 254
    #[arg(long, value_name = "N", default_value = "1", requires = "kernel")]
    pub cpus: Cpus,

    /// Whether the guest may run guests of its own, where the host can: its CPUs have VMX or SVM
    #[arg(
        long,
        value_name = "on|off",
        default_value = "off",
        requires = "kernel"
    )]
    pub nested: Switch,

    /// Memory, as in 512M or 2G
    #[arg(long, value_name = "SIZE", default_value = "512M", requires = "kernel")]
    pub memory: MemorySize,

    /// Take the memory from the huge pages of 2 MiB that the host has set aside
    #[arg(long, requires = "kernel")]
    pub hugepages: bool,

    /// Disk on an image, qcow2 if the name ends in .qcow2 and raw otherwise, or on a block device:
    /// /dev/vda, then /dev/vdb and so on. May be repeated. The keys are below
    #[arg(long, value_name = "PATH[,KEY=VALUE...]", requires = "kernel")]
    pub disk: Vec<DiskConfig>,

    /// Whether the guest gets random numbers of the host's, up to 1 MiB a second (virtio-rng)
    #[arg(long, value_name = "on|off", default_value = "on", requires = "kernel")]
    pub rng: Switch,

    /// Has the guest give memory back to the host that it has free (virtio-balloon), and not use
    /// SIZE of it, unless it runs out of memory
    #[arg(
        long,
        value_name = "SIZE",
        num_args = 0..=1,
        default_missing_value = "0",
        conflicts_with = "hugepages",
        requires = "kernel"
    )]
    pub balloon: Option<HeldBack>,

    /// What a reboot of the guest does: it ends the guest, or restarts it in this process, on the same
    /// macvtaps and disks. A kernel panic or a crash always ends it
    #[arg(
        long,
        value_name = "exit|restart",
        default_value = "exit",
        requires = "kernel"
    )]
    pub reboot: Reboot,

    /// How long the guest may take to power off after a signal that ends it; 10 by default, 90 with a
    /// disk that it writes
    #[arg(long, value_name = "SECONDS", requires = "kernel", value_parser = clap::value_parser!(u32).range(1..))]
    pub stop_timeout: Option<u32>,

    /// Where the guest's serial console goes: stdio, file:PATH, or none, with which the guest has
    /// no serial port
    #[arg(
        long,
        value_name = "WHERE",
        default_value = "stdio",
        requires = "kernel"
    )]
    pub console: ConsoleTarget,
}

impl From<GuestArgs> for Config {
    fn from(args: GuestArgs) -> Self {
        Self {
            name: args.name,
            shares: args.share,
            nics: args.nics,
            transport: args.transport,
            host_link: args.host_link,
            qmp: args.qmp,
            console_socket: None,
            events: args.events,
            vsock: args.vsock,
            runner: args.runner,
            ..args.machine.into()
        }
    }
}

impl From<MachineArgs> for Config {
    fn from(args: MachineArgs) -> Self {
        Self {
            initrd: args.initrd,
            cmdline: args.cmdline,
            cpus: args.cpus,
            nested: args.nested == Switch::On,
            memory: args.memory,
            hugepages: args.hugepages,
            reboot: args.reboot,
            stop_timeout: args
                .stop_timeout
                .map(|seconds| Duration::from_secs(seconds.into())),
            disks: args.disk,
            rng: args.rng == Switch::On,
            balloon: args.balloon,
            console: args.console,
            // The native monitor's is required, and QEMU's machine asked for only with one.
            ..Self::new(args.kernel.unwrap_or_default())
        }
    }
}

/// The value of an option that is on or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// The guest has it.
    On,
    /// The guest does not have it.
    Off,
}

/// How much is logged.
#[derive(Clone, Copy, Debug, Args)]
pub struct LogArgs {
    /// Log more on stderr: -v debug, -vv trace; RUST_LOG overrules it
    #[arg(short, long, action = ArgAction::Count, global = true, help_heading = "Log")]
    pub verbose: u8,

    /// Log less: -q warnings, -qq errors, -qqq nothing
    #[arg(short, long, action = ArgAction::Count, global = true, conflicts_with = "verbose", help_heading = "Log")]
    pub quiet: u8,
}

/// What to do instead of running a guest.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// The host's side of macvtap: links for other programs, the host's own access, what there is
    #[command(subcommand)]
    Net(NetCommand),
    /// Runs a guest in QEMU on macvtaps: for UEFI, graphics, USB, other machines
    #[command(after_help = qemu::HELP)]
    Qemu(Box<QemuArgs>),
    /// Runs a command in a guest of its own, with the host's kernel and root, and exits with its status
    #[command(after_help = run::HELP)]
    Run(Box<RunArgs>),
    /// Lists the running VMs
    #[command(after_help = vms::PS_HELP)]
    Ps(PsArgs),
    /// Presses the power buttons of VMs, and ends those that do not power off in time
    Stop(StopArgs),
    /// Ends VMs at once
    Kill(KillArgs),
    /// Sends a VM a command of QMP, and prints what it returns
    Qmp(QmpArgs),
    /// Shows what is counted of a running VM: each queue of its NICs and disks, exits, memory
    Stats(StatsArgs),
    /// Shows what a VM has logged, also one of -d that has ended
    Logs(LogsArgs),
    /// Waits until a running VM has an address, an open port, a line on its console, or has ended
    #[command(after_help = vms::WAIT_HELP)]
    Wait(WaitArgs),
    /// Runs a command in a VM whose guest has minivmm's agent, with the streams of this one
    #[command(after_help = agent::EXEC_HELP)]
    Exec(ExecArgs),
    /// Copies files between this host and a VM whose guest has minivmm's agent
    #[command(after_help = agent::CP_HELP)]
    Cp(CpArgs),
    /// Attaches to the console of a running VM: shows what it said last and what follows, and types
    Console(ConsoleArgs),
    /// Makes the initramfs of a guest of minivmm's own init
    #[command(after_help = initramfs::HELP)]
    Initramfs(InitramfsArgs),
    /// Writes the agent for a guest that has an init of its own: the program, or a Debian package
    #[command(after_help = package::HELP)]
    Agent(AgentArgs),
    /// Checks whether this host can run guests, and says what to do where it cannot
    Doctor(DoctorArgs),
    /// Serves a directory of --share: minivmm itself starts this
    #[command(hide = true)]
    FileServer(FileServerArgs),
}

/// `minivmm doctor`.
#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    /// The lower interface for guests
    pub link: Option<LinkName>,

    /// As JSON
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn command_line_of_the_mission_is_understood() {
        let cli = Cli::read(["minivmm", "--kernel", "bzImage", "--macvtap", "eno1"]).unwrap();
        assert_eq!(cli.guest.machine.kernel.unwrap(), PathBuf::from("bzImage"));
        let [nic] = &cli.guest.macvtap[..] else {
            panic!("{:?}", cli.guest.macvtap)
        };
        let NicSource::Macvtap(spec) = &nic.source else {
            panic!("{nic:?}")
        };
        assert_eq!((spec.link.as_str(), spec.mode), ("eno1", None));
    }

    #[test]
    fn command_line_has_its_nics_in_order_whatever_they_are() {
        let line = "minivmm --macvtap a --user-net --kernel k --user-net mac=52:54:00:12:34:56 --macvtap b";
        let cli = Cli::read(line.split(' ')).unwrap();
        let name = |nic: &NicConfig| match &nic.source {
            NicSource::Macvtap(spec) => spec.link.to_string(),
            NicSource::UserNet(net) => format!("user {:?}", net.mac.map(|mac| mac.to_string())),
            NicSource::Descriptors(_) => panic!("{nic:?}"),
        };
        let names: Vec<_> = Config::from(cli.guest).nics.iter().map(name).collect();
        assert_eq!(
            names,
            ["a", "user None", "user Some(\"52:54:00:12:34:56\")", "b"]
        );
    }

    #[test]
    fn command_line_of_each_subcommand_is_understood() {
        for line in [
            "minivmm net open eno1,mode=private,queues=2 --user me -- qemu -netdev x",
            "minivmm net host-link eno1 --address 10.0.0.1/24 --address fd00::1/64 --name host0",
            "minivmm net host-link eno1 --move-address",
            "minivmm net host-link eno1 --delete",
            "minivmm net host-link --delete",
            "minivmm net list",
            "minivmm net list eno1 --json",
            "minivmm net gc -v",
            "minivmm ps",
            "minivmm ps web vm1 --json",
            "minivmm wait web --for address",
            "minivmm wait web --for port=22 --for console=login: --for exit --timeout 5m",
            "minivmm exec web -- ls -l",
            "minivmm cp web:/etc/hosts .",
            "minivmm cp ./a:b web:",
            "minivmm wait web --for agent",
            "minivmm exec -t --user me:users --workdir /tmp --env A=b=c --env HOME ./vm.vsock sh",
            "minivmm console web",
            "minivmm console web --dump",
            "minivmm --kernel k --name web-1",
            "minivmm qemu --name web -- -M q35",
            "minivmm doctor",
            "minivmm doctor eno1 --json",
            "minivmm initramfs -o initramfs.img --kernel 6.12 --modules none --for nics,shares",
            "minivmm agent --deb -o minivmm-agent.deb",
            "minivmm --kernel k --macvtap fd=3 --host-link 10.0.0.1/24",
            "minivmm --kernel k --user-net",
            "minivmm --user-net --kernel k",
            "minivmm --kernel k --user-net hostfwd=tcp::2222-:22,mac=52:54:00:12:34:56",
            "minivmm --kernel k --rng off --balloon",
            "minivmm --kernel k --balloon 256M --memory 1G",
            "minivmm --balloon --kernel k",
            "minivmm --kernel k --vsock vm.vsock,cid=7",
            "minivmm qemu --kernel k --rng on --balloon 0 -- -M q35",
            "minivmm qemu --macvtap eno1,bus=pcie.0,addr=0x4,id=nic2 --dry-run -- -M q35 -m 1G",
            "minivmm qemu --kernel k --initrd i --cmdline c --cpus 2 --memory 1G --accel auto",
            "minivmm qemu --kernel k --disk a.qcow2,readonly=on --disk b --stop-timeout 5",
            "minivmm qemu --kernel k --macvtap eno1 --host-link 10.0.0.1/24 --transport pci",
            "minivmm -q qemu -q --macvtap eno1 -- -M q35",
            "minivmm -v net list",
            "minivmm qmp ./mon.qmp query-status",
            "minivmm qmp web query-status",
            "minivmm stop web vm1 --timeout 0",
            "minivmm kill web",
            "minivmm stats web",
            "minivmm stats web --watch",
            "minivmm stats ./vm.qmp --watch 5 --json",
            "minivmm -d --kernel k --name web",
            "minivmm run -- true",
            "minivmm run --user-net -- pytest -q",
            "minivmm run --macvtap eno1,ip=10.0.0.5/24,gw=10.0.0.1 --user-net -t -- bash",
            "minivmm run --kernel k --root d:ro --share .:/src:ro --timeout 10m -- make -C /src",
            "minivmm run -d --name web",
            "minivmm run --copy-out a:b --copy-out /c:. -- true",
            "minivmm run --file minivmm.toml",
            "minivmm run -v --dry-run --file minivmm.toml unit lint",
            "minivmm run -v --accel kvm --result r.json --env A=b --env HOME --workdir / -- id",
            "minivmm ps -a",
            "minivmm logs web",
            "minivmm --kernel k --qmp a --qmp fd=3",
            "minivmm --kernel k --events fd:5",
        ] {
            Cli::read(line.split(' ')).unwrap();
        }
        for line in [
            "minivmm",
            "minivmm --kernel k net list",
            "minivmm net",
            "minivmm net open eno1",
            "minivmm net host-link eno1",
            "minivmm net host-link --address 10.0.0.1/24",
            "minivmm net host-link eno1 --address 10.0.0.1",
            "minivmm net host-link eno1 --delete --move-address",
            "minivmm --kernel k --host-link 10.0.0.1/24",
            "minivmm --kernel k --balloon --hugepages",
            "minivmm --kernel k --name a/b",
            "minivmm run",
            "minivmm run true",
            "minivmm run true -- true",
            "minivmm run --file f -- true",
            "minivmm run --file f --cpus 2",
            "minivmm run --file f -d",
            "minivmm run -d -t -- sh",
            "minivmm run -d --copy-out a:b -- sh",
            "minivmm run --copy-out a -- sh",
            "minivmm run --share . -- true",
            "minivmm run --accel hvf -- true",
            "minivmm run --macvtap eno1,ip=me -- true",
            "minivmm --kernel k run -- true",
            "minivmm ps .",
            "minivmm console",
            "minivmm exec web",
            "minivmm cp web:/etc/hosts",
            "minivmm cp :/etc/hosts .",
            "minivmm exec -- ls",
            "minivmm exec web --env =x -- ls",
            "minivmm exec web --workdir tmp -- ls",
            "minivmm wait web",
            "minivmm wait --for address",
            "minivmm wait web --for port=0",
            "minivmm wait web --for console=(",
            "minivmm wait web --for exit --timeout soon",
            "minivmm stop",
            "minivmm -d ps",
            "minivmm logs",
            "minivmm qmp .mon query-status",
            "minivmm --kernel k --rng maybe",
            "minivmm qemu --balloon -- -M q35",
            "minivmm qemu",
            "minivmm qemu -M q35",
            "minivmm -q qemu",
            "minivmm --kernel k qemu -- -M q35",
            "minivmm --cpus 2 qemu --kernel k",
            "minivmm qemu --host-link 10.0.0.1/24 -- -M q35",
            "minivmm qemu --kernel k --transport mmio",
            "minivmm qemu --kernel k --transport isa",
            "minivmm qemu --cpus 2 -- -M q35",
            "minivmm qemu --accel hvf -- -M q35",
        ] {
            assert!(Cli::read(line.split(' ')).is_err(), "{line}");
        }
    }

    #[test]
    fn command_lines_of_the_documentation_are_understood() {
        let mut found = 0;
        for text in [
            include_str!("../../README.md"),
            include_str!("../../docs/run.md"),
            include_str!("../../docs/recipes.md"),
        ] {
            for line in text.lines().filter(|line| line.starts_with("    ")) {
                let line = line.split(" #").next().unwrap().trim();
                let line = line.strip_prefix("sudo ").unwrap_or(line);
                if !line.starts_with("minivmm run ") || line.contains("[OPTIONS]") {
                    continue;
                }
                Cli::read(line.split_whitespace())
                    .unwrap_or_else(|error| panic!("{line}: {error}"));
                found += 1;
            }
        }
        assert!(found > 5, "{found}");
    }

    #[test]
    fn command_line_with_bad_values_is_refused() {
        for (option, value) in [
            ("--memory", "0"),
            ("--memory", "lots"),
            ("--memory", "-1G"),
            ("--memory", "99999999999999999999"),
            ("--balloon", "lots"),
            ("--vsock", "a,cid=2"),
            ("--cpus", "0"),
            ("--cpus", "5000"),
            ("--cpus", "two"),
            ("--macvtap", ""),
            ("--macvtap", ",mode=bridge"),
            ("--macvtap", "eno1,name=abcdefghijklmnop"),
            ("--macvtap", "eno1,mode=hub"),
            ("--macvtap", "eno1,mode"),
            ("--macvtap", "eno1,colour=red"),
            ("--macvtap", "eno1,mac=01:00:5e:00:00:01"),
            ("--macvtap", "eno1,mac=52:54:00"),
            ("--macvtap", "eno1,mode=vepa,mode=bridge"),
            ("--user-net", "eno1"),
            ("--user-net", "hostfwd=sctp::1-:1"),
            ("--disk", "a,queues=0"),
            ("--stop-timeout", "0"),
            ("--stop-timeout", "1m"),
            ("--events", "fd:1"),
            ("--console", "telnet"),
            ("--console", "file:"),
        ] {
            let parsed = Cli::read(["minivmm", "--kernel", "k", option, value]);
            assert!(parsed.is_err(), "{option} {value}");
        }
    }
}
