//! The process that a link belongs to, written on the link itself, so that stale links can be found.
//!
//! The tag is the link's alias (IFLA_IFALIAS; `ip link` shows it). A pid alone would not do: it is used again, and
//! means another process in a container. So the tag has the start time too, and the namespaces in which both count.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::str::FromStr;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};

/// The process that a link belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    program: String,
    pid: u32,
    start: u64,
    pid_namespace: String,
    time_namespace: String,
}

/// An alias that is no tag of an [`Owner`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not the tag of an owner")]
pub struct ParseOwnerError;

/// The pid namespace that a machine starts with, which shows the processes of all others (PROC_PID_INIT_INO in
/// include/linux/proc_ns.h).
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";

impl Owner {
    /// The calling process.
    ///
    /// # Errors
    ///
    /// When /proc is not there, or not that of the process's own pid namespace.
    pub fn this_process() -> io::Result<Self> {
        let pid = std::process::id();
        if fs::read_link("/proc/self")?.to_str() != Some(&pid.to_string()) {
            return Err(io::Error::other("/proc is that of another pid namespace"));
        }
        let program = std::env::current_exe()?;
        let program = program.file_name().unwrap_or_default().to_string_lossy();
        Ok(Self {
            program: shortened(program.into_owned()),
            pid,
            start: Status::of(pid)?.start,
            pid_namespace: namespace("self", "pid")?,
            // Kernels before 5.6 have no time namespaces.
            time_namespace: namespace("self", "time").unwrap_or_default(),
        })
    }

    /// The file name of the program that it runs.
    pub fn program(&self) -> &str {
        &self.program
    }

    /// Its number in its own pid namespace.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// It, for people.
    pub fn describe(&self) -> String {
        format!("{} (pid {})", self.program, self.pid)
    }

    /// The user that it runs as. None when it has ended, and when it is out of the calling process's sight.
    pub fn user(&self) -> Option<u32> {
        let me = Self::this_process().ok()?;
        if self.pid_namespace != me.pid_namespace || self.is_dead_to(&me) {
            return None;
        }
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
        // Real, effective, saved and file system's.
        line.split_whitespace().nth(1)?.parse().ok()
    }

    /// Whether it has certainly ended, as the calling process sees it. In doubt, as for most processes of other
    /// containers, it runs.
    pub fn is_dead(&self) -> bool {
        Self::this_process().is_ok_and(|me| self.is_dead_to(&me))
    }

    /// A descriptor of the process, by which it cannot be taken for another one (pidfd_open(2)). None when it has ended,
    /// and when it is out of the calling process's sight.
    pub fn pidfd(&self) -> Option<OwnedFd> {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw)?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // Checked while the descriptor keeps the number from being given out again.
        self.user().map(|_| pidfd)
    }

    pub(crate) fn is_dead_to(&self, me: &Self) -> bool {
        if self.pid_namespace != me.pid_namespace {
            return me.pid_namespace == FIRST_PID_NAMESPACE && is_deserted(&self.pid_namespace);
        }
        // Asked by kill(2), which a /proc that hides others' processes cannot mislead.
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        if pid.is_none_or(|pid| rustix::process::test_kill_process(pid) == Err(Errno::SRCH)) {
            return true;
        }
        // Start times are as the reader's time namespace counts them.
        let same_clock = self.time_namespace == me.time_namespace;
        Status::of(self.pid)
            .is_ok_and(|now| now.has_ended || (same_clock && now.start != self.start))
    }
}

/// At most 64 bytes of a program's name: the alias has room for 255 (IFALIASZ).
fn shortened(mut name: String) -> String {
    let mut end = name.len().min(64);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name.truncate(end);
    name
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            program,
            pid,
            start,
            pid_namespace,
            time_namespace,
        } = self;
        write!(
            f,
            "owner: {program} pid={pid} start={start} in={pid_namespace},{time_namespace}"
        )
    }
}

