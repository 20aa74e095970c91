//! `-t`.

use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use super::*;
use crate::harness::pty::Pty;

/// A terminal, and minivmm on it.
struct Session {
    pty: Pty,
    child: Killed,
    shown: Vec<u8>,
}

impl Session {
    fn start(agent: &Agent, script: &str) -> Self {
        let pty = Pty::new();
        resize(&pty, 33, 101);
        let child = pty.start(&mut agent.with(&["-t"], &["sh", "-c", script]));
        let shown = Vec::new();
        Self { pty, child, shown }
    }

    fn wait_for(&mut self, wanted: &str) {
        while !text(&self.shown).contains(wanted) {
            let mut bytes = [0; 4096];
            let length = self.pty.keyboard.read(&mut bytes).unwrap();
            self.shown.extend(&bytes[..length]);
        }
    }

    fn type_keys(&mut self, keys: &str) {
        self.pty.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.pty.terminal).unwrap().local_modes;
        !modes.contains(LocalModes::ICANON)
    }
}

fn resize(pty: &Pty, rows: u16, columns: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&pty.terminal, size).unwrap();
}

#[test]
fn terminal_has_the_size_of_the_users_and_follows_it() {
    let agent = Agent::start();
    let script = "trap 'stty size' WINCH; stty size; test -t 0 && test -t 1 && test -t 2 && echo all $TERM; \
        echo ready; while :; do read -r line; [ \"$line\" = end ] && exit 8; done";
    let mut session = Session::start(&agent, script);
    session.wait_for("33 101\r\n");
    session.wait_for("all ");
    session.wait_for("ready");
    assert!(session.is_raw());
    resize(&session.pty, 44, 122);
    session.wait_for("44 122\r\n");
    session.type_keys("end\r");
    assert_eq!(session.child.wait().unwrap().code(), Some(8));
    assert!(!session.is_raw(), "the terminal is not restored");
}

#[test]
fn keys_of_a_terminal_are_the_commands() {
    let agent = Agent::start();
    let mut session = Session::start(
        &agent,
        "trap 'echo interrupted; got=1' INT; echo ready; \
         while [ -z \"$got\" ]; do sleep 0.05; done; cat; exit 3",
    );
    session.wait_for("ready");
    session.type_keys("\x03");
    session.wait_for("interrupted");
    // A line, and the end of the input.
    session.type_keys("line\r\x04");
    assert_eq!(session.child.wait().unwrap().code(), Some(3));
}

#[test]
fn terminal_is_hung_up_when_the_client_is_killed() {
    let agent = Agent::start();
    let held = agent.holds();
    let mut session = Session::start(&agent, "echo pid $$ end; exec sleep 1000");
    session.wait_for("end");
    let shown = text(&session.shown);
    let pid = shown.split(' ').nth(1).unwrap().to_owned();
    session.child.kill().unwrap();
    assert!(eventually(|| !is_running(&pid)));
    assert!(agent.has_left_nothing(held));
}

#[test]
fn command_with_a_terminal_and_input_from_a_pipe_sees_its_end() {
    let agent = Agent::start();
    let mut command = agent.with(&["-t"], &["sh", "-c", "cat; exit 5"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"line\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(5));
    assert!(text(&output.stdout).contains("line\r\n"), "{output:?}");
}
