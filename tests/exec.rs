//! `minivmm exec`, with the agent on this machine instead of in a guest: `minivmm-agent --unix PATH` serves as a VM's
//! socket does. It needs neither a VM nor root.
//!
//! - `exec/streams.rs`: what passes, how fast a writer may be, and who sees which end
//! - `exec/terminal.rs`: `-t`
//! - `exec/copies.rs`: `minivmm cp`
//! - `exec/hostile.rs`: agents that say anything
//! - this file: commands, their statuses, signals and ends, and what the agent has left of many

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

#[path = "exec/copies.rs"]
mod copies;
mod harness;
#[path = "exec/hostile.rs"]
mod hostile;
#[path = "exec/streams.rs"]
mod streams;
#[path = "exec/terminal.rs"]
mod terminal;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{ChildStdout, Command, Output, Stdio};
use std::thread;

use harness::eventually;
use harness::process::{Killed, is_running, tasks};
use harness::vm::{binary, copy_program};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit, setrlimit};
use tempfile::TempDir;

/// An agent, and the socket that leads to it.
#[derive(Debug)]
struct Agent {
    process: Killed,
    socket: PathBuf,
    /// The most descriptors that it has without a connection.
    own: usize,
    _directory: TempDir,
}

impl Agent {
    fn start() -> Self {
        Self::serve(Command::new(env!("MINIVMM_AGENT")), TempDir::new().unwrap())
    }

    /// Has the agent that the command starts serve a socket in the directory.
    fn serve(mut command: Command, directory: TempDir) -> Self {
        let socket = directory.path().join("vsock");
        command.arg("--unix").arg(&socket);
        let process = Killed(command.spawn().expect("the agent starts"));
        let mut agent = Self {
            process,
            socket,
            own: 0,
            _directory: directory,
        };
        assert!(eventually(|| agent.socket.exists()));
        // It has its listener, and may still make a pair of sockets.
        agent.own = agent.descriptors() + 2;
        assert!(eventually(|| UnixStream::connect(&agent.socket).is_ok()));
        agent
    }

    /// minivmm with these options, and this command.
    fn with<T: AsRef<OsStr>>(&self, options: &[&str], command: &[T]) -> Command {
        let mut minivmm = Command::new(binary());
        minivmm.env_remove("RUST_LOG").arg("exec").args(options);
        minivmm.arg(&self.socket).arg("--").args(command);
        minivmm.stdin(Stdio::null());
        minivmm
    }

    fn exec<T: AsRef<OsStr>>(&self, command: &[T]) -> Command {
        self.with(&[], command)
    }

    fn sh(&self, script: &str) -> Command {
        self.exec(&["sh", "-c", script])
    }