impl FromStr for Owner {
    type Err = ParseOwnerError;

    /// Reads the alias of a link. Whatever this crate has not written there is refused.
    fn from_str(alias: &str) -> Result<Self, ParseOwnerError> {
        let parse = || {
            // From the end: a program's name may have anything in it.
            let (rest, namespaces) = alias.strip_prefix("owner: ")?.rsplit_once(" in=")?;
            let (rest, start) = rest.rsplit_once(" start=")?;
            let (program, pid) = rest.rsplit_once(" pid=")?;
            let (pid_namespace, time_namespace) = namespaces.split_once(',')?;
            Some(Self {
                program: program.to_owned(),
                pid: pid.parse().ok().filter(|pid| *pid > 0)?,
                start: start.parse().ok()?,
                pid_namespace: Some(pid_namespace)
                    .filter(|text| is_namespace(text, "pid"))?
                    .to_owned(),
                time_namespace: Some(time_namespace)
                    .filter(|text| text.is_empty() || is_namespace(text, "time"))?
                    .to_owned(),
            })
        };
        parse()
            .filter(|owner| owner.to_string() == alias)
            .ok_or(ParseOwnerError)
    }
}

/// What /proc/PID/stat says of a process (proc_pid_stat(5)).
#[derive(Debug, PartialEq, Eq)]
struct Status {
    /// In clock ticks since the machine was started; field 22.
    start: u64,
    /// It has not been waited for yet, but all of its threads are gone.
    has_ended: bool,
}

impl Status {
    fn of(pid: u32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        Self::parse(&text).ok_or_else(|| io::Error::other(format!("unknown form: {text:?}")))
    }

    fn parse(text: &str) -> Option<Self> {
        // Field 2, the name, stands in parentheses and may contain any character.
        let (_, after_name) = text.rsplit_once(") ")?;
        let field = |number: usize| after_name.split(' ').nth(number - 3);
        let threads: u64 = field(20)?.parse().ok()?;
        Some(Self {
            start: field(22)?.parse().ok()?,
            // A first thread can end before the others: it then is a zombie, and the process lives.
            has_ended: matches!(field(3)?, "Z" | "X") && threads <= 1,
        })
    }
}

/// What stands for a namespace of a process in /proc, such as `pid:[4026531836]`.
fn namespace(process: &str, kind: &str) -> io::Result<String> {
    let link = fs::read_link(format!("/proc/{process}/ns/{kind}"))?;
    Ok(link.to_string_lossy().into_owned())
}

fn is_namespace(text: &str, kind: &str) -> bool {
    let inode = text
        .strip_prefix(kind)
        .and_then(|rest| rest.strip_prefix(":["));
    inode
        .and_then(|rest| rest.strip_suffix(']'))
        .is_some_and(|inode| inode.parse::<u64>().is_ok())
}

