//! The processor as level 3 sees it: the IDT (plain memory to us), ports, the APICs, the clock.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use smoltcp::time::{Duration, Instant};

use crate::memory::{read_at, write_at};
use crate::{power, report};

const GATES: usize = 256;
/// The selector of level 0's code segment in `entry.s`.
const CODE0: u64 = 0x08;
/// Present interrupt gates: one for the processor itself, one that level 3 may use too.
const GATE: u64 = 0x8e << 40;
const GATE_LEVEL3: u64 = 0xee << 40;
/// The vector of int3, our system calls.
const SYSTEM_CALL: usize = 3;
/// The vector of line 0; the others follow.
const INTERRUPT_VECTOR: usize = 0x40;
/// How many lines there are: the IOAPIC's 24, or the slots of a PCI bus, whose functions send
/// messages.
const LINES: usize = 32;

const LOCAL_APIC: u64 = 0xfee0_0000;
const SPURIOUS: u64 = LOCAL_APIC + 0xf0;
const COMMAND: u64 = LOCAL_APIC + 0x300;
const TIMER_INITIAL: u64 = LOCAL_APIC + 0x380;
const TIMER_CURRENT: u64 = LOCAL_APIC + 0x390;
const TIMER_DIVIDE: u64 = LOCAL_APIC + 0x3e0;
const DIVIDE_BY_1: u32 = 0b1011;

const IOAPIC_SELECT: u64 = 0xfec0_0000;
const IOAPIC_DATA: u64 = 0xfec0_0010;
/// The register of line 0's low half; two registers a line.
const IOAPIC_LINES: u32 = 0x10;

/// A table that the processor reads, unseen by the compiler.
#[repr(C, align(16))]
struct Table(UnsafeCell<[[u64; 2]; GATES]>);

// SAFETY: there is one processor, and interrupt handlers do not touch the table.
unsafe impl Sync for Table {}

/// Named in `entry.s`, which loads its address.
#[unsafe(no_mangle)]
static IDT: Table = Table(UnsafeCell::new([[0; 2]; GATES]));

/// How often each line interrupted; `entry.s` counts.
#[unsafe(no_mangle)]
static INTERRUPTS: [AtomicU64; LINES] = [const { AtomicU64::new(0) }; LINES];

/// Rounds of the time stamp counter in a millisecond.
static TICKS_PER_MS: AtomicU64 = AtomicU64::new(1);

unsafe extern "C" {
    // Code, 16 bytes a stub: only the addresses are used.
    static exception_stubs: u8;
    static interrupt_stubs: u8;
    static system_call_stub: u8;
}

/// Fills the IDT: exceptions report and end, interrupts count, and int3 is a system call.
pub fn fill_idt() {
    let exceptions = &raw const exception_stubs as u64;
    let interrupts = &raw const interrupt_stubs as u64;
    for vector in 0..32 {
        set_gate(vector, exceptions + 16 * vector as u64, GATE);
    }
    for line in 0..LINES {
        set_gate(INTERRUPT_VECTOR + line, interrupts + 16 * line as u64, GATE);
    }
    set_gate(SYSTEM_CALL, &raw const system_call_stub as u64, GATE_LEVEL3);
}

/// Takes every gate away: the next exception is a triple fault.
pub fn empty_idt() {
    // SAFETY: see `Table`: no other code accesses it.
    unsafe { IDT.0.get().write_volatile([[0; 2]; GATES]) };
}

fn set_gate(vector: usize, handler: u64, kind: u64) {
    let low = (handler & 0xffff) | (CODE0 << 16) | kind | ((handler >> 16 & 0xffff) << 48);
    let gate = [low, handler >> 32];
    // SAFETY: see `Table`; the vector is below GATES at every call, and indexing checks it.
    unsafe { (*IDT.0.get())[vector] = gate };
}

/// Level 3's end of an exception (see `entry.s`).
#[unsafe(no_mangle)]
extern "C" fn report_exception(vector: u64, error: u64, rip: u64, address: u64) -> ! {
    report::fail(
        "exception",
        format_args!("vector={vector} error={error:#x} rip={rip:#x} cr2={address:#x}"),
    );
    report::end();
    power::off()
}

/// Raises an exception (#UD).
pub fn invalid_instruction() -> ! {
    // SAFETY: it ends here by design, in an exception handler or a triple fault.
    unsafe { asm!("ud2", options(noreturn)) }
}

/// Stops the processor for good.
pub fn halt() -> ! {
    // SAFETY: this system call never comes back.
    unsafe { asm!("int3", in("rax") 0_u64, options(noreturn)) }
}

/// Port I/O of one width.
macro_rules! port {
    ($out:ident, $in:ident, $word:ty, $register:tt) => {
        /// Writes to a port.
        pub fn $out(port: u16, value: $word) {
            // SAFETY: port I/O touches no memory of this program.
            unsafe {
                asm!(concat!("out dx, ", $register), in("dx") port, in($register) value,
                    options(nomem, nostack, preserves_flags))
            };
        }

        /// Reads from a port.
        pub fn $in(port: u16) -> $word {
            let value;
            // SAFETY: port I/O touches no memory of this program.
            unsafe {
                asm!(concat!("in ", $register, ", dx"), in("dx") port, out($register) value,
                    options(nomem, nostack, preserves_flags))
            };
            value
        }
    };
}

