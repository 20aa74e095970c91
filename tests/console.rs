//! The guest's console without a terminal: pipes of every sort, closed descriptors and the end of
//! input do no harm.
//!
//! The guests are a few instructions each (`harness/tiny.rs`), so this needs /dev/kvm, but neither
//! root nor a network.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;
#[path = "harness/session.rs"]
mod session;
#[path = "harness/tiny.rs"]
mod tiny;

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use harness::kvm_test;
use harness::process::Killed;
use harness::vm::Vm;
use harness::{AT_ONCE, PATIENCE, eventually};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use session::{by_shell, minivmm};
use tempfile::TempDir;
use tiny::{POWER_OFF, RESET, Tiny};
use vmm::config::{Config, ConsoleTarget};
use vmm::{Exit, Guest};

kvm_test!(stdin_and_stdout_that_are_closed_do_no_harm, || {
    for line in [
        "exec \"$@\" <&-",
        "exec \"$@\" >&-",
        "exec \"$@\" <&- >&-",
        "exec \"$@\" <&- 2>&-",
        "exec \"$@\" <&- >&- 2>&-",
    ] {
        let (mut shell, _directory) = by_shell(line, Tiny::Greeter);
        shell.stdin(Stdio::null());
        let mut vm = Vm::spawn(shell);
        assert_eq!(vm.wait_exit().code(), Some(0), "{line}: {}", vm.log());
        let expected = if line.contains(">&- 2") || line.ends_with(" >&-") {
            ""
        } else {
            "hi\n"
        };
        assert_eq!(vm.console(), expected, "{line}");
    }
});

kvm_test!(stdin_from_dev_null_lets_the_guest_run_on, || {
    let (mut command, _directory) = minivmm(Tiny::Echo);
    command.stdin(Stdio::null());
    let mut vm = Vm::spawn(command);
    vm.wait_for("ready\n");
    thread::sleep(Duration::from_millis(200));
    assert!(!vm.has_ended(), "{}", vm.log());
    end_by_signals(&mut vm);
});

kvm_test!(prompt_of_a_guest_that_halts_appears, || {
    let (mut command, _directory) = minivmm(Tiny::Prompt);
    command.args(["--cpus", "2"]).stdin(Stdio::null());
    let mut vm = Vm::spawn(command);
    vm.wait_for("$ ");
    end_by_signals(&mut vm);
});

kvm_test!(last_words_wait_for_a_reader_that_is_slow, || {
    let (reader, writer) = small_pipe();
    (&writer).write_all(&[b'x'; PIPE_SIZE as usize]).unwrap();
    let (mut command, _directory) = minivmm(Tiny::LastWords);
    command.stdin(Stdio::null()).stdout(writer);
    let mut child = Killed(command.spawn().unwrap());
    drop(command);
    thread::sleep(Duration::from_millis(300));
    let mut text = String::new();
    (&reader).read_to_string(&mut text).unwrap();
    assert_eq!(text.trim_start_matches('x'), "bye");
    assert_eq!(child.wait().unwrap().code(), Some(0));
});

kvm_test!(stdin_from_a_pipe_reaches_the_guest_without_our_keys, || {
    let (mut command, _directory) = minivmm(Tiny::Echo);
    command.stdin(Stdio::piped());
    let mut vm = Vm::spawn(command);
    vm.wait_for("ready\n");
    vm.send("\x01x\x03");
    vm.wait_for("\x01x\x03");
    let long = "0123456789abcdef".repeat(200);
    vm.send(&long);
    vm.wait_for(&long);
    vm.send(POWER_OFF);
    assert_eq!(vm.wait_exit_within(AT_ONCE).code(), Some(0), "{}", vm.log());
});

kvm_test!(stdin_at_its_end_lets_the_guest_run_on, || {
    let (mut command, _directory) = minivmm(Tiny::Echo);
    command.stdin(Stdio::piped());
    let mut vm = Vm::spawn(command);
    vm.wait_for("ready\n");
    vm.send("last words");
    vm.close_stdin();
    vm.wait_for("last words");
    end_by_signals(&mut vm);
});

