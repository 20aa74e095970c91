//! The program `minivmm`: command line, log, and the exit status.

use std::process::ExitCode;
use std::time::Instant;

use crate::builder::Error;
use crate::cli::{Cli, Command};
use crate::config::Config;
use crate::control::exit::{Exit, chain};
use crate::detach::{self, Side};
use crate::instance::{Instance, Serves};
use crate::nic::Inherited;
use crate::nic::registry::Runs;
use crate::run::tie::Tie;
use crate::vsock::VsockError;
use crate::{builder, commands, limits, log_writer, qemu, share, signals, trim, tty};

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
    share::is_minivmm();
    let cli = Cli::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    if let Some(Command::FileServer(args)) = &cli.command {
        // SAFETY: this is the first thread, which has opened nothing.
        return unsafe { share::serve(args) };
    }
    let (queues, listeners, events) = (cli.descriptors(), cli.listeners(), cli.events_descriptor());
    let mut keep = Inherited::numbers(&queues, &listeners, events);
    if let Some(Command::Qemu(args)) = &cli.command {
        keep.extend(qemu::descriptors_of(&args.args));
    }
    let forked = match cli.detaches() {
        // SAFETY: this is the first thread, which has opened nothing.
        true => unsafe { detach::fork(&keep) }.map(Some),
        false => Ok(None),
    };
    if let Ok(Some(Side::Command(starting))) = forked {
        return starting.finish();
    }
    let _log = log_writer::start(i16::from(cli.log.verbose) - i16::from(cli.log.quiet));
    if let Err(error) = settled {
        log::warn!("cannot change what signals do: {error}");
    }
    if let Err(error) = forked {
        log::error!("cannot start a process for the VM: {error}");
        return ExitCode::FAILURE;
    }
    // SAFETY: as for this function, which has opened nothing that it keeps, and nothing that has such a number.
    let inherited = match unsafe { Inherited::take(&queues, &listeners, events) } {
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
    let exit = run_guest(began, Config::from(cli.guest), inherited);
    // Not `exit`: nothing that the console's thread, blocked in its read, might hold is waited for.
    ExitCode::from(exit.code())
}

/// Nothing is left of the guest when this returns, but for what is to be known of one that was detached.
fn run_guest(began: Instant, mut config: Config, mut inherited: Inherited) -> Exit {
    let failure = |error: Error| Exit::Failure(with_remedy(chain(&error), error.remedy()));
    let runs = Runs::kernel(&config.kernel);
    let runner = config.runner;
    let serves = Serves {
        runs: &runs,
        qmp: &config.qmp,
        vsock: config.vsock.as_ref(),
        runner,
    };
    let claimed = Instance::of_program(config.name.as_ref(), &serves);
    let entered = claimed.map_err(Error::from).and_then(|instance| {
        let Some(instance) = instance else {
            return Ok((None, None));
        };
        instance.enter(&mut config);
        let tied = runner.map(|fds| instance.tie(fds, &mut inherited));
        let (vsock, tie) = tied.transpose().map_err(VsockError::from)?.unzip();
        config.vsock = vsock.or(config.vsock.take());
        Ok((Some(instance), tie))
    });
    let (instance, tie) = match entered {
        Ok(entered) => entered,
        Err(error) => {
            let exit = failure(error);
            exit.log();
            return exit;
        }
    };
    let name = config.name.clone();
    // No other thread is to control the guest.
    let started = |_| {
        tie.map_or(Ok(()), Tie::hold)?;
        detach::started(name.as_ref())
    };
    let settled = trim::give_back;
    let exit = builder::run(began, config, inherited, &signals::ENDING, started, settled);
    let exit = exit.unwrap_or_else(failure);
    exit.log();
    if let Some(instance) = instance {
        instance.end(exit.code(), exit.to_string());
    }
    exit
}

fn with_remedy(failure: String, remedy: Option<String>) -> String {
    match remedy {
        Some(remedy) => format!("{failure}: {remedy}"),
        None => failure,
    }
}
