//! The freestanding test guest does all that a driver must not do (`guest/src/hostile/`): to disks, to shares, to the entropy
//! device, the balloon and the socket device, and to our own data path of NICs, on this machine's KVM, and to vhost-net where
//! Linux guests can run, since that is where vhost-net is known to be.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;
mod lab;

use std::fs;
use std::io;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::Instant;

use harness::PATIENCE;
use harness::guest::{Net, PEER, Transport, addresses, succeed};
use harness::images::{self, Images};
use harness::memory::held_memory;
use harness::process::children;
use harness::vm::Vm;
use harness::{kvm_test, lab_test, transports_test};
use tempfile::TempDir;

transports_test!(user_threads_harm_neither_monitor_nic_nor_neighbour, |net| {
    harms_nothing(&net, "user", 1000);
});

transports_test!(user_threads_do_not_make_the_monitor_grow, |net| {
    makes_nothing_grow(&net, "user", [100, 3000]);
});

transports_test!(
    drivers_on_user_networks_harm_neither_monitor_nor_nic,
    |net| {
        let options = "mode=hostile backend=user count=50 ip=10.0.2.15/24 peer=10.0.2.2";
        let options = options.split(' ').map(|option| format!("guest.{option} "));
        let mut command = net.command();
        command.args(["--user-net", "--cmdline", &options.collect::<String>()]);
        let console = succeed(Vm::spawn(command));
        // After each of them passt, which is the router, has answered.
        let attacks = console.lines().filter(|line| line.starts_with("OK "));
        assert!(attacks.count() > 200, "{console}");
    }
);

kvm_test!(drivers_of_disks_harm_no_monitor, || {
    let images = Images::in_memory();
    for (transport, io) in [
        (Transport::Mmio, "auto"),
        (Transport::Pci, "uring"),
        (Transport::Pci, "threads"),
    ] {
        let disk = format!("{},io={io}", images.raw("disk.img").display());
        let options = "mode=hostile-disk count=50";
        let console = succeed(images::start(transport, &[disk], options));
        let attacks = console.lines().filter(|line| line.starts_with("OK "));
        assert!(attacks.count() > 200, "{console}");
    }
});

kvm_test!(drivers_of_disks_do_not_make_the_monitor_grow, || {
    let images = Images::in_memory();
    for io in ["auto", "uring", "threads"] {
        let disk = [format!("{},io={io}", images.raw("disk.img").display())];
        grows_not([20, 200], |rounds| {
            let options = format!("mode=hostile-disk count={rounds} only=disk-life end=halt");
            images::start(Transport::Pci, &disk, &options)
        });
    }
});

kvm_test!(drivers_of_entropy_and_balloon_harm_no_monitor, || {
    for transport in [Transport::Mmio, Transport::Pci] {
        let console = succeed(memory_attack(transport, "count=50"));
        let attacks = console.lines().filter(|line| line.starts_with("OK "));
        assert!(attacks.count() > 150, "{console}");
    }
});

kvm_test!(
    drivers_of_entropy_and_balloon_do_not_make_the_monitor_grow,
    || {
        for device in ["rng", "balloon"] {
            grows_not([20, 200], |rounds| {
                let options = format!("count={rounds} only={device}-life end=halt");
                memory_attack(Transport::Pci, &options)
            });
        }
    }
);

/// Starts the guest that attacks the entropy device and the balloon.
fn memory_attack(transport: Transport, options: &str) -> Vm {
    let options = format!("mode=hostile-memory {options}");
    let mut command = images::command(transport, &[], &options);
    command.arg("--balloon");
    Vm::spawn(command)
}

kvm_test!(drivers_of_shares_harm_neither_monitor_nor_servers, || {
    for transport in [Transport::Mmio, Transport::Pci] {
        let shared = [shared(), shared()];
        let mut vm = share_attack(transport, &shared, "count=50 end=halt");
        vm.wait_for("READY hostile-share\n");
        let servers = children(vm.pid());
        assert_eq!(servers.len(), 2, "{servers:?}");
        vm.wait_for("END failures=0\n");
        assert_eq!(children(vm.pid()), servers);
        let console = vm.console();
        let attacks = console.lines().filter(|line| line.starts_with("OK "));
        assert!(attacks.count() > 500, "{console}");
        for directory in &shared {
            let hello = fs::read_to_string(directory.path().join("hello"));
            assert_eq!(hello.expect("it is there"), "of the host");
        }
    }
});

kvm_test!(
    drivers_of_shares_make_neither_monitor_nor_server_grow,
    || {
        let shared = [shared(), shared()];
        grows_not([20, 200], |rounds| {
            let options = format!("count={rounds} only=share-life end=halt");
            share_attack(Transport::Pci, &shared, &options)
        });
    }
);

/// A directory with the file by which a guest knows that its share works.
fn shared() -> TempDir {
    let directory = tempfile::tempdir().expect("a directory can be made");
    fs::write(directory.path().join("hello"), "of the host").expect("there is room");
    directory
}

/// Starts the guest that attacks the first of its shares, and uses the second one as it should.
fn share_attack(transport: Transport, shared: &[TempDir; 2], options: &str) -> Vm {
    let options = format!("mode=hostile-share {options}");
    let mut command = images::command(transport, &[], &options);
    for (directory, tag) in shared.iter().zip(["attacked", "neighbour"]) {
        let share = format!("{}:{tag}", directory.path().display());
        command.args(["--share", &share]);
    }
    Vm::spawn(command)
}

