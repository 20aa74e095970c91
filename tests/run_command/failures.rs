//! Guests that fail: each by its own reason, also when it is a command that sees to it.

use std::fs;
use std::process::Command;
use std::time::Instant;

use rustix::process::Signal;
use serde_json::Value;

use super::harness::assets::assets;
use super::harness::netns::Netns;
use super::harness::process::{all_children, file_server};
use super::harness::vm;
use super::{AT_ONCE, Host, Running, eventually, on_host, signal};

/// `minivmm run` in this network namespace.
fn run_in(host: &Host, netns: &Netns, options: &[&str]) -> Command {
    let mut minivmm = host.runtime.command("ip");
    minivmm
        .args(["netns", "exec", netns.name()])
        .arg(vm::binary());
    minivmm.args(["run", "--kernel"]).arg(assets().bzimage());
    minivmm.arg("--modules").arg(assets().modules());
    minivmm.args(options).args(["--", "true"]);
    minivmm
}

fn reason(host: &Host, stderr: &str) -> String {
    let report =
        fs::read(host.path("result.json")).unwrap_or_else(|error| panic!("{error}: {stderr}"));
    let report: Value = serde_json::from_slice(&report).unwrap();
    assert_eq!(report["status"], 125, "{report}");
    report["reason"].as_str().unwrap().to_owned()
}

#[test]
fn nic_without_an_address_ends_the_guest_with_what_was_tried() {
    on_host(|host| {
        let netns = Netns::new();
        netns.wire("lower");
        let result = host.path("result.json");
        let options = [
            "--macvtap",
            "lower,mac=52:54:00:12:34:56",
            "--network-timeout",
            "2500ms",
            "--result",
            result.to_str().unwrap(),
        ];
        let ended = Running::start(run_in(&host, &netns, &options)).wait();
        assert_eq!(ended.status, Some(125), "{}", ended.stderr);
        assert_eq!(reason(&host, &ended.stderr), "network");
        let text = "eth0 (52:54:00:12:34:56) has no address after 2 s: no DHCP server answered";
        assert!(ended.stderr.contains(text), "{}", ended.stderr);
        assert_eq!(host.vms(), [""; 0]);
        assert!(
            !netns.ip("link").contains("macvtap"),
            "{}",
            netns.ip("link")
        );
    });
}

/// What ends the guest's init, and what is said of it: the reason, and a part of the text.
const ENDS: [(&str, &str, &str); 3] = [
    // Its program is overwritten in memory, as root can.
    (
        "perl -e 'open M, \"/proc/1/maps\"; for (<M>) { /^(\\w+)-(\\w+) r-x/ or next; \
         open F, \"+<\", \"/proc/1/mem\"; sysseek F, hex $1, 0; syswrite F, \"\\xcc\" x (hex($2) - hex $1) }'; \
         exec sleep 1000",
        "panic",
        "the guest's kernel panicked: Attempted to kill init!",
    ),
    // As its hook for panics does.
    (
        "echo \"<2>minivmm-agent: the guest's init has failed: panicked\" > /dev/kmsg; \
         echo o > /proc/sysrq-trigger; exec sleep 1000",
        "agent",
        "the guest's init has failed: panicked",
    ),
    // The device that it needs is taken away.
    (
        "cd /sys/bus/virtio/drivers/vmw_vsock_virtio_transport && \
         for name in virtio*; do echo $name > unbind; done; exec sleep 1000",
        "agent",
        "the connection to the host is lost",
    ),
];

#[test]
fn init_that_a_command_ends_ends_the_guest_with_the_reason() {
    on_host(|host| {
        let result = host.path("result.json");
        for (script, why, text) in ENDS {
            let options = ["--result", result.to_str().unwrap()];
            let ended = host.run(&options, &["sh", "-c", script]).wait();
            assert_eq!(ended.status, Some(125), "{}", ended.stderr);
            assert_eq!(reason(&host, &ended.stderr), why, "{}", ended.stderr);
            let first = ended.stderr.lines().find(|line| line.contains(text));
            assert!(first.is_some(), "{text}: {}", ended.stderr);
            assert_eq!(host.vms(), [""; 0]);
        }
    });
}

#[test]
fn file_server_that_is_killed_ends_the_guest_with_the_reason() {
    on_host(|host| {
        let result = host.path("result.json");
        let share = format!("{}:/mnt", host.directory.path().display());
        let options = ["--share", &share, "--result", result.to_str().unwrap()];
        let script = ": > /mnt/ready; while :; do /bin/true; done";
        let run = host.run(&options, &["sh", "-c", script]);
        let ready = host.path("ready");
        assert!(eventually(|| ready.exists()));
        let vm = all_children(run.child.id())[0];
        signal(file_server(vm, "/"), Signal::KILL);
        let killed = Instant::now();
        let ended = run.wait();
        assert!(killed.elapsed() < AT_ONCE, "{:?}", killed.elapsed());
        assert_eq!(ended.status, Some(125), "{}", ended.stderr);
        assert_eq!(reason(&host, &ended.stderr), "share", "{}", ended.stderr);
        let text = "the share root has failed: the file server of / has ended";
        assert!(ended.stderr.contains(text), "{}", ended.stderr);
        assert_eq!(host.vms(), [""; 0]);
    });
}
