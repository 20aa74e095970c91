//! The ways to end: the ports that the ACPI tables of the machine name, and the impolite ones.

use crate::cpu;

/// The ACPI sleep control register (ACPI 6.5, 4.8.3.7).
const SLEEP_CONTROL: u16 = 0x600;
/// SLP_TYP 5, SLP_EN.
const SLEEP_S5: u8 = (5 << 2) | (1 << 5);
/// The ACPI reset register, and the value that resets.
const RESET: u16 = 0x602;
const RESET_VALUE: u8 = 1;

/// Powers the machine off.
pub fn off() -> ! {
    cpu::out8(SLEEP_CONTROL, SLEEP_S5);
    halt()
}

/// Resets the machine.
pub fn reset() -> ! {
    cpu::out8(RESET, RESET_VALUE);
    halt()
}

/// Takes the exception handlers away and then raises an exception.
pub fn triple_fault() -> ! {
    cpu::empty_idt();
    cpu::invalid_instruction()
}

/// Halts for good, with interrupts off.
pub fn halt() -> ! {
    cpu::halt()
}
