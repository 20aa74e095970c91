//! KVM: these modules alone use kvm-ioctls.
//!
//! [`vm`] is the virtual machine (memory, interrupts, notifications), [`vcpu`] a vCPU and its thread, [`cpuid`] what a
//! vCPU says of itself, [`msi`] the routing table of MSI vectors, and [`probe`] finds out what a host's KVM can run.

pub mod cpuid;
pub mod msi;
pub mod probe;
pub mod vcpu;
pub mod vm;
