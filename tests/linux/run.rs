//! `minivmm run` on KVM, with a stock kernel.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::harness::assets::assets;
use crate::harness::guest::Net;
use crate::harness::lab_test;
use crate::harness::netns::Netns;
use crate::harness::process::{all_children, file_server};
use crate::harness::runtime::Runtime;

/// The number of the host.
const HOST: u8 = 2;

/// `minivmm run` of this script on KVM, which writes its report there.
fn run(host: &Netns, runtime: &Runtime, options: &[&str], result: &Path, script: &str) -> Child {
    let minivmm = runtime.minivmm(&["run", "--accel", "kvm", "--memory", "512M"]);
    let mut command = host.command(minivmm.get_program());
    command.args(minivmm.get_args()).args(options);
    command.arg("--kernel").arg(assets().bzimage());
    command.arg("--modules").arg(assets().modules());
    command.arg("--result").arg(result);
    command.args(["--", "sh", "-c", script]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    command.stderr(Stdio::piped()).spawn().expect("it starts")
}

fn read(result: &Path) -> Value {
    let report = fs::read(result).expect("there is a report");
    serde_json::from_slice(&report).expect("it is JSON")
}

lab_test!(command_in_a_guest_of_its_own_has_a_network, || {
    let net = Net::routed(HOST);
    let runtime = Runtime::new();
    let result = runtime.directory.path().join("result.json");
    let script = "cat && ip -4 route >&2 && mkdir /tmp/made && exit 37";
    let mut run = run(&net.host, &runtime, &["--user-net"], &result, script);
    let mut stdin = run.stdin.take().expect("a pipe");
    stdin.write_all(b"from the host\n").expect("it is read");
    drop(stdin);
    let ended = run.wait_with_output().expect("it ends");
    let log = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(37), "{log}");
    assert_eq!(ended.stdout, b"from the host\n", "{log}");
    assert!(log.contains("default via 10.0.2.2 dev eth0"), "{log}");
    let report = read(&result);
    assert_eq!(report["accel"], "kvm", "{report}");
    let addresses = report["nics"][0]["addresses"].as_array();
    let addresses = addresses.expect("it lists addresses");
    assert!(addresses.contains(&"10.0.2.15/24".into()), "{report}");
});

lab_test!(
    command_whose_root_is_served_no_more_ends_with_the_guest,
    || {
        let net = Net::routed(HOST);
        let runtime = Runtime::new();
        let result = runtime.directory.path().join("result.json");
        // Each program that it cannot load any more is a status of its own.
        let script = "echo ready; while :; do /bin/true; done";
        let mut run = run(&net.host, &runtime, &[], &result, script);
        let mut ready = [0; 6];
        let stdout = run.stdout.as_mut().expect("a pipe");
        stdout.read_exact(&mut ready).expect("it is ready");
        let vm = all_children(run.id())[0];
        let server = i32::try_from(file_server(vm, "/")).expect("a process");
        kill_process(Pid::from_raw(server).expect("a process"), Signal::KILL).expect("it runs");
        let ended = run.wait_with_output().expect("it ends");
        let log = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(125), "{log}");
        let report = read(&result);
        assert_eq!(report["reason"], "share", "{report}");
        assert!(log.contains("the share root has failed"), "{log}");
    }
);
