//! What a vCPU tells the guest of itself (CPUID), where it differs from what KVM supports.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1, ECX: the local APIC timer knows the TSC deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: the CPU is a virtual one.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the package has several logical CPUs.
const HTT: u32 = 1 << 28;

/// Fills in, for vCPU `id` of `cpus`, what differs between vCPUs: APIC id and topology. The
/// topology is one package of single-threaded cores.
///
/// Sources: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.
pub fn for_vcpu(cpuid: &mut CpuId, id: u8, cpus: u8, tsc_deadline: bool) {
    let id = u32::from(id);
    let count = u32::from(cpus);
    // Bits of an APIC id that number the cores of the package.
    let core_bits = count.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => {
                entry.ebx = (entry.ebx & 0x0000_ffff) | id << 24 | count << 16;
                entry.ecx |= HYPERVISOR;
                entry.ecx = set(entry.ecx, TSC_DEADLINE, tsc_deadline);
                entry.edx = set(entry.edx, HTT, count > 1);
            }
            // Deterministic cache parameters: cores in the package, CPUs that share the cache.
            0x4 if entry.eax & 0x1f != 0 => {
                let level = (entry.eax >> 5) & 0x7;
                let sharing = if level < 3 { 0 } else { count - 1 };
                entry.eax = (entry.eax & 0x3fff) | sharing << 14 | (count - 1).min(63) << 26;
            }
            0xb | 0x1f => topology(entry, id, count, core_bits),
            0x8000_0008 => entry.ecx = (core_bits << 12) | (count - 1),
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
}

/// Extended topology: subleaf 0 is the threads of a core, subleaf 1 the cores of the package.
fn topology(entry: &mut kvm_cpuid_entry2, id: u32, count: u32, core_bits: u32) {
    const THREADS: u32 = 1;
    const CORES: u32 = 2;
    entry.flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    entry.edx = id;
    (entry.eax, entry.ebx, entry.ecx) = match entry.index {
        0 => (0, 1, THREADS << 8),
        1 => (core_bits, count, CORES << 8 | 1),
        // An invalid level ends the list.
        index => (0, 0, index & 0xff),
    };
}

fn set(value: u32, bit: u32, on: bool) -> u32 {
    if on { value | bit } else { value & !bit }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpuid(leaves: &[(u32, u32)]) -> CpuId {
        let entry = |&(function, index)| kvm_cpuid_entry2 {
            function,
            index,
            ..Default::default()
        };
        CpuId::from_entries(&leaves.iter().map(entry).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn apic_id_of_every_leaf_is_the_vcpus() {
        let mut cpuid = cpuid(&[(1, 0), (0xb, 0), (0xb, 1), (0x8000_001e, 0)]);
        for_vcpu(&mut cpuid, 3, 4, true);
        let [one, threads, cores, amd] = cpuid.as_slice() else {
            panic!()
        };
        assert_eq!(one.ebx >> 24, 3);
        assert_eq!((one.ebx >> 16) & 0xff, 4);
        assert_ne!(one.ecx & TSC_DEADLINE, 0);
        assert_ne!(one.edx & HTT, 0);
        assert_eq!((threads.edx, cores.edx, amd.eax), (3, 3, 3));
        assert_eq!((cores.eax, cores.ebx), (2, 4));
    }

    #[test]
    fn single_cpu_has_no_siblings() {
        let mut cpuid = cpuid(&[(1, 0), (0xb, 1), (0x8000_0008, 0)]);
        for_vcpu(&mut cpuid, 0, 1, false);
        let [one, cores, amd] = cpuid.as_slice() else {
            panic!()
        };
        assert_eq!((one.edx & HTT, one.ecx & TSC_DEADLINE), (0, 0));
        assert_eq!((cores.eax, cores.ebx, amd.ecx), (0, 1, 0));
    }
}
