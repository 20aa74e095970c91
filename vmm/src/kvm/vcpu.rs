//! A vCPU: how it starts, what it exits for, and its state.

use std::slice;
use std::sync::Arc;

use boot::BootState;
use devices::bus::Bus;
use kvm_bindings::CpuId;
use kvm_ioctls::{KvmNestedStateBuffer, VcpuExit, VcpuFd};
use vm_memory::GuestMemoryMmap;

use super::crash::{Crash, CrashReason};
use super::exits::Exits;
use super::state::{VcpuState, set_msrs};
use super::vm::{Vm, VmError, call};
use crate::control::exit::{Exit, ExitRequest};
use crate::tty::output::Output;

/// What every vCPU of a machine shares.
#[derive(Debug)]
pub struct DeviceBuses {
    /// Guest memory.
    pub memory: Arc<GuestMemoryMmap>,
    /// Devices at I/O ports.
    pub ports: Bus,
    /// Devices in the memory hole.
    pub mmio: Bus,
    /// Where a vCPU says that the guest has ended.
    pub exit: Arc<ExitRequest>,
    /// What the serial port writes to.
    pub console: Option<Arc<Output>>,
}

/// A vCPU without registers, which nothing is needed for but a VM.
#[derive(Debug)]
pub struct NewVcpu {
    fd: VcpuFd,
    id: u8,
}

impl NewVcpu {
    /// One with this APIC id.
    pub fn create(vm: &Vm, id: u8, cpuid: &CpuId) -> Result<Self, VmError> {
        let fd = vm.create_vcpu(id)?;
        fd.set_cpuid2(cpuid)
            .map_err(call("set up a vCPU's CPUID"))?;
        Ok(Self { fd, id })
    }
}

/// A vCPU that does not run yet.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    id: u8,
    buses: Arc<DeviceBuses>,
    pub(super) exits: Arc<Exits>,
}

impl Vcpu {
    /// A vCPU whose accesses to devices go to `buses`.
    pub fn new(new: NewVcpu, buses: Arc<DeviceBuses>) -> Self {
        let NewVcpu { fd, id } = new;
        Self {
            fd,
            id,
            buses,
            exits: Arc::default(),
        }
    }

    /// Sets what every vCPU of a machine begins with.
    pub(super) fn set_up(&self, boot: &BootState) -> Result<(), VmError> {
        self.fd
            .set_fpu(&boot.fpu)
            .map_err(call("set a vCPU's FPU"))?;
        set_msrs(&self.fd, &boot.msrs)
    }

    /// Lets this vCPU begin at the kernel's entry.
    pub(super) fn set_entry(&self, boot: &BootState) -> Result<(), VmError> {
        let mut sregs = self
            .fd
            .get_sregs()
            .map_err(call("read a vCPU's system registers"))?;
        boot.apply_sregs(&mut sregs);
        self.fd
            .set_sregs(&sregs)
            .map_err(call("set a vCPU's system registers"))?;
        self.fd
            .set_regs(&boot.regs)
            .map_err(call("set a vCPU's registers"))
    }

    /// Reads its state, while its thread waits at the barrier.
    pub(super) fn save(&self, msrs: &[u32]) -> Result<VcpuState, VmError> {
        VcpuState::save(&self.fd, msrs)
    }

    /// Writes its state, while its thread waits at the barrier.
    pub(super) fn restore(&self, state: &VcpuState) -> Result<(), VmError> {
        state.restore(&self.fd)
    }

    /// What KVM holds of a hypervisor that runs in it, apart from what is in guest memory; `None`
    /// where this KVM has no such state.
    pub(super) fn nested_state(&self) -> Option<Box<KvmNestedStateBuffer>> {
        let mut state = Box::new(KvmNestedStateBuffer::empty());
        self.fd.nested_state(&mut state).ok().map(|_| state)
    }

    /// Writes that, before all other state: it decides whose registers they are.
    pub(super) fn set_nested_state(&self, state: &KvmNestedStateBuffer) -> Result<(), VmError> {
        self.fd
            .set_nested_state(state)
            .map_err(call("take a vCPU out of nested virtualization"))
    }

