//! `minivmm run`: a command in a guest of its own, with its exit status.
//!
//! The VM is another process of this program, tied to this one. Its guest boots with an initramfs of ours, whose init
//! connects to this process, gets what it is to be, and makes it so; then the command runs by a session with the agent.
//!
//! | file | what it is |
//! | --- | --- |
//! | `plan.rs` | from what was asked for to what is started |
//! | `below.rs` | what the host has mounted below the root |
//! | `engine.rs` | what runs the guest's code |
//! | `kernel.rs`, `modules.rs` | the guest's kernel and its modules |
//! | `initramfs.rs` | the archive with the init |
//! | `vm.rs` | the VM's process, seen from the one that has started it |
//! | `tie.rs` | in the VM's process: what ties it to that one |
//! | `follow.rs` | what becomes known of the VM: its events, its guest's boot, its end |
//! | `console.rs` | the guest's console, and the log of the VM's process |
//! | `copies.rs` | what comes out of the guest after its command |
//! | `supervise.rs` | the run, from the start of the VM to its end |
//! | `report.rs` | what came of it |
//! | `oci.rs` | an image of a local OCI layout as the guest's root |
//! | `root.rs` | how its files get into the guest |
//! | `unpack.rs` | packed streams |

mod below;
mod console;
mod copies;
mod engine;
mod follow;
pub mod initramfs;
pub mod kernel;
pub mod modules;
mod oci;
mod plan;
mod report;
mod root;
mod supervise;
pub mod tie;
mod unpack;
mod vm;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use initramfs::InitramfsError;
use kernel::KernelError;
use oci::OciError;
use plan::Plan;
use report::{End, Reason, Stages};
use supervise::PANIC;
use vm::Vm;

pub use report::FAILED;

use crate::agent::SessionError;
use crate::cli::RunArgs;
use crate::config::RunConfig;
use crate::control::exit::chain;
use crate::log_writer;

/// How many lines of the console are shown when a VM has failed.
const LINES: usize = 20;
/// The same from that of a panic on.
const PANIC_LINES: usize = 60;
/// How long the last of them may take to come.
const LAST_LINES: Duration = Duration::from_millis(500);

