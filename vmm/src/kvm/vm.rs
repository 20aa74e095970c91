//! The virtual machine as KVM sees it: memory, interrupts, notifications, vCPUs.

use std::io;
use std::sync::Arc;

use boot::layout::{KVM_IDENTITY_MAP, KVM_TSS};
use devices::irq::IrqLine;
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_irqchip, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::fam;

use super::msi::{MsiRoutes, Routes};
use super::state::VmState;
use crate::config::Cpus;
use crate::plan::Gsi;

/// What went wrong between KVM and us.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// There is no KVM.
    #[error("there is no /dev/kvm")]
    NoKvm,
    /// There is one, for others.
    #[error("no permission to use /dev/kvm")]
    KvmForbidden,
    /// It is something else.
    #[error("/dev/kvm is not KVM, or not of version 12 (it answers {0})")]
    NotKvm(i32),
    /// It cannot be opened for another reason.
    #[error("cannot open /dev/kvm")]
    OpenKvm(#[source] io::Error),
    /// More vCPUs than this KVM has.
    #[error("{0} CPUs are more than the {1} that this host's KVM can run")]
    TooManyCpus(u8, usize),
    /// More leaves than KVM takes.
    #[error("cannot list so many CPUID leaves for KVM")]
    Cpuid(#[source] fam::Error),
    /// A saved state with another number of vCPUs.
    #[error("cannot restore the state of {0} vCPUs into a guest that has another number of them")]
    OtherCpus(usize),
    /// The guest of the probe did something else than to run its loop and halt.
    #[error("KVM ended the guest of its probe with {0}, not with HLT")]
    Exit(String),
    /// One of KVM's calls failed.
    #[error("KVM cannot {0}")]
    Call(&'static str, #[source] io::Error),
}

impl VmError {
    /// What to do about it, where the text does not say it.
    pub fn remedy(&self) -> Option<&'static str> {
        Some(match self {
            Self::NoKvm => {
                "enable virtualization in the firmware (in a VM, nested virtualization on its host), \
                 and load it with `modprobe kvm_intel` or `modprobe kvm_amd`; in a container have \
                 it passed in"
            }
            Self::KvmForbidden => {
                "become root, or join its group with `sudo usermod -aG kvm $USER` and log in again"
            }
            Self::NotKvm(_) | Self::OpenKvm(_) => {
                "see that it is KVM's device, as by `mknod /dev/kvm c 10 232`"
            }
            Self::TooManyCpus(..) | Self::Cpuid(_) | Self::OtherCpus(_) => return None,
            Self::Call(_, error) if error.raw_os_error() == Some(libc::EBUSY) => {
                "end what else uses the processor's virtualization, such as VirtualBox or VMware"
            }
            Self::Call(..) | Self::Exit(_) => {
                "look for KVM's reason with `dmesg | grep -i kvm`, and try another kernel"
            }
        })
    }
}

/// Names what KVM was asked to do, as it goes into the error.
pub(crate) fn call(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> VmError {
    move |error| VmError::Call(what, error.into())
}

/// The host's KVM, opened.
#[derive(Debug)]
pub struct Hypervisor(pub(super) Kvm);

impl Hypervisor {
    /// Opens /dev/kvm.
    pub fn open() -> Result<Self, VmError> {
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => VmError::NoKvm,
            libc::EACCES | libc::EPERM => VmError::KvmForbidden,
            _ => VmError::OpenKvm(error.into()),
        })?;
        match kvm.get_api_version() {
            version if version == KVM_API_VERSION as i32 => Ok(Self(kvm)),
            other => Err(VmError::NotKvm(other)),
        }
    }

    /// Makes sure that this KVM runs so many vCPUs.
    pub fn check_cpus(&self, cpus: Cpus) -> Result<(), VmError> {
        let (wanted, max) = (cpus.get(), self.0.get_max_vcpus());
        if usize::from(wanted) > max {
            Err(VmError::TooManyCpus(wanted, max))
        } else {
            Ok(())
        }
    }
}

/// The CPUID that KVM supports, and whether the vCPUs' timers know the TSC deadline mode, which is
/// not part of it (Documentation/virt/kvm/api.rst, 4.46).
pub type SupportedCpuid = (CpuId, bool);

/// A virtual machine with memory and interrupt controllers.
#[derive(Debug)]
pub struct Vm {
    hypervisor: Hypervisor,
    fd: Arc<VmFd>,
    routes: Arc<Routes>,
    /// KVM reads and writes it as long as the VM exists.
    _memory: Arc<GuestMemoryMmap>,
}

