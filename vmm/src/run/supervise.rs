//! A run from its beginning to its end, on the main thread: the VM is started, its guest gets what it is to be, the command
//! runs, and the guest powers off.

use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use agent_protocol::boot::ToInit;
use agent_protocol::session::{Exec, ExecFailure};

use super::RunError;
use super::console::last_error;
use super::copies::{self, Copied};
use super::follow::Known;
use super::plan::Plan;
use super::report::{End, FAILED, Reason, Stages, TIMED_OUT};
use super::vm::Vm;
use crate::agent::{Agent, FORWARDED, Outcome, Reaction, Session, SessionError};
use crate::child::Arrivals;
use crate::config::{RunConfig, VmName};
use crate::control::exit::chain;
use crate::{detach, instance, tty};

/// How long a guest may be silent while it boots natively: on its console, and to this process.
const SILENCE: Duration = Duration::from_secs(30);
/// How long it may take to power off natively.
const POWER_OFF: Duration = Duration::from_secs(10);
/// How long the end of the VM's process takes to be known once the connections to its guest have ended.
const VERDICT: Duration = Duration::from_secs(1);
/// How a panic's line begins (panic() in the kernel's kernel/panic.c).
pub const PANIC: &str = "Kernel panic - not syncing: ";
/// How a line of the guest's init begins that could not say it to this process (vmm/agent/src/init/console.rs).
const AGENT: &str = "minivmm-agent: ";

/// Runs the command; how it ended. The VM that is left in `vm` has ended, too.
///
/// # Errors
///
/// See [`RunError`].
pub fn run(
    config: &RunConfig,
    plan: &Plan,
    stages: &mut Stages,
    vm: &mut Option<Vm>,
) -> Result<End, RunError> {
    let failed = |error| RunError::Host("catch signals", error);
    let mut signals = Arrivals::new(&FORWARDED).map_err(failed)?;
    tty::restore_on_panic();
    let vm = vm.insert(Vm::start(plan, config.console)?);
    stages.note("started");
    let run = Run { config, plan, vm };
    let end = match run.boot(&mut signals, stages)? {
        Some(end) => end,
        None => match &plan.exec {
            Some(exec) => run.command(exec.clone(), &mut signals, stages)?,
            None => run.idle(&mut signals)?,
        },
    };
    run.finish(&end, stages);
    // Whatever came of it in the guest.
    let unserved = run.vm.known(|known| known.unserved.clone());
    Ok(unserved.map_or(end, |why| End::failed(Reason::Share, why)))
}

/// How far the guest is with an image.
#[derive(Debug, Default)]
enum Unpacking {
    /// It has not asked for one.
    #[default]
    Unasked,
    /// It gets it.
    Asked,
    /// It has it.
    Done,
}

struct Run<'a> {
    config: &'a RunConfig,
    plan: &'a Plan,
    vm: &'a Vm,
}

