//! The program: command line, log, and the exit status.

use std::error::Error;
use std::io::{IsTerminal, Write, stderr, stdout};
use std::process::ExitCode;

use env_logger::Env;
use vmm::cli::Cli;
use vmm::config::Config;
use vmm::printable::printable;
use vmm::{Exit, builder, commands, console, limits, signals, terminal};

fn main() -> ExitCode {
    let settled = signals::settle();
    limits::raise();
    let cli = Cli::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    start_log(i16::from(cli.log.verbose) - i16::from(cli.log.quiet));
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
    terminal::restore_on_panic();
    // SAFETY: this process has opened nothing yet that it would keep, so whatever is open under
    // the numbers that the command line names was handed to it.
    let exit = unsafe { builder::run(Config::from(cli.guest)) };
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

/// Logs to stderr. On a terminal that also shows the guest's console, a log line begins on a line
/// of its own.
fn start_log(verbosity: i16) {
    let level = match verbosity {
        ..=-3 => "off",
        -2 => "error",
        -1 => "warn",
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    // virtio-queue logs what a guest can cause at will, and rtnetlink its messages.
    let default = format!("{level},virtio_queue=off,netlink_proto=off,netlink_packet_route=off");
    let share_terminal = stdout().is_terminal() && stderr().is_terminal();
    env_logger::Builder::from_env(Env::default().default_filter_or(default))
        .format(move |line, record| {
            if share_terminal && console::take_mid_line() {
                writeln!(line)?;
            }
            let style = line.default_level_style(record.level());
            let level = record.level().as_str().to_lowercase();
            let text = record.args().to_string();
            let text = printable(&text);
            writeln!(line, "minivmm: {style}{level}{style:#}: {text}")
        })
        .init();
}
