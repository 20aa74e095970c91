//! COM1: a 16550A whose output goes to a writer and whose input is pushed by the monitor.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vm_superio::Serial as Uart;
use vm_superio::serial::{NoEvents, SerialState};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{BoxError, BusDevice};
use crate::irq::IrqLine;

/// The number of I/O ports of a 16550A.
pub const PORTS: u64 = 8;

/// How much input waits for a guest that does not read it.
const MOST_WAITING: usize = 64 << 10;

/// The registers with the guest's output and with the transmitter's readiness, and what ends a line.
const DATA: u64 = 0;
const LINE_STATUS: u64 = 5;
const LINE_END: &[u8] = b"\n";
/// How often a driver looks whether the transmitter is ready before and after a byte, at most: it
/// always is.
const MOST_LOOKS: u8 = 2;

/// A 16550A serial port.
pub struct Serial {
    uart: Uart<IrqLine, NoEvents, Unflushed>,
    /// How often the guest has looked whether the transmitter is ready since it wrote a byte.
    looks: u8,
    /// The room in the FIFO when it is empty.
    fifo: usize,
    /// Input that gets into the FIFO once the guest has read what is there.
    waiting: VecDeque<u8>,
    /// Signalled when there is room again.
    room: Option<EventFd>,
    /// Input was refused since.
    is_room_awaited: bool,
}

impl Serial {
    /// A port on `irq` that writes to `output`, and flushes it at the end of a line and when the
    /// guest no longer writes byte after byte. A guest that does nothing more with the port does not
    /// cause that.
    pub fn new(irq: IrqLine, output: Box<dyn Write + Send>) -> Self {
        let uart = Uart::new(irq, Unflushed(output));
        Self {
            fifo: uart.fifo_capacity(),
            uart,
            looks: 0,
            waiting: VecDeque::new(),
            room: None,
            is_room_awaited: false,
        }
    }

    /// Signals `room` whenever there is room for input again after some was refused.
    pub fn signal_room(&mut self, room: EventFd) {
        self.room = Some(room);
    }

    /// The interrupt line of the port.
    pub fn irq(&self) -> &IrqLine {
        self.uart.interrupt_evt()
    }

    /// Takes input for the guest, and returns how many bytes: all of it but for what a guest that
    /// does not read has no room for.
    pub fn push_input(&mut self, input: &[u8]) -> usize {
        let taken = input.len().min(MOST_WAITING - self.waiting.len());
        self.waiting.extend(&input[..taken]);
        self.is_room_awaited |= taken < input.len();
        self.fill_fifo();
        taken
    }

    fn flush(&mut self) {
        if let Err(error) = self.uart.writer_mut().0.flush() {
            log::trace!("serial output lost: {error}");
        }
    }

    /// Fills an empty FIFO. Not one byte by byte: each filling interrupts the guest.
    fn fill_fifo(&mut self) {
        if self.waiting.is_empty() || self.uart.fifo_capacity() < self.fifo {
            return;
        }
        let (next, _) = self.waiting.as_slices();
        // In loopback mode (the guest's driver is probing) the port takes nothing and returns 0.
        let taken = self.uart.enqueue_raw_bytes(next).unwrap_or(0);
        self.waiting.drain(..taken);
        self.announce_room();
    }

    /// Not for each byte that the guest reads.
    fn announce_room(&mut self) {
        if self.is_room_awaited && self.waiting.len() <= MOST_WAITING / 2 {
            self.is_room_awaited = false;
            if let Some(room) = &self.room {
                let _ = room.write(1);
            }
        }
    }

    fn set_registers(&mut self, state: &SerialState) -> Result<(), String> {
        let irq = self.irq().clone();
        let none = Uart::new(irq.clone(), Unflushed(Box::new(io::sink())));
        let output = std::mem::replace(&mut self.uart, none).into_writer();
        self.uart =
            Uart::from_state(state, irq, NoEvents, output).map_err(|error| format!("{error:?}"))?;
        Ok(())
    }
}

/// A writer that is not flushed after each byte.
struct Unflushed(Box<dyn Write + Send>);

impl Write for Unflushed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the guest has made of the port, and the input that it has not read.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    #[serde(with = "Registers")]
    uart: SerialState,
    waiting: VecDeque<u8>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "SerialState")]
