//! Routes a guest's port and memory accesses to the device that owns the address.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::lock;

/// Why a device does not start, or does not take a state: for people.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A device that answers accesses inside a window of a [`Bus`].
///
/// Called on the thread of the vCPU that made the access, one call at a time. `data` is 1 to 8
/// bytes long and `offset + data.len()` may pass the end of the window: a device ignores what it
/// does not know.
pub trait BusDevice: Send {
    /// Fills `data` with what the guest reads at `offset` bytes into the window.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes what the guest writes at `offset` bytes into the window.
    fn write(&mut self, offset: u64, data: &[u8]);

    /// Stops what the device does by itself, until [`BusDevice::resume`]: no thread touches guest
    /// memory or the host's side of the device once this has returned, and nothing is lost. The
    /// vCPUs have to stand still before.
    fn pause(&mut self) {}
    /// Goes on.
    fn resume(&mut self) {}
    /// Becomes the device that it was at power-on, when the machine is reset: guest memory is not
    /// touched once this has returned. The vCPUs have to stand still before; one that is paused
    /// stays so.
    fn reset(&mut self) {}
    /// What another device needs to take the place of this one, which is paused.
    ///
    /// # Errors
    ///
    /// Says why there is no such state.
    fn save(&self) -> Result<Value, BoxError> {
        Ok(Value::Null)
    }
    /// Finds out whether this device can become the one that was saved. It changes nothing.
    ///
    /// # Errors
    ///
    /// Says what does not fit.
    fn check(&self, _state: &Value) -> Result<(), BoxError> {
        Ok(())
    }
    /// Makes this device, which has not run or is paused, the one that was saved, paused.
    ///
    /// # Errors
    ///
    /// As [`BusDevice::check`], with nothing changed; or says what the host refuses.
    fn restore(&mut self, _state: Value) -> Result<(), BoxError> {
        Ok(())
    }
}

/// What [`BusDevice::check`] of a device does that takes any `T`.
pub(crate) fn check<T: DeserializeOwned>(state: &Value) -> Result<(), BoxError> {
    T::deserialize(state)?;
    Ok(())
}

/// A device on a bus, with its own lock.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Two windows of one bus overlap.
#[derive(Debug, thiserror::Error)]
#[error("bus window {new:#x?} overlaps {existing:#x?}")]
pub struct Overlap {
    new: Range<u64>,
    existing: Range<u64>,
}

