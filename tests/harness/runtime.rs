//! Another `/run/minivmm` for what a test starts, so that it finds its own VMs alone.

use std::ffi::OsStr;
use std::fs;
use std::process::Command;

use tempfile::TempDir;

use super::vm;

const RUNTIME: &str = "/run/minivmm";

/// A directory that its programs see in place of `/run/minivmm`. It needs root.
#[derive(Debug)]
pub struct Runtime {
    /// The directory itself.
    pub directory: TempDir,
}

impl Runtime {
    /// An empty one.
    pub fn new() -> Self {
        fs::create_dir_all(RUNTIME).expect("root may write to /run");
        let directory = TempDir::new().expect("a directory");
        Self { directory }
    }

    /// A program that sees it. Its process is the one that is started.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let [unshare, args @ ..] = self.prefix();
        let mut command = Command::new(unshare);
        command.args(args).arg(program);
        command.env_remove("XDG_RUNTIME_DIR").env_remove("RUST_LOG");
        command
    }

    /// What runs the program and its arguments that follow.
    pub fn prefix(&self) -> [String; 6] {
        let script = format!(r#"mount --bind "$0" {RUNTIME} && exec "$@""#);
        let directory = self.directory.path().to_str().expect("UTF-8");
        ["unshare", "--mount", "sh", "-c", &script, directory].map(str::to_owned)
    }

    /// minivmm, with these arguments.
    pub fn minivmm(&self, args: &[&str]) -> Command {
        let mut command = self.command(vm::binary());
        command.args(args);
        command
    }
}