kvm_test!(stdin_and_stdout_that_do_not_block_work_alike, || {
    let (mut command, _directory) = minivmm(Tiny::Echo);
    let (stdin, mut keys) = io::pipe().unwrap();
    // As a neighbour in the same pipeline may leave it.
    rustix::io::ioctl_fionbio(&stdin, true).unwrap();
    command.stdin(stdin);
    let mut vm = Vm::spawn(command);
    vm.wait_for("ready\n");
    thread::sleep(Duration::from_millis(300));
    keys.write_all(b"late").unwrap();
    vm.wait_for("late");
    keys.write_all(POWER_OFF.as_bytes()).unwrap();
    assert_eq!(vm.wait_exit_within(AT_ONCE).code(), Some(0), "{}", vm.log());
});

kvm_test!(unread_stdout_does_not_delay_the_end, || {
    for (guest, blocking) in [
        (Tiny::Flood, true),
        (Tiny::Flood, false),
        (Tiny::FloodBeside, true),
    ] {
        let (reader, writer) = small_pipe();
        rustix::io::ioctl_fionbio(&writer, !blocking).unwrap();
        let (mut command, _directory) = minivmm(guest);
        command
            .args(["--cpus", "2"])
            .stdin(Stdio::null())
            .stdout(writer);
        command.stderr(Stdio::piped());
        let mut child = Guarded(Killed(command.spawn().unwrap()));
        drop(command); // Its copy of the pipe's writing end.
        wait_until_full(&reader);
        let case = (guest, blocking);
        assert_eq!(child.end_by_signals(), Some(143), "{case:?}");
    }
});

kvm_test!(unread_log_does_not_delay_the_end, || {
    let (reader, writer) = small_pipe();
    let (mut command, _directory) = minivmm(Tiny::Flood);
    command.stdin(Stdio::null());
    command.stdout(writer.try_clone().unwrap()).stderr(writer);
    let mut child = Guarded(Killed(command.spawn().unwrap()));
    drop(command);
    wait_until_full(&reader);
    // Two that come together are one, and neither is known as the second.
    let deadline = Instant::now() + AT_ONCE;
    while child.0.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "still there");
        kill_process(Pid::from_child(&child.0), Signal::TERM).unwrap();
        thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(child.0.wait().unwrap().code(), Some(143));
});

/// A pipe that is soon full.
fn small_pipe() -> (io::PipeReader, io::PipeWriter) {
    let (reader, writer) = io::pipe().unwrap();
    // SAFETY: it takes a plain number.
    let size = unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_SIZE) };
    assert_eq!(size, PIPE_SIZE);
    (reader, writer)
}

/// The smallest one: a page.
const PIPE_SIZE: i32 = 4096;

/// Output goes out in pieces of at most so many bytes, and into a pipe each at once.
const MOST_IN_PIECE: u64 = 1024;

/// Waits until a [`small_pipe`] takes no more, or does not take the longest piece.
fn wait_until_full(pipe: &io::PipeReader) {
    let room = || PIPE_SIZE as u64 - rustix::io::ioctl_fionread(pipe).unwrap();
    let is_full = || room() < MOST_IN_PIECE;
    assert!(eventually(is_full), "the pipe takes more");
}

kvm_test!(stdout_closed_by_its_reader_does_not_hurt_the_guest, || {
    let (reader, writer) = io::pipe().unwrap();
    let (mut command, _directory) = minivmm(Tiny::Flood);
    command.stdin(Stdio::null()).stdout(writer);
    command.stderr(Stdio::piped());
    let mut child = Guarded(Killed(command.spawn().unwrap()));
    drop(command);
    let mut first = [0; 100];
    (&reader).read_exact(&mut first).unwrap();
    drop(reader);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(
        child.0.try_wait().unwrap(),
        None,
        "the broken pipe ended it"
    );
    assert_eq!(child.end_by_signals(), Some(143));
});

