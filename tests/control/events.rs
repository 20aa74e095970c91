//! `--events`: a guest's life as other programs see it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::eventually;
use crate::harness::guest::{Net, Transport, addresses};
use crate::harness::images;
use crate::harness::vm::{self, Vm};
use crate::harness::{guest_test, kvm_test};
use crate::host::Host;
use crate::tiny::{CRASH, POWER_OFF, RESET, Tiny};

/// A directory, and the file of events in it.
struct Log {
    directory: TempDir,
}

impl Log {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        Self { directory }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("events")
    }

    fn argument(&self) -> String {
        self.path().to_str().unwrap().to_owned()
    }

    /// What has been written so far.
    fn events(&self) -> Vec<Value> {
        lines(&fs::read_to_string(self.path()).unwrap())
    }

    /// The names of the events, less those that a guest may cause at any time.
    fn names(&self) -> Vec<String> {
        let names = self.events().into_iter();
        let names = names.map(|event| event["event"].as_str().unwrap().to_owned());
        names.filter(|name| name != "address").collect()
    }

    #[track_caller]
    fn wait_for(&self, name: &str, count: usize) {
        let has = || self.names().iter().filter(|found| *found == name).count() == count;
        assert!(eventually(has), "{name}: {:#?}", self.events());
    }
}

fn lines(text: &str) -> Vec<Value> {
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}")))
        .collect()
}

guest_test!(life_of_a_guest_is_in_its_events_in_order, || {
    let (net, log) = (Net::new(), Log::new());
    fs::write(log.path(), "what another guest has left").unwrap();
    let [ip, _] = addresses(2);
    let line = format!("guest.mode=echo guest.ip={ip}/24");
    let mut command = net.command();
    command.args([
        "--macvtap",
        "lower,mac=02:00:00:00:00:07",
        "--cmdline",
        &line,
    ]);
    command.args(["--events", &log.argument(), "--name", "storyteller"]);
    let mut vm = Vm::spawn(command);
    vm.wait_for("READY echo\n");
    net.host.ip("link set lower down");
    log.wait_for("link", 1);
    net.host.ip("link set lower up");
    log.wait_for("link", 2);
    assert!(eventually(|| net.far.pings(&ip, 1)));
    let address = || {
        let events = log.events();
        let mut addresses = events.iter().filter(|event| event["event"] == "address");
        addresses.any(|event| event["address"] == ip && event["mac"] == "02:00:00:00:00:07")
    };
    assert!(eventually(address), "{:#?}", log.events());
    vm.signal(Signal::TERM);
    log.wait_for("power-button", 1);
    net.quit(2, vm);

    let order = [
        "started",
        "driver-ready",
        "link",
        "link",
        "power-button",
        "power-off",
        "exit",
    ];
    assert_eq!(log.names(), order);
    let events = log.events();
    assert!(events.iter().all(|event| event["v"] == 1), "{events:#?}");
    let times = events.iter().map(|event| event["time"].as_f64().unwrap());
    assert!(times.is_sorted(), "{events:#?}");
    let started = &events[0];
    assert_eq!(started["name"], "storyteller");
    assert_eq!(started["nics"][0]["nic"], "net0");
    assert_eq!(started["nics"][0]["mac"], "02:00:00:00:00:07");
    assert_eq!(started["nics"][0]["lower"], "lower");
    let stage = |name: &str| started["stages"][name].as_u64().unwrap();
    let stages = ["opened", "memory", "network", "devices", "vcpus"].map(stage);
    assert!(stages.is_sorted() && stages[0] > 0, "{started:#}");
    assert!(stage("kernel").max(stage("machine")) <= stage("vcpus"));
    let find = |name: &str| events.iter().find(|event| event["event"] == name).unwrap();
    assert_eq!(find("driver-ready")["device"], "net0");
    assert_eq!(find("link")["up"], false);
    let exit = find("exit");
    assert_eq!(
        (&exit["code"], &exit["reason"]),
        (&0.into(), &"power-off".into())
    );
    let mode = fs::metadata(log.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o644, "it was there before");
});

