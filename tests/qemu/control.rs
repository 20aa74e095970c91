//! QMP, served by minivmm in front of QEMU's monitor.

use std::io::{BufRead, BufReader};

use serde_json::{Value, json};

use super::*;
use crate::harness::runtime::Runtime;

/// A client that gets all events.
pub(super) struct Listener(UnixStream);

impl Listener {
    pub fn connect(path: &Path) -> Self {
        let mut stream = UnixStream::connect(path).expect("minivmm serves the socket");
        let commands = br#"{"execute": "qmp_capabilities"} {"execute": "query-name"}"#;
        stream.write_all(commands).expect("it reads");
        stream.set_read_timeout(Some(PATIENCE)).expect("not 0");
        let lines = BufReader::new(stream.try_clone().expect("a descriptor is free")).lines();
        // QEMU has answered, and nothing is missed from here on.
        let answers = lines
            .map_while(Result::ok)
            .filter(|line| line.contains("\"return\":{}"));
        assert_eq!(answers.take(2).count(), 2);
        Self(stream)
    }

    /// The names and data of the events to the end.
    pub fn events(self) -> Vec<(String, Value)> {
        let values = serde_json::Deserializer::from_reader(self.0).into_iter::<Value>();
        let values = values.map(|value| value.expect("QMP has JSON alone"));
        let event = |value: Value| {
            let name = value["event"].as_str()?.to_owned();
            Some((name, value["data"].clone()))
        };
        values.filter_map(event).collect()
    }
}

tcg_test!(qemu_of_args_is_controlled_besides_its_own_monitors, || {
    let site = Site::new();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (ours, own) = (dir.path().join("ours"), dir.path().join("own"));
    let qmp = |path: &Path, command: &str| {
        let output = Command::new(binary())
            .arg("qmp")
            .arg(path)
            .arg(command)
            .output();
        let output = output.expect("minivmm starts");
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    let name = format!("qemu-of-args-{}", std::process::id());
    let mut command = site.qemu(["--name", &name, "--qmp"]);
    command.arg(&ours).args([
        "--macvtap",
        "wire",
        "--",
        "-M",
        "q35",
        "-accel",
        "tcg",
        "-S",
    ]);
    // QEMU's monitor is one of its defaults here, which another monitor takes away.
    command
        .args(["-nographic", "-readconfig"])
        .arg(dir.path().join("config"));
    let config = format!(
        "[chardev \"own\"]\n  backend = \"socket\"\n  path = \"{}\"\n  server = \"on\"\n  wait = \"off\"\n\
         [mon \"own\"]\n  chardev = \"own\"\n  mode = \"control\"\n",
        own.display()
    );
    fs::write(dir.path().join("config"), config).expect("it can be written");
    let mut vm = Vm::spawn(command);
    vm.send("\u{1}c");
    vm.wait_for("(qemu)");
    let version = qmp(&own, "query-version");
    assert_eq!(qmp(&ours, "query-version"), version);
    assert!(qmp(&ours, "query-status").contains("prelaunch"));
    assert_eq!(qmp(&own, "query-status"), qmp(&ours, "query-status"));
    let mut console = Command::new(binary());
    console.args(["console", &name, "--dump"]);
    let log = text(&outcome(console).stderr);
    assert!(log.contains("has no console"), "{log}");
    let listener = Listener::connect(&ours);
    qmp(&ours, "quit");
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.log());
    let data = json!({"guest": false, "reason": "host-qmp-quit"});
    assert_eq!(listener.events(), [("SHUTDOWN".to_owned(), data)]);
    assert!(!ours.exists(), "the socket is removed");
});

tcg_test!(detached_qemu_runs_on_and_leaves_its_log_and_events, || {
    let site = Site::new();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let events = dir.path().join("events");
    let runtime = Runtime::new();
    let [program, args @ ..] = runtime.prefix();
    let mut command = site.host.command(program);
    command.args(args).arg(binary()).arg("qemu");
    command.args(["-d", "--name", "web", "--macvtap", "wire", "--events"]);
    command.arg(&events);
    command.args("-- -M q35 -accel tcg -display none -S".split(' '));
    let output = outcome(command);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "web\n");
    let ask = |args: &[&str]| text(&outcome(runtime.minivmm(args)).stdout);
    let shown: Value = serde_json::from_str(&ask(&["ps", "web", "--json"])).expect("JSON");
    assert_eq!(shown[0]["state"], "prelaunch");
    let pid = shown[0]["pid"].as_i64().expect("a number");
    let pid = Pid::from_raw(pid as i32).expect("not 0");
    kill_process(pid, Signal::TERM).expect("it runs");
    let is_over = || rustix::process::test_kill_process(pid).is_err();
    assert!(eventually(is_over), "it runs on");
    let log = ask(&["logs", "web"]);
    assert!(log.contains("terminating on signal 15"), "{log}");
    let lines = fs::read_to_string(&events).expect("it was written");
    let lines = lines
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"));
    let lines: Vec<Value> = lines.collect();
    assert_eq!(lines[0]["event"], "started");
    assert_eq!(lines[0]["nics"][0]["nic"], "macvtap0");
    let last = lines.last().expect("there is one");
    assert_eq!((&last["event"], &last["code"]), (&"exit".into(), &0.into()));
});
