//! KVM: these modules alone use kvm-ioctls.
//!
//! [`vm`] is the virtual machine (memory, interrupts, notifications), [`vcpu`] a vCPU, [`guest`] all of
//! them, and [`state`] what can be saved of them; [`vcpus`] are their threads, and [`barrier`] is where
//! those stop. [`cpuid`] is what a vCPU says of itself, [`exits`] counts what it leaves the guest for,
//! [`crash`] is why it cannot go on, [`msi`] the routing table of MSI vectors, and [`probe`] finds out
//! what a host's KVM can run.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub mod barrier;
pub mod cpuid;
pub mod crash;
pub mod exits;
pub mod guest;
pub mod msi;
pub mod probe;
pub mod state;
pub mod vcpu;
pub mod vcpus;
pub mod vm;

/// Takes a lock whose holders leave nothing half done, even where they panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
