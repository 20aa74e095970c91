//! Agents that are none, or have been taken over: whatever one says, `minivmm exec` ends, with the reason, and does not grow.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Output, Stdio};
use std::thread::{self, JoinHandle};

use agent_protocol::session::{ExecFailure, FromCommand, Hello, Request, Stream};
use agent_protocol::{VERSION, read, write};
use rustix::process::Signal;
use tempfile::TempDir;

use super::harness::eventually;
use super::harness::process::Killed;
use super::{assert_status, binary, signal, text};

/// The connections of a command, as an agent has them: to control it, and its streams.
struct Connections {
    control: UnixStream,
    streams: [UnixStream; 3],
}

/// Serves one command by what `answer` does with its connections.
struct HostileAgent {
    directory: TempDir,
    serves: JoinHandle<()>,
}

fn accept(listener: &UnixListener) -> (UnixStream, Request) {
    let (mut stream, _) = listener.accept().unwrap();
    let mut line = [0; 14];
    stream.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"CONNECT 28022\n");
    stream.write_all(b"OK 1024\n").unwrap();
    write(&stream, &Hello { version: VERSION }).unwrap();
    let request = read(&stream).unwrap();
    (stream, request)
}

impl HostileAgent {
    fn new(answer: impl FnOnce(Connections) + Send + 'static) -> Self {
        let directory = TempDir::new().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
        let serves = thread::spawn(move || {
            let (control, request) = accept(&listener);
            assert!(matches!(request, Request::Exec(_)), "{request:?}");
            let streams = [Stream::Stdin, Stream::Stdout, Stream::Stderr].map(|expected| {
                let (connection, request) = accept(&listener);
                assert!(matches!(request, Request::Stream { stream, .. } if stream == expected));
                connection
            });
            answer(Connections { control, streams });
        });
        Self { directory, serves }
    }

    fn exec(&self) -> Command {
        let mut minivmm = Command::new(binary());
        minivmm.env_remove("RUST_LOG").arg("exec");
        minivmm.arg(self.directory.path().join("vsock"));
        minivmm.args(["--", "true"]).stdin(Stdio::null());
        minivmm
    }

    /// What `exec` says of it, and how it ends.
    fn meet(answer: impl FnOnce(Connections) + Send + 'static) -> Output {
        let agent = Self::new(answer);
        let output = agent.exec().output().unwrap();
        agent.serves.join().unwrap();
        output
    }
}

/// Waits until the other end is gone.
fn wait_for_end(mut stream: &UnixStream) {
    let _ = std::io::copy(&mut stream, &mut std::io::sink());
}

#[test]
fn agent_that_makes_no_sense_is_not_waited_for() {
    let lengths = [u32::MAX, (4 << 20) + 1];
    let long = lengths.map(|length| length.to_le_bytes().to_vec());
    let other = [
        vec![1, 0, 0, 0, 0xff],
        [&[8, 0, 0, 0][..], &[0xff; 8]].concat(),
    ];
    for garbage in long.into_iter().chain(other) {
        let output = HostileAgent::meet(
            move |Connections {
                      mut control,
                      streams,
                  }| {
                control.write_all(&garbage).unwrap();
                // Its streams stay open.
                streams.iter().for_each(wait_for_end);
            },
        );
        assert_status(&output, 125, "makes no sense");
    }
}

#[test]
fn agent_that_closes_early_is_status_125_after_what_it_has_sent() {
    let output = HostileAgent::meet(
        |Connections {
             control,
             mut streams,
         }| {
            streams[1].write_all(b"output").unwrap();
            drop((control, streams));
        },
    );
    assert_status(&output, 125, "has ended");
    assert_eq!(output.stdout, b"output");
    let output = HostileAgent::meet(|Connections { mut control, .. }| {
        // In the middle of a message.
        control.write_all(&[100, 0, 0, 0, 1]).unwrap();
        control.shutdown(Shutdown::Both).unwrap();
    });
    assert_status(&output, 125, "has ended");
}

#[test]
fn statuses_and_texts_of_a_hostile_agent_are_kept_in_their_bounds() {
    for (said, status) in [
        (FromCommand::Exited(256 + 7), 7),
        (FromCommand::Exited(-1), 255),
        (
            FromCommand::Killed {
                signal: 1 << 30 | 9,
                core: false,
            },
            128 + 9,
        ),
    ] {
        let output =
            HostileAgent::meet(move |Connections { control, .. }| write(&control, &said).unwrap());
        assert_status(&output, status, "");
    }
    let output = HostileAgent::meet(|Connections { control, .. }| {
        let text = "\x1b]0;title\x07 of a terminal".to_owned();
        write(
            &control,
            &FromCommand::Failed {
                reason: ExecFailure::Refused,
                text,
            },
        )
        .unwrap();
    });
    assert_status(&output, 125, "of a terminal");
    assert!(
        !text(&output.stderr).contains('\x1b'),
        "{:?}",
        text(&output.stderr)
    );
}

#[test]
fn output_without_an_end_after_the_commands_is_ended_by_a_signal() {
    let agent = HostileAgent::new(
        |Connections {
             control,
             mut streams,
         }| {
            write(&control, &FromCommand::Exited(3)).unwrap();
            while streams[1].write_all(&[b'x'; 1 << 16]).is_ok() {}
        },
    );
    let mut exec = Killed(agent.exec().stdout(Stdio::piped()).spawn().unwrap());
    let mut stdout = exec.stdout.take().unwrap();
    // More than was on its way when the command ended.
    stdout.read_exact(&mut vec![0; 8 << 20]).unwrap();
    assert!(exec.try_wait().unwrap().is_none());
    signal(&exec, Signal::INT);
    assert!(eventually(|| exec.try_wait().unwrap().is_some()));
    assert_eq!(exec.wait().unwrap().code(), Some(3));
    drop(stdout);
    agent.serves.join().unwrap();
}

#[test]
fn messages_without_an_end_neither_fill_memory_nor_keep_a_signal_from_its_command() {
    let agent = HostileAgent::new(|Connections { control, streams }| {
        let mut sent = 0u64;
        let reader = control.try_clone().unwrap();
        let signalled =
            thread::spawn(move || read::<agent_protocol::session::ToCommand>(&reader).unwrap());
        while !signalled.is_finished() {
            write(
                &control,
                &FromCommand::Started {
                    pid: 1,
                    elsewhere: false,
                },
            )
            .unwrap();
            sent += 1;
        }
        assert!(sent > 1000, "{sent}");
        write(&control, &FromCommand::Exited(4)).unwrap();
        drop(streams);
    });
    let mut exec = Killed(agent.exec().spawn().unwrap());
    let resident = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let words = line.and_then(|line| line.trim().split(' ').next());
        words.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0)
    };
    assert!(eventually(|| cpu_ms(exec.id()) > 300));
    assert!(
        resident(exec.id()) < 64 << 10,
        "{} KiB",
        resident(exec.id())
    );
    signal(&exec, Signal::TERM);
    assert!(eventually(|| exec.try_wait().unwrap().is_some()));
    assert_eq!(exec.wait().unwrap().code(), Some(4));
    agent.serves.join().unwrap();
}

/// How long a process has run: that of its first thread.
fn cpu_ms(pid: u32) -> u128 {
    let tasks = super::harness::process::tasks(pid);
    tasks.iter().map(|task| task.cpu.as_millis()).sum()
}
