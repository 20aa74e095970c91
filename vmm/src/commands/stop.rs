//! `minivmm stop` and `minivmm kill`: the end of running VMs.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::cli::{KillArgs, StopArgs};
use crate::config::VmName;
use crate::control::exit::chain;
use crate::instance::{self, FindError, Found};
use crate::qmp::client::ClientError;
use crate::qmp::commands::info::{Info, QUERY_INFO};

/// How long a VM that is asked to end at once may take to answer, and to end.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long it may take for each answer before its power button is given up.
const PRESSING: Duration = Duration::from_secs(5);
/// How long the kernel may take to end a process.
const KILLED: Duration = Duration::from_secs(30);

/// Why a VM runs on.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// There is none of that name.
    #[error(transparent)]
    Find(#[from] FindError),
    /// Its process cannot be reached.
    #[error(
        "{0} does not end when it is asked to, and its process cannot be killed from here: pid {1} is out of sight"
    )]
    OutOfSight(VmName, u32),
    /// The kernel does not end it.
    #[error("{0} does not end: its process, pid {1}, was killed and is still there")]
    Stays(VmName, u32),
}

/// Presses the power buttons, and ends those that are not off in time. The exit status.
pub fn stop(args: &StopArgs) -> Result<u8, FindError> {
    let timeout = args
        .timeout
        .map(|seconds| Duration::from_secs(seconds.into()));
    each(&args.name, |vm| match power_off(vm, timeout) {
        true => Ok(()),
        false => end(vm),
    })
}

/// Ends them at once. The exit status.
pub fn kill(args: &KillArgs) -> Result<u8, FindError> {
    each(&args.name, end)
}

/// Does it to all of them, side by side, if they are there.
fn each(
    names: &[VmName],
    work: impl Fn(&Found) -> Result<(), StopError> + Sync,
) -> Result<u8, FindError> {
    let found = names.iter().map(instance::find);
    let found: Vec<_> = found.collect::<Result<_, _>>()?;
    let failed = thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = found
            .iter()
            .map(|vm| scope.spawn(move || work(vm)))
            .collect();
        let results = threads.into_iter().filter_map(|thread| thread.join().ok());
        let failed = results.filter_map(Result::err);
        failed.inspect(|error| log::error!("{error}")).count()
    });
    Ok(u8::from(failed > 0))
}

/// Whether the guest has powered off in time.
fn power_off(vm: &Found, timeout: Option<Duration>) -> bool {
    let name = &vm.record.name;
    let timeout = match press(vm) {
        Ok(usual) => timeout.unwrap_or(usual),
        // It has just ended.
        Err(_) if vm.await_end(Duration::ZERO) => return true,
        Err(error) => {
            log::warn!("{name} does not take the power button: {}", chain(&error));
            return false;
        }
    };
    let ended = vm.await_end(timeout);
    if !ended {
        log::warn!("{name} did not power off within {} s", timeout.as_secs());
    }
    ended
}

/// Presses the power button, and returns how long the guest may take to power off.
fn press(vm: &Found) -> Result<Duration, ClientError> {
    let mut client = vm.connect(PRESSING)?;
    let info = client.execute(QUERY_INFO, json!({}))?;
    let info: Info = serde_json::from_value(info).map_err(|_| ClientError::NoQmp)?;
    client.execute("system_powerdown", json!({}))?;
    Ok(Duration::from_secs(info.stop_timeout))
}

/// Ends a VM at once, by the kernel's hand where it does not do that itself.
fn end(vm: &Found) -> Result<(), StopError> {
    let process = vm.process();
    let start = Instant::now();
    // It may end before it answers.
    let asked = vm
        .connect(PATIENCE)
        .and_then(|mut client| client.execute("quit", json!({})));
    log::debug!("{}: quit: {asked:?}", vm.record.name);
    if vm.await_end(PATIENCE.saturating_sub(start.elapsed())) {
        return Ok(());
    }
    let (name, pid) = (vm.record.name.clone(), vm.record.pid);
    let Some(process) = process.filter(|process| process.kill()) else {
        return Err(StopError::OutOfSight(name, pid));
    };
    log::warn!("{name} did not end by itself: its process, pid {pid}, was killed");
    drop(process);
    match vm.await_end(KILLED) {
        true => Ok(()),
        false => Err(StopError::Stays(name, pid)),
    }
}
