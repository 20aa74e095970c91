//! `minivmm agent` on the command line.

use std::path::PathBuf;

use clap::Args;

pub(super) const HELP: &str = "\
A guest that boots by itself, from a disk say, takes commands of `minivmm exec` when the agent runs in it and the
VM has --vsock. The package starts it by systemd. The same minivmm makes the same bytes.

Example:
  minivmm agent --deb -o minivmm-agent.deb
  minivmm --kernel vmlinuz --initrd initrd.img --disk disk.qcow2 --vsock vm.vsock
  minivmm exec ./vm.vsock -- uname -a";

/// `minivmm agent`.
#[derive(Clone, Debug, Args)]
pub struct AgentArgs {
    /// Where it goes, - for stdout. A file is there whole or not at all
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,

    /// A Debian package with the agent and a unit of systemd, instead of the program alone
    #[arg(long)]
    pub deb: bool,
}
