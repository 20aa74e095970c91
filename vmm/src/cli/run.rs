//! `minivmm run`, as typed.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args};

use super::agent::Variable;
use crate::config::{
    CopyOut, Cpus, Engine, MemorySize, Patience, RootConfig, RunConfig, RunNic, RunShare, VmName,
};

pub(super) const HELP: &str = "\
The guest has the host's kernel, and the host's root directory below an overlay in its own memory: it sees
the host's files, and what it writes is gone at its end. No program, user or network of the host's is needed
besides. Without an option for a NIC it has none.

Keys of --macvtap and --user-net besides those of `minivmm --help`:
  ip=dhcp            IPv4 by DHCP, and IPv6 by router advertisements (default)
  ip=none            the NIC stays down
  ip=ADDRESS/LEN     this address, of IPv4 or IPv6; may be repeated
  gw=ADDRESS         the default gateway, with ip=ADDRESS/LEN; one of each family
  dns=ADDRESS        a name server, with ip=ADDRESS/LEN; may be repeated

SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2 and SIGWINCH are passed on to the command. A second SIGINT
ends the VM, and so does any that ends a program while the guest boots.

Exit status:
  that of the command, and besides
  124    its time (--timeout) was over
  125    the VM failed, or the command could not be started; stderr says why, and what the guest's console
         said last
  126    the command cannot be run
  127    there is no such command
  128+N  signal N has ended the command, or minivmm while the guest booted

Examples:
  A test on the network of eno1, with an address of its own there:
      sudo minivmm run --macvtap eno1 -- ./integration-test.sh
  Without root, on any CI runner; with a network behind the host's:
      minivmm run --user-net -- pytest -q
  With another kernel and root, and the current directory as /src:
      minivmm run --kernel vmlinuz-6.12 --root ./debian --share .:/src --timeout 10m -- make -C /src check
  An image, as of `skopeo copy docker://debian:12 oci:images:debian`:
      minivmm run --root oci:images:debian -- cat /etc/os-release
  The kernel that was just built in this tree:
      minivmm run --kernel . -- dmesg
  A shell:
      minivmm run -t --user-net -- bash
  With the report that it has written, whether it succeeds or not:
      minivmm run --share .:/src --workdir /src --copy-out build/report.xml:. -- make check
  The targets of a file, in which keys are options: [target.NAME], then command = 'make check'
      minivmm run --file minivmm.toml
  A VM that goes on, for `minivmm exec`:
      minivmm run -d --name box --user-net && minivmm exec -t box -- bash; minivmm stop box";