/// Whether no process is in the pid namespace any more. In doubt there is one.
fn is_deserted(pid_namespace: &str) -> bool {
    // Process 1 in sight proves that /proc hides none from us.
    let Ok(processes) = namespace("1", "pid").and_then(|_| fs::read_dir("/proc")) else {
        return false;
    };
    processes.flatten().all(|entry| {
        let name = entry.file_name();
        match name.to_str().filter(|name| name.parse::<u32>().is_ok()) {
            Some(process) => match namespace(process, "pid") {
                Ok(found) => found != pid_namespace,
                Err(error) => {
                    error.kind() == io::ErrorKind::NotFound
                        || error.raw_os_error() == Some(libc::ESRCH)
                }
            },
            None => true,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me() -> Owner {
        Owner::this_process().unwrap()
    }

    #[test]
    fn owner_tag_is_read_back_and_fits_an_alias() {
        let odd = Owner {
            program: "a pid=7 start=1 in=x,y)".to_owned(),
            ..me()
        };
        // As many bytes as a file's name can have.
        let long = Owner {
            program: shortened("\u{1f5a7}".repeat(63) + "abc"),
            ..me()
        };
        assert_eq!(long.program.chars().count(), 16);
        for owner in [me(), odd, long] {
            let tag = owner.to_string();
            assert_eq!(tag.parse(), Ok(owner));
            assert!(tag.len() < 256, "{tag}");
        }
    }

    #[test]
    fn owner_foreign_alias_is_refused() {
        let tag = me().to_string();
        let foreign = [
            "",
            "uplink to the lab",
            "owner: me",
            "owner: x pid=0 start=1 in=pid:[1],time:[2]",
            "owner: x pid=+5 start=1 in=pid:[1],time:[2]",
            &format!("{tag} "),
            &format!(" {tag}"),
        ];
        for alias in foreign {
            assert_eq!(alias.parse::<Owner>(), Err(ParseOwnerError), "{alias}");
        }
    }

    #[test]
    fn owner_alive_is_not_dead() {
        assert!(!me().is_dead());
        let init = Owner {
            pid: 1,
            start: Status::of(1).unwrap().start,
            ..me()
        };
        assert!(!init.is_dead());
    }

    #[test]
    fn owner_alive_has_a_user_and_a_dead_one_has_none() {
        let user = rustix::process::geteuid().as_raw();
        assert_eq!(me().user(), Some(user));
        let before = Owner {
            start: me().start - 1,
            ..me()
        };
        assert_eq!(before.user(), None);
        assert!(me().pidfd().is_some() && before.pidfd().is_none());
    }

    #[test]
    fn owner_whose_pid_was_given_out_again_is_dead() {
        let before = Owner {
            start: me().start - 1,
            ..me()
        };
        assert!(before.is_dead());
        let on_another_clock = Owner {
            time_namespace: "time:[1]".to_owned(),
            ..before
        };
        assert!(!on_another_clock.is_dead());
    }

    #[test]
    fn owner_that_has_ended_is_dead_even_before_it_is_waited_for() {
        let starting = crate::STARTING.write().unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        drop(starting);
        let owner = Owner {
            pid: child.id(),
            start: Status::of(child.id()).unwrap().start,
            ..me()
        };
        assert!(!owner.is_dead());
        child.kill().unwrap();
        while !Status::of(child.id()).unwrap().has_ended {
            std::thread::yield_now();
        }
        assert!(owner.is_dead());
        child.wait().unwrap();
        assert!(owner.is_dead());
    }

    #[test]
    fn owner_of_another_container_is_judged_from_the_first_namespace_alone() {
        let elsewhere = Owner {
            pid_namespace: "pid:[1]".to_owned(),
            ..me()
        };
        let first = Owner {
            pid_namespace: FIRST_PID_NAMESPACE.to_owned(),
            ..me()
        };
        let container = Owner {
            pid_namespace: "pid:[2]".to_owned(),
            ..me()
        };
        assert!(!elsewhere.is_dead_to(&container));
        assert!(!me().is_dead_to(&container));
        if namespace("1", "pid").is_ok() {
            assert!(elsewhere.is_dead_to(&first));
            let mine = Owner {
                pid_namespace: me().pid_namespace,
                ..elsewhere
            };
            assert!(!mine.is_dead_to(&first));
        }
    }

    #[test]
    fn status_with_any_name_is_read() {
        let line = |name: &str, state: &str, threads: u32| {
            let zeros = "0 ".repeat(16);
            Status::parse(&format!("7 ({name}) {state} {zeros}{threads} 0 4711 0 0"))
        };
        for name in ["sleep", "a) Z 1 (b", ""] {
            let running = Status {
                start: 4711,
                has_ended: false,
            };
            assert_eq!(line(name, "S", 1), Some(running), "{name}");
        }
        assert!(line("x", "Z", 1).unwrap().has_ended);
        assert!(!line("x", "Z", 2).unwrap().has_ended);
        assert_eq!(Status::parse("7 (x"), None);
    }
}
