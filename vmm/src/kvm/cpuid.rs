//! The CPUID of a vCPU, where it differs from what KVM supports.
//!
//! A guest has one package of cores without threads, with the APIC ids 0, 1, 2 and so on. The
//! leaves that list the levels of a topology are made here, since KVM passes on the host's, or as
//! much of them as it likes: since Linux 6.2 only the first subleaf of leaf 0xb. What else shows
//! the topology, caches above all, is changed to agree with them.
//!
//! Sources: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use vmm_sys_util::fam;

/// Leaf 1, ECX: there is VMX.
const VMX: u32 = 1 << 5;
/// Leaf 1, ECX: the local APIC timer knows the TSC deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: the CPU is a virtual one.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the package has several logical CPUs.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX: those are cores, not threads.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0x8000_0001, ECX: there is SVM.
const SVM: u32 = 1 << 2;
/// The leaf that describes SVM.
const SVM_LEAF: u32 = 0x8000_000a;

/// The first topology leaf. Every guest has it, whatever its CPU.
const TOPOLOGY: u32 = 0xb;
/// The topology leaves, and the types of the levels that each lists: threads of a core and cores of
/// the package, or AMD's core, complex, die and socket.
const TOPOLOGIES: [(u32, &[u32]); 3] = [
    (TOPOLOGY, &[1, 2]),
    (0x1f, &[1, 2]),
    (0x8000_0026, &[1, 2, 3, 4]),
];

/// EBX of leaf 0, the beginning of the vendor's name, where AMD's manual holds.
const AMD: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];

/// The CPUs of a guest.
#[derive(Clone, Copy, Debug)]
pub struct CpuModel {
    /// How many there are.
    pub count: u8,
    /// KVM's timers know the TSC deadline mode, which is not part of what it says it supports
    /// (Documentation/virt/kvm/api.rst, 4.46).
    pub tsc_deadline: bool,
    /// The guest may run guests of its own. As after power-on, and without firmware, its MSR
    /// IA32_FEATURE_CONTROL is not locked: the guest's kernel enables VMX there, or locks it.
    pub nested: bool,
}

impl CpuModel {
    /// The CPUID of vCPU `id`, out of what is `supported`.
    pub fn vcpu(self, supported: &CpuId, id: u8) -> Result<CpuId, fam::Error> {
        let entries = supported.as_slice();
        let leaf = |function| entries.iter().find(|entry| entry.function == function);
        let is_amd = leaf(0).is_some_and(|entry| AMD.contains(&entry.ebx));
        let vcpu = VcpuModel {
            model: self,
            id: id.into(),
            is_amd,
        };
        let is_replaced = |function| TOPOLOGIES.iter().any(|&(leaf, _)| leaf == function);
        let mut all: Vec<_> = entries
            .iter()
            .filter(|entry| !is_replaced(entry.function))
            .filter(|entry| self.nested || entry.function != SVM_LEAF)
            .map(|&entry| vcpu.changed(entry))
            .collect();
        for (function, levels) in TOPOLOGIES {
            // The leaves count in two ranges, each of which begins with its highest one.
            let highest = leaf(function & 0x8000_0000).map_or(0, |entry| entry.eax);
            if function == TOPOLOGY || function <= highest {
                all.extend(vcpu.topology(function, levels));
            }
        }
        CpuId::from_entries(&all)
    }
}

/// One CPU of a guest.
#[derive(Clone, Copy, Debug)]
struct VcpuModel {
    model: CpuModel,
    /// Its APIC id.
    id: u32,
    is_amd: bool,
}

impl VcpuModel {
    fn count(self) -> u32 {
        self.model.count.into()
    }

    /// The bits of an APIC id that number the cores of the package.
    fn core_bits(self) -> u32 {
        self.count().next_power_of_two().trailing_zeros()
    }

