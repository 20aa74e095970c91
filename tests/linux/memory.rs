//! What a guest gives back of its memory, and the random numbers that it gets.

use std::fs;

use crate::harness::eventually;
use crate::harness::lab_test;
use crate::harness::linux::boot;
use crate::harness::vm::Vm;
use crate::number;

const MIB: u64 = 1 << 20;

/// The monitor's resident memory in bytes, the guest's included.
fn resident(vm: &Vm) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.expect("the monitor runs") << 10
}

lab_test!(memory_that_a_guest_has_free_is_the_hosts_again, || {
    let image = tempfile::NamedTempFile::new().expect("a file can be made");
    image
        .as_file()
        .set_len(512 * MIB)
        .expect("it may be sparse");
    let path = image.path().to_str().expect("its path is UTF-8");
    let args = ["--memory", "768M", "--balloon", "--disk", path];
    let mut vm = boot(None, &args);
    vm.run("head -c 32m /dev/urandom >/run/kept");
    let kept = vm.run("md5sum </run/kept");
    let before = resident(&vm);
    for _ in 0..2 {
        vm.run("dd if=/dev/vda of=/dev/null bs=1M count=400");
        let filled = resident(&vm);
        assert!(filled > 400 * MIB, "{} MiB", filled / MIB);
        vm.run("echo 3 >/proc/sys/vm/drop_caches");
        let goes = || resident(&vm) < filled - 350 * MIB;
        assert!(
            eventually(goes),
            "{} MiB\n{}",
            resident(&vm) / MIB,
            vm.transcript()
        );
        let [before, filled, after] = [before, filled, resident(&vm)].map(|bytes| bytes / MIB);
        println!(
            "resident: {before} MiB, {filled} with the page cache, {after} when it is dropped"
        );
    }
    assert_eq!(vm.run("md5sum </run/kept"), kept);

    // Its kernel takes random numbers from the device at its start, and here.
    let source = vm.run("cat /sys/class/misc/hw_random/rng_current");
    assert_eq!(source.trim(), "virtio_rng.0");
    assert_eq!(vm.run("head -c 5000 /dev/hwrng | wc -c").trim(), "5000");
    vm.start_command("poweroff -f");
    assert_eq!(vm.wait_exit().code(), Some(0));
});

lab_test!(
    memory_that_is_held_back_is_the_guests_when_it_has_no_other,
    || {
        let mut args = vec!["--memory", "256M", "--transport", "mmio", "--rng", "off"];
        args.extend(["--balloon", "128M"]);
        let mut vm = boot(None, &args);
        // In pages of 4 KiB.
        let count = |vm: &mut Vm, what: &str| {
            let line = format!("sed -n 's/^balloon_{what} //p' /proc/vmstat");
            number(vm, &line) << 12
        };
        let inflated = || count(&mut vm, "inflate") >= 128 * MIB;
        assert!(eventually(inflated), "{}", vm.transcript());
        let available = number(&mut vm, "awk '/^MemAvailable:/ {print $2}' /proc/meminfo") << 10;
        assert!(available < 128 * MIB, "{available}\n{}", vm.transcript());

        let more = available + 8 * MIB;
        let all = vm.run(&format!(
            "head -c {more} /dev/zero | tail -c {more} | wc -c"
        ));
        assert_eq!(all.trim(), more.to_string(), "{}", vm.transcript());
        assert!(count(&mut vm, "deflate") > 0, "{}", vm.transcript());

        let sources = vm.run("cat /sys/class/misc/hw_random/rng_available");
        assert!(!sources.contains("virtio"), "{sources}");
        vm.start_command("poweroff -f");
        assert_eq!(vm.wait_exit().code(), Some(0));
    }
);
