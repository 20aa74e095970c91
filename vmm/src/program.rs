//! The program `minivmm`: command line, log, and the exit status.

use std::process::ExitCode;
use std::time::Instant;

use crate::builder::Error;
use crate::cli::Cli;
use crate::config::Config;
use crate::control::exit::{Exit, chain};
use crate::instance::Instance;
use crate::nic::Inherited;
use crate::nic::registry::Runs;
use crate::{builder, commands, limits, log_writer, signals, trim, tty};

/// Does what the command line says.
///
/// # Safety
///
/// Nothing in this process may own a file descriptor that the command line can name: call it first
/// in `main`.
pub unsafe fn main() -> ExitCode {
    let began = Instant::now();
    trim::hold_little();
    let settled = signals::settle();
    limits::raise();
    let cli = Cli::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    let _log = log_writer::start(i16::from(cli.log.verbose) - i16::from(cli.log.quiet));
    if let Err(error) = settled {
        log::warn!("cannot change what signals do: {error}");
    }
    // SAFETY: as for this function, which has opened nothing that it keeps.
    let inherited = match unsafe { Inherited::take(&cli.descriptors(), cli.events_descriptor()) } {
        Ok(inherited) => inherited,
        Err(error) => {
            log::error!("{}", chain(&error));
            return ExitCode::FAILURE;
        }
    };
    if let Some(command) = &cli.command {
        let status = commands::run(command, inherited);
        return ExitCode::from(status.unwrap_or_else(|error| {
            log::error!("{}", with_remedy(chain(&error), error.remedy()));
            error.code()
        }));
    }
    tty::restore_on_panic();
    let config = Config::from(cli.guest);
    let exit = run_guest(began, config, inherited)
        .unwrap_or_else(|error| Exit::Failure(with_remedy(chain(&error), error.remedy())));
    exit.log();
    // Not `exit`: nothing that the console's thread, blocked in its read, might hold is waited for.
    ExitCode::from(exit.code())
}

/// Nothing is left of the guest when this returns.
fn run_guest(began: Instant, mut config: Config, inherited: Inherited) -> Result<Exit, Error> {
    let runs = Runs::kernel(&config.kernel);
    let instance = Instance::of_program(config.name.as_ref(), &runs, &config.qmp)?;
    instance
        .iter()
        .for_each(|instance| instance.enter(&mut config));
    // No other thread is to control the guest.
    builder::run(
        began,
        config,
        inherited,
        &signals::ENDING,
        drop,
        trim::give_back,
    )
}

fn with_remedy(failure: String, remedy: Option<String>) -> String {
    match remedy {
        Some(remedy) => format!("{failure}: {remedy}"),
        None => failure,
    }
}