    /// An entry that KVM supports, as this CPU has it.
    fn changed(self, mut entry: kvm_cpuid_entry2) -> kvm_cpuid_entry2 {
        let (id, count) = (self.id, self.count());
        let several = count > 1;
        let hidden = |bit| if self.model.nested { 0 } else { bit };
        // APIC ids, used or not, that belong to the package: a power of two, where it matters.
        let ids = 1 << self.core_bits();
        match entry.function {
            0 => entry.eax = entry.eax.max(TOPOLOGY),
            0x1 => {
                entry.ebx = (entry.ebx & 0xffff) | id << 24 | count << 16;
                entry.ecx = set(
                    entry.ecx | HYPERVISOR,
                    TSC_DEADLINE,
                    self.model.tsc_deadline,
                );
                entry.ecx &= !hidden(VMX);
                entry.edx = set(entry.edx, HTT, several);
            }
            // Caches: the ids of the package's cores (6 bits), the ids that share the cache.
            0x4 if entry.eax & 0x1f != 0 => {
                let sharing = if is_private(entry) { 1 } else { ids };
                entry.eax = (entry.eax & 0x3fff) | (sharing - 1) << 14 | (ids - 1).min(63) << 26;
            }
            // The same of AMD, which counts CPUs.
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let sharing = if is_private(entry) { 1 } else { count };
                entry.eax = (entry.eax & 0x3fff) | (sharing - 1) << 14;
            }
            0x8000_0001 => {
                entry.ecx &= !hidden(SVM);
                entry.ecx = set(entry.ecx, CMP_LEGACY, self.is_amd && several);
            }
            0x8000_0008 if self.is_amd => entry.ecx = self.core_bits() << 12 | (count - 1),
            // The core's number, one thread in each, and one node.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (id, id, 0, 0),
            _ => {}
        }
        entry
    }

    /// The subleaves of a topology leaf: what each level has below the next, then one that ends
    /// them.
    fn topology(self, function: u32, levels: &[u32]) -> impl Iterator<Item = kvm_cpuid_entry2> {
        let types = levels.iter().copied().chain([0]);
        (0..).zip(types).map(move |(index, level)| {
            let (shift, cpus) = match (index, level) {
                (_, 0) => (0, 0),
                // A core has one thread, and no bit of the id numbers it.
                (0, _) => (0, 1),
                _ => (self.core_bits(), self.count()),
            };
            kvm_cpuid_entry2 {
                function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: cpus,
                ecx: level << 8 | index,
                edx: self.id,
                ..Default::default()
            }
        })
    }
}

/// Whether a cache is a core's own: levels 1 and 2.
fn is_private(cache: kvm_cpuid_entry2) -> bool {
    (cache.eax >> 5) & 0x7 < 3
}