kvm_test!(drivers_of_sockets_harm_no_monitor, || {
    let program = Program::new();
    for transport in [Transport::Mmio, Transport::Pci] {
        let console = succeed(program.attack(transport, "count=50"));
        let attacks = console.lines().filter(|line| line.starts_with("OK "));
        assert!(attacks.count() > 200, "{console}");
    }
});

kvm_test!(drivers_of_sockets_do_not_make_the_monitor_grow, || {
    let program = Program::new();
    grows_not([20, 200], |rounds| {
        let options = format!("count={rounds} only=vsock-life end=halt");
        program.attack(Transport::Pci, &options)
    });
});

/// A program of the host's that echoes what guests send to its port.
struct Program(TempDir);

impl Program {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let listener = UnixListener::bind(directory.path().join("vm.vsock_7")).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut copy = stream.try_clone().unwrap();
                // The device ends it at any time.
                thread::spawn(move || io::copy(&mut stream, &mut copy));
            }
        });
        Self(directory)
    }

    /// Starts the guest that attacks the socket device, by connections to the program.
    fn attack(&self, transport: Transport, options: &str) -> Vm {
        let options = format!("mode=hostile-vsock port=7 {options}");
        let mut command = images::command(transport, &[], &options);
        command.arg("--vsock").arg(self.0.path().join("vm.vsock"));
        Vm::spawn(command)
    }
}

transports_test!(user_threads_serve_as_many_queue_pairs_as_there_are, |net| {
    serves_as_many_queue_pairs_as_there_are(&net, "user");
});

lab_test!(vhost_net_on_mmio_harms_nothing, || {
    withstands_by_vhost_net(Transport::Mmio);
});

lab_test!(vhost_net_on_pci_harms_nothing, || {
    withstands_by_vhost_net(Transport::Pci);
});

fn withstands_by_vhost_net(transport: Transport) {
    harms_nothing(&Net::with(transport), "vhost", 100);
    makes_nothing_grow(&Net::with(transport), "vhost", [20, 200]);
    serves_as_many_queue_pairs_as_there_are(&Net::with(transport), "vhost");
}

/// Starts the hostile guest. It knows what it attacks, since vhost-net may do with some frames what
/// no NIC should.
fn attack(net: &Net, backend: &str, options: &str) -> Vm {
    attack_on("lower", net, backend, options)
}

/// The same on another macvtap.
fn attack_on(macvtap: &str, net: &Net, backend: &str, options: &str) -> Vm {
    let options = format!("mode=hostile backend={backend} peer={} {options}", PEER[0]);
    net.start_on(&format!("{macvtap},backend={backend}"), 2, &options)
}

/// What is done again and again is done `rounds` times.
fn harms_nothing(net: &Net, backend: &str, rounds: u32) {
    let mut neighbour = net.start_on(&format!("lower,backend={backend}"), 3, "mode=echo");
    neighbour.wait_for("READY echo\n");
    let mut vm = attack(net, backend, &format!("count={rounds}"));
    vm.wait_for("READY hostile\n");
    let [neighbours_ip, _] = addresses(3);
    let start = Instant::now();
    // Under attack the neighbour may be late, and its queue may be full, but it is reached.
    let lost = |share: &str| {
        let ping = ["ping", "-n", "-q", "-i0.05", "-c20", "-W5", &neighbours_ip];
        let pings = String::from_utf8_lossy(&net.far.exec(&ping).stdout).into_owned();
        pings.contains(&format!(" {share} packet loss"))
    };
    while !vm.console().contains("END ") && start.elapsed() < PATIENCE {
        assert!(
            !lost("100%"),
            "{}\n{}",
            neighbour.transcript(),
            vm.transcript()
        );
    }
    let console = succeed(vm);
    let attacks = console.lines().filter(|line| line.starts_with("OK "));
    assert!(attacks.count() > 200, "{console}");
    assert!(lost("0%"), "{}", neighbour.transcript());
    net.quit(3, neighbour);
}

/// A driver that sets up some of four queue pairs.
fn serves_as_many_queue_pairs_as_there_are(net: &Net, backend: &str) {
    let vm = attack_on("lower,queues=4", net, backend, "only=pairs");
    let console = succeed(vm);
    let attacks = console.lines().filter(|line| line.starts_with("OK pairs"));
    assert_eq!(attacks.count(), 6, "{console}");
}

/// The same attacks a few times and many times.
fn makes_nothing_grow(net: &Net, backend: &str, rounds: [u32; 2]) {
    grows_not(rounds, |rounds| {
        let options = format!("count={rounds} only=life end=halt");
        attack(net, backend, &options)
    });
}

fn grows_not(rounds: [u32; 2], start: impl Fn(u32) -> Vm) {
    let memory = rounds.map(|rounds| {
        let mut vm = start(rounds);
        // It halts then, and is killed when dropped.
        vm.wait_for("END failures=0\n");
        held_memory(vm.pid())
    });
    let ([few, many], [short, long]) = (rounds, memory);
    println!("memory of the monitor: {short} kB after {few} resets, {long} kB after {many}");
    assert!(long < short + 256, "it grew from {short} kB to {long} kB");
}
