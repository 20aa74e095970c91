//! A vCPU and the thread that runs it.

use std::cell::Cell;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::slice;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use boot::BootState;
use devices::bus::Bus;
use kvm_bindings::{CpuId, Msrs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::control::exit::{Exit, ExitRequest};
use crate::kvm::vm::{Vm, VmError, call};

/// The longest x86 instruction, in bytes.
const MAX_INSTRUCTION: usize = 15;

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
}

/// A vCPU that does not run yet.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    id: u8,
    buses: Arc<DeviceBuses>,
}

impl Vcpu {
    /// A vCPU with this APIC id, which KVM holds until it gets an INIT and a start-up IPI, unless
    /// [`Vcpu::set_entry`] makes it the first to run.
    ///
    /// # Errors
    ///
    /// Says what KVM refused.
    pub fn new(
        vm: &Vm,
        id: u8,
        cpuid: &CpuId,
        boot: &BootState,
        buses: Arc<DeviceBuses>,
    ) -> Result<Self, VmError> {
        let fd = vm.create_vcpu(id)?;
        fd.set_cpuid2(cpuid)
            .map_err(call("set up a vCPU's CPUID"))?;
        fd.set_fpu(&boot.fpu).map_err(call("set a vCPU's FPU"))?;
        let msrs = Msrs::from_entries(&boot.msrs).map_err(|error| {
            VmError::Call("take so many MSRs", io::Error::other(format!("{error:?}")))
        })?;
        let set = fd.set_msrs(&msrs).map_err(call("set a vCPU's MSRs"))?;
        if let Some(refused) = boot.msrs.get(set) {
            log::debug!(
                "KVM does not know MSR {:#x} nor sets those after it",
                refused.index
            );
        }
        Ok(Self { fd, id, buses })
    }

    /// Lets this vCPU begin at the kernel's entry.
    ///
    /// # Errors
    ///
    /// Says what KVM refused.
    pub fn set_entry(&self, boot: &BootState) -> Result<(), VmError> {
        let mut sregs = self
            .fd
            .get_sregs()
            .map_err(call("tell a vCPU's system registers"))?;
        boot.apply_sregs(&mut sregs);
        self.fd
            .set_sregs(&sregs)
            .map_err(call("set a vCPU's system registers"))?;
        self.fd
            .set_regs(&boot.regs)
            .map_err(call("set a vCPU's registers"))
    }

    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// Fails when the host has no thread left.
    pub fn start(self) -> io::Result<VcpuThread> {
        let name = format!("vcpu{}", self.id);
        let exit = Arc::clone(&self.buses.exit);
        let body = move || {
            let mut vcpu = self;
            // A panic of one vCPU must end the others too, and be told.
            if catch_unwind(AssertUnwindSafe(|| vcpu.run())).is_err() {
                exit.request(Exit::Failure(format!(
                    "the thread of vCPU {} panicked",
                    vcpu.id
                )));
            }
        };
        thread::Builder::new()
            .name(name)
            .spawn(body)
            .map(VcpuThread)
    }

    fn run(&mut self) {
        let _kicked = Kicked::let_in(&mut self.fd);
        while self.buses.exit.reason().is_none() {
            let reason = match self.fd.run() {
                Ok(VcpuExit::IoIn(port, data)) => {
                    let (start, len) = (data.as_mut_ptr(), data.len());
                    let width = self.port_width();
                    // SAFETY: it is the slice that KVM_RUN gave, in memory that is mapped as long as
                    // `fd`; until the next KVM_RUN nobody else accesses it, and `port_width` looks
                    // at another part only.
                    let data = unsafe { slice::from_raw_parts_mut(start, len) };
                    self.buses.ports.read_each(port.into(), width, data);
                    continue;
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    let (start, len) = (data.as_ptr(), data.len());
                    let width = self.port_width();
                    // SAFETY: as above.
                    let data = unsafe { slice::from_raw_parts(start, len) };
                    self.buses.ports.write_each(port.into(), width, data);
                    continue;
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    self.buses.mmio.read(address, data);
                    continue;
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    self.buses.mmio.write(address, data);
                    continue;
                }
                // A kick, or a signal of somebody else's.
                Ok(VcpuExit::Intr | VcpuExit::Hlt) => continue,
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
                Ok(VcpuExit::Shutdown) => "triple fault".to_owned(),
                Ok(VcpuExit::InternalError) => "KVM internal error".to_owned(),
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    format!(
                        "the CPU refused to enter the guest (reason {reason:#x}, host CPU {cpu})"
                    )
                }
                Ok(other) => format!("unexpected exit from KVM: {other:?}"),
                Err(error) => format!("KVM_RUN failed: {error}"),
            };
            let what = self.describe_crash(&reason);
            self.buses.exit.request(Exit::Crash(what));
        }
    }

    /// The width of the port access that KVM has just left with, which a string instruction may
    /// repeat.
    fn port_width(&mut self) -> usize {
        // SAFETY: after KVM_EXIT_IO it is this member of the union that KVM has filled; it holds
        // integers only.
        let width = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io.size };
        width.into()
    }

    /// The reason with where it happened, what stands there, and what may help.
    fn describe_crash(&mut self, reason: &str) -> String {
        let mut text = format!("{reason} on vCPU {}", self.id);
        if reason == "KVM internal error" {
            // SAFETY: KVM has just left with KVM_EXIT_INTERNAL_ERROR, for which it fills this
            // member of the union; it holds integers only.
            let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
            let _ = write!(text, " (suberror {suberror})");
        }
        if let (Ok(regs), Ok(sregs)) = (self.fd.get_regs(), self.fd.get_sregs()) {
            if (sregs.cs.base, regs.rip) == RESET_VECTOR {
                // KVM resets a vCPU that shut down on AMD (svm.c, shutdown_interception).
                text.push_str("; its RIP is lost, since KVM has reset the vCPU");
                return text;
            }
            let _ = write!(text, " at RIP {:#x}", regs.rip);
            // In 64-bit mode the base is 0.
            let bytes = self.instruction(sregs.cs.base.wrapping_add(regs.rip));
            text.push_str(if bytes.is_empty() {
                ", where there is no memory"
            } else {
                ", instruction bytes"
            });
            for byte in bytes {
                let _ = write!(text, " {byte:02x}");
            }
        }
        if looks_emulated() {
            text.push_str(
                "\n  hint: this host's CPU shows neither svm nor vmx in /proc/cpuinfo, so its KVM is \
                 emulated in software: it may lack instructions that the guest uses",
            );
        }
        text
    }

    fn instruction(&self, linear: u64) -> Vec<u8> {
        let translate = |linear| {
            let translated = self.fd.translate_gva(linear).ok()?;
            (translated.valid != 0).then_some(GuestAddress(translated.physical_address))
        };
        read_linear(&self.buses.memory, linear, MAX_INSTRUCTION, translate)
    }
}

