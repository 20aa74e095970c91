//! COM1: a 16550A whose output goes to a writer and whose input is pushed by the monitor.

use std::fmt;
use std::io::Write;
use std::sync::mpsc::SyncSender;

use vm_superio::Serial as Uart;
use vm_superio::serial::SerialEvents;

use crate::bus::BusDevice;
use crate::irq::IrqLine;

/// The number of I/O ports of a 16550A.
pub const PORTS: u64 = 8;

/// Tells the monitor that the guest has read all input.
struct InputDrained(SyncSender<()>);

impl SerialEvents for InputDrained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // Full: the monitor has not looked since the last time, and will.
        let _ = self.0.try_send(());
    }
}

/// A 16550A serial port.
pub struct Serial {
    uart: Uart<IrqLine, InputDrained, Box<dyn Write + Send>>,
}

impl Serial {
    /// A port on `irq` that writes to `output` and sends to `drained` whenever the guest has read
    /// everything that [`Serial::push_input`] took.
    pub fn new(irq: IrqLine, drained: SyncSender<()>, output: Box<dyn Write + Send>) -> Self {
        Self {
            uart: Uart::with_events(irq, InputDrained(drained), output),
        }
    }

    /// The interrupt line of the port.
    pub fn irq(&self) -> &IrqLine {
        self.uart.interrupt_evt()
    }

    /// Hands input to the guest and returns how many bytes the FIFO took; the rest has to wait
    /// until it is drained.
    pub fn push_input(&mut self, input: &[u8]) -> usize {
        // In loopback mode (the guest's driver is probing) the port takes nothing and returns 0;
        // a full FIFO is an error that means the same.
        self.uart.enqueue_raw_bytes(input).unwrap_or(0)
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // Registers are a byte wide, and reading one may change it: nothing else is answered.
        match (u8::try_from(offset), data) {
            (Ok(register), [value]) => *value = self.uart.read(register),
            (_, data) => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(register), &[value]) = (u8::try_from(offset), data)
            && let Err(error) = self.uart.write(register, value)
        {
            // The console's reader went away or the disk is full: the guest must not care.
            log::trace!("serial output lost: {error:?}");
        }
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;

    #[test]
    fn wide_access_touches_no_register() {
        let (signal, drained) = sync_channel(1);
        let mut serial = Serial::new(IrqLine::new().unwrap(), signal, Box::new(Vec::new()));
        assert_eq!(serial.push_input(b"k"), 1);
        let mut wide = [0; 2];
        serial.read(0, &mut wide);
        assert_eq!(wide, [0xff; 2]);
        assert!(drained.try_recv().is_err(), "the input is still there");
        let mut byte = [0];
        serial.read(0, &mut byte);
        assert_eq!(byte, *b"k");
    }
}
