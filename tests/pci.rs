//! The NIC as a PCI function, and with several queues, with Debian's stock kernel as the guest.

mod harness;
mod lab;

use harness::linux::boot;
use harness::site::{Site, address, pings, send_from_many_ports};
use harness::{eventually, lab_test};

lab_test!(stock_kernel_drives_two_nics_on_pci_by_msi_x, || {
    let site = Site::new();
    let args = [
        "--transport",
        "pci",
        "--cpus",
        "2",
        "--macvtap",
        "wire",
        "--macvtap",
        "wire",
    ];
    let mut vm = boot(Some(&site.host), &args);
    address(&mut vm, "eth0", 11);
    for to in ["192.168.77.3", "fd77::3"] {
        assert!(
            pings(&mut vm, to),
            "the guest reaches {to}\n{}",
            vm.transcript()
        );
    }
    for guest in ["192.168.77.11", "fd77::11"] {
        assert!(site.peer.pings(guest, 3), "the peer reaches {guest}");
    }

    // The host bridge, two Ethernet controllers, and the entropy device.
    let expected = [
        "00:00.0 0600: 1b36:0008",
        "00:01.0 0200: 1af4:1041 (rev 01)",
        "00:02.0 0200: 1af4:1041 (rev 01)",
        "00:03.0 ff00: 1af4:1044 (rev 01)",
    ];
    assert_eq!(vm.run("lspci -n").lines().collect::<Vec<_>>(), expected);
    let all = vm.run("lspci -vvxxx -s 00:01.0 2>&1");
    for part in [
        "MSI-X: Enable+ Count=4",
        "VirtIO: CommonCfg",
        "VirtIO: Notify",
        "Kernel driver in use: virtio-pci",
    ] {
        assert!(all.contains(part), "{part} in\n{all}");
    }
    assert!(
        !all.contains("<access denied>") && !all.contains("Unknown"),
        "{all}"
    );

    // A vector for the configuration and one for each queue, and those of eth0's queues were used.
    let interrupts = vm.run("grep virtio0 /proc/interrupts");
    for vector in ["virtio0-config", "virtio0-input.0", "virtio0-output.0"] {
        assert!(interrupts.contains(vector), "{interrupts}");
    }
    let used = vm.run("awk '/virtio0-input/ {print $2 + $3}' /proc/interrupts");
    assert!(
        used.trim().parse::<u64>().is_ok_and(|count| count > 0),
        "{interrupts}"
    );

    // Nothing that we made is complained of, and the enhanced configuration space is in use.
    let bad = "ACPI Error|ACPI Warning|ACPI BIOS|Firmware|can't claim|not reserved|BAR 0: no space";
    assert_eq!(vm.run(&format!("dmesg | grep -E \"{bad}\" || true")), "");
    vm.run("dmesg | grep 'MMCONFIG for domain 0000'");

    // The driver goes and comes back.
    for _ in 0..3 {
        vm.run("rmmod virtio_net && insmod /modules/virtio_net.ko");
    }
    address(&mut vm, "eth0", 11);
    assert!(pings(&mut vm, "192.168.77.3"), "{}", vm.transcript());
    vm.start_command("poweroff -f");
    assert_eq!(vm.wait_exit().code(), Some(0));
    assert!(!vm.log().contains("with MSI-X off"), "{}", vm.log());
});

lab_test!(stock_kernel_without_msi_has_no_nic_and_the_log_why, || {
    let site = Site::new();
    for (transport, links) in [("pci", "lo"), ("mmio", "eth0 lo")] {
        let args = [
            "--cmdline",
            "pci=nomsi",
            "--macvtap",
            "wire",
            "--transport",
            transport,
        ];
        let mut vm = boot(Some(&site.host), &args);
        assert_eq!(
            vm.run("echo $(ls /sys/class/net)").trim(),
            links,
            "{transport}"
        );
        vm.start_command("poweroff -f");
        assert_eq!(vm.wait_exit().code(), Some(0));
        let log = vm.log();
        let warnings = log.matches("the NIC: the guest's driver gives it up with MSI-X off");
        let warnings = warnings.count();
        assert_eq!(warnings, usize::from(transport == "pci"), "{log}");
    }
});

lab_test!(nic_spreads_its_traffic_over_all_four_queue_pairs, || {
    for transport in ["mmio", "pci"] {
        let site = Site::new();
        let args = [
            "--transport",
            transport,
            "--cpus",
            "4",
            "--macvtap",
            "wire,queues=4,backend=user",
        ];
        let mut vm = boot(Some(&site.host), &args);
        address(&mut vm, "eth0", 11);
        assert!(pings(&mut vm, "192.168.77.3"), "{}", vm.transcript());
        assert_eq!(vm.run("ls /sys/class/net/eth0/queues | wc -l").trim(), "8");

        // The host's kernel spreads what it has for the guest by addresses and ports, and the guest's what it sends
        // by the CPU that sends it.
        send_from_many_ports(&site.peer, "192.168.77.3", "192.168.77.11");
        for cpu in [1, 2, 4, 8] {
            vm.run(&format!("taskset {cpu} ping -c1 -W5 192.168.77.3"));
        }
        vm.run("iperf3 -s -D");
        let client = ["iperf3", "-c", "192.168.77.11", "-P", "8", "-t", "2"];
        assert!(
            eventually(|| site.peer.exec(&client).status.success()),
            "{}",
            vm.transcript()
        );

        // Without its driver the NIC has one queue again, which is not read.
        vm.run("rmmod virtio_net && insmod /modules/virtio_net.ko");
        address(&mut vm, "eth0", 11);
        assert!(pings(&mut vm, "192.168.77.3"), "{}", vm.transcript());
        vm.start_command("poweroff -f");
        assert_eq!(vm.wait_exit().code(), Some(0));
        let log = vm.log();
        for pair in 0..4 {
            let pair = format!("net0 queue pair {pair}: ");
            let counters = log.lines().find_map(|line| line.split(&pair).nth(1));
            let counters = counters.unwrap_or_else(|| panic!("{pair} in {log}"));
            for none in ["received 0 frames", "sent 0 frames"] {
                assert!(!counters.contains(none), "{transport}: {pair}{counters}");
            }
        }
    }
});