/// The base of CS and the RIP after a reset (AMD64 manual volume 2, 14.1.3).
const RESET_VECTOR: (u64, u64) = (0xffff_0000, 0xfff0);

/// Up to `len` bytes at a linear address, fewer where the memory ends; `translate` knows where its
/// pages are.
fn read_linear(
    memory: &GuestMemoryMmap,
    linear: u64,
    len: usize,
    translate: impl Fn(u64) -> Option<GuestAddress>,
) -> Vec<u8> {
    const PAGE: u64 = 0x1000;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let next = linear.wrapping_add(bytes.len() as u64);
        let rest = (PAGE - next % PAGE).min((len - bytes.len()) as u64) as usize;
        let mut part = [0; PAGE as usize];
        let read = translate(next).map(|at| memory.read_slice(&mut part[..rest], at));
        match read {
            Some(Ok(())) => bytes.extend(&part[..rest]),
            _ => break,
        }
    }
    bytes
}

fn looks_emulated() -> bool {
    let Ok(cpuinfo) = fs::read_to_string("/proc/cpuinfo") else {
        return false;
    };
    let flags = cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    !flags
        .split_whitespace()
        .any(|flag| flag == "svm" || flag == "vmx")
}

/// A running vCPU.
#[derive(Debug)]
pub struct VcpuThread(JoinHandle<()>);

/// Waits for the end of all threads, once an exit has been requested.
pub fn join(threads: Vec<VcpuThread>) {
    // All of them in each round: one may wait for a device that another one holds, which a reader
    // that sleeps keeps in its write. Such a write begins again until its thread sees the request,
    // so the kick is repeated.
    let is_running = |thread: &&VcpuThread| !thread.0.is_finished();
    while threads.iter().any(|thread| is_running(&thread)) {
        for thread in threads.iter().filter(is_running) {
            let _ = thread.0.kill(kick_signal());
        }
        thread::sleep(Duration::from_millis(1));
    }
    for thread in threads {
        // Its panic has been told already.
        let _ = thread.0.join();
    }
}

fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

thread_local! {
    /// Where this thread's vCPU has `immediate_exit` (KVM's api.rst, 5), while it runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// Lets kicks reach this thread's vCPU. Ends before the vCPU does.
struct Kicked;

impl Kicked {
    fn let_in(fd: &mut VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(&raw mut fd.get_kvm_run().immediate_exit);
        Self
    }
}

impl Drop for Kicked {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// Sets up the signal that [`join`] uses. Once, before any vCPU starts.
///
/// # Errors
///
/// Fails when the kernel refuses the handler.
pub fn prepare_kicks() -> io::Result<()> {
    register_signal_handler(kick_signal(), kicked).map_err(Into::into)
}

/// Interrupts what the thread waits for in the kernel. Should it be about to enter the guest, it
/// comes back at once.
extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: it points into the mapping of this thread's vCPU, which `Kicked` ends before; the
        // kernel alone reads it, and nobody holds a reference to this byte.
        unsafe { immediate_exit.write_volatile(1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_over_the_end_of_a_page_are_those_of_the_next_linear_one() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        memory
            .write_slice(&[1, 2, 3], GuestAddress(0x1ffd))
            .unwrap();
        memory.write_slice(&[9; 16], GuestAddress(0x2000)).unwrap();
        memory
            .write_slice(&[4, 5, 6], GuestAddress(0x3000))
            .unwrap();
        // The second page is in another place, the third in none, the fourth beyond the memory.
        let translate = |linear| match linear & !0xfff {
            0x7000 => Some(GuestAddress(0x1000 + linear % 0x1000)),
            0x8000 => Some(GuestAddress(0x3000 + linear % 0x1000)),
            0xa000 => Some(GuestAddress(0x10_0000)),
            _ => None,
        };
        let read = |linear| read_linear(&memory, linear, 6, translate);
        assert_eq!(read(0x7ffd), [1, 2, 3, 4, 5, 6]);
        assert_eq!(read(0x7ffa), [0, 0, 0, 1, 2, 3]);
        assert_eq!(read(0x8ffe), [0, 0]);
        assert!(read(0x9000).is_empty());
        assert!(read(0xa000).is_empty());
    }
}
