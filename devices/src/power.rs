//! The ways a guest ends its machine: ACPI sleep and reset registers, and the i8042 reset line.

use std::fmt;

use crate::bus::BusDevice;

/// What the guest asked of its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// Sleep state S5.
    PowerOff,
    /// A reset.
    Reset,
}

/// Receives the guest's requests; called on a vCPU's thread.
pub struct PowerSink(Box<dyn Fn(PowerRequest) + Send>);

impl PowerSink {
    /// Calls `sink` with each of them.
    pub fn new(sink: impl Fn(PowerRequest) + Send + 'static) -> Self {
        Self(Box::new(sink))
    }
}

impl fmt::Debug for PowerSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PowerSink").finish_non_exhaustive()
    }
}

/// Offset of the sleep control register (ACPI 6.5, 4.8.3.7).
const SLEEP_CONTROL: u64 = 0;
/// Offset of the reset register (ACPI 6.5, 4.8.3.6).
pub const RESET: u64 = 2;
/// The number of I/O ports of the ACPI registers.
pub const PORTS: u64 = 3;
/// Sleep control: SLP_EN.
const SLP_EN: u8 = 1 << 5;
/// Sleep control: SLP_TYP.
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 0b111;

/// The ACPI hardware-reduced power registers: sleep control, sleep status and reset, a byte each.
#[derive(Debug)]
pub struct AcpiPower(pub PowerSink);

impl AcpiPower {
    /// The value of SLP_TYP that stands for S5 in the DSDT's `_S5`.
    pub const SLP_TYP_S5: u8 = 5;
    /// The value that resets when written to the reset register.
    pub const RESET_VALUE: u8 = 1;
}

impl BusDevice for AcpiPower {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // Sleep status: WAK_STS is never set, since no sleep state but S5 exists.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SLEEP_CONTROL, &[value])
                if value & SLP_EN != 0
                    && (value >> SLP_TYP_SHIFT) & SLP_TYP_MASK == Self::SLP_TYP_S5 =>
            {
                (self.0.0)(PowerRequest::PowerOff);
            }
            (RESET, &[Self::RESET_VALUE]) => (self.0.0)(PowerRequest::Reset),
            _ => log::trace!("ACPI power: ignored write of {data:x?} at {offset:#x}"),
        }
    }
}

/// Offset of the i8042's command port (0x64) from its first port (0x60).
const I8042_COMMAND: u64 = 4;
/// "Pulse the CPU's reset line", the one command that guests use without a keyboard.
const I8042_RESET_CPU: u8 = 0xfe;

/// An i8042 that can only reset the CPU, for guests with `reboot=k`.
#[derive(Debug)]
pub struct I8042(pub PowerSink);

impl BusDevice for I8042 {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // Status 0: the input buffer is empty, so the guest may write its command.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == I8042_COMMAND && data == [I8042_RESET_CPU] {
            (self.0.0)(PowerRequest::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    fn sink() -> (PowerSink, Receiver<PowerRequest>) {
        let (tx, rx) = channel();
        (PowerSink::new(move |request| tx.send(request).unwrap()), rx)
    }

    #[test]
    fn sleep_control_s5_powers_off() {
        let (sink, requests) = sink();
        let mut power = AcpiPower(sink);
        for ignored in [0, 5 << 2, SLP_EN, SLP_EN | 3 << 2] {
            power.write(SLEEP_CONTROL, &[ignored]);
        }
        assert!(requests.try_recv().is_err());
        power.write(SLEEP_CONTROL, &[SLP_EN | 5 << 2]);
        assert_eq!(requests.try_recv(), Ok(PowerRequest::PowerOff));
    }

    #[test]
    fn reset_registers_reset() {
        let (sink, requests) = sink();
        AcpiPower(sink).write(RESET, &[1]);
        assert_eq!(requests.try_recv(), Ok(PowerRequest::Reset));
        let (sink, requests) = self::sink();
        let mut i8042 = I8042(sink);
        i8042.write(0, &[0xfe]);
        assert!(requests.try_recv().is_err());
        i8042.write(4, &[0xfe]);
        assert_eq!(requests.try_recv(), Ok(PowerRequest::Reset));
    }
}
