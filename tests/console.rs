//! The guest's console at the user's end: the terminal is raw while the guest runs and given back on every way out, and
//! pipes of every sort do no harm.
//!
//! The guests are a few instructions each (`harness/tiny.rs`), so this needs /dev/kvm, but neither root nor a network.

// A helper that panics fails the test, as it should; clippy spares only the functions that are tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;
#[path = "harness/tiny.rs"]
mod tiny;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use harness::skip::has_kvm;
use harness::vm::{Vm, binary};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use tempfile::TempDir;
use tiny::{CRASH, POWER_OFF, RESET, Tiny};

/// Longer than anything here may take. The time that a guest gets after its power button was pressed, which these guests
/// do not know, is 10 s.
const LIMIT: Duration = Duration::from_secs(30);
/// Shorter than that time: an end within it came at once.
const AT_ONCE: Duration = Duration::from_secs(8);

/// minivmm with a guest of ours. The file lives as long as the directory.
fn minivmm(guest: Tiny) -> (Command, TempDir) {
    let directory = TempDir::new().unwrap();
    let kernel = directory.path().join("guest");
    guest.write(&kernel);
    let mut command = Command::new(binary());
    command.arg("--kernel").arg(kernel).env_remove("RUST_LOG");
    (command, directory)
}

/// The same by a shell, where `line` stands for how the shell starts `"$@"`.
fn by_shell(line: &str, guest: Tiny) -> (Command, TempDir) {
    let (command, directory) = minivmm(guest);
    let mut shell = Command::new("sh");
    shell.args(["-c", line, "sh"]).arg(command.get_program());
    shell.args(command.get_args()).env_remove("RUST_LOG");
    (shell, directory)
}

/// A pseudo-terminal with a session of its own on it.
struct Session {
    /// The user's side; `None` once hung up.
    keyboard: Option<File>,
    /// The program's side, to look at its settings.
    terminal: OwnedFd,
    before: String,
    child: Child,
    shown: Vec<u8>,
    /// Where in `shown` the next [`Session::wait_for`] begins.
    seen: usize,
    _directory: TempDir,
}

impl Session {
    /// A guest that echoes, as soon as it does.
    fn with_echo() -> Self {
        let mut session = Self::start(minivmm(Tiny::Echo));
        session.wait_for("ready");
        session
    }