/// `minivmm run`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Kernel: a bzImage or vmlinux, a kernel tree, or a version of /boot. The host's by default, else the newest
    /// that has modules
    #[arg(long, value_name = "PATH|VERSION", help_heading = "Guest")]
    pub kernel: Option<PathBuf>,

    /// Directory of the kernel's modules, as /lib/modules/VERSION; none for a kernel that has all built in
    #[arg(long, value_name = "DIR", help_heading = "Guest")]
    pub modules: Option<PathBuf>,

    /// Root file system: a directory of the host's, the image of a disk, or an image of a local OCI
    /// layout, which is unpacked into the guest's memory, and whose environment, directory, user
    /// and command are the command's where no option says otherwise. The guest may write to it in
    /// its memory alone (overlay, the default), not at all (ro), or for good (rw)
    #[arg(
        long,
        value_name = "PATH[:ro|:rw|:overlay]|oci:LAYOUT[:TAG]",
        value_parser = OsStringValueParser::new().try_map(RootConfig::parse),
        help_heading = "Guest"
    )]
    pub root: Option<RootConfig>,

    /// Directory of the host's that the guest has too; with :ro it only reads it, with :overlay it writes in its memory
    /// alone. May be repeated
    #[arg(
        long,
        value_name = "HOST:GUEST[:ro|:rw|:overlay]",
        value_parser = OsStringValueParser::new().try_map(RunShare::parse),
        help_heading = "Guest"
    )]
    pub share: Vec<RunShare>,

    /// Number of CPUs
    #[arg(long, value_name = "N", default_value = "1", help_heading = "Guest")]
    pub cpus: Cpus,

    /// Memory, also for what is written to an overlay
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "1G",
        help_heading = "Guest"
    )]
    pub memory: MemorySize,

    /// Appended to the kernel's command line
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        allow_hyphen_values = true,
        hide_default_value = true,
        help_heading = "Guest"
    )]
    pub cmdline: String,

    /// What runs the guest's code: kvm, QEMU's translator (tcg), or kvm where that can run Linux and else tcg
    #[arg(
        long,
        value_name = "auto|kvm|tcg",
        default_value = "auto",
        help_heading = "Guest"
    )]
    pub accel: Engine,

    /// NIC on a new macvtap of the host's interface LINK, or fd=N, as for the native monitor. May be repeated
    #[arg(
        long,
        value_name = "LINK[,KEY=VALUE...]",
        value_parser = RunNic::macvtap,
        help_heading = "Network"
    )]
    pub macvtap: Vec<RunNic>,

    /// NIC on a network of the guest's own, by passt, without root, as for the native monitor. May be repeated
    #[arg(
        long,
        value_name = "KEY=VALUE[,...]",
        num_args = 0..=1,
        default_missing_value = "",
        value_parser = RunNic::user_net,
        help_heading = "Network"
    )]
    pub user_net: Vec<RunNic>,

    /// How long the NICs may take to get their addresses, as in 60s, or 0 for no limit; 20s by default, and ten times as
    /// long where QEMU emulates the guest
    #[arg(long, value_name = "TIME", help_heading = "Network")]
    pub network_timeout: Option<Patience>,

    /// The NICs of both kinds, as [`Cli::read`](super::Cli::read) has found them.
    #[arg(skip)]
    pub nics: Vec<RunNic>,

    /// Where the command starts; in the current directory by default, if the guest has it, and else in /
    #[arg(long, value_name = "PATH", help_heading = "Command")]
    pub workdir: Option<PathBuf>,

    /// Who runs the command, each by name or number of the guest's; root by default
    #[arg(long, value_name = "USER[:GROUP]", help_heading = "Command")]
    pub user: Option<String>,

    /// A variable of the command's environment, without a value the one of minivmm's. May be repeated
    #[arg(
        long,
        value_name = "NAME[=VALUE]",
        value_parser = OsStringValueParser::new().try_map(Variable::parse),
        help_heading = "Command"
    )]
    pub env: Vec<Variable>,

    /// Gives the command a terminal, of the size of the one that minivmm has
    #[arg(
        short,
        long = "tty",
        conflicts_with = "detach",
        help_heading = "Command"
    )]
    pub terminal: bool,

    /// How long the command may take, as in 90s or 10m
    #[arg(
        long,
        value_name = "TIME",
        default_value = "0",
        hide_default_value = true,
        help_heading = "Command"
    )]
    pub timeout: Patience,

    /// Return when the guest is ready, and print its name. It goes on until the command ends, without one until
    /// `minivmm stop`; `minivmm exec` runs others
    #[arg(short, long, help_heading = "Control")]
    pub detach: bool,

    /// Name of the VM, for exec, ps and the other commands; the lowest free of vm1, vm2, ... by default
    #[arg(long, value_name = "NAME", help_heading = "Control")]
    pub name: Option<VmName>,

    /// Show the guest's console on stderr
    #[arg(long, help_heading = "Control")]
    pub console: bool,

    /// Write what came of it to a file, as JSON, also after a failure
    #[arg(long, value_name = "FILE", help_heading = "Control")]
    pub result: Option<PathBuf>,

    /// Copy a file or directory of the guest's to the host, as `minivmm cp` does, when the command has ended or its
    /// time is over. GUEST is relative to the directory in which the command starts. May be repeated
    #[arg(
        long,
        value_name = "GUEST:HOST",
        value_parser = OsStringValueParser::new().try_map(CopyOut::parse),
        conflicts_with = "detach",
        help_heading = "Control"
    )]
    pub copy_out: Vec<CopyOut>,

    /// Have core files of the command, and of what it starts, written to this directory
    #[arg(long, value_name = "DIR", help_heading = "Control")]
    pub coredumps: Option<PathBuf>,

    /// Run the targets of this file one after the other, or those that are named; docs/run.md has its keys
    #[arg(long, value_name = "FILE", help_heading = "Control")]
    pub file: Option<PathBuf>,

    /// A target of --file
    #[arg(value_name = "TARGET")]
    pub targets: Vec<String>,

    /// Print the command line of the VM's process, or with --file those of the targets, and do nothing
    #[arg(long, conflicts_with = "detach", help_heading = "Control")]
    pub dry_run: bool,

    /// The command and its arguments
    #[arg(
        value_name = "COMMAND",
        last = true,
        required_unless_present_any = ["detach", "root", "file", "targets"]
    )]
    pub command: Vec<OsString>,
}

/// What goes with a file of targets.
const WITH_FILE: [&str; 3] = ["file", "targets", "dry_run"];

/// Looks at what is typed: a file has all options of its targets, and what is no option is a name in it.
///
/// # Errors
///
/// What does not go together.
pub(super) fn check(command: &mut clap::Command, typed: &ArgMatches) -> Result<(), clap::Error> {
    let is_typed = |id: &str| typed.value_source(id) == Some(ValueSource::CommandLine);
    let of_targets = |arg: &&clap::Arg| {
        let id = arg.get_id().as_str();
        is_typed(id) && !arg.is_global_set() && !WITH_FILE.contains(&id)
    };
    let text = match (is_typed("file"), is_typed("targets")) {
        (false, false) => return Ok(()),
        (false, true) => "a command stands behind `--`, as in `minivmm run -- true`".into(),
        (true, _) => {
            let run = command.find_subcommand("run");
            let mut typed = run.into_iter().flat_map(clap::Command::get_arguments);
            match typed.find(of_targets) {
                None => return Ok(()),
                Some(arg) => format!("the argument '{arg}' is one of targets, in their file"),
            }
        }
    };
    Err(command.error(ErrorKind::ArgumentConflict, text))
}

impl From<RunArgs> for RunConfig {
    fn from(args: RunArgs) -> Self {
        Self {
            name: args.name,
            kernel: args.kernel,
            modules: args.modules,
            cmdline: args.cmdline,
            cpus: args.cpus,
            memory: args.memory,
            root: args.root.unwrap_or_default(),
            shares: args.share,
            nics: args.nics,
            network_timeout: args
                .network_timeout
                .map(|Patience(limit)| limit.unwrap_or(Duration::MAX)),
            engine: args.accel,
            command: args.command,
            env: args.env.iter().filter_map(Variable::resolve).collect(),
            workdir: args.workdir,
            user: args.user,
            terminal: args.terminal,
            detach: args.detach,
            timeout: args.timeout.0,
            copies: args.copy_out,
            coredumps: args.coredumps,
            console: args.console,
            dry_run: args.dry_run,
            result: args.result,
        }
    }
}
