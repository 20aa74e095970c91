//! All that KVM holds of a guest: the virtual machine and its vCPUs.

use std::fmt;
use std::sync::{Arc, Mutex};

use boot::BootState;
use kvm_ioctls::KvmNestedStateBuffer;

use super::exits::{ExitCounts, Exits};
use super::lock;
use super::state::KvmState;
use super::vcpu::{DeviceBuses, NewVcpu, Vcpu};
use super::vm::{Vm, VmError};

/// A virtual machine and its vCPUs. Each vCPU is locked while it runs.
#[derive(Debug)]
pub struct KvmGuest {
    vm: Vm,
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
    exits: Vec<Arc<Exits>>,
}

/// What KVM holds of a guest that has not run yet, from which it can begin again.
pub struct PowerOn {
    state: KvmState,
    /// Where this KVM has any: that no vCPU is, or has, a hypervisor.
    nested: Vec<Option<Box<KvmNestedStateBuffer>>>,
}

impl fmt::Debug for PowerOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PowerOn").finish_non_exhaustive()
    }
}

impl KvmGuest {
    /// vCPUs whose accesses to devices go to `buses`. KVM holds them until they get an INIT and a
    /// start-up IPI, unless [`KvmGuest::enter_at`] makes the first begin.
    pub fn new(vm: Vm, vcpus: Vec<NewVcpu>, buses: &Arc<DeviceBuses>) -> Self {
        let vcpus = vcpus.into_iter();
        let vcpus = vcpus.map(|new| Vcpu::new(new, Arc::clone(buses)));
        let (exits, vcpus) = vcpus
            .map(|vcpu| (Arc::clone(&vcpu.exits), Arc::new(Mutex::new(vcpu))))
            .unzip();
        Self { vm, vcpus, exits }
    }

    /// The vCPUs by their APIC ids.
    pub fn vcpus(&self) -> &[Arc<Mutex<Vcpu>>] {
        &self.vcpus
    }

    /// What each vCPU has left the guest for so far, also while it runs.
    pub fn exits(&self) -> Vec<ExitCounts> {
        self.exits.iter().map(|exits| exits.read()).collect()
    }

    /// Gives new vCPUs the registers that a kernel expects, and has the first begin at its entry.
    pub fn enter_at(&self, boot: &BootState) -> Result<(), VmError> {
        for (id, vcpu) in self.vcpus.iter().enumerate() {
            lock(vcpu).set_up(boot)?;
            if id == 0 {
                lock(vcpu).set_entry(boot)?;
            }
        }
        Ok(())
    }

    /// Reads what KVM holds of the guest, while no vCPU runs.
    pub fn save(&self) -> Result<KvmState, VmError> {
        let msrs = self.vm.msrs()?;
        let vcpus = self.vcpus.iter().map(|vcpu| lock(vcpu).save(&msrs));
        Ok(KvmState {
            vcpus: vcpus.collect::<Result<_, _>>()?,
            vm: self.vm.save()?,
        })
    }

    /// Writes what [`KvmGuest::save`] has read, into the same vCPUs or others like them of which
    /// none runs.
    pub fn restore(&self, state: &KvmState) -> Result<(), VmError> {
        if state.vcpus.len() != self.vcpus.len() {
            return Err(VmError::OtherCpus(state.vcpus.len()));
        }
        for (vcpu, state) in self.vcpus.iter().zip(&state.vcpus) {
            lock(vcpu).restore(state)?;
        }
        self.vm.restore(&state.vm)
    }

    /// Reads what [`KvmGuest::reset`] needs, before the guest runs.
    pub fn power_on(&self) -> Result<PowerOn, VmError> {
        let mut state = self.save()?;
        for vcpu in &mut state.vcpus {
            vcpu.let_tsc_count_on();
        }
        let nested = self.vcpus.iter().map(|vcpu| lock(vcpu).nested_state());
        Ok(PowerOn {
            state,
            nested: nested.collect(),
        })
    }

    /// Takes everything back that the guest has done, while no vCPU runs. From then on KVM does not
    /// touch guest memory by itself: whatever address the guest gave it is forgotten.
    pub fn reset(&self, power_on: &PowerOn) -> Result<(), VmError> {
        for (vcpu, nested) in self.vcpus.iter().zip(&power_on.nested) {
            if let Some(nested) = nested {
                lock(vcpu).set_nested_state(nested)?;
            }
        }
        self.restore(&power_on.state)
    }
}