impl Run<'_> {
    /// Waits until the guest is ready; an end is one that came before.
    fn boot(&self, signals: &mut Arrivals, stages: &mut Stages) -> Result<Option<End>, RunError> {
        let host = |error| RunError::Host("wait for the VM", error);
        let silence = self.plan.mode.scale(SILENCE);
        let begun = Instant::now();
        let (mut is_sent, mut is_running) = (false, false);
        let mut unpacking = Unpacking::default();
        loop {
            let (started, has_init, said) = self
                .vm
                .known(|known| (known.started, known.kernel.is_some(), known.said));
            if let (Some(at), false) = (started, is_running) {
                is_running = true;
                stages.note_at("running", at);
            }
            if has_init && !is_sent {
                is_sent = true;
                stages.note("init");
                let boot = self.vm.known(|known| {
                    let name = known.name.as_deref();
                    self.plan.boot(name, &known.nics)
                });
                self.vm.send(&ToInit::Boot(Box::new(boot)));
            }
            if let Some(end) = self.ended_early() {
                return Ok(Some(end));
            }
            if let Some(end) = self.unpack(&mut unpacking, stages)? {
                return Ok(Some(end));
            }
            if self.vm.known(|known| known.ready.is_some()) {
                stages.note("ready");
                let name = self.vm.known(|known| known.name.clone());
                let name: Option<VmName> = name.and_then(|name| name.parse().ok());
                let failed = |error| RunError::Host("return to the command that was typed", error);
                detach::started(name.as_ref()).map_err(failed)?;
                return Ok(None);
            }
            // What the init was asked for has limits of its own.
            let last = said.max(Some(self.vm.console.last())).unwrap_or(begun);
            let until = last.max(begun) + silence;
            if Instant::now() >= until {
                return Ok(Some(self.silent(silence)));
            }
            self.vm.wait(signals, Some(until)).map_err(host)?;
            let ending = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
            if let Some(signal) = signals.take().find(|signal| ending.contains(signal)) {
                return Ok(Some(interrupted(signal, "while the guest booted")));
            }
        }
    }

    /// Sends the guest the files of its image when it wants them; an end is a failure.
    fn unpack(
        &self,
        unpacking: &mut Unpacking,
        stages: &mut Stages,
    ) -> Result<Option<End>, RunError> {
        let (asked, done) = self
            .vm
            .known(|known| (known.unpack.clone(), known.unpacked.clone()));
        if let (Some(path), Unpacking::Unasked, Some(image)) =
            (asked, &*unpacking, &self.plan.image)
        {
            *unpacking = Unpacking::Asked;
            let Some(agent) = self.agent() else {
                return Ok(Some(self.no_directory()));
            };
            let failed = |error| RunError::Host("start a thread for the image", error);
            self.vm.unpack(agent, image.clone(), path).map_err(failed)?;
        }
        match done {
            Some(Err(why)) => {
                let text = format!("the guest has not got its image: {why}");
                return Ok(Some(self.verdict(|| End::failed(Reason::Root, text))));
            }
            Some(Ok(())) if matches!(unpacking, Unpacking::Asked) => {
                *unpacking = Unpacking::Done;
                stages.note("unpacked");
                self.vm.send(&ToInit::Unpacked);
            }
            _ => {}
        }
        Ok(None)
    }

    /// The agent in the guest, unless the VM has gone.
    fn agent(&self) -> Option<Agent> {
        let name = self.vm.known(|known| known.name.clone());
        let name: Option<VmName> = name.and_then(|name| name.parse().ok());
        let vm = name.as_ref().map(instance::find).and_then(Result::ok);
        vm.and_then(|vm| vm.record.vsock)
            .map(|socket| Agent::at(&socket))
    }

    fn no_directory(&self) -> End {
        self.verdict(|| End::failed(Reason::Agent, "the VM has no directory any more"))
    }

    fn silent(&self, silence: Duration) -> End {
        let what = match self
            .vm
            .known(|known| (known.started, known.kernel.is_some()))
        {
            (None, _) => "the VM's process has not started the guest",
            (_, false) => "the guest's kernel has not come to our init",
            _ => "the guest's init is not ready",
        };
        let text = format!(
            "{what}, and nothing was heard of it for {} s",
            silence.as_secs()
        );
        End::failed(Reason::Silent, text)
    }

    /// The end of a guest that is not ready.
    fn ended_early(&self) -> Option<End> {
        let (failed, lost, off, ended) = self.vm.known(|known| {
            let failed = known.failed.clone();
            (failed, known.lost, known.is_power_off_wanted, known.ended)
        });
        if let Some((part, text)) = failed {
            return Some(End::failed(part.into(), text));
        }
        if let Some(status) = ended {
            return Some(self.vm_ended(status));
        }
        if off {
            return Some(stopped());
        }
        let why = lost?;
        // A panic, or the end of the VM's process, explains it.
        Some(self.verdict(|| End::failed(Reason::Agent, why)))
    }

    /// How the VM has ended, or if it has not, what `otherwise` says.
    fn verdict(&self, otherwise: impl FnOnce() -> End) -> End {
        self.vm
            .await_end(self.plan.mode.scale(VERDICT).min(2 * VERDICT));
        match self.vm.known(|known| known.ended) {
            Some(status) => self.vm_ended(status),
            None => otherwise(),
        }
    }

    /// Why the VM's process has ended, which was not to be.
    fn vm_ended(&self, status: ExitStatus) -> End {
        let (exit, was_running) = self
            .vm
            .known(|known| (known.exit.clone(), known.started.is_some()));
        let exit = match exit {
            Some(exit) => exit,
            // It is killed, or has ended before it had opened its files.
            None if status.code().is_none() => {
                return End::failed(
                    Reason::Killed,
                    format!("the VM's process was killed ({status})"),
                );
            }
            None => {
                let log = self.vm.log.lines(VERDICT);
                let why = last_error(&log).or(log.last().map(String::as_str));
                let why = why.map_or_else(|| status.to_string(), str::to_owned);
                return End::failed(Reason::Start, why);
            }
        };
        match exit.reason.as_str() {
            "panic" => self.panicked(),
            "power-off" if self.vm.known(|known| known.is_power_off_wanted) => stopped(),
            "power-off" => self.powered_off(),
            "reboot" => End::failed(Reason::Reboot, "the guest rebooted by itself"),
            "crash" => End::failed(Reason::Crash, exit.text),
            "quit" | "signal" => {
                End::failed(Reason::Killed, format!("the VM was ended: {}", exit.text))
            }
            _ if was_running => End::failed(Reason::Crash, exit.text),
            _ => End::failed(Reason::Start, exit.text),
        }
    }

    /// What follows these words on the console's last line that has them.
    fn said_last(&self, words: &str) -> Option<String> {
        let lines = self.vm.console.lines(VERDICT);
        let why = lines.iter().rev().find_map(|line| line.split_once(words));
        why.map(|(_, why)| why.to_owned())
    }

    fn powered_off(&self) -> End {
        match self.said_last(AGENT) {
            Some(why) => End::failed(Reason::Agent, why),
            None => End::failed(Reason::PowerOff, "the guest powered off by itself"),
        }
    }

    fn panicked(&self) -> End {
        let why = self.said_last(PANIC);
        let reason = match &why {
            Some(why) if why.contains("memory") => Reason::OutOfMemory,
            _ => Reason::Panic,
        };
        let text = "the guest's kernel panicked";
        let why = why.map(|why| format!("{text}: {why}"));
        End::failed(reason, why.unwrap_or_else(|| text.into()))
    }

    /// Runs the command.
    fn command(
        &self,
        exec: Exec,
        signals: &mut Arrivals,
        stages: &mut Stages,
    ) -> Result<End, RunError> {
        let Some(agent) = self.agent() else {
            return Ok(self.no_directory());
        };
        let mut session = match Session::start(&agent, exec) {
            Ok(session) => session,
            Err(SessionError::Connect(error)) => {
                return Ok(self.verdict(|| End::failed(Reason::Agent, chain(&error))));
            }
            Err(error) => return Err(RunError::Session(error)),
        };
        if self.config.root.path != Path::new("/") {
            session.expect_other_root();
        }
        stages.note("command");
        let deadline = self.config.timeout.map(|timeout| Instant::now() + timeout);
        let mut interrupts = Interrupts::default();
        let outcome = session.wait(signals, deadline, &mut |signal| interrupts.react(signal));
        let outcome = outcome.map_err(RunError::Session)?;
        stages.note("ended");
        if let Some(warning) = session.warning() {
            self.vm.note_warning(warning);
        }
        drop(session);
        self.copy_out(self.end_of(outcome), signals, stages)
    }

    /// Copies what is to come out of the guest. Something that is lost is the end of a run that has succeeded so far.
    fn copy_out(
        &self,
        end: End,
        signals: &mut Arrivals,
        stages: &mut Stages,
    ) -> Result<End, RunError> {
        let copies = &self.plan.copies;
        let Some(exec) = self.plan.exec.as_ref().filter(|_| !copies.is_empty()) else {
            return Ok(end);
        };
        match end.reason {
            // One whose time is over may still be about to end.
            Reason::Exited | Reason::Signal | Reason::Timeout => {}
            Reason::NotFound | Reason::NotExecutable | Reason::NotStarted => return Ok(end),
            _ => {
                log::warn!("nothing is copied out of the guest");
                return Ok(end);
            }
        }
        let directory = exec.directory.as_ref().map(|it| it.path.clone());
        let copied = match self.agent() {
            Some(agent) => {
                let directory = directory.unwrap_or_default();
                let copied = copies::copy(copies, agent, directory, self.plan.mode, signals);
                copied.map_err(|error| RunError::Host("copy out of the guest", error))?
            }
            None => Copied::Ended(vec![
                "nothing is copied out of the guest: the VM has ended".into(),
            ]),
        };
        let failures = match copied {
            Copied::Ended(failures) => failures,
            Copied::Interrupted(signal) => {
                return Ok(interrupted(
                    signal,
                    "while files were copied out of the guest",
                ));
            }
        };
        stages.note("copied");
        Ok(without(end, failures))
    }

    fn end_of(&self, outcome: Outcome) -> End {
        let status = outcome.code();
        let (reason, text) = match outcome {
            Outcome::Exited(_) => {
                let text = format!("the command has ended with status {status}");
                (Reason::Exited, text)
            }
            Outcome::Killed { signal, core } => {
                let core = if core { ", with a core file" } else { "" };
                let text = format!("signal {} has ended the command{core}", signal & 0x7f);
                (Reason::Signal, text)
            }
            Outcome::NotStarted { reason, text } => {
                let reason = match reason {
                    ExecFailure::NotFound => Reason::NotFound,
                    ExecFailure::NotExecutable => Reason::NotExecutable,
                    ExecFailure::Refused => Reason::NotStarted,
                };
                (reason, text)
            }
            Outcome::TimedOut => {
                let timeout = self.config.timeout.unwrap_or_default();
                let text = format!(
                    "the command has taken more than {} s",
                    timeout.as_secs_f64()
                );
                return End {
                    status: TIMED_OUT,
                    reason: Reason::Timeout,
                    text,
                };
            }
            Outcome::Left => return interrupted(libc::SIGINT, "a second time"),
            Outcome::Lost => {
                return self.verdict(|| {
                    let text = "the agent in the guest has ended before the command";
                    End::failed(Reason::Agent, text)
                });
            }
        };
        End {
            status,
            reason,
            text,
        }
    }

    /// Waits for the end of a guest that only others use.
    fn idle(&self, signals: &mut Arrivals) -> Result<End, RunError> {
        loop {
            let (ended, off) = self
                .vm
                .known(|known| (known.ended, known.is_power_off_wanted));
            match ended {
                Some(status) => return Ok(self.vm_ended(status)),
                None if off => return Ok(stopped()),
                None => {}
            }
            let failed = |error| RunError::Host("wait for the VM", error);
            self.vm.wait(signals, None).map_err(failed)?;
            let ending = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
            if let Some(signal) = signals.take().find(|signal| ending.contains(signal)) {
                return Ok(interrupted(signal, "while the VM waited"));
            }
        }
    }

    /// Ends the VM: in peace, unless it has failed.
    fn finish(&self, end: &End, stages: &mut Stages) {
        let is_sound = |known: &Known| known.ended.is_none() && known.lost.is_none();
        let has_failed = matches!(end.reason, Reason::Silent | Reason::Interrupted);
        if self.vm.known(is_sound) && !has_failed {
            self.vm.send(&ToInit::PowerOff);
            self.vm.await_end(self.plan.mode.scale(POWER_OFF));
        }
        if self.vm.known(|known| known.ended.is_none()) {
            log::debug!("the guest has not powered off, and is ended");
            self.vm.end();
        }
        self.vm.clean();
        let usage = self.vm.known(|known| known.usage);
        if let Some(usage) = usage.filter(|usage| usage.oom_kills > 0) {
            log::warn!(
                "the guest ran out of memory, and its kernel killed {} processes: --memory gives it more",
                usage.oom_kills
            );
        }
        stages.note("off");
    }
}