    fn start((mut command, directory): (Command, TempDir)) -> Self {
        // No other child may keep the user's side open.
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let keyboard = openpt(flags).unwrap();
        grantpt(&keyboard).unwrap();
        unlockpt(&keyboard).unwrap();
        let name = ptsname(&keyboard, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let terminal = rustix::fs::open(name, flags, Mode::empty()).unwrap();
        let stdio = || Stdio::from(terminal.try_clone().unwrap());
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        // SAFETY: both are plain system calls, which a child may make between fork and exec.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                Ok(())
            });
        }
        Self {
            before: settings(&terminal),
            child: command.spawn().unwrap(),
            keyboard: Some(File::from(keyboard)),
            terminal,
            shown: Vec::new(),
            seen: 0,
            _directory: directory,
        }
    }

    fn type_keys(&mut self, keys: &str) {
        let keyboard = self.keyboard.as_mut().expect("not hung up");
        keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Reads what the terminal shows within a tenth of a second.
    fn look(&mut self) {
        let Some(keyboard) = &mut self.keyboard else {
            return;
        };
        let patience = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        let ready = poll(&mut [PollFd::new(keyboard, PollFlags::IN)], Some(&patience));
        if ready == Ok(1) {
            let mut buffer = [0; 4096];
            let length = keyboard.read(&mut buffer).unwrap_or(0);
            self.shown.extend(&buffer[..length]);
        }
    }

    fn shown(&self) -> String {
        String::from_utf8_lossy(&self.shown).into_owned()
    }

    /// Waits until the terminal shows `text`, after what earlier calls have found.
    #[track_caller]
    fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let rest = &self.shown[self.seen..];
            let found = rest.windows(text.len()).position(|w| w == text.as_bytes());
            if let Some(at) = found {
                self.seen += at + text.len();
                return;
            }
            let shown = self.shown();
            assert!(Instant::now() < deadline, "no {text:?}, but {shown:?}");
            self.look();
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The first presses the power button, of which these guests know nothing, the second ends.
    fn signal_twice(&mut self, signal: Signal) {
        self.signal(signal);
        self.wait_for("power button");
        self.signal(signal);
    }

    /// Waits for the end and returns the exit status.
    #[track_caller]
    fn wait_exit(&mut self, limit: Duration) -> Option<i32> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.look();
                return status.code();
            }
            let shown = self.shown();
            assert!(
                Instant::now() < deadline,
                "still there after {limit:?}: {shown:?}"
            );
            self.look();
        }
    }

    #[track_caller]
    fn assert_raw(&self) {
        let modes = tcgetattr(&self.terminal).unwrap().local_modes;
        let line_mode = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        assert!(!modes.intersects(line_mode), "not raw: {modes:?}");
    }

    /// Waits for the end with this status, and for the terminal as it was.
    #[track_caller]
    fn assert_ends(&mut self, status: i32) {
        let ended = self.wait_exit(AT_ONCE);
        assert_eq!(ended, Some(status), "{:?}", self.shown());
        assert_eq!(settings(&self.terminal), self.before, "the terminal");
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Everything that a terminal can be set to.
fn settings(terminal: &OwnedFd) -> String {
    format!("{:?}", tcgetattr(terminal).unwrap())
}

// ---- a terminal: raw, and given back ----

#[test]
fn terminal_is_raw_until_the_guest_powers_off() {
    if !has_kvm() {
        return;
    }
    let mut session = Session::with_echo();
    session.assert_raw();
    session.type_keys("abc");
    session.wait_for("abc");
    session.type_keys(POWER_OFF);
    session.assert_ends(0);
    // The log has a line of its own, though the guest did not end its last one.
    assert!(
        session.shown().contains("abc\r\nminivmm: "),
        "{:?}",
        session.shown()
    );
}

#[test]
fn terminal_with_settings_of_its_own_gets_them_back() {
    if !has_kvm() {
        return;
    }
    let mut session = Session::start(by_shell(
        "stty -echo min 3 time 7 erase x; exec \"$@\"",
        Tiny::Echo,
    ));
    session.wait_for("ready");
    session.assert_raw();
    session.before = {
        let shell = Session::start(by_shell(
            "stty -echo min 3 time 7 erase x; exec cat",
            Tiny::Echo,
        ));
        let plain = shell.before.clone();
        let deadline = Instant::now() + LIMIT;
        while settings(&shell.terminal) == plain && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        settings(&shell.terminal)
    };
    session.type_keys(POWER_OFF);
    session.assert_ends(0);
}

#[test]
fn terminal_is_given_back_when_the_guest_resets() {
    if !has_kvm() {
        return;
    }
    let mut session = Session::with_echo();
    session.type_keys(RESET);
    session.assert_ends(0);
    assert!(session.shown().contains("reboot"), "{:?}", session.shown());
}

#[test]
fn terminal_is_given_back_when_the_guest_crashes() {
    if !has_kvm() {
        return;
    }
    let mut session = Session::with_echo();
    session.type_keys(CRASH);
    session.assert_ends(3);
    let shown = session.shown();
    assert!(
        shown.contains("crashed") && shown.contains("RIP 0x2000"),
        "{shown:?}"
    );
    // mov al, [rax]
    assert!(shown.contains("bytes 8a 00"), "{shown:?}");
}

#[test]
fn terminal_is_given_back_at_ctrl_a_x() {
    if !has_kvm() {
        return;
    }
    let mut session = Session::with_echo();
    session.type_keys("\x01x");
    session.assert_ends(0);
}

#[test]
fn terminal_is_given_back_at_the_second_signal() {
    if !has_kvm() {
        return;
    }
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        let mut session = Session::with_echo();
        session.assert_raw();
        session.signal_twice(signal);
        session.assert_ends(128 + signal.as_raw());
    }
}

/// Signals that nobody sends to end a guest, but that end minivmm.
const KILLERS: [Signal; 17] = [
    Signal::ABORT,
    Signal::ALARM,
    Signal::BUS,
    Signal::FPE,
    Signal::ILL,
    Signal::IO,
    Signal::PROF,
    Signal::POWER,
    Signal::SEGV,
    Signal::STKFLT,
    Signal::SYS,
    Signal::TRAP,
    Signal::USR1,
    Signal::USR2,
    Signal::VTALARM,
    Signal::XCPU,
    Signal::XFSZ,
];

