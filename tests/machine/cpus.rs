//! What the guest's CPUs say of themselves, asked by the freestanding guest on each of them.

use std::collections::BTreeMap;

use super::*;

type Registers = [u32; 4];

/// The registers of each CPU, leaf and subleaf that the guest has asked for.
struct Cpuid(BTreeMap<[u32; 3], Registers>);

impl Cpuid {
    /// Runs a guest with so many CPUs.
    fn of(count: u32, args: &[&str]) -> Self {
        let mut command = Command::new(binary());
        command.arg("--kernel").arg(elf()).args(args);
        command.args(["--cpus", &count.to_string(), "--cmdline"]);
        command.arg(format!("guest.mode=cpuid guest.count={count}"));
        command.stdin(Stdio::null()).env_remove("RUST_LOG");
        let console = guest::succeed(Vm::spawn(command));
        let lines = console.lines().filter_map(|l| l.strip_prefix("CPUID "));
        Self(lines.map(parse).collect())
    }

    #[track_caller]
    fn get(&self, cpu: u32, leaf: u32, subleaf: u32) -> Registers {
        let found = self.0.get(&[cpu, leaf, subleaf]);
        *found.unwrap_or_else(|| panic!("no leaf {leaf:#x}, subleaf {subleaf} of CPU {cpu}"))
    }

    /// The highest leaf of the range that begins with this one.
    fn highest(&self, first: u32) -> u32 {
        self.get(0, first, 0)[0]
    }

    fn is_amd(&self) -> bool {
        [*b"Auth", *b"Hygo"].contains(&self.get(0, 0, 0)[1].to_le_bytes())
    }
}

fn parse(line: &str) -> ([u32; 3], Registers) {
    let mut numbers = line.split(' ');
    let mut next = |radix| u32::from_str_radix(numbers.next().unwrap(), radix).unwrap();
    let key = [next(10), next(16), next(16)];
    (key, [(); 4].map(|()| next(16)))
}

kvm_test!(cpus_of_one_package_say_so_in_every_leaf, || {
    for (count, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (12, 4), (254, 8)] {
        let cpuid = Cpuid::of(count, &[]);
        for cpu in 0..count {
            let [_, ebx, ecx, edx] = cpuid.get(cpu, 0x1, 0);
            assert_eq!((ebx >> 24, (ebx >> 16) & 0xff), (cpu, count));
            assert_eq!(ecx >> 31, 1);
            // A KVM that shows bits of the host's leaf 1 shows this one for a single CPU too.
            assert!(edx & 1 << 28 != 0 || count == 1);
            assert_eq!(
                cpuid.get(cpu, 0xb, 1),
                [bits, count, 0x201, cpu],
                "of {count}"
            );
        }
        for cpu in [0, count - 1] {
            assert_all_leaves(&cpuid, cpu, count, bits);
        }
    }
});

/// Checks what the first and the last CPU are asked for.
fn assert_all_leaves(cpuid: &Cpuid, cpu: u32, count: u32, bits: u32) {
    let what = format!("CPU {cpu} of {count}");
    for leaf in [0xb, 0x1f] {
        if leaf > cpuid.highest(0) {
            // Or it says what the highest leaf says.
            continue;
        }
        assert_eq!(cpuid.get(cpu, leaf, 0), [0, 1, 0x100, cpu], "{what}");
        assert_eq!(cpuid.get(cpu, leaf, 1), [bits, count, 0x201, cpu], "{what}");
        assert_eq!(cpuid.get(cpu, leaf, 2), [0, 0, 2, cpu], "{what}");
    }
    let caches = |leaf| (0..4).map(move |index| cpuid.get(cpu, leaf, index)[0]);
    for cache in caches(0x4).take_while(|cache| cache & 0x1f != 0) {
        let ids = 1 << bits;
        let sharing = if (cache >> 5) & 7 < 3 { 1 } else { ids };
        assert_eq!(
            ((cache >> 14) & 0xfff, cache >> 26),
            (sharing - 1, (ids - 1).min(63)),
            "{what}"
        );
    }
    let highest = cpuid.highest(0x8000_0000);
    if !cpuid.is_amd() {
        assert_eq!(cpuid.get(cpu, 0x8000_0008, 0)[2], 0, "{what}");
        return;
    }
    assert_eq!(
        cpuid.get(cpu, 0x8000_0008, 0)[2],
        bits << 12 | (count - 1),
        "{what}"
    );
    for cache in caches(0x8000_001d).take_while(|cache| cache & 0x1f != 0) {
        let sharing = if (cache >> 5) & 7 < 3 { 1 } else { count };
        assert_eq!(cache >> 14, sharing - 1, "{what}");
    }
    if highest >= 0x8000_0026 {
        assert_eq!(cpuid.get(cpu, 0x8000_0026, 0), [0, 1, 0x100, cpu], "{what}");
        for (index, level) in [(1, 2), (2, 3), (3, 4)] {
            let expected = [bits, count, level << 8 | index, cpu];
            assert_eq!(cpuid.get(cpu, 0x8000_0026, index), expected, "{what}");
        }
    }
}

kvm_test!(cpus_can_run_nested_guests_only_on_request, || {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap();
    let host = |flag: &str| cpuinfo.split_whitespace().any(|word| word == flag);
    let bits = |args: &[&str]| {
        let cpuid = Cpuid::of(1, args);
        let vmx = cpuid.get(0, 0x1, 0)[2] & 1 << 5 != 0;
        let svm = cpuid.get(0, 0x8000_0001, 0)[2] & 1 << 2 != 0;
        (vmx, svm)
    };
    assert_eq!(bits(&[]), (false, false));
    assert_eq!(bits(&["--nested", "off"]), (false, false));
    // KVM's parameter `nested` may hide them as well.
    let (vmx, svm) = bits(&["--nested", "on"]);
    assert!((!vmx || host("vmx")) && (!svm || host("svm")));
});