    /// A script that runs, and has shown its first line.
    fn begin(&self, script: &str) -> (Killed, BufReader<ChildStdout>, String) {
        let mut command = self.sh(script);
        let mut child = Killed(command.stdout(Stdio::piped()).spawn().unwrap());
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "it ended with {line:?}");
        (child, output, line.trim_end().to_owned())
    }

    fn descriptors(&self) -> usize {
        let all = fs::read_dir(format!("/proc/{}/fd", self.process.id()));
        all.unwrap().count()
    }

    fn threads(&self) -> usize {
        harness::process::tasks(self.process.id()).len()
    }

    /// Descriptors and threads of an agent without sessions.
    fn holds(&self) -> (usize, usize) {
        assert_eq!(self.sh("exit 0").status().unwrap().code(), Some(0));
        // Connections close when their session has ended.
        assert!(eventually(|| self.descriptors() <= self.own));
        (self.descriptors(), self.threads())
    }

    /// Whether the agent has no more than it had before the sessions.
    fn has_left_nothing(&self, (descriptors, threads): (usize, usize)) -> bool {
        let is_left = || self.descriptors() > descriptors || self.threads() > threads;
        eventually(|| !is_left()) && harness::process::all_children(self.process.id()).is_empty()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn assert_status(output: &Output, status: i32, error: &str) {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{stderr}");
    match error {
        "" => assert_eq!(stderr, ""),
        error => assert!(stderr.contains(error), "{stderr}"),
    }
}

fn signal(child: &Killed, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

// ---- statuses ----

#[test]
fn status_is_the_commands_own_or_128_and_its_signal() {
    let agent = Agent::start();
    for status in [0, 1, 37, 125, 255] {
        let output = agent.sh(&format!("exit {status}")).output().unwrap();
        assert_status(&output, status, "");
    }
    for signal in [1, 2, 6, 9, 11, 15] {
        let output = agent.sh(&format!("kill -{signal} $$")).output().unwrap();
        assert_status(&output, 128 + signal, "");
    }
}

#[test]
fn command_that_cannot_be_run_has_the_status_of_a_shell_and_the_reason() {
    let agent = Agent::start();
    let run = |command: &[&str]| agent.exec(command).output().unwrap();
    assert_status(
        &run(&["no-such-program"]),
        127,
        "cannot run \"no-such-program\": No such file",
    );
    assert_status(&run(&["/no/such/program"]), 127, "No such file");
    assert_status(&run(&[""]), 127, "cannot run \"\"");
    assert_status(
        &run(&["/etc/passwd"]),
        126,
        "cannot run \"/etc/passwd\": Permission denied",
    );
    assert_status(&run(&["/tmp"]), 126, "Permission denied");
    let with = |option: &str, value: &str| {
        let command = agent.with(&[option, value], &["true"]).output();
        command.unwrap()
    };
    assert_status(
        &with("--workdir", "/no/such"),
        125,
        "directory \"/no/such\": No such file",
    );
    assert_status(
        &with("--user", "nobody-here"),
        125,
        "no user is called \"nobody-here\"",
    );
    assert_status(
        &with("--user", "0:no-group"),
        125,
        "no group is called \"no-group\"",
    );
}

#[test]
fn agent_that_is_not_there_or_ends_is_status_125_with_the_reason() {
    let mut agent = Agent::start();
    let (mut child, _output, _) = agent.begin("echo ready; exec sleep 1000");
    agent.process.kill().unwrap();
    agent.process.wait().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(125));
    let output = agent.sh("exit 0").output().unwrap();
    assert_status(&output, 125, "Connection refused");
    let output = Command::new(binary())
        .args(["exec", "nobody", "--", "true"])
        .output();
    assert_status(&output.unwrap(), 125, "no VM is called nobody");
}

// ---- what a command gets ----

#[test]
fn arguments_arrive_as_they_are() {
    let agent = Agent::start();
    let odd: [&[u8]; 7] = [
        b"a b",
        b"'\"$HOME`",
        b"",
        b"-x",
        b"--",
        b"new\nline\\",
        b"\xff\xfe",
    ];
    let words = odd.map(OsStr::from_bytes);
    let command = [
        &["sh", "-c", "printf '%s\\0' \"$@\"", "sh"].map(OsStr::new)[..],
        &words[..],
    ];
    let output = agent.exec(&command.concat()).output().unwrap();
    let expected: Vec<u8> = odd
        .iter()
        .flat_map(|word| [word, &b"\0"[..]].concat())
        .collect();
    assert_eq!(text(&output.stdout), text(&expected));
    assert_eq!(output.stdout, expected);
}

#[test]
fn command_line_of_a_megabyte_arrives() {
    let agent = Agent::start();
    let long = "x".repeat(100_000);
    let mut command = vec!["sh", "-c", "echo $# ${#1} ${#10}", "sh"];
    command.extend([&long[..]; 10]);
    let output = agent.exec(&command).output().unwrap();
    assert_eq!(
        text(&output.stdout),
        "10 100000 100000\n",
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn environment_directory_and_session_are_its_own() {
    let agent = Agent::start();
    let options = [
        "--env",
        "A=b=c",
        "--env",
        "KEPT",
        "--env",
        "MISSING",
        "--workdir",
        "/usr",
    ];
    let script = "echo \"$A $KEPT ${MISSING-none} ${LOST-none} $PWD\"; echo \"$HOME $USER $PATH\"; \
        read -r _ _ _ _ group session _ </proc/self/stat; [ $group = $$ ] && [ $session = $$ ] && echo own";
    let mut command = agent.with(&options, &["sh", "-c", script]);
    let output = command.env("KEPT", "kept").env("LOST", "lost").output();
    let shown = text(&output.unwrap().stdout);
    let lines: Vec<_> = shown.lines().collect();
    assert_eq!(lines[0], "b=c kept none none /usr");
    assert!(lines[1].ends_with("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"));
    assert_eq!(lines[2], "own");
}

#[test]
fn user_and_groups_are_those_that_are_chosen() {
    if !rustix::process::geteuid().is_root() {
        return harness::skip::leave_out("another user than root may not become others");
    }
    let agent = Agent::start();
    let run = |user: &str| {
        let script = "id -u; id -g; id -G; echo $HOME $USER; pwd";
        let output = agent
            .with(&["--user", user], &["sh", "-c", script])
            .output()
            .unwrap();
        assert_status(&output, 0, "");
        text(&output.stdout).replace('\n', ";")
    };
    // Both stand in every Debian's files.
    assert_eq!(run("daemon"), "1;1;1;/usr/sbin daemon;/usr/sbin;");
    assert_eq!(run("1:2"), "1;2;2;/usr/sbin daemon;/usr/sbin;");
    assert_eq!(run("54321"), "54321;0;0;/ 54321;/;");
    let output = agent
        .with(&["--user", "54321"], &["cat", "/etc/shadow"])
        .output();
    assert_status(&output.unwrap(), 1, "Permission denied");
}

#[test]
fn agent_that_may_start_no_process_says_so_and_recovers() {
    if !rustix::process::geteuid().is_root() {
        return harness::skip::leave_out("another user than root may not become others");
    }
    let directory = TempDir::new().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    // The user may not read where it was built.
    let program = directory.path().join("agent");
    copy_program(env!("MINIVMM_AGENT"), &program);
    let mut command = Command::new(program);
    // Two threads, one that starts a command, and one command. No other process of the tests is this user's.
    let limit = || {
        let most = Some(4);
        let (current, maximum) = (most, most);
        Ok(setrlimit(Resource::Nproc, Rlimit { current, maximum })?)
    };
    // SAFETY: the closure makes one system call.
    unsafe { command.uid(54399).gid(54399).pre_exec(limit) };
    let agent = Agent::serve(command, directory);
    let has_started_all = || tasks(agent.process.id()).len() == 2;
    let (mut first, _output, _) = agent.begin("echo ready; exec sleep 1000");
    assert!(eventually(has_started_all));
    let refused = agent.exec(&["id", "-u"]).output().unwrap();
    assert_status(
        &refused,
        125,
        "cannot start a process for \"id\": Resource temporarily",
    );
    signal(&first, Signal::TERM);
    assert_eq!(first.wait().unwrap().code(), Some(128 + 15));
    assert!(eventually(has_started_all));
    let output = agent.exec(&["id", "-u"]).output().unwrap();
    assert_eq!(text(&output.stdout), "54399\n", "{}", text(&output.stderr));
}

// ---- signals and ends ----

#[test]
fn signals_reach_the_command() {
    let agent = Agent::start();
    let all = [
        (Signal::INT, "INT"),
        (Signal::TERM, "TERM"),
        (Signal::HUP, "HUP"),
        (Signal::QUIT, "QUIT"),
        (Signal::USR1, "USR1"),
        (Signal::USR2, "USR2"),
        (Signal::WINCH, "WINCH"),
    ];
    for (number, name) in all {
        let script = format!(
            "trap 'echo got {name}; exit 9' {name}; echo ready; while :; do sleep 0.05; done"
        );
        let (mut child, mut output, _) = agent.begin(&script);
        signal(&child, number);
        let mut shown = String::new();
        output.read_to_string(&mut shown).unwrap();
        assert_eq!(shown, format!("got {name}\n"));
        assert_eq!(child.wait().unwrap().code(), Some(9));
    }
    let (mut child, _output, _) = agent.begin("echo ready; exec sleep 1000");
    signal(&child, Signal::TERM);
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
}

#[test]
fn signals_in_quick_succession_leave_a_command_that_ignores_them() {
    let agent = Agent::start();
    let held = agent.holds();
    let (mut child, _output, pid) = agent.begin("trap '' INT; echo $$; exec sleep 1000");
    assert!(eventually(|| {
        signal(&child, Signal::INT);
        child.try_wait().unwrap().is_some()
    }));
    assert_eq!(child.wait().unwrap().code(), Some(125));
    assert!(eventually(|| !is_running(&pid)));
    assert!(agent.has_left_nothing(held));
}

#[test]
fn command_ends_when_its_client_is_killed_also_one_that_ignores_sighup() {
    let agent = Agent::start();
    let held = agent.holds();
    for script in [
        "sleep 1000 & echo $$ $!; wait",
        "trap '' HUP; sleep 1000 & echo $$ $!; while :; do wait; done",
        "sleep 1000 & echo $$ $!; kill -STOP $$",
    ] {
        let (mut child, _output, pids) = agent.begin(script);
        child.kill().unwrap();
        for pid in pids.split(' ') {
            assert!(eventually(|| !is_running(pid)), "{script}: {pid} runs on");
        }
    }
    assert!(agent.has_left_nothing(held));
}

#[test]
fn process_in_the_background_is_not_waited_for_and_goes_on() {
    let agent = Agent::start();
    let held = agent.holds();
    let output = agent
        .sh("sleep 1000 & echo $!; echo error >&2")
        .output()
        .unwrap();
    assert_status(&output, 0, "error\n");
    let pid = text(&output.stdout).trim().to_owned();
    assert!(is_running(&pid));
    kill_process(Pid::from_raw(pid.parse().unwrap()).unwrap(), Signal::KILL).unwrap();
    assert!(agent.has_left_nothing(held));
}

// ---- many ----

#[test]
fn thousand_sessions_in_a_row_have_their_own_statuses_and_leave_nothing() {
    let agent = Agent::start();
    let held = agent.holds();
    for number in 0..1000 {
        let script = format!("echo {number}; exit {}", number % 200);
        let output = agent.sh(&script).output().unwrap();
        assert_status(&output, number % 200, "");
        assert_eq!(text(&output.stdout), format!("{number}\n"));
    }
    assert!(agent.has_left_nothing(held));
}

#[test]
fn thirty_sessions_at_once_do_not_mix() {
    let agent = Agent::start();
    let held = agent.holds();
    let start = |number: i32| {
        let script = format!("cat; echo {number} >&2; exit {number}");
        let mut command = agent.sh(&script);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let mut all: Vec<_> = (0..30).map(start).collect();
    // All of them run at the same time.
    let inputs: Vec<_> = all
        .iter_mut()
        .map(|child| child.stdin.take().unwrap())
        .collect();
    for (number, input) in inputs.iter().enumerate() {
        (&*input)
            .write_all(format!("to {number}").as_bytes())
            .unwrap();
    }
    drop(inputs);
    for (number, child) in all.into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        assert_status(&output, number as i32, &format!("{number}\n"));
        assert_eq!(text(&output.stdout), format!("to {number}"));
    }
    assert!(agent.has_left_nothing(held));
}

#[test]
fn connections_that_say_nothing_or_nonsense_hinder_nobody() {
    let agent = Agent::start();
    let held = agent.holds();
    let silent: Vec<_> = (0..300)
        .map(|_| UnixStream::connect(&agent.socket).unwrap())
        .collect();
    for stream in &silent[..100] {
        (&*stream).write_all(b"CONNECT 28022\n").unwrap();
    }
    for stream in &silent[100..200] {
        (&*stream)
            .write_all(b"CONNECT 28022\n\x08\0\0\0nonsense")
            .unwrap();
    }
    assert_status(&agent.sh("exit 7").output().unwrap(), 7, "");
    drop(silent);
    assert!(agent.has_left_nothing(held));
}

#[test]
fn agent_without_descriptors_says_so_and_recovers() {
    let agent = Agent::start();
    let held = agent.holds();
    let pid = Pid::from_child(&agent.process);
    let limit = |current: u64| {
        let limit = Rlimit {
            current: Some(current),
            maximum: Some(1024),
        };
        prlimit(Some(pid), Resource::Nofile, limit).unwrap();
    };
    // Enough for the connections, and not for the pipes.
    limit(held.0 as u64 + 6);
    let output = agent.sh("exit 0").output().unwrap();
    assert_status(&output, 125, "cannot make a pipe: Too many open files");
    limit(1024);
    assert_status(&agent.sh("exit 5").output().unwrap(), 5, "");
    assert!(agent.has_left_nothing(held));
}
