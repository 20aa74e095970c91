//! QEMU as a program that waits for its end, with its monitor played by the test.

use std::cell::RefCell;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitStatus};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGPROF};
use tempfile::TempDir;

use super::control::Control;
use super::guest::{Guest, Terms};
use super::monitor::{Forward, Monitor};
use crate::child::{Arrivals, Program, exit_code};
use crate::config::Reboot;
use crate::control::exit::Exit;
use crate::events::EventHub;
use crate::qmp::server::Server;
use crate::qmp::socket::Listener;

/// What is waited for comes at once, or not at all.
const LIMIT: Duration = Duration::from_secs(60);

/// A connection by lines.
struct Lines(BufReader<UnixStream>);

impl Lines {
    fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self(BufReader::new(stream))
    }

    fn send(&mut self, message: &Value) {
        let line = format!("{message}\n");
        self.0.get_mut().write_all(line.as_bytes()).unwrap();
    }

    fn next(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_default()
    }

    /// The next command of this name. Those before it are answered.
    fn expect(&mut self, name: &str) -> Value {
        loop {
            let command = self.next();
            assert!(!command.is_null(), "no {name}");
            if command["execute"] == name {
                return command;
            }
            self.send(&json!({"return": {}, "id": command["id"]}));
        }
    }
}

/// A QEMU that is followed.
struct Site {
    directory: TempDir,
    /// Its end of the monitor.
    qemu: Lines,
    /// It runs for as long as this is open.
    life: Option<io::PipeWriter>,
    thread: Option<JoinHandle<(Option<Exit>, ExitStatus)>>,
}

impl Site {
    /// `signals` end minivmm. A guest of `--kernel` is prepared by the test.
    fn new(signals: &'static [i32], guest: Option<fn(&mut Guest)>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (reader, life) = io::pipe().unwrap();
        let listener = Listener::bind(&path).unwrap();
        let signals = Arrivals::new(signals).unwrap();
        let thread = thread::spawn(move || {
            let mut command = Command::new("cat");
            command.stdin(reader);
            let qemu = Program::new(command).spawn().unwrap();
            let hub = Arc::new(EventHub::default());
            let monitor = Rc::new(RefCell::new(Monitor::new(ours, "prelaunch").unwrap()));
            let forward = Box::new(Forward {
                monitor: Rc::clone(&monitor),
                version: json!("of QEMU"),
                grace: LIMIT,
                nics: Vec::new(),
            });
            let server = Server::new(vec![listener], &hub, forward).unwrap();
            let guest = guest.map(|prepare| {
                let (monitor, hub) = (Rc::clone(&monitor), Arc::clone(&hub));
                let terms = Terms {
                    grace: LIMIT,
                    reboot: Reboot::Exit,
                    memory: None,
                };
                let mut guest = Guest::new(monitor, hub, terms);
                prepare(&mut guest);
                guest
            });
            let control = Control::new(qemu, monitor, signals, guest, None, hub);
            control.run(vec![Box::new(server)]).unwrap()
        });
        Self {
            directory,
            qemu: Lines::new(theirs),
            life: Some(life),
            thread: Some(thread),
        }
    }

    /// A client that is ready for commands.
    fn client(&self) -> Lines {
        let stream = UnixStream::connect(self.directory.path().join("qmp")).unwrap();
        let mut client = Lines::new(stream);
        assert_eq!(client.next()["QMP"]["version"], "of QEMU");
        client.send(&json!({"execute": "qmp_capabilities"}));
        assert_eq!(client.next(), json!({"return": {}}));
        client
    }

    fn end(&mut self) -> (Option<Exit>, u8) {
        let (exit, status) = self.thread.take().unwrap().join().unwrap();
        (exit, exit_code(status))
    }
}

#[test]
fn clients_with_the_same_ids_get_their_own_answers_and_all_events() {
    let mut site = Site::new(&[], None);
    let (mut first, mut second) = (site.client(), site.client());
    first.send(&json!({"execute": "a", "arguments": {"x": [1]}, "id": 7}));
    let a = site.qemu.expect("a");
    assert_eq!(a["arguments"], json!({"x": [1]}));
    // QEMU gets it in its turn.
    second.send(&json!({"execute": "b", "id": 7}));
    let timestamp = json!({"seconds": 5, "microseconds": 6});
    let event = json!({"event": "NEWS", "data": {"y": 2}, "timestamp": timestamp});
    site.qemu.send(&event);
    site.qemu.send(&json!({"return": {"z": 3}, "id": a["id"]}));
    let b = site.qemu.expect("b");
    let error = json!({"class": "DeviceNotFound", "desc": "None"});
    site.qemu.send(&json!({"error": error, "id": b["id"]}));
    assert_eq!(first.next(), event);
    assert_eq!(first.next(), json!({"return": {"z": 3}, "id": 7}));
    assert_eq!(second.next(), event);
    assert_eq!(second.next(), json!({"error": error, "id": 7}));
    site.life = None;
    assert_eq!(site.end(), (None, 0));
    assert!(first.next().is_null(), "the connection is closed");
}

