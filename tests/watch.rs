//! What minivmm shows of the host's network and follows in it: `net list`, the link of a running
//! guest, frames from a wrong MAC address, and (`watch/doctor.rs`) `doctor`. On this machine's
//! `/dev/kvm` with the freestanding test guest (`guest/`).

#[path = "watch/doctor.rs"]
mod doctor;
mod harness;

use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use harness::elf::elf;
use harness::guest::{Net, PEER, addresses};
use harness::netns::{self, Netns, root_test};
use harness::vm::{self, Vm};
use harness::{guest_test, transports_test};
use rustix::process::Signal;
use serde_json::Value;

/// USER_HZ of x86 (include/asm-generic/param.h), the unit of times in /proc.
const TICKS_PER_SECOND: f64 = 100.0;
const MAC: &str = "02:00:00:00:78:01";

/// Runs minivmm in a namespace to its end; returns its exit status and what it wrote on stdout.
fn minivmm(netns: &Netns, args: &[&str]) -> (Option<i32>, String) {
    let output = netns
        .command(vm::binary())
        .args(args)
        .output()
        .expect("minivmm starts");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    (output.status.code(), text)
}

/// The same for a run that succeeds.
fn show(netns: &Netns, args: &[&str]) -> String {
    let (status, text) = minivmm(netns, args);
    assert_eq!(status, Some(0), "{args:?}: {text}");
    text
}

fn show_json(netns: &Netns, args: &[&str]) -> Value {
    let text = show(netns, args);
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{args:?}: {e}\n{text}"))
}

/// The element of a JSON array whose `key` is `value`.
fn find<'a>(array: &'a Value, key: &str, value: &Value) -> Option<&'a Value> {
    let elements = array.as_array().expect("an array");
    elements.iter().find(|element| &element[key] == value)
}

/// Waits for `what`, which may take the monitor a moment.
fn await_some<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let mut found = None;
    harness::eventually(|| {
        found = look();
        found.is_some()
    });
    found.unwrap_or_else(|| panic!("no {what}"))
}

/// What `net list` says of a guest; None when it does not know it.
fn listed(net: &Net, pid: u32) -> Option<Value> {
    let listing = show_json(&net.host, &["net", "list", "--json"]);
    find(&listing["guests"], "pid", &pid.into()).cloned()
}

/// Starts a guest in its mode `link`, with a NIC on each of the lowers, until it has reported all
/// of them.
fn start_link_guest(net: &Net, lowers: &[&str]) -> Vm {
    let [ip, ip6] = addresses(2);
    let mut command = net.command();
    for lower in lowers {
        command.args(["--macvtap", lower]);
    }
    let line = format!(
        "guest.mode=link guest.peer={} guest.ip={ip}/24 guest.ip6={ip6}/64",
        PEER[0]
    );
    command.args(["--cmdline", &line]);
    let mut vm = Vm::spawn(command);
    for nic in 0..lowers.len() {
        let line = format!("LINK {nic} status=1 generation=0 changes=0 ");
        vm.wait_for(&line);
    }
    vm.wait_for("READY link\n");
    vm
}

/// The CPU time in seconds that the monitor itself has used, its vCPUs left out: the test guest
/// polls.
fn own_cpu_time(pid: u32) -> f64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("minivmm runs");
    let ticks: u64 = tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("stat")).ok())
        .filter(|stat| !stat.contains("(vcpu"))
        .map(|stat| {
            // After the name in parentheses: state is the first, utime and stime the 12th and 13th.
            let (_, rest) = stat.rsplit_once(") ").expect("proc(5)");
            let fields = rest.split_whitespace().skip(11).take(2);
            fields
                .map(|field| field.parse::<u64>().expect("proc(5)"))
                .sum::<u64>()
        })
        .sum();
    ticks as f64 / TICKS_PER_SECOND
}

// The name of a link may be anything but white space. The kernel returns it as it is, and a
// terminal would obey it.
root_test!(names_of_links_do_nothing_to_the_terminal, || {
    let net = Net::new();
    let (name, shown) = ("\u{1b}[7mx\u{9b}8\u{202e}", r"\u{1b}[7mx\u{9b}8\u{202e}");
    net.host.ip(&format!(
        "link add link lower name {name} type macvtap mode passthru"
    ));
    let is_clean = |text: &str| {
        let obeyed = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        !text.contains(obeyed)
    };
    let json = ["net", "list", "--json"];
    for (args, expected) in [
        (&["net", "list"][..], shown),
        (&json, r"\u001b[7mx\u009b8\u202e"),
        (&["doctor"], shown),
        (&["doctor", "--json"], r"\u001b[7mx\u009b8\u202e"),
        // Errors, which the log writes.
        (&["net", "open", "lower", "--", "true"], shown),
        (&["net", "open", "nosuch", "--", "true"], shown),
    ] {
        let mut command = net.host.command(vm::binary());
        let output = command.args(args).output().expect("minivmm starts");
        let text = String::from_utf8([output.stdout, output.stderr].concat()).expect("UTF-8");
        assert!(is_clean(&text), "{args:?}: {text:?}");
        assert!(text.contains(expected), "{args:?}: {text:?}");
    }
    let listing = show_json(&net.host, &json);
    let links = &listing["interfaces"][0]["links"];
    assert!(find(links, "name", &name.into()).is_some(), "{listing}");
});