port!(out8, in8, u8, "al");
port!(out16, in16, u16, "ax");
port!(out32, in32, u32, "eax");

/// Reads a port again and again by one string instruction.
pub fn in32_string(port: u16, words: &mut [u32]) {
    // SAFETY: the instruction fills the slice and nothing else; the direction flag is clear.
    unsafe {
        asm!("rep insd", in("dx") port, inout("rdi") words.as_mut_ptr() => _, inout("rcx") words.len() => _,
            options(nostack, preserves_flags))
    };
}

/// Writes a port again and again by one string instruction.
pub fn out32_string(port: u16, words: &[u32]) {
    // SAFETY: the instruction reads the slice and nothing else; the direction flag is clear.
    unsafe {
        asm!("rep outsd", in("dx") port, inout("rsi") words.as_ptr() => _, inout("rcx") words.len() => _,
            options(nostack, readonly, preserves_flags))
    };
}

/// Starts [`now`]: measures the time stamp counter against the local APIC's timer, which KVM runs
/// at 1 GHz.
pub fn start_clock() {
    write_register(TIMER_DIVIDE, DIVIDE_BY_1);
    write_register(TIMER_INITIAL, u32::MAX);
    let (start, first) = both_clocks();
    while start.wrapping_sub(read_register(TIMER_CURRENT)) < 2_000_000 {}
    let (end, last) = both_clocks();
    let rate = (last - first) * 1_000_000 / u64::from(start.wrapping_sub(end));
    TICKS_PER_MS.store(rate.max(1), Ordering::Relaxed);
    write_register(TIMER_INITIAL, 0);
}

/// The timer, which runs down, and the time stamp counter at nearly the same moment. The host may take the processor
/// away between two looks: of several the quickest counts.
fn both_clocks() -> (u32, u64) {
    let looks = [(); 16].map(|()| {
        let before = ticks();
        let timer = read_register(TIMER_CURRENT);
        (ticks() - before, timer, before)
    });
    let (took, timer, before) = looks.into_iter().min().unwrap_or_default();
    (timer, before + took / 2)
}

/// When a guest gives up, so that a forgotten one ends. Its test waits two minutes at most.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// The time since the processor started.
pub fn now() -> Instant {
    let micros = u128::from(ticks()) * 1000 / u128::from(TICKS_PER_MS.load(Ordering::Relaxed));
    Instant::from_micros(micros as i64)
}

/// So many rounds of the time stamp counter pass in `ns` nanoseconds.
pub fn ticks_in(ns: u64) -> u64 {
    (u128::from(ns) * u128::from(TICKS_PER_MS.load(Ordering::Relaxed)) / 1_000_000) as u64
}

/// So many nanoseconds are `ticks` rounds of the time stamp counter.
pub fn ns_of(ticks: u64) -> u64 {
    (u128::from(ticks) * 1_000_000 / u128::from(TICKS_PER_MS.load(Ordering::Relaxed))) as u64
}

/// The time stamp counter.
pub fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and CR4.TSD is clear after reset.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Lets a line of the IOAPIC interrupt this processor, edge-triggered.
pub fn enable_line(line: u32) {
    write_register(IOAPIC_SELECT, IOAPIC_LINES + 2 * line + 1);
    write_register(IOAPIC_DATA, 0);
    write_register(IOAPIC_SELECT, IOAPIC_LINES + 2 * line);
    write_register(IOAPIC_DATA, INTERRUPT_VECTOR as u32 + line);
    enable_interrupts();
}

/// The message by which a function on the PCI bus interrupts this processor as a line: address and
/// data.
pub fn message(line: u32) -> (u64, u32) {
    (LOCAL_APIC, INTERRUPT_VECTOR as u32 + line)
}

/// Sends a command to another processor by the local APIC (Intel SDM volume 3A, 10.6.1).
pub fn send(processor: u32, command: u32) {
    write_register(SPURIOUS, 0x1ff);
    write_register(COMMAND + 0x10, processor << 24);
    write_register(COMMAND, command);
}

/// Turns interrupts on.
pub fn enable_interrupts() {
    // The old interrupt controllers get the same lines, and firmware's timer: mask them.
    out8(0x21, 0xff);
    out8(0xa1, 0xff);
    write_register(SPURIOUS, 0x1ff);
    // SAFETY: the system call and the handlers keep every register, and use a stack of their own.
    unsafe { asm!("int3", in("rax") 1_u64, options(nostack)) };
}

/// Halts until there is an interrupt, unless a line, which may interrupt, has done so more often than
/// `seen` times.
pub fn halt_unless_interrupted(line: u32, seen: u64) {
    let counter = INTERRUPTS[line as usize].as_ptr();
    // SAFETY: the system call reads the counter; it and the handlers keep every register, and use a
    // stack of their own.
    unsafe { asm!("int3", in("rax") 2_u64, in("rdi") counter, in("rsi") seen, options(nostack)) };
}

/// How often a line has interrupted.
pub fn interrupts(line: u32) -> u64 {
    INTERRUPTS[line as usize].load(Ordering::Relaxed)
}

fn read_register(address: u64) -> u32 {
    // SAFETY: the APICs' registers are mapped, and reading those used here has no side effect.
    unsafe { read_at(address) }
}

fn write_register(address: u64, value: u32) {
    // SAFETY: the APICs' registers are mapped, and none of them makes the APIC write memory.
    unsafe { write_at(address, value) };
}
