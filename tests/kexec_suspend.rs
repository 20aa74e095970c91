//! The NIC's lives under stock kernels: a guest that sleeps and wakes, and one that goes on with
//! another kernel.

mod harness;
mod lab;

use std::thread;
use std::time::Duration;

use harness::eventually;
use harness::lab_test;
use harness::linux::{boot, kexec_initrd};
use harness::site::{Site, address, pings};
use harness::vm::Vm;

const SECOND: Duration = Duration::from_secs(1);

/// Boots a guest with an address that its peer answers.
fn start(site: &Site, args: &[&str]) -> Vm {
    let mut vm = boot(Some(&site.host), args);
    address(&mut vm, "eth0", 11);
    assert!(pings(&mut vm, "192.168.77.3"), "{}", vm.transcript());
    vm
}

lab_test!(nic_works_again_when_its_guest_has_slept, || {
    for (transport, backend) in [("mmio", "user"), ("pci", "user"), ("pci", "vhost")] {
        let site = Site::new();
        let nic = format!("wire,backend={backend}");
        let mut vm = start(&site, &["--transport", transport, "--macvtap", &nic]);
        for slept in 1..=2 {
            // The serial console wakes it. A key that comes before it sleeps only keeps it awake (EBUSY).
            vm.start_command(
                "echo enabled >/sys/class/tty/ttyS0/power/wakeup; \
                 until echo freeze >/sys/power/state; do :; done; echo GUEST slept",
            );
            let is_awake = || {
                thread::sleep(SECOND);
                vm.send("\n");
                vm.console().matches("GUEST slept\n").count() == slept
            };
            assert!(eventually(is_awake), "{}", vm.transcript());
            assert!(
                pings(&mut vm, "192.168.77.3") && pings(&mut vm, "fd77::3"),
                "{transport} {backend}\n{}",
                vm.transcript()
            );
            assert!(site.peer.pings("192.168.77.11", 3), "{transport} {backend}");
        }
        let log = vm.run("dmesg | grep PM:");
        assert!(log.contains("PM: suspend exit"), "{log}");
        assert!(!log.contains("PM: failed"), "{log}");
    }
});

lab_test!(nic_works_again_under_the_next_kernel, || {
    let initrd = kexec_initrd();
    let initrd = initrd.to_str().expect("the cache's path is UTF-8");
    for backend in ["user", "vhost"] {
        let site = Site::new();
        let nic = format!("wire,backend={backend}");
        let args = ["--transport", "pci", "--initrd", initrd, "--macvtap", &nic];
        let mut vm = start(&site, &args);
        let mac = vm.run("cat /sys/class/net/eth0/address");
        // Frames that come meanwhile must not end up in the next kernel's memory.
        site.peer.ip(&format!(
            "neigh replace 192.168.77.11 lladdr {} dev peer0 nud permanent",
            mac.trim()
        ));
        vm.run("kexec -s -l /kexec/bzImage --initrd=/kexec/initrd --reuse-cmdline");
        vm.start_command("kexec -e");
        let has_booted = eventually(|| {
            site.peer.pings("192.168.77.11", 1);
            vm.console().matches("GUEST ready").count() == 2
        });
        assert!(has_booted, "{}", vm.transcript());
        address(&mut vm, "eth0", 11);
        assert_eq!(vm.run("cat /sys/class/net/eth0/address"), mac);
        assert!(
            pings(&mut vm, "192.168.77.3"),
            "{backend}\n{}",
            vm.transcript()
        );
        assert!(site.peer.pings("192.168.77.11", 3), "{backend}");
    }
});