guest_test!(net_list_shows_each_links_properties_and_owner, || {
    let net = Net::new();
    net.host.macvtap("byhand", "lower", "private");
    net.host.ip(
        "link add link lower name down0 mtu 1300 address 02:00:00:00:78:02 type macvlan mode vepa",
    );
    let mut vm = net.start_on(
        &format!("lower,netns=host,name=vm0,mac={MAC},mtu=1400"),
        2,
        "mode=hlt",
    );
    vm.wait_for("OK hlt");

    let text = show(&net.host, &["net", "list"]);
    let pid = vm.pid();
    for line in [
        format!("lower  {}  mtu 1500  up", net.host.mac("lower")),
        format!(
            "  macvtap byhand  private  {}  mtu 1500  up",
            net.host.mac("byhand")
        ),
        "  macvlan down0  vepa  02:00:00:00:78:02  mtu 1300  down".to_owned(),
        format!("  macvtap vm0  bridge  {MAC}  mtu 1400  up  owner minivmm (pid {pid})"),
        format!("guest of pid {pid}, {}", elf().display()),
        format!("  macvtap vm0 on lower  bridge  {MAC}  mtu 1400  up  addresses not seen yet"),
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "no line {line:?} in\n{text}"
        );
    }

    let listing = show_json(&net.host, &["net", "list", "lower", "--json"]);
    let lower = find(&listing["interfaces"], "name", &"lower".into()).expect("the lower");
    let links = &lower["links"];
    assert_eq!(links.as_array().expect("an array").len(), 3, "{listing}");
    let down = find(links, "name", &"down0".into()).expect("down0");
    for (key, value) in [
        ("kind", Value::from("macvlan")),
        ("mode", "vepa".into()),
        ("mac", "02:00:00:00:78:02".into()),
        ("mtu", 1300.into()),
        ("up", false.into()),
        ("owner", Value::Null),
        ("leaked", false.into()),
        ("host_link", false.into()),
    ] {
        assert_eq!(down[key], value, "{key} in {down}");
    }
    let own = find(links, "name", &"vm0".into()).expect("vm0");
    assert_eq!(own["owner"], format!("minivmm (pid {pid})"), "{own}");
    assert_eq!((&own["up"], &own["carrier"]), (&true.into(), &true.into()));
    assert!(find(&listing["guests"], "pid", &pid.into()).is_some());

    let (status, _) = minivmm(&net.host, &["net", "list", "nosuch"]);
    assert_eq!(status, Some(1));
});

guest_test!(net_list_shows_a_guests_addresses_until_it_is_killed, || {
    let net = Net::new();
    let mut vm = net.serve(2, "");
    let entry = listed(&net, vm.pid()).expect("the guest is listed");
    assert_eq!(
        entry["nics"][0]["addresses"],
        Value::Array(vec![]),
        "it has said nothing yet"
    );
    // The guest answers ARP, then neighbour discovery.
    for (n, ip) in addresses(2).iter().enumerate() {
        assert!(net.far.pings(ip, 3), "{}", vm.transcript());
        let found = await_some("address", || {
            let entry = listed(&net, vm.pid())?;
            let found = entry["nics"][0]["addresses"].as_array()?.clone();
            (found.len() > n).then_some(found)
        });
        assert!(found.contains(&Value::from(ip.as_str())), "{ip}: {found:?}");
    }
    let text = show(&net.host, &["net", "list"]);
    let [ip, ip6] = addresses(2);
    let line = text
        .lines()
        .skip_while(|line| !line.starts_with(&format!("guest of pid {},", vm.pid())))
        .nth(1)
        .expect("a line for its NIC");
    assert!(line.contains(" on lower  "), "{text}");
    for address in [ip, ip6] {
        assert!(line.split(' ').any(|word| word == address), "{text}");
    }

    vm.signal(Signal::KILL);
    vm.wait_exit();
    assert_eq!(listed(&net, vm.pid()), None, "it is dead");
});

