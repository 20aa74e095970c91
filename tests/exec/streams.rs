//! What passes between this process's streams and those of a command.

use std::io::ErrorKind;
use std::sync::mpsc;
use std::time::Duration;

use super::*;

/// 64 MiB of which no two parts are the same.
fn bytes() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..8 << 20).flat_map(next).collect()
}

#[test]
fn any_bytes_pass_to_stdin_and_from_stdout_and_stderr() {
    let agent = Agent::start();
    let sent = bytes();
    for script in ["cat", "cat >&2"] {
        let mut command = agent.sh(script);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        let output = thread::scope(|scope| {
            scope.spawn(|| {
                input.write_all(&sent).unwrap();
                drop(input);
            });
            child.wait_with_output().unwrap()
        });
        assert_eq!(output.status.code(), Some(0));
        let (full, empty) = match script {
            "cat" => (output.stdout, output.stderr),
            _ => (output.stderr, output.stdout),
        };
        // Not by assert_eq, which would show them.
        assert!(full == sent, "{script}: {} bytes", full.len());
        assert!(empty.is_empty());
    }
}

#[test]
fn last_bytes_of_a_command_come_before_its_status() {
    let agent = Agent::start();
    // More than a pipe holds, by a process that ends at once when it has written the last.
    let output = agent.sh("head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2; exit 3");
    let output = { output }.output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(
        (output.stdout.len(), output.stderr.len()),
        (1_000_000, 1_000_000)
    );
}

#[test]
fn end_of_input_reaches_the_command_and_its_output_goes_on() {
    let agent = Agent::start();
    let mut command = agent.sh("cat; echo after the end");
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"input ").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout), "input after the end\n");
}

#[test]
fn stdout_that_the_command_closes_ends_while_it_runs_on() {
    let agent = Agent::start();
    let mut command = agent.sh("echo last; exec >&-; read -r line; exit 4");
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = Killed(command.spawn().unwrap());
    let mut shown = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut shown)
        .unwrap();
    assert_eq!(shown, "last\n");
    assert!(child.try_wait().unwrap().is_none());
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(4));
}

#[test]
fn stdin_that_the_command_closes_ends_its_writer_while_it_runs_on() {
    let agent = Agent::start();
    let mut command = agent.sh("exec <&-; trap 'exit 6' TERM; while :; do sleep 0.05; done");
    let mut child = Killed(command.stdin(Stdio::piped()).spawn().unwrap());
    let mut input = child.stdin.take().unwrap();
    let failed = loop {
        if let Err(error) = input.write_all(&[b'x'; 4096]) {
            break error;
        }
    };
    assert_eq!(failed.kind(), ErrorKind::BrokenPipe);
    assert!(child.try_wait().unwrap().is_none());
    signal(&child, Signal::TERM);
    assert_eq!(child.wait().unwrap().code(), Some(6));
}

#[test]
fn reader_that_goes_ends_the_writer() {
    let agent = Agent::start();
    let (mut child, output, line) = agent.begin("exec yes");
    assert_eq!(line, "y");
    drop(output);
    // Of SIGPIPE, as without minivmm.
    assert_eq!(child.wait().unwrap().code(), Some(128 + 13));
}

#[test]
fn reader_that_stops_stops_the_writer_and_nothing_is_lost() {
    let agent = Agent::start();
    let blocks = 512;
    // A line for each 64 KiB that were taken.
    let script = format!(
        "i=0; while [ $i -lt {blocks} ]; do head -c 65536 /dev/zero; echo >&2; i=$((i+1)); done"
    );
    let mut command = agent.sh(&script);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Killed(command.spawn().unwrap());
    let mut output = child.stdout.take().unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let (sender, taken) = mpsc::channel();
    let counts = thread::spawn(move || lines.for_each(|line| sender.send(line).unwrap()));
    let mut before = 0;
    while taken.recv_timeout(Duration::from_secs(1)).is_ok() {
        before += 1;
    }
    // What the pipes, sockets and both programs hold.
    assert!((1..64).contains(&before), "{before}");
    let mut all = Vec::new();
    output.read_to_end(&mut all).unwrap();
    counts.join().unwrap();
    assert_eq!(before + taken.iter().count(), blocks);
    assert_eq!(all.len(), blocks * 65536);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let agent = Agent::start();
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let mut command = agent.sh("echo lost");
    command.stdout(full).stderr(Stdio::piped());
    let output = command.spawn().unwrap().wait_with_output().unwrap();
    assert_status(&output, 125, "No space left");
}
