//! Prints what the processors say of their topology, their caches and virtualization (CPUID).

use alloc::vec::Vec;
use core::arch::x86_64::__cpuid_count;
use core::hint::spin_loop;

use crate::memory::{read_at, write_at};
use crate::options::Options;
use crate::serial::println;
use crate::{cpu, report};

/// Leaves, and how many subleaves of each.
const LEAVES: [(u32, u32); 11] = [
    (0x0, 1),
    (0x1, 1),
    (0x4, 5),
    (0xb, 3),
    (0x1f, 3),
    (0x8000_0000, 1),
    (0x8000_0001, 1),
    (0x8000_0008, 1),
    (0x8000_001d, 5),
    (0x8000_001e, 1),
    (0x8000_0026, 5),
];

// What a starting processor runs and uses, below 1 MiB, in the page that was the loader's stack.
// `entry.s` knows these places too.
const CODE: u64 = 0x8000;
const DONE: u64 = 0x80fc;
const REQUESTS: u64 = 0x8100;
const RESULTS: u64 = 0x8400;
const END: u32 = u32::MAX;

/// Commands of the local APIC: INIT, and start at the page [`CODE`] (Intel SDM volume 3A, 10.6.1).
const INIT: u32 = 0x4500;
const START: u32 = 0x4600 | (CODE >> 12) as u32;

unsafe extern "C" {
    // Code: only the addresses are used.
    static processor_start: u8;
    static processor_start_end: u8;
}

type Registers = [u32; 4];

/// All leaves of the first processor and of the last of `options.count`, in lines `CPUID processor
/// leaf subleaf registers`; two of those between.
pub fn run(options: &Options) {
    let all: Vec<_> = LEAVES
        .iter()
        .flat_map(|&(leaf, count)| (0..count).map(move |subleaf| (leaf, subleaf)))
        .collect();
    let own: Vec<_> = all.iter().map(|&request| here(request)).collect();
    print(0, &all, &own);
    copy_code();
    for processor in 1..options.count {
        let requests = if processor == options.count - 1 {
            &all[..]
        } else {
            &[(0x1, 0), (0xb, 1)]
        };
        match on(processor, requests) {
            Some(results) => print(processor, requests, &results),
            None => return report::fail("cpuid", format_args!("{processor} does not start")),
        }
    }
    report::ok("cpuid", format_args!("processors={}", options.count));
}

fn print(processor: u32, requests: &[(u32, u32)], results: &[Registers]) {
    for ((leaf, subleaf), [eax, ebx, ecx, edx]) in requests.iter().zip(results) {
        println!("CPUID {processor} {leaf:x} {subleaf:x} {eax:x} {ebx:x} {ecx:x} {edx:x}");
    }
}

fn here((leaf, subleaf): (u32, u32)) -> Registers {
    let result = __cpuid_count(leaf, subleaf);
    [result.eax, result.ebx, result.ecx, result.edx]
}

/// What another processor says, which is started for it and then halts for good.
fn on(processor: u32, requests: &[(u32, u32)]) -> Option<Vec<Registers>> {
    for (at, (leaf, subleaf)) in (REQUESTS..).step_by(8).zip(requests) {
        put(at, *leaf);
        put(at + 4, *subleaf);
    }
    put(REQUESTS + 8 * requests.len() as u64, END);
    put(DONE, 0);
    cpu::send(processor, INIT);
    cpu::send(processor, START);
    let deadline = cpu::now() + cpu::PATIENCE;
    while get(DONE) == 0 {
        if cpu::now() > deadline {
            return None;
        }
        spin_loop();
    }
    let results = (RESULTS..).step_by(16).take(requests.len());
    Some(
        results
            .map(|at| [0, 4, 8, 12].map(|n| get(at + n)))
            .collect(),
    )
}

fn copy_code() {
    let (start, end) = (&raw const processor_start, &raw const processor_start_end);
    for (to, from) in (CODE..DONE).zip(start.addr()..end.addr()) {
        // SAFETY: it lies between the two labels, in this image.
        let byte: u8 = unsafe { read_at(from as u64) };
        // SAFETY: as in `put`.
        unsafe { write_at(to, byte) };
    }
}

fn put(address: u64, value: u32) {
    // SAFETY: the page is RAM that this program has no other use for.
    unsafe { write_at(address, value) };
}

fn get(address: u64) -> u32 {
    // SAFETY: as in `put`.
    unsafe { read_at(address) }
}
