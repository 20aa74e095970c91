//! KVM: these modules alone use kvm-ioctls.
//!
//! [`vm`] is the virtual machine (memory, interrupts, notifications), [`vcpu`] a vCPU, [`vcpus`] are their threads, [`cpuid`]
//! is what a vCPU says of itself, [`crash`] why it cannot go on, [`msi`] the routing table of MSI vectors, and [`probe`] finds
//! out what a host's KVM can run.

pub mod cpuid;
pub mod crash;
pub mod msi;
pub mod probe;
pub mod state;
pub mod vcpu;
pub mod vcpus;
pub mod vm;