impl Vm {
    /// A machine with this memory, the interrupt controllers (APICs, PIC) and the PIT of a PC.
    pub fn new(hypervisor: Hypervisor, memory: Arc<GuestMemoryMmap>) -> Result<Self, VmError> {
        let fd = hypervisor
            .0
            .create_vm()
            .map_err(call("create a virtual machine"))?;
        fd.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(call("set the identity map"))?;
        fd.set_tss_address(KVM_TSS as usize)
            .map_err(call("set the TSS"))?;
        // Before the interrupt controllers: with them KVM waits for grace periods of its readers
        // whenever the memory changes, some milliseconds for each slot.
        for (slot, region) in (0..).zip(memory.iter()) {
            add_memory(&fd, slot, region)?;
        }
        fd.create_irq_chip()
            .map_err(call("create the interrupt controllers"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).map_err(call("create the timer"))?;
        let fd = Arc::new(fd);
        Ok(Self {
            hypervisor,
            routes: Arc::new(Routes::new(Arc::clone(&fd))),
            fd,
            _memory: memory,
        })
    }

    /// Connects an eventfd to an interrupt: each write raises one edge.
    pub fn register_irqfd(&self, line: &EventFd, gsi: Gsi) -> Result<(), VmError> {
        self.fd
            .register_irqfd(line, gsi.get())
            .map_err(call("connect an interrupt (irqfd)"))
    }

    /// Prepares MSI vectors, one for each of `lines`, to be connected as a guest sets up
    /// MSI-X.
    pub fn msi_routes(&self, lines: &[IrqLine]) -> io::Result<MsiRoutes> {
        let lines = lines
            .iter()
            .map(|line| line.eventfd().try_clone())
            .collect::<io::Result<_>>()?;
        Ok(self.routes.for_vectors(lines))
    }

    /// Has the guest's writes at `address` signal an eventfd, rather than stop the vCPU: those of
    /// 32 bits with this value, or any where there is none.
    pub fn register_ioeventfd(
        &self,
        kick: &EventFd,
        address: u64,
        value: Option<u32>,
    ) -> Result<(), VmError> {
        let address = IoEventAddress::Mmio(address);
        let registered = match value {
            Some(value) => self.fd.register_ioevent(kick, &address, value),
            None => self.fd.register_ioevent(kick, &address, NoDatamatch),
        };
        registered.map_err(call("watch a notification (ioeventfd)"))
    }

    /// What this KVM's vCPUs can be told to be.
    pub fn supported_cpuid(&self) -> Result<SupportedCpuid, VmError> {
        let cpuid = self
            .hypervisor
            .0
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(call("list the CPUID that it supports"))?;
        Ok((
            cpuid,
            self.hypervisor.0.check_extension(Cap::TscDeadlineTimer),
        ))
    }

    /// The MSRs that are a vCPU's state.
    pub(super) fn msrs(&self) -> Result<Vec<u32>, VmError> {
        let list = self
            .hypervisor
            .0
            .get_msr_index_list()
            .map_err(call("list its MSRs"))?;
        Ok(list.as_slice().to_vec())
    }

    /// Reads the state of what the vCPUs share.
    pub(super) fn save(&self) -> Result<VmState, VmError> {
        let mut irqchips = [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ]
        .map(|chip_id| kvm_irqchip {
            chip_id,
            ..Default::default()
        });
        for chip in &mut irqchips {
            self.fd
                .get_irqchip(chip)
                .map_err(call("read an interrupt controller"))?;
        }
        Ok(VmState {
            irqchips,
            pit: self.fd.get_pit2().map_err(call("read the timer"))?,
            clock: self.fd.get_clock().map_err(call("read its clock"))?.clock,
        })
    }

    /// Writes it, after the vCPUs' states: the I/O APIC passes pending interrupts on to their local
    /// APICs.
    pub(super) fn restore(&self, state: &VmState) -> Result<(), VmError> {
        for chip in &state.irqchips {
            self.fd
                .set_irqchip(chip)
                .map_err(call("write an interrupt controller"))?;
        }
        self.fd
            .set_pit2(&state.pit)
            .map_err(call("write the timer"))?;
        let clock = kvm_clock_data {
            clock: state.clock,
            ..Default::default()
        };
        self.fd.set_clock(&clock).map_err(call("write its clock"))
    }

    /// A new vCPU with this APIC id.
    pub(crate) fn create_vcpu(&self, id: u8) -> Result<VcpuFd, VmError> {
        self.fd
            .create_vcpu(id.into())
            .map_err(call("create a vCPU"))
    }
}

pub(super) fn add_memory(fd: &VmFd, slot: u32, region: &GuestRegionMmap) -> Result<(), VmError> {
    let slot = kvm_userspace_memory_region {
        slot,
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the range is one mapping of our own, which outlives `fd`'s VM: `Vm` holds the memory,
    // as do its vCPUs through the devices, and the probe drops its VM first. Regions do not
    // overlap, since `GuestMemoryMmap` refuses that.
    unsafe { fd.set_user_memory_region(slot) }.map_err(call("take the guest's memory"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_has_a_remedy_of_its_own() {
        let error = io::Error::from_raw_os_error;
        for (error, remedy) in [
            (VmError::NoKvm, "modprobe kvm_intel"),
            (VmError::KvmForbidden, "usermod -aG kvm"),
            (VmError::OpenKvm(error(libc::EIO)), "c 10 232"),
            (VmError::NotKvm(-1), "c 10 232"),
            (VmError::Call("run", error(libc::EBUSY)), "VirtualBox"),
            (VmError::Call("run", error(libc::EIO)), "dmesg"),
            (VmError::Exit("Shutdown".into()), "dmesg"),
        ] {
            let found = error.remedy().unwrap_or_default();
            assert!(found.contains(remedy), "{error:?}");
        }
    }
}
