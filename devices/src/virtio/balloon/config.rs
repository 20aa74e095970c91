//! How large the balloon is to be, and is: the configuration space (virtio 1.2, 5.5.4).

use std::io;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::ranges::PAGE;
use crate::lock;
use crate::virtio::{Interrupt, read_at};

/// How large the balloon of a running guest is. It may be kept longer than the device.
#[derive(Clone, Debug)]
pub struct BalloonHandle(pub(super) Arc<ConfigSpace>);

impl BalloonHandle {
    /// Asks the guest to hold back so many bytes of its memory; it does as it can.
    pub fn set_target(&self, bytes: u64) {
        self.0.set_target(bytes);
    }

    /// How many bytes it is asked for.
    pub fn target(&self) -> u64 {
        lock(&self.0.state).space.target_bytes()
    }

    /// How many bytes its driver says that it holds back.
    pub fn actual(&self) -> u64 {
        lock(&self.0.state).space.actual_bytes()
    }

    /// Readable when [`BalloonHandle::actual`] has changed since [`BalloonHandle::watch`], or since the
    /// start.
    pub fn changed(&self) -> &EventFd {
        &self.0.changed
    }

    /// Has the next change of [`BalloonHandle::actual`] shown, and returns what it is now. Before it is
    /// called again there is no other: a driver can change it at will.
    pub fn watch(&self) -> u64 {
        let mut state = lock(&self.0.state);
        let _ = self.0.changed.read();
        state.is_signalled = false;
        state.space.actual_bytes()
    }
}

/// The configuration space, which its driver, the device's thread and holders of a
/// [`BalloonHandle`] share.
#[derive(Debug)]
pub struct ConfigSpace {
    state: Mutex<State>,
    changed: EventFd,
}

#[derive(Debug)]
struct State {
    space: Space,
    driver: Option<Arc<dyn Interrupt>>,
    /// A change of `actual` has been shown.
    is_signalled: bool,
}

/// What is kept of it when the guest is saved. Sizes are in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Space {
    target: u32,
    actual: u32,
    /// What the driver fills free pages with.
    poison: u32,
    generation: u32,
    /// The target has changed while there was no driver to be notified.
    missed: bool,
}

/// `num_pages`, `actual`, `free_page_hint_cmd_id` and `poison_val`, 32 bits each.
const LEN: usize = 16;

impl Space {
    fn target_bytes(&self) -> u64 {
        u64::from(self.target) * PAGE as u64
    }

    fn actual_bytes(&self) -> u64 {
        u64::from(self.actual) * PAGE as u64
    }

    fn to_bytes(self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        for (field, value) in
            bytes
                .chunks_exact_mut(4)
                .zip([self.target, self.actual, 0, self.poison])
        {
            field.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }
}

impl ConfigSpace {
    /// The space of a balloon that is to have so many bytes, and has none.
    ///
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub fn new(target: u64) -> io::Result<Self> {
        let space = Space {
            target: pages(target),
            ..Space::default()
        };
        Ok(Self {
            state: Mutex::new(State {
                space,
                driver: None,
                is_signalled: false,
            }),
            changed: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// The balloon is so large now.
    fn set_actual(&self, state: &mut State, pages: u32) {
        let is_change = std::mem::replace(&mut state.space.actual, pages) != pages;
        if is_change && !std::mem::replace(&mut state.is_signalled, true) {
            let _ = self.changed.write(1);
        }
    }

    fn set_target(&self, bytes: u64) {
        let State { space, driver, .. } = &mut *lock(&self.state);
        if space.target != pages(bytes) {
            space.target = pages(bytes);
            space.generation = space.generation.wrapping_add(1);
            match driver {
                Some(driver) => driver.config(),
                None => space.missed = true,
            }
        }
    }

    /// What free pages have to hold that the driver reports.
    pub fn poison(&self) -> u32 {
        lock(&self.state).space.poison
    }

    /// From now on the driver is notified of changes, and of those before it if it was there then.
    pub fn attach(&self, interrupt: Arc<dyn Interrupt>, resumed: bool) {
        let State { space, driver, .. } = &mut *lock(&self.state);
        if std::mem::take(&mut space.missed) && resumed {
            interrupt.config();
        }
        *driver = Some(interrupt);
    }

    /// Until the driver is attached again, it is not notified.
    pub fn pause(&self) {
        lock(&self.state).driver = None;
    }

    /// The driver is gone, and with it what it held back.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        state.driver = None;
        state.space.poison = 0;
        self.set_actual(&mut state, 0);
    }

    pub(super) fn save(&self) -> Space {
        lock(&self.state).space
    }

    pub(super) fn restore(&self, space: Space) {
        lock(&self.state).space = space;
    }

    /// The driver reads.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        read_at(&lock(&self.state).space.to_bytes(), offset, data);
    }

    /// The driver writes: `actual` and `poison_val` are its own.
    pub fn write(&self, offset: usize, data: &[u8]) {
        let mut state = lock(&self.state);
        let mut bytes = state.space.to_bytes();
        let fields = bytes.get_mut(offset..).unwrap_or_default();
        for (to, byte) in fields.iter_mut().zip(data) {
            *to = *byte;
        }
        let [_, _, _, _, a, b, c, d, _, _, _, _, poison @ ..] = bytes;
        state.space.poison = u32::from_le_bytes(poison);
        self.set_actual(&mut state, u32::from_le_bytes([a, b, c, d]));
    }

    /// Changes whenever the device changes what can be read.
    pub fn generation(&self) -> u32 {
        lock(&self.state).space.generation
    }
}

fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE as u64).unwrap_or(u32::MAX)
}
