//! Other people's programs in QEMU's place: wrappers that do not become QEMU, that start helpers,
//! and that hang. Each is a script here, since it is about processes alone.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};

use super::harness::process::is_running;
use super::harness::site::Site;
use super::harness::vm::{Vm, copy_program};
use super::{eventually, outcome, tcg_test, text};

/// A directory with a program `qemu`, and what it leaves there.
struct Wrapper(tempfile::TempDir);

impl Wrapper {
    /// A program that answers to `--version` by `version`, and runs `rest` otherwise. `$D` is its
    /// directory.
    fn new(version: &str, rest: &str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).expect("it is ours");
        let script = format!(
            "#!/bin/bash\nD={}\nif [ \"$1\" = --version ]; then {version}; exit; fi\n{rest}\n",
            dir.path().display()
        );
        let wrapper = Self(dir);
        fs::write(wrapper.path("text"), script).expect("it can be written");
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(wrapper.path("text"), mode).expect("it is ours");
        copy_program(wrapper.path("text"), wrapper.path("qemu"));
        wrapper
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// What a file there says, once it says a line.
    fn line(&self, name: &str) -> String {
        let read = || fs::read_to_string(self.path(name)).unwrap_or_default();
        assert!(
            eventually(|| read().ends_with('\n')),
            "{name} is not written"
        );
        read().trim().to_owned()
    }

    /// `minivmm qemu --qemu IT ARGS`.
    fn qemu(&self, site: &Site, args: &[&str]) -> Command {
        let path = self.path("qemu").display().to_string();
        site.qemu([&["--qemu", &path], args].concat())
    }
}

/// Waits for a process's end, and brings it about when that does not come.
#[track_caller]
fn assert_ends(pid: &str, when: &str) {
    if !eventually(|| !is_running(pid)) {
        let pid = Pid::from_raw(pid.parse().expect("a pid")).expect("not 0");
        let _ = kill_process(pid, Signal::KILL);
        panic!("{pid:?} lives on after {when}");
    }
}

const VERSION: &str = "echo QEMU emulator version 8.0.0";
const MAC: &str = "02:aa:00:00:00:2b";

tcg_test!(qemu_of_a_wrapper_without_exec_ends_with_minivmm, || {
    let site = Site::new();
    let wrapper = Wrapper::new(
        VERSION,
        "bash -c 'echo $$ >$0/pid; exec sleep 1000' $D\necho over",
    );
    for netns in ["private", "host"] {
        for signal in [Signal::TERM, Signal::KILL] {
            let nic = format!("wire,mac={MAC},netns={netns}");
            let mut vm = Vm::spawn(wrapper.qemu(&site, &["--macvtap", &nic, "--", "-M", "q35"]));
            let pid = wrapper.line("pid");
            vm.signal(signal);
            assert_ends(&pid, &format!("{signal:?}, netns={netns}"));
            vm.wait_exit();
            fs::remove_file(wrapper.path("pid")).expect("it is there");
            let gc = site
                .host
                .exec(&[super::binary().to_str().expect("it is text"), "net", "gc"]);
            assert!(gc.status.success(), "{}", text(&gc.stderr));
            assert!(eventually(|| site.mac_is_free(MAC)), "the macvtap is left");
        }
    }
});

tcg_test!(qemu_version_does_not_wait_for_a_wrappers_helper, || {
    let site = Site::new();
    let helper = "echo $$ >>$0/helpers; exec sleep 1000";
    let version =
        format!("bash -c '{helper}' $D & until [ -s $D/helpers ]; do sleep 0.01; done; {VERSION}");
    let wrapper = Wrapper::new(&version, "exit 9");
    let output = outcome(wrapper.qemu(&site, &["--macvtap", "wire", "--", "-M", "q35"]));
    assert_eq!(output.status.code(), Some(9), "{}", text(&output.stderr));
    for helper in wrapper.line("helpers").lines() {
        assert_ends(helper, "the look at the version");
    }
});

tcg_test!(qemu_that_does_not_power_off_is_sent_quit, || {
    let site = Site::new();
    // Its end of the control socket is descriptor 3: there is no NIC.
    let deaf = "echo $$ >$D/pid; while read -r line <&3; do echo \"$line\" >>$D/commands; \
                case $line in *'\"quit\"'*) exit 0 ;; esac; done";
    let wrapper = Wrapper::new(VERSION, deaf);
    let mut vm = Vm::spawn(wrapper.qemu(&site, &["--accel", "tcg", "--kernel", "none"]));
    let pid = wrapper.line("pid");
    vm.signal(Signal::TERM);
    assert_eq!(vm.wait_exit().code(), Some(143), "{}", vm.log());
    assert_ends(&pid, "minivmm's end");
    let commands = fs::read_to_string(wrapper.path("commands")).expect("it has read some");
    let at = |name: &str| {
        commands
            .find(name)
            .unwrap_or_else(|| panic!("no {name}: {commands}"))
    };
    assert!(at("system_powerdown") < at("\"quit\""), "{commands}");
});

tcg_test!(qemu_gets_no_capability_of_an_ordinary_user, || {
    let site = Site::new();
    let wrapper = Wrapper::new(VERSION, "cat /proc/self/status; exit 9");
    let command = wrapper.qemu(&site, &["--", "-M", "q35"]);
    // ip netns exec NAME minivmm ...
    let mut command_line: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
    let at = command_line
        .iter()
        .position(|word| *word == *super::binary());
    let at = at.expect("minivmm is in it");
    let capabilities = "+net_admin,+setpcap,+sys_admin";
    let way = format!(
        "setpriv --reuid=nobody --regid=nogroup --clear-groups --inh-caps={capabilities} --ambient-caps={capabilities} --"
    );
    command_line.splice(at..at, way.split(' ').map(Into::into));
    let mut by = Command::new(command.get_program());
    by.args(command_line);
    let output = outcome(by);
    let shown = text(&output.stdout);
    assert_eq!(output.status.code(), Some(9), "{}", text(&output.stderr));
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(
            shown.contains(&format!("{set}:\t0000000000000000\n")),
            "{set} {shown}"
        );
    }
});