/// How a run ends from which something is not copied out: a lost artifact is no success, and a failure of the command
/// stays what it is.
fn without(end: End, failures: Vec<String>) -> End {
    let mut failures = failures.into_iter();
    let end = match end.status {
        0 => failures
            .next()
            .map_or(end, |why| End::failed(Reason::CopyOut, why)),
        _ => end,
    };
    failures.for_each(|why| log::warn!("{why}"));
    end
}

/// How often the user has sent SIGINT.
#[derive(Debug, Default)]
struct Interrupts(u32);

impl Interrupts {
    /// The command gets all signals, until a second SIGINT ends the VM.
    fn react(&mut self, signal: i32) -> Reaction {
        self.0 += u32::from(signal == libc::SIGINT);
        match self.0 {
            0 | 1 => Reaction::Forward,
            _ => Reaction::Leave,
        }
    }
}

fn interrupted(signal: i32, when: &str) -> End {
    End {
        // Of those that are caught, all are below 32.
        status: 128 + (signal & 0x1f) as u8,
        reason: Reason::Interrupted,
        text: format!("signal {signal} came {when}"),
    }
}

fn stopped() -> End {
    End {
        status: FAILED,
        reason: Reason::PowerOff,
        text: "the VM was stopped by its power button".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_interrupt_ends_the_vm_and_no_other_signal_does() {
        let mut interrupts = Interrupts::default();
        for signal in [libc::SIGTERM, libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            assert_eq!(interrupts.react(signal), Reaction::Forward, "{signal}");
        }
        assert_eq!(interrupts.react(libc::SIGINT), Reaction::Leave);
    }

    #[test]
    fn lost_artifact_is_no_success_and_a_failure_stays_what_it_is() {
        let ended = |status, failures: &[&str]| {
            let end = End {
                status,
                reason: Reason::Exited,
                text: "it has ended".into(),
            };
            let failures = failures.iter().map(|why| why.to_string());
            let end = without(end, failures.collect());
            (end.status, end.reason, end.text)
        };
        let as_it_was = |status| (status, Reason::Exited, "it has ended".into());
        assert_eq!(ended(0, &[]), as_it_was(0));
        let lost = (125, Reason::CopyOut, "a".to_owned());
        assert_eq!(ended(0, &["a", "b"]), lost);
        assert_eq!(ended(3, &["a", "b"]), as_it_was(3));
        assert_eq!(ended(124, &["a"]), as_it_was(124));
    }

    #[test]
    fn signal_of_the_users_is_in_the_status() {
        let end = interrupted(libc::SIGTERM, "while the guest booted");
        assert_eq!((end.status, end.reason), (143, Reason::Interrupted));
    }
}
