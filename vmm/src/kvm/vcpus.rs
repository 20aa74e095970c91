//! The threads of a guest's vCPUs, and the barrier at which they stop.
//!
//! A thread holds its vCPU's lock while the vCPU runs. [`Vcpus::pause`] closes the barrier and
//! kicks every thread out of KVM_RUN; those that wait at the barrier hold no lock, so that the
//! control thread can read and write their vCPUs.

use std::cell::Cell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::thread::gettid;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::lock;
use super::state::KvmState;
use super::vcpu::Vcpu;
use super::vm::{Vm, VmError};
use crate::control::exit::{Exit, ExitRequest};

/// A VM's vCPUs, each with a thread. Dropping them ends the guest, and waits for the threads.
#[derive(Debug)]
pub struct Vcpus {
    vm: Vm,
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
    threads: Vec<JoinHandle<()>>,
    /// Of each thread, once it runs.
    thread_ids: Vec<Arc<OnceLock<i32>>>,
    barrier: Arc<Barrier>,
    exit: Arc<ExitRequest>,
}

impl Vcpus {
    /// Starts a thread for each vCPU.
    pub fn start(vm: Vm, vcpus: Vec<Vcpu>, exit: Arc<ExitRequest>) -> io::Result<Self> {
        register_signal_handler(kick_signal(), kicked)?;
        let mut started = Self {
            vm,
            barrier: Arc::new(Barrier::new(vcpus.len())?),
            vcpus: Vec::with_capacity(vcpus.len()),
            threads: Vec::with_capacity(vcpus.len()),
            thread_ids: Vec::with_capacity(vcpus.len()),
            exit,
        };
        for (id, vcpu) in (0..).zip(vcpus) {
            let vcpu = Arc::new(Mutex::new(vcpu));
            started.vcpus.push(Arc::clone(&vcpu));
            let thread = started.start_thread(id, vcpu)?;
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

    /// Has every vCPU stop. [`Vcpus::stopped`] says when all of them have.
    pub fn pause(&self) {
        self.barrier.close();
        self.kick();
    }

    /// The kernel's number of each vCPU's thread.
    pub fn thread_ids(&self) -> Vec<i32> {
        let ids = self.thread_ids.iter();
        // A thread says its own before anything else.
        ids.map(|id| *id.wait()).collect()
    }

    /// Readable once all vCPUs have stopped after [`Vcpus::pause`].
    pub fn stopped(&self) -> &EventFd {
        &self.barrier.full
    }

    /// Whether all vCPUs have stopped, and none can run before [`Vcpus::resume`].
    pub fn have_stopped(&self) -> bool {
        lock(&self.barrier.state).is_full()
    }

    /// Lets the vCPUs run again.
    pub fn resume(&self) {
        if self.have_stopped() {
            for vcpu in &self.vcpus {
                lock(vcpu).was_paused();
            }
        }
        self.barrier.open();
    }

    /// Reads what KVM holds of the guest, while all vCPUs have stopped.
    pub fn save(&self) -> Result<KvmState, VmError> {
        let msrs = self.vm.msrs()?;
        let vcpus = self.vcpus.iter().map(|vcpu| lock(vcpu).save(&msrs));
        Ok(KvmState {
            vcpus: vcpus.collect::<Result<_, _>>()?,
            vm: self.vm.save()?,
        })
    }

    /// Writes what [`Vcpus::save`] has read, into the same vCPUs or others like them that have
    /// stopped.
    pub fn restore(&self, state: &KvmState) -> Result<(), VmError> {
        if state.vcpus.len() != self.vcpus.len() {
            return Err(VmError::OtherCpus(state.vcpus.len()));
        }
        for (vcpu, state) in self.vcpus.iter().zip(&state.vcpus) {
            lock(vcpu).restore(state)?;
        }
        self.vm.restore(&state.vm)
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
        self.barrier.open();
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
    }
}

/// Where the threads wait while the guest is paused.
#[derive(Debug)]
struct Barrier {
    state: Mutex<BarrierState>,
    opened: Condvar,
    /// Signalled when the last thread comes to wait.
    full: EventFd,
}

#[derive(Debug)]
struct BarrierState {
    is_closed: bool,
    waiting: usize,
    threads: usize,
}

impl BarrierState {
    fn is_full(&self) -> bool {
        self.is_closed && self.waiting == self.threads
    }
}

impl Barrier {
    fn new(threads: usize) -> io::Result<Self> {
        Ok(Self {
            state: Mutex::new(BarrierState {
                is_closed: false,
                waiting: 0,
                threads,
            }),
            opened: Condvar::new(),
            full: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    fn close(&self) {
        let mut state = lock(&self.state);
        state.is_closed = true;
        // Those that were still waiting since the last time go on waiting.
        self.signal_if_full(&state);
    }

    fn open(&self) {
        lock(&self.state).is_closed = false;
        self.opened.notify_all();
    }

    /// Waits while the barrier is closed.
    fn pass(&self) {
        let mut state = lock(&self.state);
        if state.is_closed {
            state.waiting += 1;
            self.signal_if_full(&state);
            state = self
                .opened
                .wait_while(state, |state| state.is_closed)
                .unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
    }

    fn signal_if_full(&self, state: &BarrierState) {
        if state.is_full() {
            // Only a counter at its end could refuse.
            let _ = self.full.write(1);
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
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: it points into the mapping of this thread's vCPU, which the thread has a share of
        // until it takes the pointer back; this thread alone writes the byte, in one store.
        unsafe { immediate_exit.write_volatile(1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn barrier_is_full_once_every_thread_waits_and_again_when_closed_in_time() {
        let barrier = Barrier::new(2).unwrap();
        thread::scope(|scope| {
            barrier.pass();
            barrier.close();
            let first = scope.spawn(|| barrier.pass());
            assert!(barrier.full.read().is_err() && !lock(&barrier.state).is_full());
            let second = scope.spawn(|| barrier.pass());
            while barrier.full.read().is_err() {
                thread::yield_now();
            }
            // Whether they have left the barrier meanwhile or not.
            barrier.open();
            barrier.close();
            assert_eq!(lock(&barrier.state).is_full(), barrier.full.read().is_ok());
            barrier.open();
            assert!(!lock(&barrier.state).is_full());
            first.join().unwrap();
            second.join().unwrap();
        });
        assert_eq!(lock(&barrier.state).waiting, 0);
    }
}
