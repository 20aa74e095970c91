//! The state that KVM holds of a guest, as plain data. Nothing of the guest may run meanwhile.

use std::io;

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::vm::{VmError, call};

/// What KVM holds of a guest, apart from its memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct KvmState {
    pub(super) vcpus: Vec<VcpuState>,
    pub(super) vm: VmState,
}

/// The interrupt controllers, the timer and the clock that the vCPUs share.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct VmState {
    /// Both PICs and the I/O APIC, by their KVM_IRQCHIP_* numbers.
    pub irqchips: [kvm_irqchip; 3],
    pub pit: kvm_pit_state2,
    /// kvmclock, in nanoseconds.
    pub clock: u64,
}

/// The state of one vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// With the TSC.
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Reads it, with these MSRs as far as the vCPU has them.
    pub fn save(fd: &VcpuFd, msrs: &[u32]) -> Result<Self, VmError> {
        // First: KVM takes a pending INIT or start-up IPI into the registers with it.
        let mp_state = fd.get_mp_state().map_err(call("read a vCPU's state"))?;
        let failed = call("read a vCPU's registers");
        let msrs = msrs.iter().map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        });
        Ok(Self {
            mp_state,
            regs: fd.get_regs().map_err(&failed)?,
            sregs: fd.get_sregs().map_err(&failed)?,
            // 4 KiB hold what there is without AMX, which a process has to ask for.
            xsave: fd.get_xsave().map_err(&failed)?,
            xcrs: fd.get_xcrs().map_err(&failed)?,
            debug_regs: fd.get_debug_regs().map_err(&failed)?,
            lapic: fd.get_lapic().map_err(call("read a local APIC"))?,
            msrs: each_msr(msrs.collect(), |msrs| fd.get_msrs(msrs))?,
            events: fd.get_vcpu_events().map_err(&failed)?,
        })
    }

    /// Has the time stamp counter go on when this is written, as many as the vCPUs are: for a 0 KVM
    /// takes the offset that they all began with, whatever the guest has made of it
    /// (`kvm_synchronize_tsc` in arch/x86/kvm/x86.c). Other values would leave those apart that are
    /// written at different times.
    pub fn let_tsc_count_on(&mut self) {
        /// IA32_TIME_STAMP_COUNTER.
        const MSR_TSC: u32 = 0x10;
        for msr in self.msrs.iter_mut().filter(|msr| msr.index == MSR_TSC) {
            msr.data = 0;
        }
    }

    /// Writes it into a vCPU that has the same CPUID.
    pub fn restore(&self, fd: &VcpuFd) -> Result<(), VmError> {
        let failed = call("write a vCPU's registers");
        fd.set_mp_state(self.mp_state)
            .map_err(call("write a vCPU's state"))?;
        fd.set_regs(&self.regs).map_err(&failed)?;
        fd.set_sregs(&self.sregs).map_err(&failed)?;
        // KVM has none on a host without XSAVE, and takes none there.
        if self.xcrs.nr_xcrs > 0 {
            fd.set_xcrs(&self.xcrs).map_err(&failed)?;
        }
        // SAFETY: KVM reads no more than the 4 KiB of the struct, since this process has not
        // enabled a feature with a larger state (ARCH_REQ_XCOMP_GUEST_PERM).
        unsafe { fd.set_xsave(&self.xsave) }.map_err(&failed)?;
        fd.set_debug_regs(&self.debug_regs).map_err(&failed)?;
        // After the APIC's base, which is among the sregs; and before the MSRs, since its timer's
        // mode decides what the deadline means.
        fd.set_lapic(&self.lapic)
            .map_err(call("write a local APIC"))?;
        set_msrs(fd, &self.msrs)?;
        // Last: KVM_SET_REGS clears pending exceptions.
        fd.set_vcpu_events(&self.events).map_err(&failed)
    }
}

/// Sets MSRs. Those that KVM refuses are logged.
pub(super) fn set_msrs(fd: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<(), VmError> {
    let set = each_msr(msrs.to_vec(), |msrs| fd.set_msrs(msrs))?;
    for refused in msrs.iter().filter(|msr| !set.contains(msr)) {
        log::debug!("KVM does not set MSR {:#x}", refused.index);
    }
    Ok(())
}

/// Has KVM read or write MSRs, and returns those that it did: it stops at one that it refuses.
fn each_msr(
    msrs: Vec<kvm_msr_entry>,
    mut work: impl FnMut(&mut Msrs) -> Result<usize, kvm_ioctls::Error>,
) -> Result<Vec<kvm_msr_entry>, VmError> {
    /// KVM takes 255 (MAX_IO_MSRS in arch/x86/kvm/x86.c).
    const MOST: usize = 128;
    let what = "read or write MSRs";
    let mut done = Vec::with_capacity(msrs.len());
    let mut rest = &msrs[..];
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(MOST)];
        let mut list = Msrs::from_entries(part)
            .map_err(|error| VmError::Call(what, io::Error::other(format!("{error:?}"))))?;
        let count = work(&mut list).map_err(call(what))?;
        done.extend(&list.as_slice()[..count]);
        rest = &rest[count + usize::from(count < part.len())..];
    }
    Ok(done)
}