/// Why there is no run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// There is no kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// There is no initramfs.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// KVM was asked for.
    #[error("KVM cannot run the guest: {0}")]
    NoKvm(String),
    /// The root file system.
    #[error("cannot use the root {0:?}")]
    Root(PathBuf, #[source] io::Error),
    /// An image of a layout.
    #[error(transparent)]
    Image(#[from] OciError),
    /// An image that does not fit into the guest's memory, where its files are.
    #[error("the image has {} MiB, and the guest's memory of {} MiB has to hold it", .0 >> 20, .1 >> 20)]
    TooLarge(u64, u64),
    /// No image says what runs.
    #[error("there is no command")]
    NoCommand,
    /// A directory.
    #[error("cannot share the directory {0:?}")]
    Share(PathBuf, #[source] io::Error),
    /// A place for what comes out of the guest.
    #[error("cannot copy anything to {0:?}")]
    CopyOut(PathBuf, #[source] io::Error),
    /// The command's streams.
    #[error(transparent)]
    Session(SessionError),
    /// The host refuses something small.
    #[error("cannot {0}")]
    Host(&'static str, #[source] io::Error),
}

impl RunError {
    /// What to do about it, where the text does not say it.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Kernel(error) => error.remedy(),
            Self::Initramfs(error) => error.remedy(),
            Self::TooLarge(size, _) => Some(format!("--memory {}M", (size >> 19).max(512))),
            Self::NoCommand => {
                Some("write one behind --, or -d for a guest that waits for exec".into())
            }
            Self::NoKvm(_) => Some("--accel auto or tcg runs it by emulation, in QEMU".into()),
            _ => None,
        }
    }

    fn reason(&self) -> Reason {
        match self {
            Self::Initramfs(InitramfsError::Modules(_)) => Reason::Module,
            Self::Root(..) | Self::Image(_) | Self::TooLarge(..) => Reason::Root,
            Self::Share(..) => Reason::Share,
            Self::CopyOut(..) => Reason::CopyOut,
            Self::Session(_) | Self::Host(..) => Reason::Host,
            _ => Reason::Setup,
        }
    }
}

impl From<RunError> for End {
    fn from(error: RunError) -> Self {
        let why = chain(&error);
        let text = match error.remedy() {
            Some(remedy) => format!("{why}: {remedy}"),
            None => why,
        };
        Self::failed(error.reason(), text)
    }
}

/// Runs the command, or shows what would be started; returns the exit status.
pub fn run(args: &RunArgs) -> u8 {
    let config = RunConfig::from(args.clone());
    let mut stages = Stages::begin();
    let (mut vm, mut started) = (None, [None, None]);
    let end = attempt(&config, &mut stages, &mut vm, &mut started);
    let end = end.unwrap_or_else(End::from);
    show(&config, &end, vm.as_ref());
    if let Some(path) = &config.result {
        let [kernel, accel] = &started;
        let started = [kernel.as_deref(), accel.as_deref()];
        let json = |known: Option<&_>| report::json(&end, &stages, known, started);
        let report = match &vm {
            Some(vm) => vm.known(|known| json(Some(known))),
            None => json(None),
        };
        if let Err(error) = report::write(path, &report) {
            log::error!("cannot write {path:?}: {error}");
            return match end.status {
                0 => report::FAILED,
                status => status,
            };
        }
    }
    end.status
}

/// The run, and what was started for it: the kernel's release, and what runs it.
fn attempt(
    config: &RunConfig,
    stages: &mut Stages,
    vm: &mut Option<Vm>,
    started: &mut [Option<String>; 2],
) -> Result<End, RunError> {
    let plan = Plan::new(config)?;
    *started = [
        Some(plan.kernel.release.clone()),
        Some(plan.mode.name().into()),
    ];
    stages.note("planned");
    if config.dry_run {
        return dry_run(&plan).map(|()| End {
            status: 0,
            reason: Reason::Exited,
            text: "nothing was run".into(),
        });
    }
    supervise::run(config, &plan, stages, vm)
}

/// Shows how the VM's process would be started.
fn dry_run(plan: &Plan) -> Result<(), RunError> {
    let mut line = "minivmm".to_owned();
    for word in plan.words(Path::new("INITRAMFS")) {
        line.push(' ');
        line.push_str(&quoted(&word.to_string_lossy()));
    }
    let failed = |error| RunError::Host("write to stdout", error);
    writeln!(io::stdout(), "{line}").map_err(failed)
}

/// A word for a shell.
pub fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,%+@".contains(c);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

/// Says why there is no status of the command's, and what the guest's console said last.
fn show(config: &RunConfig, end: &End, vm: Option<&Vm>) {
    match end.reason {
        Reason::Exited | Reason::Signal => return log::debug!("{}", end.text),
        _ => log::error!("{}", end.text),
    }
    let is_the_guests = !matches!(
        end.reason,
        Reason::NotFound
            | Reason::NotExecutable
            | Reason::NotStarted
            | Reason::Timeout
            | Reason::CopyOut
            | Reason::Interrupted
    );
    let Some(vm) = vm.filter(|_| is_the_guests && !config.console) else {
        return;
    };
    let lines = vm.console.lines(LAST_LINES);
    let lines = relevant(&lines);
    if !lines.is_empty() {
        log_writer::flush();
        let text = format!("The guest's console said last:\n  {}\n", lines.join("\n  "));
        // Nothing is to be done where stderr is closed.
        let _ = io::stderr().write_all(text.as_bytes());
    }
}

/// The last lines, or those of a panic.
fn relevant(lines: &[String]) -> &[String] {
    match lines.iter().rposition(|line| line.contains(PANIC)) {
        Some(at) => &lines[at..lines.len().min(at + PANIC_LINES)],
        None => &lines[lines.len().saturating_sub(LINES)..],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_where_a_shell_would_split_them() {
        for (word, expected) in [
            ("--share", "--share"),
            ("/:root:ro", "/:root:ro"),
            ("", "''"),
            ("quiet a", "'quiet a'"),
            ("it's", r"'it'\''s'"),
        ] {
            assert_eq!(quoted(word), expected);
        }
    }

    #[test]
    fn lines_that_tell_are_those_of_a_panic_or_the_last() {
        let lines: Vec<_> = (0..200).map(|n| n.to_string()).collect();
        assert_eq!(relevant(&lines), &lines[180..]);
        assert_eq!(relevant(&lines[..5]), &lines[..5]);
        let mut panicked = lines.clone();
        panicked[50] = format!("[ 1.0] {PANIC}no init");
        assert_eq!(relevant(&panicked), &panicked[50..110]);
    }

    #[test]
    fn error_becomes_an_end_with_its_remedy() {
        let end = End::from(RunError::NoKvm("it emulates".into()));
        assert_eq!((end.status, end.reason), (125, Reason::Setup));
        assert!(
            end.text.contains("it emulates: --accel auto"),
            "{}",
            end.text
        );
    }
}