// Each change reaches the guest by an interrupt, once, and the link works again afterwards.
transports_test!(carrier_of_the_lower_shows_in_the_guests_link, |net| {
    let mut vm = start_link_guest(&net, &["lower"]);
    let interrupts = |line: &str| -> u64 {
        let (_, count) = line.rsplit_once("interrupts=").expect("a LINK line");
        count.trim().parse().expect("a number")
    };
    let mut before = 0;
    for round in 0..3 {
        net.far.down("wire");
        let generation = 2 * round + 1;
        vm.wait_for(&format!(
            "LINK 0 status=0 generation={generation} changes={generation} "
        ));
        let now = interrupts(&vm.wait_for("\n"));
        assert!(now > before, "no interrupt came: {}", vm.transcript());
        before = now;
        net.far.up("wire");
        let generation = generation + 1;
        vm.wait_for(&format!(
            "LINK 0 status=1 generation={generation} changes={generation} "
        ));
    }
    let [ip, _] = addresses(2);
    assert!(net.far.pings(&ip, 5), "{}", vm.transcript());
    let log = vm.log();
    for line in ["the link is down", "the link is up"] {
        assert_eq!(log.matches(line).count(), 3, "{line}:\n{log}");
    }
    net.quit(2, vm);
});

guest_test!(lower_without_carrier_starts_a_guest_without_link, || {
    let net = Net::new();
    net.far.down("wire");
    // What the guest reads first may be from before the monitor's first look at the host.
    let mut vm = net.start(2, "mode=link");
    vm.wait_for("LINK 0 status=0 ");
    net.far.up("wire");
    vm.wait_for("LINK 0 status=1 generation=2 ");
    net.quit(2, vm);
});

guest_test!(macvtap_down_or_deleted_takes_the_guests_link_down, || {
    let net = Net::new();
    let mut vm = net.start_on("lower,netns=host,name=vm0", 2, "mode=link");
    vm.wait_for("READY link\n");
    net.host.down("vm0");
    vm.wait_for("LINK 0 status=0 generation=1 ");
    net.host.up("vm0");
    vm.wait_for("LINK 0 status=1 generation=2 ");
    // And the lower itself, which takes the macvtap with it.
    net.host.down("lower");
    vm.wait_for("LINK 0 status=0 generation=3 ");
    net.host.up("lower");
    vm.wait_for("LINK 0 status=1 generation=4 ");
    // Deleted by another program, it does not disturb the end of the monitor, which would delete
    // it.
    net.host.ip("link delete vm0");
    vm.wait_for("LINK 0 status=0 generation=5 ");
    vm.signal(Signal::TERM);
    vm.wait_for_log("power button");
    vm.signal(Signal::TERM);
    assert_eq!(vm.wait_exit().code(), Some(128 + 15), "{}", vm.transcript());
    // The signal's.
    let errors = vm.log().matches("error: ").count();
    assert_eq!(errors, 1, "{}", vm.transcript());
});

guest_test!(settings_of_a_macvtap_are_restored_or_warned_of, || {
    let net = Net::new();
    let nic = format!("lower,netns=host,name=vm0,mac={MAC}");
    let mut vm = net.start_on(&nic, 2, "mode=link");
    vm.wait_for("READY link\n");
    let set = |what: &str| drop(net.host.ip(&format!("link set vm0 {what}")));
    set("allmulticast off");
    vm.wait_for_log("vm0 was set to filter multicast");
    await_some("vm0 that takes every multicast frame", || {
        net.host
            .ip("link show vm0")
            .contains("ALLMULTI")
            .then_some(())
    });
    // No frame for the guest arrives then, and nothing in the guest shows it.
    set("address 02:00:00:00:78:99");
    let remedy = format!(
        "the guest has {MAC}, so no frame reaches it any more: `ip link set vm0 address {MAC}`"
    );
    vm.wait_for_log(&remedy);
    assert!(
        vm.log().contains("the MAC address 02:00:00:00:78:99"),
        "{}",
        vm.log()
    );
    let seen = || listed(&net, vm.pid()).expect("the guest is listed")["nics"][0]["link"].clone();
    let wrong_mac = await_some("wrong MAC address in the list", || {
        seen().get("wrong_mac").cloned()
    });
    let expected = serde_json::json!({"link": "02:00:00:00:78:99", "guest": MAC});
    assert_eq!(wrong_mac, expected);
    assert_eq!(seen()["filters_multicast"], false);
    let checks = show_json(&net.host, &["doctor", "lower", "--json"]);
    let check = find(&checks, "check", &"running guests".into()).expect("its line");
    assert_eq!(check["status"], "warn", "{check}");
    assert_eq!(check["remedy"], format!("`ip link set vm0 address {MAC}`"));
    set(&format!("address {MAC}"));
    vm.wait_for_log(&format!("has the guest's MAC address {MAC} again"));
    await_some("list that is content", || {
        seen().get("wrong_mac").is_none().then_some(())
    });
});

