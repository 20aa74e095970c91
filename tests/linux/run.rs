//! `minivmm run` on KVM, with a stock kernel.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use serde_json::Value;

use crate::harness::assets::assets;
use crate::harness::guest::Net;
use crate::harness::lab_test;
use crate::harness::runtime::Runtime;

/// The number of the host.
const HOST: u8 = 2;

lab_test!(command_in_a_guest_of_its_own_has_a_network, || {
    let net = Net::routed(HOST);
    let runtime = Runtime::new();
    let result = runtime.directory.path().join("result.json");
    let minivmm = runtime.minivmm(&["run", "--accel", "kvm", "--memory", "512M", "--user-net"]);
    let mut command = net.host.command(minivmm.get_program());
    command.args(minivmm.get_args()).arg("--kernel");
    command.arg(assets().bzimage()).arg("--modules");
    command.arg(assets().modules()).arg("--result").arg(&result);
    let script = "cat && ip -4 route >&2 && mkdir /tmp/made && exit 37";
    command.args(["--", "sh", "-c", script]);
    command.stdin(Stdio::piped());
    let mut run = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut stdin = run.stdin.take().expect("a pipe");
    stdin.write_all(b"from the host\n").expect("it is read");
    drop(stdin);
    let ended = run.wait_with_output().expect("it ends");
    let log = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(37), "{log}");
    assert_eq!(ended.stdout, b"from the host\n", "{log}");
    assert!(log.contains("default via 10.0.2.2 dev eth0"), "{log}");
    let report = fs::read(result).expect("there is a report");
    let report: Value = serde_json::from_slice(&report).expect("it is JSON");
    assert_eq!(report["accel"], "kvm", "{report}");
    let addresses = report["nics"][0]["addresses"].as_array();
    let addresses = addresses.expect("it lists addresses");
    assert!(addresses.contains(&"10.0.2.15/24".into()), "{report}");
});
