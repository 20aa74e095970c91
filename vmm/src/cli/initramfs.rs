//! `minivmm initramfs` on the command line.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::plan::Transport;
use crate::run::initramfs::Needs;

pub(super) const HELP: &str = "\
The initramfs has minivmm's init, and the kernel's modules that a guest of `minivmm run` loads with what they
depend on. The same program, kernel and modules make the same bytes.

Example:
  minivmm initramfs --kernel 6.12.48+deb13-amd64 -o initramfs.img";

/// `minivmm initramfs`.
#[derive(Clone, Debug, Args)]
pub struct InitramfsArgs {
    /// Where it goes, - for stdout. A file is there whole or not at all
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,

    /// The kernel: a bzImage, a vmlinux, a kernel tree with one built, or the version of an installed one;
    /// the host's by default, else the newest that has modules
    #[arg(long, value_name = "PATH|VERSION")]
    pub kernel: Option<PathBuf>,

    /// Where the kernel's modules are, if not in its tree, beside it, or in /lib/modules/VERSION; none for
    /// a kernel that has all built in
    #[arg(long, value_name = "DIR|none")]
    pub modules: Option<PathBuf>,

    /// How the guest reaches its virtio devices
    #[arg(long, value_name = "pci|mmio", default_value = "pci")]
    pub transport: Transport,

    /// What the guest has, besides sockets to the host
    #[arg(
        long = "for",
        value_name = "WHAT,...",
        value_delimiter = ',',
        default_value = "shares,overlay,disks,nics"
    )]
    pub parts: Vec<Part>,
}

/// A part of a guest that takes modules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Directories of the host's.
    Shares,
    /// A writable layer above its root.
    Overlay,
    /// Disks.
    Disks,
    /// NICs.
    Nics,
}

impl InitramfsArgs {
    /// What the guest needs.
    pub fn needs(&self) -> Needs {
        let has = |part| self.parts.contains(&part);
        Needs {
            transport: self.transport,
            shares: has(Part::Shares),
            overlay: has(Part::Overlay),
            disks: has(Part::Disks),
            nics: has(Part::Nics),
        }
    }
}