guest_test!(end_is_in_the_events_however_it_comes, || {
    let host = Host::new();
    for (keys, code, reason) in [(POWER_OFF, 0, "power-off"), (CRASH, 3, "crash")] {
        let log = Log::new();
        let mut vm = host.start(&["--events", &log.argument()]);
        vm.send(keys);
        assert_eq!(vm.wait_exit().code(), Some(code));
        let events = log.events();
        let exit = events.last().unwrap();
        assert_eq!(
            (&exit["event"], &exit["reason"]),
            (&"exit".into(), &reason.into())
        );
        assert_eq!(exit["code"], code);
        assert!(exit["text"].as_str().unwrap().starts_with("the guest"));
        let mode = fs::metadata(log.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
    }
    // One that cannot be started.
    let log = Log::new();
    let kernel = log.directory.path().join("kernel");
    fs::write(&kernel, "no kernel").unwrap();
    let events = log.argument();
    host.fail(&["--kernel", kernel.to_str().unwrap(), "--events", &events]);
    assert_eq!(log.names(), ["exit"]);
    assert_eq!(log.events()[0]["reason"], "failure");
});

guest_test!(guest_that_restarts_goes_on_in_the_same_events, || {
    let (host, log) = (Host::new(), Log::new());
    let mut vm = host.start(&["--reboot", "restart", "--events", &log.argument()]);
    vm.send(RESET);
    vm.wait_for("ready\n");
    vm.send(POWER_OFF);
    assert_eq!(vm.wait_exit().code(), Some(0));
    assert_eq!(log.names(), ["started", "reset", "power-off", "exit"]);
    assert_eq!(log.events()[1]["guest"], true);
});

guest_test!(disk_for_which_the_host_has_no_room_is_reported, || {
    let log = Log::new();
    let (small, line) = (TempDir::new().unwrap(), "mode=disk-journal count=100");
    let image = small.path().join("disk.img");
    let guest = images::command(Transport::Pci, &[image.display().to_string()], line);
    let script =
        r#"mount -t tmpfs -o size=64k tmpfs "$0" && truncate -s 16M "$1" && shift && exec "$@""#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]);
    command
        .args([small.path(), &image])
        .arg(guest.get_program());
    command
        .args(guest.get_args())
        .args(["--events", &log.argument()]);
    let mut vm = Vm::spawn(command);
    vm.wait_exit();
    let events = log.events();
    let error = events
        .iter()
        .find(|event| event["event"] == "block-io-error");
    let error = error.unwrap_or_else(|| panic!("{events:#?}\n{}", vm.transcript()));
    assert_eq!(
        (&error["device"], &error["operation"]),
        (&"disk0".into(), &"write".into())
    );
    assert_eq!(error["no-space"], true);
    assert!(log.names().contains(&"driver-ready".to_owned()));
});

kvm_test!(events_go_to_a_descriptor_that_is_open_already, || {
    let log = Log::new();
    let kernel = write(Tiny::Greeter, log.directory.path());
    let run = |script: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(vm::binary()).arg(&kernel);
        command.arg(log.path()).stdin(Stdio::null());
        command.output().unwrap()
    };
    let output = run(r#"exec "$0" --kernel "$1" --events fd:7 7>"$2""#);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(log.names(), ["started", "power-off", "exit"]);
    let output = run(r#"exec "$0" --kernel "$1" --events fd:7"#);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("cannot write events to fd 7"), "{text}");
    assert_eq!(output.status.code(), Some(1));
});

kvm_test!(fifo_that_is_not_read_holds_up_neither_guest_nor_end, || {
    let log = Log::new();
    let mkfifo = Command::new("mkfifo").arg(log.path()).status();
    assert!(mkfifo.unwrap().success());
    let mut options = File::options();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK);
    let mut fifo = options.open(log.path()).unwrap();
    while fifo.write(&[b'\n'; 4096]).is_ok() {}
    let mut vm = start(Tiny::Greeter, &log.argument(), log.directory.path());
    assert_eq!(vm.wait_exit().code(), Some(0));
    assert!(vm.log().contains("events are not in"), "{}", vm.log());
    // With a reader they come, also to one that opens the FIFO late.
    let mut filled = vec![0; 1 << 20];
    let _ = fifo.read(&mut filled).unwrap();
    let mut vm = start(Tiny::Greeter, &log.argument(), log.directory.path());
    assert_eq!(vm.wait_exit().code(), Some(0));
    let read = fifo.read(&mut filled).unwrap();
    let events = lines(std::str::from_utf8(&filled[..read]).unwrap());
    assert_eq!(events.last().unwrap()["event"], "exit");
});

kvm_test!(full_disk_costs_events_and_one_warning, || {
    let directory = TempDir::new().unwrap();
    let mut vm = start(Tiny::Greeter, "/dev/full", directory.path());
    assert_eq!(vm.wait_exit().code(), Some(0));
    let text = vm.log();
    let warnings = text.lines().filter(|line| line.contains("events"));
    assert_eq!(warnings.count(), 2, "{text}");
    assert!(text.contains("No space left on device"), "{text}");
});

kvm_test!(events_in_the_file_of_another_output_are_refused, || {
    let log = Log::new();
    let kernel = write(Tiny::Greeter, log.directory.path());
    let console = format!("file:{}", log.argument());
    let arguments = ["--console", &console, "--events", &log.argument()];
    let mut command = Command::new(vm::binary());
    command.arg("--kernel").arg(&kernel).args(arguments);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("the events cannot be written to"), "{text}");
});

kvm_test!(
    driver_that_starts_in_a_loop_is_reported_now_and_then,
    || {
        let log = Log::new();
        let began = Instant::now();
        let options = "mode=hostile-memory count=200 only=balloon-life";
        let mut command = images::command(Transport::Pci, &[], options);
        command.args(["--balloon", "--events", &log.argument()]);
        let mut vm = Vm::spawn(command);
        assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
        let seconds = began.elapsed().as_secs() as usize;
        let names = log.names();
        let count = |name: &str| names.iter().filter(|found| *found == name).count();
        // Eight at once and one a second of each device; two a second of the balloon's size.
        assert!(count("driver-ready") >= 8, "{names:?}");
        assert!(count("driver-ready") <= 2 * (9 + seconds), "{names:?}");
        assert!(count("balloon") <= 2 * (1 + seconds), "{names:?}");
    }
);

fn start(guest: Tiny, events: &str, directory: &Path) -> Vm {
    let kernel = write(guest, directory);
    Vm::start(["--kernel", kernel.to_str().unwrap(), "--events", events])
}

fn write(guest: Tiny, directory: &Path) -> PathBuf {
    let path = directory.join("kernel");
    guest.write(&path);
    path
}
