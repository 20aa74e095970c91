//! Processes that the agent starts, and as init those that it inherits.
//!
//! One thread reaps all of them, and passes on how those ended that were started here. It learns the process of one that has ended, and
//! takes the lock before it reaps it, so that a number that [`Child::signal_group`] is about to use is still that of the same process.
//! One that it does not know is left as it is while [`Children::spawn`] starts any: that may be about to register it, or to wait for it
//! since its program cannot be executed. To execute a program can take for ever, where a file system does not answer; all others are
//! reaped meanwhile.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::mem;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::check;

/// The stack of the thread that reaps.
const STACK: usize = 64 << 10;
/// How often it looks for others while there is one that it has to leave.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How a process has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this status.
    Exited(i32),
    /// By a signal.
    Killed {
        /// Its number.
        signal: i32,
        /// Whether it left a core file.
        core: bool,
    },
}

/// All child processes.
#[derive(Debug)]
pub struct Children {
    state: Mutex<State>,
    /// When a process is about to start or has done so, and when the last one is reaped.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Those that were started here.
    running: HashMap<u32, Started>,
    /// How many are being started.
    starting: usize,
    /// Whether there is any child.
    any: bool,
    /// The most memory that one that has ended had resident, in bytes.
    largest: u64,
}

/// What is to be done when a process ends.
struct Started {
    ended: Box<dyn FnOnce(Ended) + Send>,
    /// The rest of its group gets SIGKILL.
    ends_group: bool,
}

impl fmt::Debug for Started {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ends_group = &self.ends_group;
        formatter
            .debug_struct("Started")
            .field("ends_group", ends_group)
            .finish_non_exhaustive()
    }
}

/// A process that was started here.
#[derive(Debug)]
pub struct Child {
    pid: u32,
    children: Arc<Children>,
}