/// A device has no state that could be saved.
#[derive(Debug, thiserror::Error)]
#[error("cannot save the device at {0}")]
pub struct SaveError(String, #[source] BoxError);

/// A state that the devices of a bus do not take.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state is not one of a bus.
    #[error("the saved state is none of devices on a bus")]
    NotABus,
    /// Another machine was saved.
    #[error("the saved machine has a device at {0} that this one lacks")]
    NoDevice(String),
    /// A device refuses its state.
    #[error("cannot restore the device at {0}")]
    Device(String, #[source] BoxError),
}

/// An address space (ports or guest-physical memory) and the devices in it.
///
/// It is filled while the VM is built and only read afterwards, so lookups take no lock; each
/// device has its own.
#[derive(Default)]
pub struct Bus {
    /// Sorted by start, never overlapping.
    windows: Vec<(Range<u64>, SharedDevice)>,
}

impl Bus {
    /// Gives `device` the addresses of `window`.
    ///
    /// # Errors
    ///
    /// Fails when another device has part of `window`.
    pub fn insert(&mut self, window: Range<u64>, device: SharedDevice) -> Result<(), Overlap> {
        let at = self
            .windows
            .partition_point(|(w, _)| w.start < window.start);
        let neighbours = at.saturating_sub(1)..(at + 1).min(self.windows.len());
        for (existing, _) in &self.windows[neighbours] {
            if existing.start < window.end && window.start < existing.end {
                return Err(Overlap {
                    new: window,
                    existing: existing.clone(),
                });
            }
        }
        self.windows.insert(at, (window, device));
        Ok(())
    }

    /// Reads for the guest; where there is no device all bits are ones, as on a real bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => lock(device).read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Reads for a string instruction: fills `data` by accesses of `width` bytes to one address.
    pub fn read_each(&self, address: u64, width: usize, data: &mut [u8]) {
        for part in data.chunks_mut(width.max(1)) {
            self.read(address, part);
        }
    }

    /// Writes for the guest; where there is no device nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address) {
            lock(device).write(offset, data);
        }
    }

    /// Writes for a string instruction: see [`Bus::read_each`].
    pub fn write_each(&self, address: u64, width: usize, data: &[u8]) {
        for part in data.chunks(width.max(1)) {
            self.write(address, part);
        }
    }

    /// Pauses all devices: see [`BusDevice::pause`].
    pub fn pause(&self) {
        self.devices().for_each(|(_, mut device)| device.pause());
    }

    /// Has all devices go on.
    pub fn resume(&self) {
        self.devices().for_each(|(_, mut device)| device.resume());
    }

    /// Resets all devices: see [`BusDevice::reset`].
    pub fn reset(&self) {
        self.devices().for_each(|(_, mut device)| device.reset());
    }

    /// The states of the devices, which are paused, by their addresses.
    ///
    /// # Errors
    ///
    /// Says which device cannot be saved.
    pub fn save(&self) -> Result<Value, SaveError> {
        let states = self.devices().map(|(name, device)| match device.save() {
            Ok(state) => Ok((name, state)),
            Err(source) => Err(SaveError(name, source)),
        });
        Ok(states.collect::<Result<Map<_, _>, _>>()?.into())
    }

    /// Finds out whether the devices can become those that were saved. It changes nothing.
    ///
    /// # Errors
    ///
    /// Says which device does not take its state.
    pub fn check(&self, state: &Value) -> Result<(), RestoreError> {
        let states = state.as_object().ok_or(RestoreError::NotABus)?;
        let mut known = HashSet::new();
        for (name, device) in self.devices() {
            let checked = device.check(states.get(&name).unwrap_or(&Value::Null));
            checked.map_err(|source| RestoreError::Device(name.clone(), source))?;
            known.insert(name);
        }
        match states.keys().find(|name| !known.contains(*name)) {
            Some(name) => Err(RestoreError::NoDevice(name.clone())),
            None => Ok(()),
        }
    }

    /// Makes the devices, which have not run or are paused, those that were saved, paused.
    ///
    /// # Errors
    ///
    /// As [`Bus::check`], with nothing changed; or says for which device the host refuses something.
    pub fn restore(&self, mut state: Value) -> Result<(), RestoreError> {
        self.check(&state)?;
        for (name, mut device) in self.devices() {
            let restored = device.restore(state[&name].take());
            restored.map_err(|source| RestoreError::Device(name, source))?;
        }
        Ok(())
    }

    /// The devices, each locked, with their addresses.
    fn devices(&self) -> impl Iterator<Item = (String, MutexGuard<'_, dyn BusDevice + 'static>)> {
        let windows = self.windows.iter();
        windows.map(|(window, device)| (format!("{:#x}", window.start), lock(device.as_ref())))
    }

    fn find(&self, address: u64) -> Option<(u64, &Mutex<dyn BusDevice>)> {
        let after = self.windows.partition_point(|(w, _)| w.start <= address);
        let (window, device) = &self.windows[after.checked_sub(1)?];
        window
            .contains(&address)
            .then(|| (address - window.start, device.as_ref()))
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.windows.iter().map(|(w, _)| w))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);
    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }
        fn write(&mut self, _offset: u64, data: &[u8]) {
            self.0 = data[0];
        }
    }

    fn bus() -> Bus {
        let mut bus = Bus::default();
        bus.insert(0x20..0x28, Arc::new(Mutex::new(Echo(0x20))))
            .unwrap();
        bus.insert(0x10..0x20, Arc::new(Mutex::new(Echo(0x10))))
            .unwrap();
        bus
    }

    fn read(bus: &Bus, address: u64) -> u8 {
        let mut data = [0];
        bus.read(address, &mut data);
        data[0]
    }

    #[test]
    fn access_inside_a_window_reaches_its_device() {
        let bus = bus();
        assert_eq!(read(&bus, 0x10), 0x10);
        assert_eq!(read(&bus, 0x1f), 0x1f);
        assert_eq!(read(&bus, 0x27), 0x27);
        bus.write(0x10, &[0x40]);
        assert_eq!(read(&bus, 0x11), 0x41);
    }

    #[test]
    fn string_access_repeats_at_one_address() {
        struct Counter(Vec<Vec<u8>>);
        impl BusDevice for Counter {
            fn read(&mut self, offset: u64, data: &mut [u8]) {
                assert_eq!(offset, 4);
                data.fill(self.0.len() as u8);
                self.0.push(data.to_vec());
            }
            fn write(&mut self, offset: u64, data: &[u8]) {
                assert_eq!(offset, 4);
                self.0.push(data.to_vec());
            }
        }
        let device = Arc::new(Mutex::new(Counter(Vec::new())));
        let mut bus = Bus::default();
        bus.insert(0x10..0x18, device.clone()).unwrap();
        let mut data = [0xaa; 6];
        bus.read_each(0x14, 2, &mut data);
        assert_eq!(data, [0, 0, 1, 1, 2, 2]);
        bus.write_each(0x14, 4, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(device.lock().unwrap().0[3..], [[1, 2, 3, 4], [5, 6, 7, 8]]);
    }

    #[test]
    fn access_outside_any_window_reads_ones() {
        let bus = bus();
        for address in [0, 0xf, 0x28, u64::MAX] {
            assert_eq!(read(&bus, address), 0xff);
            bus.write(address, &[0]);
        }
    }

    #[test]
    fn states_go_to_the_devices_at_the_same_addresses() {
        struct State(u8);
        impl BusDevice for State {
            fn read(&mut self, _offset: u64, data: &mut [u8]) {
                data.fill(self.0);
            }
            fn write(&mut self, _offset: u64, data: &[u8]) {
                self.0 = data[0];
            }
            fn save(&self) -> Result<Value, BoxError> {
                Ok(self.0.into())
            }
            fn check(&self, state: &Value) -> Result<(), BoxError> {
                check::<u8>(state)
            }
            fn restore(&mut self, state: Value) -> Result<(), BoxError> {
                self.0 = serde_json::from_value(state)?;
                Ok(())
            }
        }
        let bus = |windows: &[u64]| {
            let mut bus = Bus::default();
            for &start in windows {
                let device = Arc::new(Mutex::new(State(0)));
                bus.insert(start..start + 1, device).unwrap();
            }
            bus
        };
        let saved = bus(&[1, 2]);
        saved.write(1, &[10]);
        saved.write(2, &[20]);
        let same = bus(&[1, 2]);
        same.restore(saved.save().unwrap()).unwrap();
        assert_eq!((read(&same, 1), read(&same, 2)), (10, 20));
        for (windows, error) in [
            (&[1, 2, 3][..], "cannot restore the device at 0x3"),
            (
                &[1],
                "the saved machine has a device at 0x2 that this one lacks",
            ),
        ] {
            let other = bus(windows);
            let refused = other.restore(saved.save().unwrap());
            assert_eq!(refused.unwrap_err().to_string(), error);
            // Those before it neither.
            assert_eq!(read(&other, 1), 0);
        }
        assert!(same.restore(Value::Null).is_err());
    }

    #[test]
    fn insert_overlapping_is_refused() {
        let mut bus = bus();
        for window in [0x0..0x11, 0x1f..0x21, 0x12..0x14, 0x0..0x100, 0x27..0x28] {
            assert!(bus.insert(window, Arc::new(Mutex::new(Echo(0)))).is_err());
        }
        assert!(
            bus.insert(0x28..0x29, Arc::new(Mutex::new(Echo(0))))
                .is_ok()
        );
    }
}