/// A guest whose console has a socket at this path, and goes nowhere else.
fn guest_with_socket(guest: Tiny) -> (Guest, PathBuf, TempDir) {
    let directory = TempDir::new().unwrap();
    let (kernel, path) = (
        directory.path().join("guest"),
        directory.path().join("console"),
    );
    guest.write(&kernel);
    let mut config = Config::new(kernel);
    config.console = ConsoleTarget::File("/dev/null".into());
    config.console_socket = Some(path.clone());
    (Guest::start(config).unwrap(), path, directory)
}

fn connect(path: &Path) -> UnixStream {
    let socket = UnixStream::connect(path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

#[track_caller]
fn expect(client: &mut UnixStream, text: &str) {
    let mut found = vec![0; text.len()];
    client.read_exact(&mut found).unwrap();
    assert_eq!(String::from_utf8_lossy(&found), text);
}

kvm_test!(clients_of_the_socket_get_all_to_the_last_word, || {
    for (end, exit) in [(POWER_OFF, Exit::PowerOff), (RESET, Exit::Reboot)] {
        let (guest, path, _directory) = guest_with_socket(Tiny::Echo);
        let mut early = connect(&path);
        expect(&mut early, "ready\n");
        early.write_all(b"abc").unwrap();
        expect(&mut early, "abc");
        let mut late = connect(&path);
        expect(&mut late, "ready\nabc");
        late.write_all(format!("last words{end}").as_bytes())
            .unwrap();
        assert_eq!(guest.wait().unwrap(), exit);
        for client in [&mut early, &mut late] {
            let mut rest = String::new();
            client.read_to_string(&mut rest).unwrap();
            assert_eq!(rest, "last words");
        }
        assert!(!path.exists());
    }
});

kvm_test!(
    client_that_never_reads_holds_up_neither_guest_nor_end,
    || {
        let (guest, path, _directory) = guest_with_socket(Tiny::Flood);
        let idle = connect(&path);
        let is_gone = || {
            let mut watched = [PollFd::new(&idle, PollFlags::IN)];
            poll(&mut watched, Some(&Timespec::default())).unwrap();
            watched[0].revents().contains(PollFlags::HUP)
        };
        assert!(eventually(is_gone), "it is still a client");
        let mut other = connect(&path);
        expect(&mut other, "x");
        let started = Instant::now();
        guest.end();
        assert_eq!(guest.wait().unwrap(), Exit::Quit);
        assert!(started.elapsed() < AT_ONCE);
    }
);

/// A minivmm without our reading its console; killed when dropped.
struct Guarded(Killed);

impl Guarded {
    /// Ends it by two SIGTERM, and returns its status. The log must not have grown long: a guest
    /// can write for ever.
    #[track_caller]
    fn end_by_signals(&mut self) -> Option<i32> {
        let mut log = self.0.stderr.take().expect("stderr is piped");
        let pid = Pid::from_child(&self.0);
        kill_process(pid, Signal::TERM).unwrap();
        let mut text = String::new();
        let mut buffer = [0; 4096];
        while !text.contains("power button") {
            let length = log.read(&mut buffer).unwrap();
            assert_ne!(length, 0, "it ended before the second signal: {text}");
            text.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
        kill_process(pid, Signal::TERM).unwrap();
        let deadline = Instant::now() + AT_ONCE;
        while self.0.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "still there: {text}");
            thread::sleep(Duration::from_millis(10));
        }
        log.read_to_string(&mut text).unwrap();
        assert!(text.lines().count() < 10, "the guest fills the log: {text}");
        self.0.wait().unwrap().code()
    }
}

fn end_by_signals(vm: &mut Vm) {
    vm.signal(Signal::TERM);
    vm.wait_for_log("power button");
    vm.signal(Signal::TERM);
    assert_eq!(
        vm.wait_exit_within(AT_ONCE).code(),
        Some(143),
        "{}",
        vm.log()
    );
}