impl Children {
    /// Starts the thread that reaps. The process has one, and later calls return the same.
    ///
    /// # Errors
    ///
    /// Those of pthread_create(3).
    pub fn start() -> io::Result<Arc<Self>> {
        static CHILDREN: Mutex<Option<Arc<Children>>> = Mutex::new(None);
        let mut known = CHILDREN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(children) = &*known {
            return Ok(children.clone());
        }
        let children = Arc::new(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let reaper = children.clone();
        thread::Builder::new()
            .stack_size(STACK)
            .spawn(move || reaper.reap())?;
        Ok(known.insert(children).clone())
    }

    /// Starts a process. The thread that reaps calls `ended` when it has ended, which must not start or signal another one.
    ///
    /// # Errors
    ///
    /// Those of [`Command::spawn`].
    pub fn spawn(
        self: &Arc<Self>,
        command: &mut Command,
        ended: impl FnOnce(Ended) + Send + 'static,
    ) -> io::Result<Child> {
        let mut state = self.lock();
        state.starting += 1;
        state.any = true;
        self.changed.notify_all();
        drop(state);
        let spawned = command.spawn();
        let mut state = self.lock();
        state.starting -= 1;
        self.changed.notify_all();
        let pid = spawned?.id();
        let started = Started {
            ended: Box::new(ended),
            ends_group: false,
        };
        state.running.insert(pid, started);
        Ok(Child {
            pid,
            children: self.clone(),
        })
    }

    /// Waits until there is no child, for at most this long. Returns whether there is none.
    pub fn wait_for_none(&self, patience: Duration) -> bool {
        let state = self.lock();
        let waited = self
            .changed
            .wait_timeout_while(state, patience, |state| state.any);
        !waited.unwrap_or_else(PoisonError::into_inner).0.any
    }

    /// The most memory that a child that has ended, or one of which it has waited for, had resident, in bytes.
    pub fn largest(&self) -> u64 {
        self.lock().largest
    }

    fn reap(&self) {
        loop {
            let ended = peek();
            let mut state = self.lock();
            match ended {
                Some(pid) if state.starting == 0 || state.running.contains_key(&pid) => {
                    state.reap(pid);
                }
                // A process may have been started, or inherited, since.
                None if state.starting == 0 && has_ended(None).is_ok() => {}
                None if state.starting == 0 => {
                    state.any = false;
                    self.changed.notify_all();
                    let started = self.changed.wait_while(state, |state| !state.any);
                    drop(started);
                }
                _ => {
                    let others: Vec<_> = state.running.keys().copied().collect();
                    for pid in others {
                        if has_ended(Some(pid)).is_ok_and(|ended| ended) {
                            state.reap(pid);
                        }
                    }
                    drop(self.changed.wait_timeout(state, LOOK_AGAIN));
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Reaps a child that has ended.
    fn reap(&mut self, pid: u32) {
        if self.running.get(&pid).is_some_and(|it| it.ends_group) {
            // Its number stays that of the group until it is reaped.
            let _ = signal_group(pid, libc::SIGKILL);
        }
        // Otherwise the standard library has reaped it.
        if let Some((ended, resident)) = reap(pid) {
            self.largest = self.largest.max(resident);
            if let Some(started) = self.running.remove(&pid) {
                (started.ended)(ended);
            }
        }
    }
}

impl Child {
    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends a signal to its process group, whose first process it is; without effect when it has ended.
    ///
    /// # Errors
    ///
    /// Those of kill(2).
    pub fn signal_group(&self, signal: i32) -> io::Result<()> {
        let state = self.children.lock();
        if !state.running.contains_key(&self.pid) {
            return Ok(());
        }
        signal_group(self.pid, signal)
    }

    /// Has the rest of its process group end with it.
    pub fn end_group_with_it(&self) {
        let mut state = self.children.lock();
        if let Some(started) = state.running.get_mut(&self.pid) {
            started.ends_group = true;
        }
    }
}

fn signal_group(pid: u32, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes no memory.
    check(unsafe { libc::kill(-(pid as i32), signal) }).map(drop)
}

/// Waits until a child has ended, and leaves it as it is. None when there is no child.
fn peek() -> Option<u32> {
    loop {
        match waitid(None, libc::WEXITED | libc::WNOWAIT) {
            Ok(pid) => return pid,
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            Err(_) => return None,
        }
    }
}

/// Whether a child has ended, this one or any. It is an error that there is none.
fn has_ended(pid: Option<u32>) -> io::Result<bool> {
    let found = waitid(pid, libc::WEXITED | libc::WNOWAIT | libc::WNOHANG);
    found.map(|ended| ended.is_some())
}

/// One that has ended, if any has.
fn waitid(pid: Option<u32>, options: i32) -> io::Result<Option<u32>> {
    // SAFETY: a siginfo_t is numbers, which may all be 0.
    let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
    let (which, id) = pid.map_or((libc::P_ALL, 0), |pid| (libc::P_PID, pid));
    // SAFETY: the kernel writes into `info`, which lasts for the call.
    check(unsafe { libc::waitid(which, id, &raw mut info, options) })?;
    // SAFETY: the kernel has written the fields of SIGCHLD, or left 0 where none has ended.
    let pid = unsafe { info.si_pid() } as u32;
    Ok(Some(pid).filter(|pid| *pid != 0))
}

/// Reaps a child that has ended. Returns its end, and the most memory that it had resident, in bytes.
fn reap(pid: u32) -> Option<(Ended, u64)> {
    let mut status = 0;
    // SAFETY: a rusage is numbers, which may all be 0.
    let mut usage: libc::rusage = unsafe { mem::zeroed() };
    // SAFETY: the kernel writes into both, which last for the call.
    let reaped = unsafe { libc::wait4(pid as i32, &raw mut status, libc::WNOHANG, &raw mut usage) };
    let ended = match libc::WIFEXITED(status) {
        true => Ended::Exited(libc::WEXITSTATUS(status)),
        false => Ended::Killed {
            signal: libc::WTERMSIG(status),
            core: libc::WCOREDUMP(status),
        },
    };
    // ru_maxrss is in KiB.
    (reaped == pid as i32).then_some((ended, usage.ru_maxrss as u64 * 1024))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::sync::mpsc;

    use super::*;

    /// The thread that reaps takes all children of the process: so one test does all that is to be shown.
    #[test]
    fn children_are_reaped_and_their_ends_are_told_apart() {
        use std::os::unix::process::CommandExt;

        let children = Children::start().unwrap();
        let spawn = |command: &mut Command| {
            let (sender, ended) = mpsc::channel();
            let child = children.spawn(command, move |how| sender.send(how).unwrap());
            child.map(|child| (child, ended))
        };
        let sh = |script: &str| spawn(Command::new("sh").args(["-c", script]).process_group(0));
        let killed = |signal| Ended::Killed {
            signal,
            core: false,
        };
        let ends = ["exit 37", "kill -9 $$", "exit 0"].map(|script| sh(script).unwrap().1);
        let ends = ends.map(|ended| ended.recv().unwrap());
        assert_eq!(ends, [Ended::Exited(37), killed(9), Ended::Exited(0)]);
        assert!(children.largest() > 100 << 10);

        let missing = spawn(&mut Command::new("/no/such/program"));
        assert_eq!(missing.unwrap_err().kind(), io::ErrorKind::NotFound);

        let (sleeps, ended) = sh("sleep 1000").unwrap();
        assert!(!children.wait_for_none(Duration::ZERO));
        sleeps.signal_group(libc::SIGTERM).unwrap();
        assert_eq!(ended.recv(), Ok(killed(libc::SIGTERM)));

        // One whose program is not executed for long keeps no other from it, whichever ends first.
        let (mut hangs, mut goes_on) = io::pipe().unwrap();
        let late = thread::spawn({
            let children = children.clone();
            move || {
                let (sender, ended) = mpsc::channel();
                let mut command = Command::new("/no/such/program");
                // SAFETY: it makes one system call.
                unsafe { command.pre_exec(move || hangs.read(&mut [0]).map(drop)) };
                let child = children.spawn(&mut command, move |how| sender.send(how).unwrap());
                (child.map(drop), ended)
            }
        });
        while children.lock().starting == 0 {
            thread::yield_now();
        }
        let orphan = "(exec setsid true) & exit 5";
        for (script, status) in [("exit 4", 4), (orphan, 5), ("exit 6", 6)] {
            let (_, ended) = sh(script).unwrap();
            assert_eq!(ended.recv(), Ok(Ended::Exited(status)));
        }
        // The one that hangs has a copy of it.
        goes_on.write_all(b"\n").unwrap();
        let (child, ended) = late.join().unwrap();
        assert_eq!(child.unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(ended.recv().is_err());

        let (mut output, input) = io::pipe().unwrap();
        let script = "sleep 1000 & exit 3";
        let mut command = Command::new("sh");
        command
            .args(["-c", &format!("read x; {script}")])
            .process_group(0);
        let (from, mut to) = io::pipe().unwrap();
        let (child, ended) = spawn(command.stdin(from).stdout(input)).unwrap();
        drop(command);
        child.end_group_with_it();
        to.write_all(b"\n").unwrap();
        assert_eq!(ended.recv(), Ok(Ended::Exited(3)));
        // The process in the background had the other end of the pipe.
        assert_eq!(output.read(&mut [0]).unwrap(), 0);
    }
}
