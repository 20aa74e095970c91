//! The threads of a guest's vCPUs, which stop at a barrier.
//!
//! A thread holds its vCPU's lock while the vCPU runs. [`Vcpus::pause`] closes the barrier and
//! kicks every thread out of KVM_RUN; those that wait at the barrier hold no lock, so that other
//! threads can read and write their vCPUs.

use std::cell::Cell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::thread::gettid;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::barrier::Barrier;
use super::guest::KvmGuest;
use super::lock;
use super::vcpu::Vcpu;
use crate::control::exit::{Exit, ExitRequest};

/// A guest's vCPUs, each with a thread. Dropping them ends the guest, and waits for the threads.
#[derive(Debug)]
pub struct Vcpus {
    guest: Arc<KvmGuest>,
    threads: Vec<JoinHandle<()>>,
    /// Of each thread, once it runs.
    thread_ids: Vec<Arc<OnceLock<i32>>>,
    barrier: Arc<Barrier>,
    exit: Arc<ExitRequest>,
}

impl Vcpus {
    /// Starts a thread for each vCPU, which stop at the barrier.
    pub fn start(
        guest: Arc<KvmGuest>,
        barrier: Arc<Barrier>,
        exit: Arc<ExitRequest>,
    ) -> io::Result<Self> {
        register_signal_handler(kick_signal(), kicked)?;
        let mut started = Self {
            barrier,
            threads: Vec::with_capacity(guest.vcpus().len()),
            thread_ids: Vec::with_capacity(guest.vcpus().len()),
            guest: Arc::clone(&guest),
            exit,
        };
        for (id, vcpu) in guest.vcpus().iter().enumerate() {
            let thread = started.start_thread(id, Arc::clone(vcpu))?;
            started.threads.push(thread);
        }
        Ok(started)
    }

    fn start_thread(&mut self, id: usize, vcpu: Arc<Mutex<Vcpu>>) -> io::Result<JoinHandle<()>> {
        let (barrier, exit) = (Arc::clone(&self.barrier), Arc::clone(&self.exit));
        let thread_id = Arc::new(OnceLock::new());
        self.thread_ids.push(Arc::clone(&thread_id));
        let body = move || {
            thread_id.get_or_init(|| gettid().as_raw_pid());
            IMMEDIATE_EXIT.set(lock(&vcpu).immediate_exit());
            let run = || {
                while exit.reason().is_none() {
                    barrier.pass();
                    lock(&vcpu).run();
                }
            };
            // A panic of one vCPU must end the others too.
            if catch_unwind(AssertUnwindSafe(run)).is_err() {
                exit.request(Exit::Failure(format!("the thread of vCPU {id} panicked")));
            }
            IMMEDIATE_EXIT.set(ptr::null_mut());
        };
        thread::Builder::new().name(format!("vcpu{id}")).spawn(body)
    }

    /// What KVM holds of the guest. To be used while all vCPUs have stopped.
    pub fn guest(&self) -> &Arc<KvmGuest> {
        &self.guest
    }

    /// Where they stop.
    pub fn barrier(&self) -> &Barrier {
        &self.barrier
    }

    /// Has every vCPU stop. [`Barrier::full`] says when all of them have.
    pub fn pause(&self) {
        self.barrier.pause();
        self.kick();
    }

    /// The kernel's number of each vCPU's thread.
    pub fn thread_ids(&self) -> Vec<i32> {
        let ids = self.thread_ids.iter();
        // A thread says its own before anything else.
        ids.map(|id| *id.wait()).collect()
    }

    /// Lets the vCPUs run again that have been paused, or are about to be.
    pub fn resume(&self) {
        if self.barrier.is_full() && !self.barrier.is_resetting() {
            for vcpu in self.guest.vcpus() {
                lock(vcpu).was_paused();
            }
        }
        self.barrier.resume();
    }

    /// Has each vCPU leave the guest for an instant, and whatever its thread waits for in the kernel.
    pub fn kick(&self) {
        for thread in self.threads.iter().filter(|thread| !thread.is_finished()) {
            let _ = thread.kill(kick_signal());
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        // Where no reason was given before, what has failed is reported elsewhere.
        self.exit.request(Exit::Quit);
        self.barrier.end();
        // All of them in each round: one may wait for a device that another one holds, which a
        // reader that sleeps keeps in its write. Such a write begins again until its thread sees
        // the request, so the kick is repeated.
        while self.threads.iter().any(|thread| !thread.is_finished()) {
            self.kick();
            thread::sleep(Duration::from_millis(1));
        }
        for thread in self.threads.drain(..) {
            // A panic has requested the exit.
            let _ = thread.join();
        }
        for (id, exits) in self.guest.exits().into_iter().enumerate() {
            log::debug!("vcpu{id} left the guest for {exits}");
        }
    }
}

fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

thread_local! {
    /// Where this thread's vCPU has `immediate_exit`, as long as the thread holds a share of it.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// Interrupts what the thread waits for in the kernel. Should it be about to enter the guest, it
/// comes back at once.
extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    leave_guest();
}

/// Has this thread, if it is a vCPU's, go to the barrier before its guest runs on.
pub fn leave_guest() {
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: it points into the mapping of this thread's vCPU, which the thread has a share of
        // until it takes the pointer back; this thread alone writes the byte, in one store.
        unsafe { immediate_exit.write_volatile(1) };
    }
}
