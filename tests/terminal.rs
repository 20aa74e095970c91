//! The guest's console on a terminal: raw while the guest runs, restored at every end, and with
//! keys of its own.
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

use std::fs;
use std::io::{self, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use harness::kvm_test;
use harness::{AT_ONCE, PATIENCE, eventually};
use rustix::process::{Pid, Signal, kill_process};
use session::{Session, by_shell, minivmm, settings};
use tempfile::TempDir;
use tiny::{CRASH, POWER_OFF, RESET, Tiny};
use vmm::config::Config;
use vmm::{Exit, Guest};

// ---- a terminal: raw, and restored ----

kvm_test!(terminal_is_raw_until_the_guest_powers_off, || {
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
});

kvm_test!(terminal_with_settings_of_its_own_gets_them_back, || {
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
        eventually(|| settings(&shell.terminal) != plain);
        settings(&shell.terminal)
    };
    session.type_keys(POWER_OFF);
    session.assert_ends(0);
});

kvm_test!(terminal_is_restored_when_the_guest_resets, || {
    let mut session = Session::with_echo();
    session.type_keys(RESET);
    session.assert_ends(0);
    assert!(session.shown().contains("reboot"), "{:?}", session.shown());
});

kvm_test!(terminal_is_restored_when_the_guest_crashes, || {
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
});

kvm_test!(terminal_is_restored_at_ctrl_a_x, || {
    let mut session = Session::with_echo();
    session.type_keys("\x01x");
    session.assert_ends(0);
});

kvm_test!(terminal_is_restored_at_the_second_signal, || {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        let mut session = Session::with_echo();
        session.assert_raw();
        session.signal_twice(signal);
        session.assert_ends(128 + signal.as_raw());
    }
});

/// Signals that are not meant to end a guest, but end minivmm.
const KILLERS: [Signal; 16] = [
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
];

kvm_test!(terminal_is_restored_by_a_signal_that_kills, || {
    for signal in KILLERS {
        let line = "ulimit -c 0; exec \"$@\"";
        let mut session = Session::start(by_shell(line, Tiny::Echo));
        session.wait_for("ready");
        session.assert_raw();
        session.signal(signal);
        assert_eq!(session.wait_exit_within(AT_ONCE), None, "{signal:?}");
        let status = session.child.wait().unwrap();
        assert_eq!(status.signal(), Some(signal.as_raw()));
        assert_eq!(settings(&session.terminal), session.before, "{signal:?}");
    }
});

kvm_test!(terminal_is_restored_while_stopped_and_raw_again, || {
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
    wait_until_raw(&mut session);
    session.type_keys("again");
    session.wait_for("again");
    // A second time, as the first.
    kill_process(group, Signal::TSTP).unwrap();
    let deadline = Instant::now() + PATIENCE;
    session.wait_for("ended");
    while settings(&session.terminal) != session.before {
        assert!(Instant::now() < deadline, "raw: {:?}", session.shown());
        session.look();
    }
    kill_process(group, Signal::KILL).unwrap();
});

/// The process group that has the terminal, which the kernel shows to those on it alone
/// (proc_pid_stat(5)).
fn foreground(session: &Session) -> Pid {
    let stat = fs::read_to_string(format!("/proc/{}/stat", session.child.id())).unwrap();
    let fields = stat.rsplit(") ").next().unwrap();
    let tpgid = fields.split(' ').nth(5).unwrap();
    Pid::from_raw(tpgid.parse().unwrap()).unwrap()
}

/// What the monitor does around a guest, with a panic in the end; run on a terminal by the test
/// below.
#[test]
#[ignore = "a child of terminal_is_restored_by_a_panic"]
fn panic_child() {
    // Run with all ignored tests, it has no terminal.
    let Some(_terminal) = vmm::RawTerminal::enter().unwrap() else {
        return;
    };
    vmm::restore_on_panic();
    let thread = thread::spawn(|| {
        println!("ready");
        let mut key = [0];
        io::stdin().read_exact(&mut key).unwrap();
        panic!("of the test");
    });
    assert!(thread.join().is_err());
    println!("survived");
    thread::sleep(PATIENCE);
}

#[test]
fn terminal_is_restored_by_a_panic() {
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

/// A program that uses the library, and has paused its guest; run by the tests below.
#[test]
#[ignore = "a child of the tests of a program with a paused guest"]
fn paused_child() {
    let Some(kernel) = std::env::var_os("PAUSED_KERNEL") else {
        return;
    };
    let mut config = Config::new(kernel);
    config.memory = "16M".parse().unwrap();
    let guest = Guest::start(config).unwrap();
    guest.pause().unwrap();
    println!("paused");
    assert_eq!(guest.wait().unwrap(), Exit::Terminal);
}

fn paused_session() -> Session {
    let directory = TempDir::new().unwrap();
    let kernel = directory.path().join("guest");
    Tiny::Echo.write(&kernel);
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "--nocapture", "paused_child"]);
    command.env("PAUSED_KERNEL", kernel);
    let mut session = Session::start((command, directory));
    session.wait_for("paused");
    session.assert_raw();
    session
}

kvm_test!(paused_guest_ends_at_ctrl_a_x, || {
    let mut session = paused_session();
    session.type_keys("\x01x");
    session.assert_ends(0);
});

kvm_test!(
    terminal_of_a_program_with_a_paused_guest_is_restored_by_its_signal,
    || {
        for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
            let mut session = paused_session();
            session.signal(signal);
            assert_eq!(session.wait_exit_within(AT_ONCE), None, "{signal:?}");
            let status = session.child.wait().unwrap();
            assert_eq!(status.signal(), Some(signal.as_raw()));
            assert_eq!(settings(&session.terminal), session.before, "{signal:?}");
        }
    }
);

