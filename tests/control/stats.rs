//! `stats`, of guests that do a lot.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use vmm::stats::Stats;

use crate::harness::guest::Net;
use crate::harness::process::Killed;
use crate::harness::vm::Vm;
use crate::harness::{eventually, guest_test};
use crate::host::Host;

guest_test!(counters_are_read_while_a_thread_is_always_busy, || {
    let (host, net) = (Host::new(), Net::new());
    let prefix = host.runtime.prefix();
    let prefix: Vec<_> = prefix.iter().map(String::as_str).collect();
    let mut command = net.command_under(&prefix);
    let line = "guest.mode=send guest.size=60 guest.ms=600000";
    command.args(["--name", "busy", "--balloon", "16M", "--cmdline", line]);
    command.args(["--macvtap", "lower,backend=user"]);
    let mut vm = Vm::spawn(command);
    vm.wait_for("READY send\n");

    let stats = || {
        let text = host.show(&["stats", "busy", "--json"]);
        serde_json::from_str::<Stats>(&text).unwrap()
    };
    // The driver never waits, so that the pair's thread seldom does.
    for _ in 0..3 {
        let before = stats();
        let grows = || stats().nics[0].queues[0].tx.frames > before.nics[0].queues[0].tx.frames;
        assert!(eventually(grows), "{before:#?}");
        assert!(stats().uptime_us > before.uptime_us);
    }
    let stats = stats();
    assert_eq!(stats.memory.size, 128 << 20);
    assert!(stats.memory.resident > 1 << 20, "{stats:#?}");
    assert_eq!(stats.balloon.unwrap().target, 16 << 20);
    assert!(stats.console_bytes > Some(0) && stats.vcpus[0].io_out > 0);
    assert!(!stats.nics[0].vhost && stats.nics[0].link);

    let table = host.show(&["stats", "busy"]);
    for part in ["up ", "balloon", "rx frames", "net0.0 ", "vcpu0 "] {
        assert!(table.contains(part), "{table}");
    }
    // Each second a line, until the VM has ended.
    let mut watch = host
        .runtime
        .minivmm(&["stats", "busy", "--watch", "--json"]);
    let mut watch = Killed(watch.stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut next = || serde_json::from_str::<Stats>(&lines.next()?.ok()?).ok();
    let (first, second) = (next().unwrap(), next().unwrap());
    assert!(second.uptime_us >= first.uptime_us + 900_000);
    host.show(&["kill", "busy"]);
    while next().is_some() {}
    assert_eq!(watch.wait().unwrap().code(), Some(0));
});
