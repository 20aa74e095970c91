//! `-d`, and what is known of a VM after its end.

use std::fs::{self, File};
use std::io::Read;
use std::process::Stdio;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Pid, Signal, kill_process};

use crate::harness::process::tasks;
use crate::harness::vm::Vm;
use crate::harness::{eventually, guest_test};
use crate::host::Host;
use crate::tiny::Tiny;

/// The process of the only VM.
fn pid(host: &Host) -> Pid {
    let pid = host.ps()[0]["pid"].as_i64().unwrap();
    Pid::from_raw(pid as i32).unwrap()
}

// Its output ends with the command: what reads it waits for nothing else.
guest_test!(detached_vm_runs_on_by_itself, || {
    let host = Host::new();
    assert_eq!(host.detach(Tiny::Prompt, &["--name", "web"]), "web");
    assert_eq!(host.detach(Tiny::Prompt, &[]), "vm1");
    let found = host.ps();
    assert_eq!((found.len(), &found[0]["detached"]), (2, &true.into()));
    let proc = format!("/proc/{}", found[0]["pid"]);
    let link = |name: &str| fs::read_link(format!("{proc}/{name}")).unwrap();
    assert_eq!(link("cwd").to_str(), Some("/"));
    for stream in ["fd/0", "fd/1"] {
        assert_eq!(link(stream).to_str(), Some("/dev/null"));
    }
    assert!(link("fd/2").ends_with("vms/web/log"), "{:?}", link("fd/2"));
    let stat = fs::read_to_string(format!("{proc}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let session = fields.split(' ').nth(3).unwrap();
    assert_eq!(session, found[0]["pid"].to_string());
});

guest_test!(detached_vm_keeps_no_descriptor_of_the_caller, || {
    let host = Host::new();
    let kernel = host.kernel(Tiny::Prompt);
    let command = host.runtime.minivmm(&["-d", "--kernel", &kernel]);
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "exec \"$@\" 5>&1 7>&2", "sh"]);
    shell.arg(command.get_program()).args(command.get_args());
    shell.stdin(Stdio::null()).env_remove("XDG_RUNTIME_DIR");
    // It waits until nothing has them open.
    let output = shell.output().unwrap();
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(0), &b"vm1\n"[..])
    );
});

guest_test!(start_that_fails_is_the_callers_error, || {
    let host = Host::new();
    let kernel = host.kernel(Tiny::Prompt);
    let missing = ["-d", "--kernel", "/no/such/kernel"];
    let no_link = ["-d", "--kernel", &kernel, "--macvtap", "no-such-link"];
    for (args, text) in [
        (&missing[..], "/no/such/kernel"),
        (&no_link, "no-such-link"),
    ] {
        let output = host.run(args);
        let log = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{log}");
        assert!(
            log.contains("minivmm: error: ") && log.contains(text),
            "{log}"
        );
        assert!(
            output.stdout.is_empty() && host.left().is_empty(),
            "{:?}",
            host.left()
        );
    }
    assert_eq!(host.fail(&["-d"]).0, 2);
    host.detach(Tiny::Prompt, &["--name", "web"]);
    let (status, log) = host.fail(&["-d", "--kernel", &kernel, "--name", "web"]);
    assert!(
        status == 1 && log.contains("the name web is in use"),
        "{log}"
    );
});

guest_test!(end_of_a_detached_vm_stays_known, || {
    let host = Host::new();
    host.detach(Tiny::Button, &["--name", "web"]);
    host.show(&["stop", "web"]);
    assert!(host.ps().is_empty());
    let table = host.show(&["ps", "--all"]);
    assert!(table.contains("ended(0)"), "{table}");
    let log = host.show(&["logs", "web"]);
    assert!(
        log.ends_with("minivmm: info: the guest powered off\n"),
        "{log}"
    );
    // Its name is free.
    host.detach(Tiny::Prompt, &["--name", "web"]);
    assert!(!host.show(&["logs", "web"]).contains("powered off"));
    kill_process(pid(&host), Signal::KILL).unwrap();
    let is_known = || host.show(&["ps", "-a"]).contains("ended(137)");
    assert!(eventually(is_known), "{}", host.show(&["ps", "-a"]));
});

guest_test!(log_of_an_attached_vm_is_kept_while_it_runs, || {
    let host = Host::new();
    let mut vm = host.start(&["--name", "web", "-v"]);
    let is_kept = || host.show(&["logs", "web"]).contains("debug: ");
    assert!(eventually(is_kept), "{}", host.show(&["logs", "web"]));
    host.show(&["kill", "web"]);
    vm.wait_exit();
    let (status, log) = host.fail(&["logs", "web"]);
    assert!(status == 1 && log.contains("no VM is called web"), "{log}");
});

// It is held up when it opens its console.
guest_test!(
    vm_whose_command_is_killed_while_it_starts_does_not_run,
    || {
        let host = Host::new();
        let kernel = host.kernel(Tiny::Prompt);
        let fifo = host.runtime.directory.path().join("console");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let console = format!("file:{}", fifo.display());
        let mut command =
            Vm::spawn(
                host.runtime
                    .minivmm(&["-d", "--kernel", &kernel, "--console", &console]),
            );
        command.wait_for_log("waiting for a program to open");
        command.signal(Signal::KILL);
        // A signal takes a moment, in which the VM could start.
        let is_dead = || tasks(command.pid()).iter().all(|task| task.state == 'Z');
        assert!(eventually(is_dead));
        let mut console = File::open(&fifo).unwrap();
        command.wait_exit();
        // Its end.
        console.read_to_end(&mut Vec::new()).unwrap();
        assert!(eventually(|| host.left().is_empty()), "{:?}", host.left());
    }
);