#[test]
fn client_waits_for_a_qemu_that_hangs_while_others_and_signals_go_on() {
    let mut site = Site::new(&[SIGHUP], None);
    let mut waits = site.client();
    waits.send(&json!({"execute": "a", "id": "x"}));
    let a = site.qemu.expect("a");
    assert!(a["id"].is_u64());
    let _other = site.client();
    signal_hook::low_level::raise(SIGHUP).unwrap();
    assert_eq!(site.end(), (None, 128 + SIGHUP as u8), "it is passed on");
    let answer = waits.next();
    assert_eq!(answer["error"]["class"], "GenericError");
    assert_eq!(answer["id"], "x");
}

#[test]
fn info_is_there_while_qemu_hangs_and_has_the_last_state() {
    let mut site = Site::new(&[], None);
    let mut client = site.client();
    let mut status = |id: &str| {
        client.send(&json!({"execute": "x-minivmm-info", "id": id}));
        let answer = loop {
            let message = client.next();
            if message["id"] == id {
                break message;
            }
            assert!(message["event"].is_string(), "{message}");
        };
        assert_eq!(answer["return"]["stop-timeout"], LIMIT.as_secs());
        answer["return"]["status"].as_str().unwrap().to_owned()
    };
    assert_eq!(status("a"), "starting");
    let negotiation = site.qemu.expect("qmp_capabilities");
    let id = &negotiation["id"];
    site.qemu.send(&json!({"return": {}, "id": id}));
    while status("b") != "prelaunch" {}
    site.qemu.send(&json!({"event": "RESUME"}));
    while status("c") != "running" {}
    site.qemu.send(&json!({"event": "STOP"}));
    let question = site.qemu.expect("query-status");
    let state = json!({"status": "paused", "running": false});
    let id = &question["id"];
    site.qemu.send(&json!({"return": state, "id": id}));
    while status("d") != "paused" {}
}

#[test]
fn commands_that_a_qemu_does_not_read_are_refused_once_they_are_many() {
    let mut site = Site::new(&[], None);
    let (sender, answers) = mpsc::channel();
    // More than is kept, and the socket takes.
    for _ in 0..10 {
        let (mut client, sender) = (site.client(), sender.clone());
        thread::spawn(move || {
            client.send(&json!({"execute": "a", "arguments": {"x": "x".repeat(200 << 10)}}));
            let _ = sender.send(client.next());
        });
    }
    let answer = answers.recv_timeout(LIMIT).unwrap();
    let desc = "QEMU does not answer on its monitor";
    assert_eq!(answer["error"]["desc"], desc);
    site.life = None;
    site.end();
}

#[test]
fn qemu_that_hangs_in_its_end_is_killed_by_the_second_signal() {
    let mut site = Site::new(&[SIGPROF], Some(|_| {}));
    site.qemu.expect("qmp_capabilities");
    signal_hook::low_level::raise(SIGPROF).unwrap();
    site.qemu.expect("system_powerdown");
    let (_, unused) = UnixStream::pair().unwrap();
    // QEMU closes its end, and goes on.
    site.qemu = Lines::new(unused);
    signal_hook::low_level::raise(SIGPROF).unwrap();
    assert_eq!(site.end(), (Some(Exit::Signal(SIGPROF)), 137));
}

#[test]
fn qemu_that_hangs_in_its_end_is_killed_at_the_deadline() {
    let mut site = Site::new(
        &[],
        Some(|guest| {
            let data = json!({"guest": true, "reason": "guest-shutdown"});
            guest.message(&json!({"event": "SHUTDOWN", "data": data}));
            guest.deadline = Some(Instant::now());
        }),
    );
    assert_eq!(site.end(), (Some(Exit::PowerOff), 137));
}

#[test]
fn last_event_comes_though_qemu_has_ended_and_its_helper_holds_the_monitor() {
    let mut site = Site::new(&[], Some(|_| {}));
    let mut client = site.client();
    let event = json!({"event": "SHUTDOWN", "data": {"guest": false, "reason": "host-ui"}});
    site.qemu.send(&event);
    assert_eq!(client.next()["data"], event["data"]);
    site.qemu.expect("quit");
    site.life = None;
    assert_eq!(site.end(), (None, 0));
}