#[test]
fn terminal_is_given_back_by_a_signal_that_kills() {
    if !has_kvm() {
        return;
    }
    for signal in KILLERS {
        let line = "ulimit -c 0; exec \"$@\"";
        let mut session = Session::start(by_shell(line, Tiny::Echo));
        session.wait_for("ready");
        session.assert_raw();
        session.signal(signal);
        assert_eq!(session.wait_exit(AT_ONCE), None, "{signal:?}");
        let status = session.child.wait().unwrap();
        assert_eq!(status.signal(), Some(signal.as_raw()));
        assert_eq!(settings(&session.terminal), session.before, "{signal:?}");
    }
}

#[test]
fn terminal_is_given_back_while_stopped_and_taken_again() {
    if !has_kvm() {
        return;
    }
    // The shell takes the terminal when its job stops, and waits for a line.
    let line = "set -m; \"$@\"; echo \"stopped $?.\"; read x; fg >/dev/null; echo \"ended $?.\"";
    let mut session = Session::start(by_shell(line, Tiny::Echo));
    session.wait_for("ready");
    session.assert_raw();
    let group = foreground(&session);
    kill_process(group, Signal::TSTP).unwrap();
    session.wait_for(&format!("stopped {}.", 128 + Signal::TSTP.as_raw()));
    assert_eq!(settings(&session.terminal), session.before);
    session.type_keys("\n");
    let deadline = Instant::now() + LIMIT;
    while settings(&session.terminal) == session.before {
        assert!(Instant::now() < deadline, "not raw: {:?}", session.shown());
        session.look();
    }
    session.assert_raw();
    session.type_keys("again");
    session.wait_for("again");
    // A second time, as the first.
    kill_process(group, Signal::TSTP).unwrap();
    let deadline = Instant::now() + LIMIT;
    session.wait_for("ended");
    while settings(&session.terminal) != session.before {
        assert!(Instant::now() < deadline, "raw: {:?}", session.shown());
        session.look();
    }
    kill_process(group, Signal::KILL).unwrap();
}

/// The process group that has the terminal, which is told to those on it alone (proc_pid_stat(5)).
fn foreground(session: &Session) -> Pid {
    let stat = fs::read_to_string(format!("/proc/{}/stat", session.child.id())).unwrap();
    let fields = stat.rsplit(") ").next().unwrap();
    let tpgid = fields.split(' ').nth(5).unwrap();
    Pid::from_raw(tpgid.parse().unwrap()).unwrap()
}

/// What the monitor does around a guest, with a panic in the end; run on a terminal by the test below.
#[test]
#[ignore = "a child of terminal_is_given_back_by_a_panic"]
fn panic_child() {
    // Run by somebody who asked for all ignored tests, it has no terminal.
    let Some(_terminal) = vmm::terminal::RawTerminal::enter().unwrap() else {
        return;
    };
    vmm::terminal::restore_on_panic();
    let thread = thread::spawn(|| {
        println!("ready");
        let mut key = [0];
        io::stdin().read_exact(&mut key).unwrap();
        panic!("of the test");
    });
    assert!(thread.join().is_err());
    println!("survived");
    thread::sleep(LIMIT);
}

#[test]
fn terminal_is_given_back_by_a_panic() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "--nocapture", "panic_child"]);
    let mut session = Session::start((command, TempDir::new().unwrap()));
    session.wait_for("ready");
    session.assert_raw();
    session.type_keys("x");
    session.wait_for("of the test");
    // By the hook, before anything is unwound: its owner lives on.
    session.wait_for("survived");
    assert_eq!(settings(&session.terminal), session.before);
    assert_eq!(session.child.try_wait().unwrap(), None);
}

#[test]
fn terminal_is_given_back_when_the_time_after_one_signal_is_over() {
    if !has_kvm() {
        return;
    }
    let mut session = Session::with_echo();
    session.signal(Signal::TERM);
    assert_eq!(session.wait_exit(LIMIT), Some(143), "{:?}", session.shown());
    assert_eq!(settings(&session.terminal), session.before);
}

#[test]
fn terminal_stays_as_it_is_when_there_is_no_guest() {
    let (mut command, directory) = minivmm(Tiny::Echo);
    command.args(["--initrd", "/nosuch"]);
    let mut session = Session::start((command, directory));
    session.assert_ends(1);
}

