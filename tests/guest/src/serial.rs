//! COM1. Each byte is an exit to the monitor: print little.

use core::fmt;

use crate::cpu;

const DATA: u16 = 0x3f8;

/// The port as a [`fmt::Write`]. It is not waited for: a virtual one is always ready.
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| cpu::out8(DATA, byte));
        Ok(())
    }
}

/// Prints a line.
macro_rules! println {
    ($($argument:tt)*) => {{
        use core::fmt::Write;
        // Writing to the port cannot fail.
        let _ = writeln!($crate::serial::Serial, $($argument)*);
    }};
}
pub(crate) use println;
