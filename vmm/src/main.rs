//! The program: command line, log, and the exit status.

use std::process::ExitCode;

use vmm::cli::Cli;
use vmm::config::Config;
use vmm::control::exit::{Exit, chain};
use vmm::nic::Inherited;
use vmm::{builder, commands, limits, log_writer, signals, tty};

fn main() -> ExitCode {
    let settled = signals::settle();
    limits::raise();
    let cli = Cli::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    let _log = log_writer::start(i16::from(cli.log.verbose) - i16::from(cli.log.quiet));
    if let Err(error) = settled {
        log::warn!("cannot change what signals do: {error}");
    }
    // SAFETY: this process has opened nothing yet that it would keep, so whatever is open under
    // the numbers that the command line names was passed to it.
    let inherited = match unsafe { Inherited::take(&cli.descriptors()) } {
        Ok(inherited) => inherited,
        Err(error) => {
            log::error!("{}", chain(&error));
            return ExitCode::FAILURE;
        }
    };
    if let Some(command) = &cli.command {
        let status = commands::run(command, inherited);
        return ExitCode::from(status.unwrap_or_else(|error| {
            log::error!("{}", chain(&error));
            error.code()
        }));
    }
    tty::restore_on_panic();
    let exit = builder::run(Config::from(cli.guest), inherited, &signals::ENDING, drop);
    let exit = exit.unwrap_or_else(|error| Exit::Failure(chain(&error)));
    exit.log();
    // Not `exit`: nothing that the console's thread, blocked in its read, might hold is waited for.
    ExitCode::from(exit.code())
}
