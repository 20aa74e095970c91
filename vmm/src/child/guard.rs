//! The guard: a process between minivmm and a program that it waits for.
//!
//! It is there for the end. Whatever the program starts, and leaves to others by its own end, is a descendant of the
//! guard for ever (PR_SET_CHILD_SUBREAPER), so the guard can end all of it: when the program has ended, when minivmm asks
//! for it, and when minivmm is gone, be it by SIGKILL. To minivmm the guard looks like the program: it stops, ends and is
//! killed as the program was, and passes on what signals minivmm sends.
//!
//! It is a fork of minivmm that never calls exec, with all signals blocked and no descriptor open. As after any fork of a
//! process with threads, it makes system calls alone. It has minivmm's memory as that was at the fork: start programs
//! before there is a guest's.

use std::ffi::{CStr, c_int};
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;
use rustix::fs::{CWD, Mode, OFlags, readlinkat_raw};
use rustix::io::Errno;
use rustix::process::{
    DumpableBehavior, Pid, Signal, WaitId, WaitIdOptions, WaitOptions, WaitStatus, getpid, getppid,
    kill_process, kill_process_group, set_child_subreaper, set_dumpable_behavior,
    set_parent_process_death_signal, wait, waitid,
};

use super::descriptors::close_all;
use super::terminal;

/// How long those that are asked to end may take.
const GRACE: Duration = Duration::from_secs(5);
/// How long nothing may happen after SIGKILL: what may not be killed, or hangs in the kernel, is left then.
const PATIENCE: Duration = Duration::from_secs(2);
/// By which minivmm has the guard kill everything.
pub(super) const KILL_ALL: Signal = Signal::USR1;

/// What becomes of the processes that a program has started and that outlive it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// They keep running.
    Leave,
    /// They are asked to end, and killed if they do not.
    End,
    /// They are killed.
    Kill,
}

/// What a guard has to know.
#[derive(Debug)]
pub(super) struct Guard {
    /// minivmm.
    parent: Pid,
    rest: Rest,
    /// The program is alone on a terminal of its own: minivmm stops and continues with it.
    has_terminal: bool,
}

impl Guard {
    pub fn new(rest: Rest, has_terminal: bool) -> Self {
        Self {
            parent: getpid(),
            rest,
            has_terminal,
        }
    }

    /// Makes this process, a new child of minivmm's, a guard's.
    pub fn arm(&self) -> io::Result<()> {
        SigSet::all().thread_block()?;
        // A signal that also continues a guard that has stopped.
        set_parent_process_death_signal(Some(Signal::CONT))?;
        must_have_parent(self.parent)?;
        set_child_subreaper(Some(getpid()))?;
        Ok(())
    }

    /// Returns in a new process, the program's, what the guard's pid is; the guard does not return. All signals are
    /// blocked.
    pub fn fork(&self) -> io::Result<Pid> {
        let guard = getpid();
        // SAFETY: both processes make system calls alone from here on, until one calls exec and the other one exits.
        let forked = unsafe { libc::fork() };
        if forked < 0 {
            return Err(io::Error::last_os_error());
        }
        match Pid::from_raw(forked) {
            Some(program) => self.watch(program),
            None => Ok(guard),
        }
    }

    fn watch(&self, program: Pid) -> ! {
        close_all();
        // For ps, and for umount.
        let _ = rustix::thread::set_name(c"minivmm-guard");
        let _ = rustix::process::chdir(c"/");
        let mut tree = Tree {
            program,
            end: None,
            has_terminal: self.has_terminal,
        };
        loop {
            tree.reap();
            if tree.end.is_some() {
                break;
            }
            let (signal, sender) = next_signal(None);
            if getppid() != Some(self.parent) {
                tree.end(Rest::End);
            } else if sender == self.parent.as_raw_nonzero().get() {
                self.obey(signal, &mut tree);
            }
        }
        tree.end(self.rest);
        if self.has_terminal {
            // The end of the session's leader would throw away what minivmm has not read yet.
            terminal::leave();
        }
        end_like(tree.end)
    }