fn set(value: u32, bit: u32, on: bool) -> u32 {
    if on { value | bit } else { value & !bit }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: CpuModel = CpuModel {
        count: 4,
        tsc_deadline: true,
        nested: false,
    };

    fn entry(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: regs[0],
            ebx: regs[1],
            ecx: regs[2],
            edx: regs[3],
            ..Default::default()
        }
    }

    fn supported(entries: &[kvm_cpuid_entry2]) -> CpuId {
        CpuId::from_entries(entries).unwrap()
    }

    /// The first of a host of AMD's, or Intel's, up to the newest leaves.
    fn vendor(name: [u8; 4]) -> [kvm_cpuid_entry2; 2] {
        [
            entry(0, 0, [0x20, u32::from_le_bytes(name), 0, 0]),
            entry(0x8000_0000, 0, [0x8000_0026, 0, 0, 0]),
        ]
    }

    /// The registers of a leaf that must be there once.
    fn regs(cpuid: &CpuId, function: u32, index: u32) -> [u32; 4] {
        let all = cpuid.as_slice().iter();
        let mut found = all.filter(|e| (e.function, e.index) == (function, index));
        let one = found.next().unwrap();
        assert!(found.next().is_none(), "{function:#x} is there twice");
        [one.eax, one.ebx, one.ecx, one.edx]
    }

    fn has(cpuid: &CpuId, function: u32) -> bool {
        cpuid.as_slice().iter().any(|e| e.function == function)
    }

    #[test]
    fn topology_lists_every_level_whatever_kvm_lists() {
        let mut host = vendor(*b"Genu").to_vec();
        host.push(entry(0xb, 0, [1, 2, 0x100, 77]));
        for (count, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (12, 4), (128, 7), (254, 8)] {
            let id = count - 1;
            let cpuid = CpuModel { count, ..MODEL }
                .vcpu(&supported(&host), id)
                .unwrap();
            let (count, id) = (count.into(), id.into());
            for leaf in [0xb, 0x1f] {
                assert_eq!(regs(&cpuid, leaf, 0), [0, 1, 0x100, id], "{count}");
                assert_eq!(regs(&cpuid, leaf, 1), [bits, count, 0x201, id], "{count}");
                assert_eq!(regs(&cpuid, leaf, 2), [0, 0, 2, id], "{count}");
            }
            assert_eq!(regs(&cpuid, 0x8000_0026, 0), [0, 1, 0x100, id]);
            for (index, level) in [(1, 2), (2, 3), (3, 4)] {
                let expected = [bits, count, level << 8 | index, id];
                assert_eq!(regs(&cpuid, 0x8000_0026, index), expected, "{count}");
            }
            assert_eq!(regs(&cpuid, 0x8000_0026, 4), [0, 0, 4, id]);
        }
    }

    #[test]
    fn topology_leaves_beyond_the_highest_are_only_the_one_that_all_have() {
        let host = [
            entry(0, 0, [0x7, 0, 0, 0]),
            entry(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
        ];
        let cpuid = MODEL.vcpu(&supported(&host), 0).unwrap();
        assert_eq!(regs(&cpuid, 0, 0)[0], 0xb);
        assert!(has(&cpuid, 0xb) && !has(&cpuid, 0x1f) && !has(&cpuid, 0x8000_0026));
    }

    #[test]
    fn apic_id_and_count_of_leaf_1_are_the_vcpus() {
        let host = [entry(1, 0, [0, 0x4004_0800, 0, HTT])];
        let cpuid = CpuModel {
            count: 254,
            ..MODEL
        }
        .vcpu(&supported(&host), 253)
        .unwrap();
        let [_, ebx, ecx, edx] = regs(&cpuid, 1, 0);
        assert_eq!(
            (ebx, ecx, edx),
            (0xfdfe_0800, HYPERVISOR | TSC_DEADLINE, HTT)
        );
        let alone = CpuModel {
            count: 1,
            tsc_deadline: false,
            ..MODEL
        };
        let [_, ebx, ecx, edx] = regs(&alone.vcpu(&supported(&host), 0).unwrap(), 1, 0);
        assert_eq!((ebx, ecx, edx), (0x0001_0800, HYPERVISOR, 0));
    }

    #[test]
    fn caches_up_to_level_2_are_a_cores_own_and_the_rest_is_everybodys() {
        // Type and level, and the host's 64 cores of 2 threads with 16 CPUs to a cache.
        let cache = |level: u32| 0xfc03_c000 | level << 5 | 1;
        let mut host = vendor(*b"Auth").to_vec();
        for function in [0x4, 0x8000_001d] {
            for level in [1, 2, 3] {
                host.push(entry(function, level, [cache(level), 1, 2, 3]));
            }
            host.push(entry(function, 4, [0, 1, 2, 3]));
        }
        for (count, ids) in [(1, 1), (2, 2), (3, 4), (12, 16), (254, 256)] {
            let cpuid = CpuModel { count, ..MODEL }
                .vcpu(&supported(&host), 0)
                .unwrap();
            let eax = |function, level| regs(&cpuid, function, level)[0];
            for level in [1, 2, 3] {
                let kept = level << 5 | 1;
                let (intel, amd) = if level < 3 {
                    (1, 1)
                } else {
                    (ids, count.into())
                };
                let cores = ids.min(64) - 1;
                assert_eq!(
                    eax(0x4, level),
                    kept | (intel - 1) << 14 | cores << 26,
                    "{count}"
                );
                assert_eq!(eax(0x8000_001d, level), kept | (amd - 1) << 14, "{count}");
            }
            assert_eq!((eax(0x4, 4), eax(0x8000_001d, 4)), (0, 0));
        }
    }

    #[test]
    fn amd_leaves_count_the_cpus_and_those_of_others_stay() {
        let rest = [
            entry(0x8000_0001, 0, [0, 0, 0x1, 0]),
            entry(0x8000_0008, 0, [0x3030, 0, 0x707f, 0]),
            entry(0x8000_001e, 0, [9, 0x0103, 0x0705, 1]),
        ];
        let of = |name, count| {
            let host = [&vendor(name)[..], &rest].concat();
            let cpuid = CpuModel { count, ..MODEL }
                .vcpu(&supported(&host), count - 1)
                .unwrap();
            [0x8000_0001, 0x8000_0008, 0x8000_001e].map(|function| regs(&cpuid, function, 0))
        };
        for name in [*b"Auth", *b"Hygo"] {
            let [features, sizes, topology] = of(name, 12);
            assert_eq!(features[2], 0x1 | CMP_LEGACY);
            assert_eq!((sizes[0], sizes[2]), (0x3030, 0x400b));
            assert_eq!(topology, [11, 11, 0, 0]);
            let [features, sizes, topology] = of(name, 1);
            assert_eq!((features[2], sizes[2], topology), (0x1, 0, [0; 4]));
        }
        let [features, sizes, _] = of(*b"Genu", 12);
        assert_eq!((features[2], sizes[2]), (0x1, 0x707f));
    }

    #[test]
    fn virtualization_is_the_guests_only_where_it_is_wanted_and_there_is_any() {
        let host = |ecx: [u32; 2]| {
            supported(&[
                entry(1, 0, [0, 0, ecx[0], 0]),
                entry(0x8000_0001, 0, [0, 0, ecx[1], 0]),
                entry(SVM_LEAF, 0, [1, 0x8000, 0, 0x1]),
            ])
        };
        let seen = |host: &CpuId, nested| {
            let cpuid = CpuModel { nested, ..MODEL }.vcpu(host, 0).unwrap();
            let bits = [
                regs(&cpuid, 1, 0)[2] & VMX,
                regs(&cpuid, 0x8000_0001, 0)[2] & SVM,
            ];
            (bits.map(|bit| bit != 0), has(&cpuid, SVM_LEAF))
        };
        let both = host([VMX, SVM]);
        assert_eq!(seen(&both, true), ([true, true], true));
        assert_eq!(seen(&both, false), ([false, false], false));
        assert_eq!(seen(&host([0, 0]), true).0, [false, false]);
    }
}