#[test]
fn terminal_that_hangs_up_is_a_signal() {
    if !has_kvm() {
        return;
    }
    let mut session = Session::with_echo();
    session.keyboard = None;
    // The kernel has sent the first SIGHUP by now; two that come together are one.
    thread::sleep(Duration::from_secs(1));
    session.signal(Signal::HUP);
    assert_eq!(session.wait_exit(AT_ONCE), Some(129));
}

// ---- keys ----

#[test]
fn keys_that_would_signal_reach_the_guest() {
    if !has_kvm() {
        return;
    }
    let mut session = Session::with_echo();
    let keys = "\x03\x04\x1a\x1c\x11\x13\x7fok";
    session.type_keys(keys);
    session.wait_for(keys);
    session.type_keys(POWER_OFF);
    session.assert_ends(0);
}

#[test]
fn ctrl_a_twice_sends_one_to_the_guest() {
    if !has_kvm() {
        return;
    }
    let mut session = Session::with_echo();
    session.type_keys("[\x01\x01x]");
    session.wait_for("[\x01x]");
    session.type_keys(POWER_OFF);
    session.assert_ends(0);
}

#[test]
fn ctrl_a_h_shows_the_keys_and_the_guest_runs_on() {
    if !has_kvm() {
        return;
    }
    let mut session = Session::with_echo();
    session.type_keys("\x01h");
    session.wait_for("Ctrl-A x");
    session.wait_for("end the guest");
    session.wait_for("Ctrl-A Ctrl-A");
    session.type_keys("ok");
    session.wait_for("ok");
    session.type_keys(POWER_OFF);
    session.assert_ends(0);
}

#[test]
fn paste_longer_than_the_serial_ports_buffer_arrives_whole() {
    if !has_kvm() {
        return;
    }
    let mut session = Session::with_echo();
    let line = "0123456789 abcdefghijklm";
    let pasted = line.repeat(40);
    session.type_keys(&pasted);
    session.wait_for(&pasted);
    session.type_keys(POWER_OFF);
    session.assert_ends(0);
}

// ---- a terminal that is somebody else's ----

#[test]
fn background_job_is_not_stopped_and_leaves_the_terminal_alone() {
    if !has_kvm() {
        return;
    }
    let line = "set -m; \"$@\" & echo \"pid $!.\"; wait $!; echo \"status $?.\"";
    let mut session = Session::start(by_shell(line, Tiny::Echo));
    let pid = {
        session.wait_for("pid ");
        let from = session.seen;
        session.wait_for(".");
        let digits = &session.shown[from..session.seen - 1];
        Pid::from_raw(std::str::from_utf8(digits).unwrap().parse().unwrap()).unwrap()
    };
    let _killed_in_the_end = Killed(pid);
    session.wait_for("ready");
    thread::sleep(Duration::from_millis(300));
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it still runs");
    let state = stat.rsplit(") ").next().unwrap();
    assert!(!state.starts_with('T'), "stopped: {stat}");
    assert_eq!(settings(&session.terminal), session.before);
    kill_process(pid, Signal::TERM).unwrap();
    session.wait_for("power button");
    kill_process(pid, Signal::TERM).unwrap();
    session.wait_for("status 143.");
    session.assert_ends(0);
}

/// Kills a process that is not a child of ours, at the end of a test that may have failed.
struct Killed(Pid);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::KILL);
    }
}

#[test]
fn terminal_as_stdin_with_stdout_elsewhere_is_raw_and_given_back() {
    if !has_kvm() {
        return;
    }
    let mut session = Session::start(by_shell("exec \"$@\" >/dev/null", Tiny::Echo));
    let deadline = Instant::now() + LIMIT;
    while settings(&session.terminal) == session.before {
        assert!(Instant::now() < deadline, "it never became raw");
        session.look();
    }
    session.assert_raw();
    session.type_keys("\x01x");
    session.assert_ends(0);
}

// ---- no terminal ----

#[test]
fn stdin_and_stdout_that_are_closed_do_no_harm() {
    if !has_kvm() {
        return;
    }
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
        assert_eq!(vm.wait_exit(LIMIT).code(), Some(0), "{line}: {}", vm.log());
        let expected = if line.contains(">&- 2") || line.ends_with(" >&-") {
            ""
        } else {
            "hi\n"
        };
        assert_eq!(vm.console(), expected, "{line}");
    }
}