    /// Does what minivmm's signal is for.
    fn obey(&self, signal: c_int, tree: &mut Tree) {
        if signal == KILL_ALL.as_raw() {
            tree.end(Rest::Kill);
        } else if signal == libc::SIGCONT && !is_stopped(tree.program) {
            // Of a thread of minivmm's that has ended before the others: the parent-death signal.
        } else if signal == libc::SIGCONT && self.has_terminal {
            let _ = kill_process_group(tree.program, Signal::CONT);
        } else {
            // SAFETY: it takes numbers. The pid is the program's until that is reaped.
            unsafe { libc::kill(tree.program.as_raw_nonzero().get(), signal) };
        }
    }
}

/// Fails when the parent has ended already: its death signal would never come.
pub(super) fn must_have_parent(parent: Pid) -> io::Result<()> {
    if getppid() == Some(parent) {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::ESRCH))
    }
}

/// The program and what it has started.
struct Tree {
    program: Pid,
    /// The program's, once it is reaped.
    end: Option<WaitStatus>,
    has_terminal: bool,
}

impl Tree {
    /// Reaps what has ended, and says whether anything has. When the program has stopped, so does this process.
    fn reap(&mut self) -> bool {
        let mut any = false;
        let options = match self.has_terminal {
            true => WaitOptions::NOHANG | WaitOptions::UNTRACED,
            false => WaitOptions::NOHANG,
        };
        while let Ok(Some((pid, status))) = wait(options) {
            if status.stopped() {
                if pid == self.program {
                    let _ = kill_process(getpid(), Signal::STOP);
                }
                continue;
            }
            any = true;
            if pid == self.program {
                self.end = Some(status);
            }
        }
        any
    }

    fn end(&mut self, how: Rest) {
        match how {
            Rest::Leave => {}
            Rest::Kill => self.kill(),
            Rest::End => {
                self.ask();
                self.kill();
            }
        }
    }

    /// Asks all to end. Those whose parent ends are this process's children then, and are asked as well.
    fn ask(&mut self) {
        let deadline = Instant::now() + GRACE;
        let mut asks = true;
        loop {
            if !has_children() {
                return;
            }
            if asks {
                self.for_each_child(|pid| {
                    let _ = kill_process(pid, Signal::TERM);
                    // A stopped process handles no signal but this.
                    if is_stopped(pid) {
                        let _ = kill_process(pid, Signal::CONT);
                    }
                });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || next_signal(Some(left)).0 == KILL_ALL.as_raw() {
                return;
            }
            asks = self.reap();
        }
    }

    fn kill(&mut self) {
        let mut deadline = Instant::now() + PATIENCE;
        while has_children() {
            self.for_each_child(|pid| {
                let _ = kill_process(pid, Signal::KILL);
            });
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            next_signal(Some(left));
            if self.reap() {
                deadline = Instant::now() + PATIENCE;
            }
        }
    }

    /// Calls `act` for each child of this process, as far as they are known. None of them is reaped meanwhile, so the
    /// pids stay theirs.
    fn for_each_child(&self, mut act: impl FnMut(Pid)) {
        let mut buffer = [0; 4096];
        match read_children(&mut buffer) {
            // Each ends with a space: what does not is cut off, and comes with the next look.
            Some(list) => list
                .split_inclusive(|byte| *byte == b' ')
                .filter_map(|word| parse_pid(word.strip_suffix(b" ")?))
                .for_each(act),
            None if self.end.is_none() => act(self.program),
            None => {}
        }
    }
}

/// Whether this process has children, ended ones included.
fn has_children() -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    !matches!(waitid(WaitId::All, options), Err(Errno::CHILD))
}