guest_test!(mtu_of_the_lower_that_changes_is_logged, || {
    let net = Net::new();
    let vm = net.serve(2, "");
    net.host.ip("link set lower mtu 1400");
    vm.wait_for_log("is now 1400");
    // It has to be one line, with the NIC and what it means for the guest.
    let log = vm.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("MTU of")).collect();
    assert_eq!(lines.len(), 1, "{log}");
    assert!(
        lines[0].contains("net0") && lines[0].contains("the guest"),
        "{log}"
    );
    net.quit(2, vm);
});

guest_test!(lower_that_vanishes_takes_one_link_and_nothing_else, || {
    let net = Net::new();
    let other = Netns::new();
    net.host.veth("lower2", &other, "wire2");
    // The same as on the first wire: the guest talks to it on both.
    other.address("wire2", &format!("{}/24", PEER[0]));
    let mut vm = start_link_guest(&net, &["lower", "lower2"]);
    let [ip, _] = addresses(2);
    assert!(net.far.pings(&ip, 3) && other.pings(&ip, 3));

    flood(&net.far, &ip, || {
        thread::sleep(Duration::from_millis(300));
        net.host.ip("link delete lower");
        vm.wait_for("LINK 0 status=0 generation=1 changes=1 ");
    });
    vm.wait_for_log("is gone");
    let log = vm.log();
    let warnings = log.lines().filter(|line| line.contains("warn: "));
    let warnings: Vec<_> = warnings.filter(|line| line.contains("gone")).collect();
    assert_eq!(warnings.len(), 1, "{log}");
    assert!(warnings[0].contains("net0"), "{log}");

    // The guest goes on sending by both NICs. A thread that waits for the dead one in a loop would
    // show.
    let before = own_cpu_time(vm.pid());
    thread::sleep(Duration::from_secs(1));
    let used = own_cpu_time(vm.pid()) - before;
    println!("the monitor used {used} s of a second");
    assert!(used < 0.1, "the monitor used {used} s of a second");

    assert!(other.pings(&ip, 3), "{}", vm.transcript());
    assert!(
        !vm.console().contains("LINK 1 status=0"),
        "{}",
        vm.transcript()
    );
    // `quit` by the other NIC: power-off works as ever.
    let quit = Net { far: other, ..net };
    let console = quit.quit(2, vm);
    assert!(console.ends_with("END failures=0\n"), "{console}");
});

/// Sends large datagrams, which come back, as fast as it goes while `work` runs.
fn flood(netns: &Netns, ip: &str, work: impl FnOnce()) {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            netns.enter(|| {
                let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("a socket");
                socket
                    .set_read_timeout(Some(Duration::from_millis(10)))
                    .expect("a timeout");
                let mut answer = [0; 1500];
                while !done.load(Ordering::Relaxed) {
                    // It fails once the link is gone.
                    let _ = socket.send_to(&[0; 1400], (ip, harness::guest::ECHO));
                    let _ = socket.recv(&mut answer);
                }
            });
        });
        // Also when the work panics, or the flood would go on for ever.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        done.store(true, Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

guest_test!(frames_from_a_wrong_mac_are_warned_of_and_counted, || {
    let net = Net::new();
    let wrong = "02:00:00:00:99:99";
    let options = format!("mode=ping count=5 end=halt mac={wrong} peer={}", PEER[0]);
    let mut vm = net.start_on(&format!("lower,mac={MAC}"), 2, &options);
    // No answer reaches it.
    vm.wait_for("FAIL ping ");
    vm.wait_for("END failures=1\n");

    let log = vm.log();
    let warnings: Vec<_> = log.lines().filter(|line| line.contains(wrong)).collect();
    assert_eq!(warnings.len(), 1, "{log}");
    for part in ["warn: ", MAC, "mac=", "mode=passthru"] {
        assert!(warnings[0].contains(part), "no {part} in {:?}", warnings[0]);
    }
    let count = await_some("count", || {
        let entry = listed(&net, vm.pid())?;
        entry["nics"][0]["wrong_source_frames"]
            .as_u64()
            .filter(|count| *count > 1)
    });
    let text = show(&net.host, &["net", "list"]);
    assert!(
        text.contains("frames from a wrong MAC address)"),
        "{count}: {text}"
    );
});