kvm_test!(terminal_is_restored_after_one_signals_grace_time, || {
    let mut session = Session::with_echo();
    session.signal(Signal::TERM);
    assert_eq!(session.wait_exit(), Some(143), "{:?}", session.shown());
    assert_eq!(settings(&session.terminal), session.before);
});

#[test]
fn terminal_stays_as_it_is_when_there_is_no_guest() {
    let (mut command, directory) = minivmm(Tiny::Echo);
    command.args(["--initrd", "/nosuch"]);
    let mut session = Session::start((command, directory));
    session.assert_ends(1);
}

kvm_test!(terminal_that_hangs_up_is_a_signal, || {
    let mut session = Session::with_echo();
    session.keyboard = None;
    // The kernel has sent the first SIGHUP by now; two that come together are one.
    thread::sleep(Duration::from_secs(1));
    session.signal(Signal::HUP);
    assert_eq!(session.wait_exit_within(AT_ONCE), Some(129));
});

// ---- keys ----

kvm_test!(keys_that_would_signal_reach_the_guest, || {
    let mut session = Session::with_echo();
    let keys = "\x03\x04\x1a\x1c\x11\x13\x7fok";
    session.type_keys(keys);
    session.wait_for(keys);
    session.type_keys(POWER_OFF);
    session.assert_ends(0);
});

kvm_test!(ctrl_a_twice_sends_one_to_the_guest, || {
    let mut session = Session::with_echo();
    session.type_keys("[\x01\x01x]");
    session.wait_for("[\x01x]");
    session.type_keys(POWER_OFF);
    session.assert_ends(0);
});

kvm_test!(ctrl_a_h_shows_the_keys_and_the_guest_runs_on, || {
    let mut session = Session::with_echo();
    session.type_keys("\x01h");
    session.wait_for("Ctrl-A x");
    session.wait_for("end the guest");
    session.wait_for("Ctrl-A Ctrl-A");
    session.type_keys("ok");
    session.wait_for("ok");
    session.type_keys(POWER_OFF);
    session.assert_ends(0);
});

kvm_test!(ctrl_a_x_ends_a_guest_that_reads_no_keys, || {
    let mut session = Session::start(minivmm(Tiny::Flood));
    session.wait_for("xxx");
    // More than the serial port's FIFO has room for, and than is read at once.
    session.type_keys(&"k".repeat(1000));
    session.type_keys("\x01x");
    session.assert_ends(0);
});

kvm_test!(paste_longer_than_the_serial_fifo_arrives_whole, || {
    let mut session = Session::with_echo();
    let line = "0123456789 abcdefghijklm";
    let pasted = line.repeat(40);
    session.type_keys(&pasted);
    session.wait_for(&pasted);
    session.type_keys(POWER_OFF);
    session.assert_ends(0);
});

// ---- a terminal of another process ----

kvm_test!(background_job_runs_on_and_leaves_the_terminal_alone, || {
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
});

kvm_test!(guest_put_into_the_background_runs_on_and_comes_back, || {
    let line = "set -m; \"$@\"; echo \"stopped $?.\"; bg >/dev/null; echo \"pid $!.\"; read x; fg >/dev/null";
    let mut session = Session::start(by_shell(line, Tiny::Echo));
    session.wait_for("ready");
    let group = foreground(&session);
    let _killed_in_the_end = Killed(group);
    kill_process(group, Signal::TSTP).unwrap();
    session.wait_for("stopped");
    session.wait_for("pid");
    // A job that was stopped once more would not handle it.
    kill_process(group, Signal::TERM).unwrap();
    session.wait_for("power button");
    assert_eq!(settings(&session.terminal), session.before);
    session.type_keys("\n");
    wait_until_raw(&mut session);
    session.type_keys("again");
    session.wait_for("again");
    session.type_keys(POWER_OFF);
    session.assert_ends(0);
});

kvm_test!(background_guest_gets_its_keys_in_the_foreground, || {
    let line = "set -m; \"$@\" & read x; fg >/dev/null";
    let mut session = Session::start(by_shell(line, Tiny::Echo));
    session.wait_for("ready");
    session.type_keys("\n");
    wait_until_raw(&mut session);
    session.type_keys("keys");
    session.wait_for("keys");
    session.type_keys("\x01x");
    session.assert_ends(0);
});

kvm_test!(terminal_of_another_session_gives_keys_as_it_is, || {
    // Nothing else would end what is no child of the test, and in no session of its.
    let command = "setsid --wait timeout --foreground -s KILL 300 \"$@\"";
    let mut session = Session::start(by_shell(command, Tiny::Echo));
    session.wait_for("ready");
    session.type_keys(&format!("{POWER_OFF}\n"));
    session.assert_ends(0);
});

/// Waits until minivmm has taken the terminal.
#[track_caller]
fn wait_until_raw(session: &mut Session) {
    let deadline = Instant::now() + PATIENCE;
    while settings(&session.terminal) == session.before {
        assert!(Instant::now() < deadline, "not raw: {:?}", session.shown());
        session.look();
    }
    session.assert_raw();
}

/// Kills a process that is not a child of ours, at the end of a test that may have failed.
struct Killed(Pid);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::KILL);
    }
}

kvm_test!(terminal_as_stdin_alone_is_raw_and_restored, || {
    let mut session = Session::start(by_shell("exec \"$@\" >/dev/null", Tiny::Echo));
    wait_until_raw(&mut session);
    session.type_keys("\x01x");
    session.assert_ends(0);
});
