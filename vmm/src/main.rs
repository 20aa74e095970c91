//! The program: command line, log, and the exit status.

use std::error::Error;
use std::process::ExitCode;

use vmm::cli::Cli;
use vmm::config::Config;
use vmm::{Exit, builder, commands, limits, log_writer, signals, tty};

fn main() -> ExitCode {
    let settled = signals::settle();
    limits::raise();
    let cli = Cli::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    let _log = log_writer::start(i16::from(cli.log.verbose) - i16::from(cli.log.quiet));
    if let Err(error) = settled {
        log::warn!("cannot change what signals do: {error}");
    }
    if let Some(command) = &cli.command {
        // SAFETY: as below.
        let status = unsafe { commands::run(command) };
        return ExitCode::from(status.unwrap_or_else(|error| {
            log::error!("{}", chain(&error));
            error.code()
        }));
    }
    tty::restore_on_panic();
    // SAFETY: this process has opened nothing yet that it would keep, so whatever is open under
    // the numbers that the command line names was handed to it.
    let exit = unsafe { builder::run(Config::from(cli.guest), &signals::ENDING, drop) };
    let exit = exit.unwrap_or_else(|error| Exit::Failure(chain(&error)));
    exit.log();
    // Not `exit`: nothing that the console's thread, blocked in its read, might hold is waited for.
    ExitCode::from(exit.code())
}

/// The error and its causes, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
