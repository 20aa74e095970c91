//! Where the vCPUs' threads wait while the guest is paused or reset.

use std::io;
use std::sync::{Condvar, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::lock;

/// A barrier that is closed for a pause, a reset, or both.
#[derive(Debug)]
pub struct Barrier {
    state: Mutex<State>,
    opened: Condvar,
    /// Signalled when the last thread comes to wait.
    full: EventFd,
}

#[derive(Debug)]
struct State {
    is_paused: bool,
    is_resetting: bool,
    /// It stays open.
    has_ended: bool,
    waiting: usize,
    threads: usize,
}

impl State {
    fn is_closed(&self) -> bool {
        !self.has_ended && (self.is_paused || self.is_resetting)
    }

    fn is_full(&self) -> bool {
        self.is_closed() && self.waiting == self.threads
    }
}

impl Barrier {
    /// An open one, for so many threads.
    pub fn new(threads: usize) -> io::Result<Self> {
        Ok(Self {
            state: Mutex::new(State {
                is_paused: false,
                is_resetting: false,
                has_ended: false,
                waiting: 0,
                threads,
            }),
            opened: Condvar::new(),
            full: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// Readable once all threads wait, and again for each later reason to.
    pub fn full(&self) -> &EventFd {
        &self.full
    }

    /// Whether all threads wait, and none can leave.
    pub fn is_full(&self) -> bool {
        lock(&self.state).is_full()
    }

    /// Whether it is closed for a pause.
    pub fn is_paused(&self) -> bool {
        lock(&self.state).is_paused
    }

    /// Whether it is closed for a reset.
    pub fn is_resetting(&self) -> bool {
        lock(&self.state).is_resetting
    }

    /// Closes it for a pause.
    pub fn pause(&self) {
        self.change(|state| state.is_paused = true);
    }

    /// The pause is over.
    pub fn resume(&self) {
        self.change(|state| state.is_paused = false);
    }

    /// Closes it for a reset. False when it is already.
    pub fn reset(&self) -> bool {
        self.change(|state| !std::mem::replace(&mut state.is_resetting, true))
    }

    /// The reset is over.
    pub fn reset_done(&self) {
        self.change(|state| state.is_resetting = false);
    }

    /// Opens it for good.
    pub fn end(&self) {
        self.change(|state| state.has_ended = true);
    }

    /// Waits while the barrier is closed.
    pub fn pass(&self) {
        let mut state = lock(&self.state);
        if state.is_closed() {
            state.waiting += 1;
            self.signal_if_full(&state);
            state = self
                .opened
                .wait_while(state, |state| state.is_closed())
                .unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = lock(&self.state);
        let result = change(&mut state);
        // Those that were still waiting since the last time go on waiting.
        self.signal_if_full(&state);
        if !state.is_closed() {
            self.opened.notify_all();
        }
        result
    }

    fn signal_if_full(&self, state: &State) {
        if state.is_full() {
            // Only a counter at its end could refuse.
            let _ = self.full.write(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn barrier_is_full_once_every_thread_waits_and_again_when_closed_in_time() {
        let barrier = Barrier::new(2).unwrap();
        thread::scope(|scope| {
            barrier.pass();
            barrier.pause();
            let first = scope.spawn(|| barrier.pass());
            assert!(barrier.full.read().is_err() && !barrier.is_full());
            let second = scope.spawn(|| barrier.pass());
            while barrier.full.read().is_err() {
                thread::yield_now();
            }
            // Whether they have left the barrier meanwhile or not.
            barrier.resume();
            barrier.pause();
            assert_eq!(barrier.is_full(), barrier.full.read().is_ok());
            barrier.resume();
            assert!(!barrier.is_full());
            first.join().unwrap();
            second.join().unwrap();
        });
        assert_eq!(lock(&barrier.state).waiting, 0);
    }

    #[test]
    fn barrier_opens_when_both_the_pause_and_the_reset_are_over() {
        for reset_is_first in [true, false] {
            let barrier = Barrier::new(1).unwrap();
            assert!(barrier.reset());
            assert!(!barrier.reset());
            barrier.pause();
            thread::scope(|scope| {
                scope.spawn(|| barrier.pass());
                while !barrier.is_full() {
                    thread::yield_now();
                }
                let ends: [fn(&Barrier); 2] = [Barrier::reset_done, Barrier::resume];
                barrier.full.read().unwrap();
                ends[usize::from(!reset_is_first)](&barrier);
                assert!(barrier.is_full() && barrier.full.read().is_ok());
                ends[usize::from(reset_is_first)](&barrier);
            });
            assert!(!barrier.is_full());
        }
    }

    #[test]
    fn barrier_that_has_ended_cannot_be_closed() {
        let barrier = Barrier::new(1).unwrap();
        barrier.pause();
        barrier.end();
        barrier.reset();
        barrier.pass();
        assert!(!barrier.is_full());
    }
}