/// The kernel's list of this process's children. `None` where there is none: without CONFIG_PROC_CHILDREN, or
/// where `/proc` is another pid namespace's, whose pids are not the ones here.
fn read_children(buffer: &mut [u8]) -> Option<&[u8]> {
    if !is_proc_ours() {
        return None;
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open(c"/proc/thread-self/children", flags, Mode::empty()).ok()?;
    let count = rustix::io::read(&file, &mut *buffer).ok()?;
    buffer.get(..count)
}

/// Whether `/proc` has the pids that are known here.
fn is_proc_ours() -> bool {
    let mut buffer = [0; 16];
    let read = readlinkat_raw(CWD, c"/proc/self", &mut buffer).ok();
    read.and_then(|count| parse_pid(buffer.get(..count)?)) == Some(getpid())
}

/// Whether a process is stopped by a signal, or may be: only then does it get SIGCONT, at which QEMU makes its terminal
/// raw again, also one that minivmm has just restored.
fn is_stopped(pid: Pid) -> bool {
    let mut path = [0; 32];
    let mut rest = &mut path[..];
    // Pids have up to 10 digits, and a NUL ends the path.
    let formatted = write!(rest, "/proc/{}/stat", pid.as_raw_nonzero());
    let path = CStr::from_bytes_until_nul(&path);
    let (Ok(()), Ok(path), true) = (formatted, path, is_proc_ours()) else {
        return true;
    };
    let mut buffer = [0; 128];
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let read = rustix::fs::open(path, flags, Mode::empty())
        .and_then(|file| rustix::io::read(&file, &mut buffer));
    let text = read.ok().and_then(|count| buffer.get(..count));
    // The state follows the name, which is in parentheses and may contain others (proc(5)).
    let after_name = text.and_then(|text| text.rsplit(|byte| *byte == b')').next());
    after_name.is_none_or(|text| text.get(1) == Some(&b'T'))
}

fn parse_pid(digits: &[u8]) -> Option<Pid> {
    Pid::from_raw(std::str::from_utf8(digits).ok()?.parse().ok()?)
}

/// Waits for a signal; its number and the pid of who sent it. Zeros when none came in time.
fn next_signal(within: Option<Duration>) -> (c_int, c_int) {
    let all = SigSet::all();
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let signal = match within {
        // SAFETY: it reads a set and fills a siginfo, both of which are ours.
        None => unsafe { libc::sigwaitinfo(all.as_ref(), info.as_mut_ptr()) },
        Some(within) => {
            let within = libc::timespec {
                tv_sec: within.as_secs() as libc::time_t,
                tv_nsec: within.subsec_nanos().into(),
            };
            // SAFETY: as above; the time is read.
            unsafe { libc::sigtimedwait(all.as_ref(), info.as_mut_ptr(), &within) }
        }
    };
    if signal < 0 {
        return (0, 0);
    }
    // SAFETY: it was filled, and zeros are valid besides.
    let info = unsafe { info.assume_init() };
    // SAFETY: the field is a number whatever the signal; it names a sender where a process has sent it.
    (signal, unsafe { info.si_pid() })
}

/// Ends this process as the program ended, but for a core dump.
fn end_like(end: Option<WaitStatus>) -> ! {
    // One that cannot be reaped was killed in vain.
    let signal = end.map_or(Some(libc::SIGKILL), |end| end.terminating_signal());
    if let Some(signal) = signal {
        let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
        // SAFETY: the default action runs no code of this process.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        // SAFETY: it takes numbers.
        unsafe { libc::kill(getpid().as_raw_nonzero().get(), signal) };
        let mut set = SigSet::empty().as_ref().to_owned();
        // SAFETY: the set is ours.
        unsafe { libc::sigaddset(&mut set, signal) };
        // SAFETY: it reads a set that is ours.
        unsafe { libc::sigprocmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut()) };
    }
    let code = end.and_then(|end| end.exit_status());
    // SAFETY: it takes a number. Nothing of minivmm's is to be flushed or dropped here.
    unsafe { libc::_exit(code.unwrap_or(128 + signal.unwrap_or(0))) }
}
