//! The terminal is as before, whichever way QEMU ends.

use std::fs;
use std::io::{Read, Write};
use std::process::Command;
use std::thread;

use rustix::fs::{OFlags, fcntl_getfl};
use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::{LocalModes, tcgetattr};

use super::harness::assets::assets;
use super::harness::pty::Pty;
use super::harness::vm::binary;
use super::{descendants, eventually, outcome, tcg_test};

/// The name of the VM.
fn name() -> String {
    format!("qemu-terminal-{}", std::process::id())
}

/// Whether QEMU answers on its monitor.
fn has_begun() -> bool {
    let mut command = Command::new(binary());
    command.args(["qmp", &name(), "query-status"]);
    outcome(command).status.success()
}

/// Runs a command on a terminal of its own until it is raw, ends it by `end` (which gets the
/// command's pid and the user's side of the terminal), and checks that the terminal is as before.
/// Returns the exit status.
fn on_a_terminal(mut command: Command, end: impl FnOnce(u32, &mut fs::File)) -> Option<i32> {
    let mut pty = Pty::new();
    let is_raw = || {
        let settings = tcgetattr(&pty.terminal).expect("a terminal");
        !settings.local_modes.contains(LocalModes::ICANON)
    };
    let nonblocking = || {
        let flags = fcntl_getfl(&pty.terminal).expect("it is open");
        flags.contains(OFlags::NONBLOCK)
    };
    let mut child = pty.start(&mut command);
    let mut shown = pty.keyboard.try_clone().expect("a descriptor is free");
    // Ends with the terminal's other side.
    thread::spawn(move || while shown.read(&mut [0; 4096]).is_ok_and(|n| n > 0) {});
    assert!(eventually(is_raw), "the terminal is not raw");
    // Until then QEMU may still change its mode.
    assert!(eventually(has_begun), "QEMU does not begin");
    end(child.id(), &mut pty.keyboard);
    let mut status = None;
    assert!(
        eventually(|| {
            status = child.try_wait().expect("it is our child");
            status.is_some()
        }),
        "minivmm does not end"
    );
    assert!(!is_raw(), "the terminal is restored");
    assert!(!nonblocking(), "and blocks");
    status.and_then(|status| status.code())
}

tcg_test!(terminal_is_restored_by_ctrl_a_x_and_by_kills, || {
    let with_kernel = || {
        let mut command = Command::new(binary());
        // Without an initrd the guest panics, and would end by itself.
        command.args([
            "qemu",
            "--name",
            &name(),
            "--accel",
            "tcg",
            "--cmdline",
            "panic=0 no_timer_check",
        ]);
        command.arg("--kernel").arg(assets().bzimage());
        command
    };
    let of_args = || {
        let mut command = Command::new(binary());
        let args = "-- -M q35 -accel tcg -nodefaults -display none -serial mon:stdio";
        command.args(["qemu", "--name", &name()]);
        command.args(args.split_whitespace());
        command
    };
    let quit = |_, keyboard: &mut fs::File| keyboard.write_all(b"\x01x").expect("it reads");
    let kill = |minivmm, _: &mut fs::File| {
        let qemu = *descendants(minivmm).last().expect("QEMU runs");
        let qemu = Pid::from_raw(qemu as i32).expect("a pid");
        kill_process(qemu, Signal::KILL).expect("QEMU runs");
    };
    assert_eq!(on_a_terminal(with_kernel(), quit), Some(0));
    assert_eq!(on_a_terminal(with_kernel(), kill), Some(137));
    assert_eq!(on_a_terminal(of_args(), quit), Some(0));
    assert_eq!(on_a_terminal(of_args(), kill), Some(137));
    let kill_us = |minivmm, _: &mut fs::File| {
        let minivmm = Pid::from_raw(minivmm as i32).expect("a pid");
        kill_process(minivmm, Signal::USR1).expect("it runs");
    };
    assert_eq!(on_a_terminal(of_args(), kill_us), None, "of the signal");
});
