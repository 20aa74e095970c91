//! `minivmm run --file`: the targets of a file, one after the other, each by a process of its own.

use std::env;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use log::LevelFilter;
use signal_hook::consts::{SIGHUP, SIGTERM};

use crate::child::{Arrivals, Program, exit_code};
use crate::cli::{RunArgs, RunTarget, TargetsError, read_targets};
use crate::log_writer;
use crate::printable::printable;
use crate::run::quoted;
use crate::signals::ENDING;

/// Why targets are not run.
#[derive(Debug, thiserror::Error)]
pub enum RunTargetsError {
    /// The file.
    #[error(transparent)]
    File(#[from] TargetsError),
    /// Its directory, where paths begin.
    #[error("cannot go to the directory {0:?}")]
    Directory(PathBuf, #[source] io::Error),
    /// This host refuses something.
    #[error("cannot {0}")]
    Host(&'static str, #[source] io::Error),
}

/// What came of a target.
#[derive(Debug)]
struct Outcome<'a> {
    name: &'a str,
    status: u8,
    took: Duration,
}

/// Runs the targets of the file, or shows them. Returns 0 if all have succeeded, or the status of the first that has not.
///
/// # Errors
///
/// See [`RunTargetsError`]. One that is wrong is one before the first target is run.
pub fn run(args: &RunArgs, path: &Path) -> Result<u8, RunTargetsError> {
    let targets = read_targets(path, &args.targets)?;
    if args.dry_run {
        let failed = |error| RunTargetsError::Host("write to stdout", error);
        return show(&targets).map_err(failed).map(|()| 0);
    }
    let directory = path.parent().filter(|it| !it.as_os_str().is_empty());
    if let Some(directory) = directory {
        let failed = |error| RunTargetsError::Directory(directory.to_owned(), error);
        env::set_current_dir(directory).map_err(failed)?;
    }
    let failed = |error| RunTargetsError::Host("run a target", error);
    // Of each that ends one target, and with it the others.
    let mut signals = Arrivals::new(&ENDING).map_err(failed)?;
    let mut outcomes = Vec::new();
    let mut status = 0;
    for target in &targets {
        let began = Instant::now();
        let outcome = Outcome {
            name: &target.name,
            status: one(target).map_err(failed)?,
            took: began.elapsed(),
        };
        say(&line(&outcome));
        if status == 0 {
            status = outcome.status;
        }
        outcomes.push(outcome);
        if let Some(signal) = signals.take().find(|signal| ENDING.contains(signal)) {
            // Of those that are caught, all are below 32.
            status = 128 + (signal & 0x1f) as u8;
            break;
        }
    }
    say(&summary(&outcomes, &targets));
    Ok(status)
}

/// Runs one, without an input: that is of no target.
fn one(target: &RunTarget) -> io::Result<u8> {
    let mut command = Command::new(env::current_exe()?);
    command.arg("run").args(verbosity()).args(&target.words);
    command.stdin(Stdio::null());
    let mut program = Program::new(command);
    // The numbers that its NICs name.
    program.inherits = true;
    let signals = Arrivals::new(&ENDING)?;
    log_writer::flush();
    let child = program.spawn()?;
    // The others come from the terminal, to it as well.
    let status = child.wait(signals, &[SIGTERM, SIGHUP])?;
    Ok(exit_code(status))
}

/// How much it logs: as much as this process.
fn verbosity() -> Option<&'static str> {
    match log::max_level() {
        LevelFilter::Trace => Some("-vv"),
        LevelFilter::Debug => Some("-v"),
        LevelFilter::Info => None,
        LevelFilter::Warn => Some("-q"),
        LevelFilter::Error => Some("-qq"),
        LevelFilter::Off => Some("-qqq"),
    }
}

/// Prints each as a command line.
fn show(targets: &[RunTarget]) -> io::Result<()> {
    let mut text = String::new();
    for target in targets {
        text += &format!("# {}\nminivmm run", printable(&target.name));
        for word in &target.words {
            text.push(' ');
            text += &quoted(word);
        }
        text.push('\n');
    }
    io::stdout().write_all(text.as_bytes())
}

fn line(outcome: &Outcome) -> String {
    let took = outcome.took.as_secs_f64();
    let name = outcome.name;
    match outcome.status {
        0 => format!("{name}: ok, {took:.1} s"),
        status => format!("{name}: status {status}, {took:.1} s"),
    }
}

fn summary(outcomes: &[Outcome], targets: &[RunTarget]) -> String {
    let failed = outcomes.iter().filter(|it| it.status != 0);
    let failed: Vec<_> = failed.map(|it| it.name).collect();
    let left = targets[outcomes.len()..].iter().map(|it| &*it.name);
    let left: Vec<_> = left.collect();
    let ok = outcomes.len() - failed.len();
    let mut text = format!("{} targets: {ok} ok", targets.len());
    for (what, names) in [("failed", failed), ("not run", left)] {
        if !names.is_empty() {
            text += &format!(", {} {what} ({})", names.len(), names.join(", "));
        }
    }
    text
}

/// Says it on stderr, whatever is logged.
fn say(text: &str) {
    log_writer::flush();
    // Nothing is to be done where stderr is closed.
    let _ = writeln!(io::stderr(), "{}", printable(text));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_target_has_a_line_and_all_a_summary() {
        let targets = ["a", "b", "c"].map(|name| RunTarget {
            name: name.into(),
            words: Vec::new(),
        });
        let outcome = |name, status| Outcome {
            name,
            status,
            took: Duration::from_millis(1230),
        };
        assert_eq!(line(&outcome("a", 0)), "a: ok, 1.2 s");
        assert_eq!(line(&outcome("b", 124)), "b: status 124, 1.2 s");
        let all = [outcome("a", 0), outcome("b", 0), outcome("c", 0)];
        assert_eq!(summary(&all, &targets), "3 targets: 3 ok");
        let some = [outcome("a", 0), outcome("b", 3)];
        assert_eq!(
            summary(&some, &targets),
            "3 targets: 1 ok, 1 failed (b), 1 not run (c)"
        );
    }
}