#[test]
fn stdin_from_dev_null_lets_the_guest_run_on() {
    if !has_kvm() {
        return;
    }
    let (mut command, _directory) = minivmm(Tiny::Echo);
    command.stdin(Stdio::null());
    let mut vm = Vm::spawn(command);
    vm.wait_for("ready\n", LIMIT);
    thread::sleep(Duration::from_millis(200));
    assert!(!vm.has_ended(), "{}", vm.log());
    end_by_signals(&mut vm);
}

#[test]
fn stdin_that_is_a_pipe_reaches_the_guest_without_our_keys() {
    if !has_kvm() {
        return;
    }
    let (mut command, _directory) = minivmm(Tiny::Echo);
    command.stdin(Stdio::piped());
    let mut vm = Vm::spawn(command);
    vm.wait_for("ready\n", LIMIT);
    vm.send("\x01x\x03");
    vm.wait_for("\x01x\x03", LIMIT);
    let long = "0123456789abcdef".repeat(200);
    vm.send(&long);
    vm.wait_for(&long, LIMIT);
    vm.send(POWER_OFF);
    assert_eq!(vm.wait_exit(AT_ONCE).code(), Some(0), "{}", vm.log());
}

#[test]
fn stdin_at_its_end_lets_the_guest_run_on() {
    if !has_kvm() {
        return;
    }
    let (mut command, _directory) = minivmm(Tiny::Echo);
    command.stdin(Stdio::piped());
    let mut vm = Vm::spawn(command);
    vm.wait_for("ready\n", LIMIT);
    vm.send("last words");
    vm.close_stdin();
    vm.wait_for("last words", LIMIT);
    end_by_signals(&mut vm);
}

#[test]
fn stdin_and_stdout_that_do_not_block_work_alike() {
    if !has_kvm() {
        return;
    }
    let (mut command, _directory) = minivmm(Tiny::Echo);
    let (stdin, mut keys) = io::pipe().unwrap();
    // As a neighbour in the same pipeline may leave it.
    rustix::io::ioctl_fionbio(&stdin, true).unwrap();
    command.stdin(stdin);
    let mut vm = Vm::spawn(command);
    vm.wait_for("ready\n", LIMIT);
    thread::sleep(Duration::from_millis(300));
    keys.write_all(b"late").unwrap();
    vm.wait_for("late", LIMIT);
    keys.write_all(POWER_OFF.as_bytes()).unwrap();
    assert_eq!(vm.wait_exit(AT_ONCE).code(), Some(0), "{}", vm.log());
}

#[test]
fn stdout_that_nobody_reads_does_not_hold_up_the_end() {
    if !has_kvm() {
        return;
    }
    for blocking in [true, false] {
        let (reader, writer) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&writer, !blocking).unwrap();
        let (mut command, _directory) = minivmm(Tiny::Flood);
        command.stdin(Stdio::null()).stdout(writer);
        command.stderr(Stdio::piped());
        let mut child = Guarded(command.spawn().unwrap());
        drop(command); // Its copy of the pipe's writing end.
        wait_until_full(&reader);
        assert_eq!(child.end_by_signals(), Some(143), "blocking: {blocking}");
    }
}

/// Waits until a pipe takes no more, told by its content that no longer grows.
fn wait_until_full(pipe: &io::PipeReader) {
    let deadline = Instant::now() + LIMIT;
    let mut before = 0;
    loop {
        thread::sleep(Duration::from_millis(300));
        let now = rustix::io::ioctl_fionread(pipe).unwrap();
        if now > 0 && now == before {
            return;
        }
        assert!(Instant::now() < deadline, "{now} bytes, and it goes on");
        before = now;
    }
}

#[test]
fn stdout_closed_by_its_reader_does_not_hurt_the_guest() {
    if !has_kvm() {
        return;
    }
    let (reader, writer) = io::pipe().unwrap();
    let (mut command, _directory) = minivmm(Tiny::Flood);
    command.stdin(Stdio::null()).stdout(writer);
    command.stderr(Stdio::piped());
    let mut child = Guarded(command.spawn().unwrap());
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
}

/// A minivmm without our reading its console; killed when dropped.
struct Guarded(Child);

impl Guarded {
    /// Ends it by two SIGTERM, and returns its status. The log must not have grown long: a guest can write for ever.
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

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn end_by_signals(vm: &mut Vm) {
    vm.signal(Signal::TERM);
    vm.wait_for_log("power button", LIMIT);
    vm.signal(Signal::TERM);
    assert_eq!(vm.wait_exit(AT_ONCE).code(), Some(143), "{}", vm.log());
}