struct Registers {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // Registers are a byte wide, and reading one may change it: nothing else is answered.
        match (u8::try_from(offset), data) {
            (Ok(register), [value]) => *value = self.uart.read(register),
            (_, data) => data.fill(0xff),
        }
        self.fill_fifo();
        self.looks = self.looks.saturating_add(1);
        if offset != LINE_STATUS || self.looks > MOST_LOOKS {
            self.flush();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(register), &[value]) = (u8::try_from(offset), data)
            && let Err(error) = self.uart.write(register, value)
        {
            // The console's reader went away or the disk is full: the guest must not care.
            log::trace!("serial output lost: {error:?}");
        }
        // The end of loopback mode.
        self.fill_fifo();
        self.looks = 0;
        if offset != DATA || data == LINE_END {
            self.flush();
        }
    }

    fn reset(&mut self) {
        self.flush();
        // Input that the old guest has not read is not for the next one.
        self.waiting.clear();
        self.looks = 0;
        if let Err(error) = self.set_registers(&SerialState::default()) {
            log::error!("cannot reset the serial port: {error}");
        }
    }

    fn save(&self) -> Result<Value, BoxError> {
        Ok(json!(State {
            uart: self.uart.state(),
            waiting: self.waiting.clone(),
        }))
    }

    fn check(&self, state: &Value) -> Result<(), BoxError> {
        let State { uart, waiting } = State::deserialize(state)?;
        if uart.in_buffer.len() > self.fifo || waiting.len() > MOST_WAITING {
            return Err("more input than a serial port holds".into());
        }
        Ok(())
    }

    fn restore(&mut self, state: Value) -> Result<(), BoxError> {
        self.check(&state)?;
        let State { uart, waiting } = serde_json::from_value(state)?;
        self.set_registers(&uart)?;
        self.waiting = waiting;
        self.announce_room();
        Ok(())
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    const INTERRUPT_ENABLE: u64 = 1;
    const MODEM_CONTROL: u64 = 4;
    const LOOPBACK: u8 = 1 << 4;

    fn serial() -> Serial {
        Serial::new(IrqLine::new().unwrap(), Box::new(Vec::new()))
    }

    /// Counts how often it is flushed with something to send.
    #[derive(Clone, Default)]
    struct Flushes(Arc<Mutex<(usize, Vec<u8>)>>);

    impl Write for Flushes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().1.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            let (flushes, waiting) = &mut *self.0.lock().unwrap();
            *flushes += usize::from(!std::mem::take(waiting).is_empty());
            Ok(())
        }
    }

    impl Flushes {
        fn count(&self) -> usize {
            self.0.lock().unwrap().0
        }
    }

    fn flushed_serial() -> (Serial, Flushes) {
        let flushes = Flushes::default();
        let output = Box::new(flushes.clone());
        (Serial::new(IrqLine::new().unwrap(), output), flushes)
    }

    fn read(serial: &mut Serial, register: u64) -> u8 {
        let mut byte = [0];
        serial.read(register, &mut byte);
        byte[0]
    }

    /// What the guest reads as long as there is something.
    fn read_all(serial: &mut Serial) -> Vec<u8> {
        let mut all = Vec::new();
        while read(serial, LINE_STATUS) & 1 != 0 {
            all.push(read(serial, DATA));
        }
        all
    }

    #[test]
    fn wide_access_touches_no_register() {
        let mut serial = serial();
        assert_eq!(serial.push_input(b"k"), 1);
        let mut wide = [0; 2];
        serial.read(0, &mut wide);
        assert_eq!(wide, [0xff; 2]);
        assert_eq!(read_all(&mut serial), b"k");
    }

    #[test]
    fn input_longer_than_the_fifo_waits_for_the_guest_up_to_a_bound() {
        let mut serial = serial();
        let input: Vec<u8> = (0..100_000).map(|n| (n % 251) as u8).collect();
        let taken = serial.push_input(&input);
        assert!((MOST_WAITING..input.len()).contains(&taken), "{taken}");
        let again = serial.push_input(&input[taken..]);
        assert!(again <= serial.fifo, "{again}");
        assert_eq!(read_all(&mut serial), input[..taken + again]);
        assert_eq!(serial.push_input(b"more"), 4);
        assert_eq!(read_all(&mut serial), b"more");
    }

    #[test]
    fn room_is_signalled_when_the_guest_has_read_half_of_what_waits() {
        let mut serial = serial();
        let room = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        serial.signal_room(room.try_clone().unwrap());
        let input = vec![b'x'; 2 * MOST_WAITING];
        let taken = serial.push_input(&input[..MOST_WAITING]);
        assert_eq!(taken, MOST_WAITING);
        assert!(serial.push_input(&input) < input.len());
        let mut was_read = 0;
        while room.read().is_err() {
            assert_eq!(read(&mut serial, DATA), b'x');
            was_read += 1;
        }
        assert!(
            (MOST_WAITING / 2..MOST_WAITING).contains(&was_read),
            "{was_read}"
        );
        read_all(&mut serial);
        assert!(room.read().is_err(), "once");
    }

    #[test]
    fn restored_port_has_the_registers_and_the_input_of_the_saved_one() {
        let mut saved = serial();
        saved.write(7, b"s");
        let input: Vec<u8> = (0..1000).map(|n| (n % 251) as u8).collect();
        assert_eq!(saved.push_input(&input), 1000);
        let mut other = serial();
        other.restore(saved.save().unwrap()).unwrap();
        assert_eq!(other.save().unwrap(), saved.save().unwrap());
        assert_eq!(read(&mut other, 7), b's');
        assert_eq!(read_all(&mut other), input);
        assert!(other.restore(Value::Null).is_err());
    }

    #[test]
    fn port_after_a_reset_is_a_new_one_and_its_output_is_sent() {
        let (mut serial, flushes) = flushed_serial();
        serial.write(DATA, b"$");
        serial.write(7, b"s");
        serial.write(INTERRUPT_ENABLE, &[1]);
        assert_eq!(serial.push_input(&[b'x'; 1000]), 1000);
        serial.reset();
        assert_eq!(
            serial.save().unwrap(),
            super::tests::serial().save().unwrap()
        );
        assert_eq!(flushes.count(), 1);
        serial.write(DATA, b"new\n");
        serial.write(DATA, b"\n");
        assert_eq!(flushes.count(), 2);
    }

    #[test]
    fn input_during_loopback_comes_after_it() {
        let mut serial = serial();
        serial.write(MODEM_CONTROL, &[LOOPBACK]);
        assert_eq!(serial.push_input(b"key"), 3);
        assert_eq!(read_all(&mut serial), b"");
        serial.write(DATA, b"l");
        assert_eq!(read_all(&mut serial), b"l");
        serial.write(MODEM_CONTROL, &[0]);
        assert_eq!(read_all(&mut serial), b"key");
    }

    #[test]
    fn output_is_flushed_at_the_end_of_a_line() {
        let (mut serial, flushes) = flushed_serial();
        // As a Linux console writes until its port is opened.
        for byte in b"[    0.000000] Linux version\r" {
            assert_ne!(read(&mut serial, LINE_STATUS), 0);
            serial.write(DATA, &[*byte]);
        }
        assert_eq!(flushes.count(), 0);
        serial.write(DATA, b"\n");
        assert_eq!(flushes.count(), 1);
    }

    #[test]
    fn prompt_is_flushed_once_the_guest_waits_for_input() {
        let (mut serial, flushes) = flushed_serial();
        // Looks before and after each byte.
        for byte in b"grub> " {
            read(&mut serial, LINE_STATUS);
            serial.write(DATA, &[*byte]);
            read(&mut serial, LINE_STATUS);
        }
        assert_eq!(flushes.count(), 0);
        for _ in 0..2 {
            read(&mut serial, LINE_STATUS);
        }
        assert_eq!(flushes.count(), 1);
    }

    #[test]
    fn output_by_interrupts_is_flushed_by_each() {
        const INTERRUPT_IDENTIFICATION: u64 = 2;
        let (mut serial, flushes) = flushed_serial();
        serial.write(INTERRUPT_ENABLE, &[1 << 1]);
        for byte in b"$ " {
            serial.write(DATA, &[*byte]);
        }
        assert_eq!(flushes.count(), 0);
        read(&mut serial, INTERRUPT_IDENTIFICATION);
        assert_eq!(flushes.count(), 1);
        serial.write(DATA, b"x");
        serial.write(INTERRUPT_ENABLE, &[0]);
        assert_eq!(flushes.count(), 2);
    }
}