    /// Marks the guest's kvmclock, if it uses that, as paused (KVM_KVMCLOCK_CTRL), for its
    /// watchdogs.
    pub(super) fn was_paused(&self) {
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Where a signal handler ends a KVM_RUN that is about to begin (KVM's api.rst, 5), as long as
    /// this vCPU exists.
    pub(super) fn immediate_exit(&mut self) -> *mut u8 {
        &raw mut self.fd.get_kvm_run().immediate_exit
    }

    /// Runs the guest until this thread is kicked or the guest ends, and sends what is left of its
    /// output. KVM has completed the last access to a device then: it does so as it enters KVM_RUN,
    /// which only then looks at `immediate_exit`.
    pub(super) fn run(&mut self) {
        self.run_until_kicked();
        if let Some(console) = &self.buses.console {
            console.send_unless_busy();
        }
    }

    /// Sends what the serial port has to send, now that its lock is free again.
    fn send_output(&self) {
        if let Some(console) = &self.buses.console {
            console.send_if_due();
        }
    }

    fn run_until_kicked(&mut self) {
        while self.buses.exit.reason().is_none() {
            let exits = &self.exits;
            let reason = match self.fd.run() {
                Ok(VcpuExit::IoIn(port, data)) => {
                    exits.io_in.add();
                    let (start, len) = (data.as_mut_ptr(), data.len());
                    let width = self.port_width();
                    // SAFETY: it is the slice that KVM_RUN gave, in memory that is mapped as long
                    // as `fd`; until the next KVM_RUN nothing else accesses it, and `port_width`
                    // looks at another part only.
                    let data = unsafe { slice::from_raw_parts_mut(start, len) };
                    self.buses.ports.read_each(port.into(), width, data);
                    self.send_output();
                    continue;
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    exits.io_out.add();
                    let (start, len) = (data.as_ptr(), data.len());
                    let width = self.port_width();
                    // SAFETY: as above.
                    let data = unsafe { slice::from_raw_parts(start, len) };
                    self.buses.ports.write_each(port.into(), width, data);
                    self.send_output();
                    continue;
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    exits.mmio_read.add();
                    self.buses.mmio.read(address, data);
                    continue;
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    exits.mmio_write.add();
                    self.buses.mmio.write(address, data);
                    continue;
                }
                Ok(VcpuExit::Hlt) => {
                    exits.hlt.add();
                    continue;
                }
                // A kick, or another signal.
                Ok(VcpuExit::Intr) => return self.interrupted(),
                Err(error) if error.errno() == libc::EINTR => return self.interrupted(),
                Err(error) if error.errno() == libc::EAGAIN => continue,
                Ok(VcpuExit::Shutdown) => CrashReason::TripleFault,
                Ok(VcpuExit::InternalError) => CrashReason::Internal(self.suberror()),
                Ok(VcpuExit::FailEntry(reason, cpu)) => CrashReason::FailEntry(reason, cpu),
                Ok(other) => CrashReason::Unexpected(format!("{other:?}")),
                Err(error) => CrashReason::Run(error.to_string()),
            };
            // While a reader that is slow is still waited for.
            if let Some(console) = &self.buses.console {
                console.send();
            }
            self.exits.other.add();
            let crash = Crash::of(self.id, reason, &self.fd, &self.buses.memory);
            self.buses.exit.request(Exit::Crash(crash));
        }
    }

    fn interrupted(&mut self) {
        self.exits.interrupted.add();
        self.fd.set_kvm_immediate_exit(0);
    }

    /// The width of the port access that KVM has just left with, which a string instruction may
    /// repeat.
    fn port_width(&mut self) -> usize {
        // SAFETY: after KVM_EXIT_IO it is this member of the union that KVM has filled; it holds
        // integers only.
        let width = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io.size };
        width.into()
    }

    fn suberror(&mut self) -> u32 {
        // SAFETY: KVM has just left with KVM_EXIT_INTERNAL_ERROR, for which it fills this
        // member of the union; it holds integers only.
        unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror }
    }
}
