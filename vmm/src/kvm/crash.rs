//! A guest that its KVM cannot run on: why, where, and what may help.

use std::fmt;
use std::fs;

use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The longest x86 instruction, in bytes.
const MAX_INSTRUCTION: usize = 15;
/// The base of CS and the RIP after a reset (AMD64 manual volume 2, 14.1.3).
const RESET_VECTOR: (u64, u64) = (0xffff_0000, 0xfff0);

/// A vCPU that cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crash {
    /// The vCPU's number.
    pub vcpu: u8,
    /// What KVM said.
    pub reason: CrashReason,
    /// Where it was, if KVM has that.
    pub place: Option<CrashPlace>,
    /// The host's CPU has neither SVM nor VMX, so its KVM is emulated in software.
    pub is_emulated: bool,
}

/// What KVM says of a vCPU that cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CrashReason {
    /// KVM_EXIT_SHUTDOWN.
    TripleFault,
    /// KVM_EXIT_INTERNAL_ERROR, with its suberror.
    Internal(u32),
    /// KVM_EXIT_FAIL_ENTRY, with the hardware's reason and the host's CPU.
    FailEntry(u64, u32),
    /// An exit that minivmm does not ask for.
    Unexpected(String),
    /// An error of KVM_RUN.
    Run(String),
}

/// Where a vCPU has crashed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CrashPlace {
    /// KVM resets a vCPU that shuts down on AMD (svm.c, shutdown_interception).
    Lost,
    /// At this RIP, with the bytes there, if there is memory.
    At(u64, Vec<u8>),
}

impl Crash {
    pub(super) fn of(vcpu: u8, reason: CrashReason, fd: &VcpuFd, memory: &GuestMemoryMmap) -> Self {
        Self {
            vcpu,
            reason,
            place: place(fd, memory),
            is_emulated: !has_virtualization(),
        }
    }
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vcpu = self.vcpu;
        match &self.reason {
            CrashReason::TripleFault => write!(f, "triple fault on vCPU {vcpu}")?,
            CrashReason::Internal(suberror) => {
                write!(f, "KVM internal error on vCPU {vcpu} (suberror {suberror})")?;
            }
            CrashReason::FailEntry(reason, cpu) => write!(
                f,
                "the CPU refused to enter the guest (reason {reason:#x}, host CPU {cpu}) on vCPU {vcpu}"
            )?,
            CrashReason::Unexpected(exit) => {
                write!(f, "unexpected exit from KVM: {exit} on vCPU {vcpu}")?;
            }
            CrashReason::Run(error) => write!(f, "KVM_RUN failed: {error} on vCPU {vcpu}")?,
        }
        match &self.place {
            None => {}
            Some(CrashPlace::Lost) => {
                return f.write_str("; its RIP is lost, since KVM has reset the vCPU");
            }
            Some(CrashPlace::At(rip, bytes)) if bytes.is_empty() => {
                write!(f, " at RIP {rip:#x}, where there is no memory")?;
            }
            Some(CrashPlace::At(rip, bytes)) => {
                write!(f, " at RIP {rip:#x}, instruction bytes")?;
                bytes.iter().try_for_each(|byte| write!(f, " {byte:02x}"))?;
            }
        }
        if self.is_emulated {
            f.write_str(
                "\n  hint: this host's CPU shows neither svm nor vmx in /proc/cpuinfo, so its KVM is \
                 emulated in software: it may lack instructions that the guest uses",
            )?;
        }
        Ok(())
    }
}

fn place(fd: &VcpuFd, memory: &GuestMemoryMmap) -> Option<CrashPlace> {
    let (regs, sregs) = (fd.get_regs().ok()?, fd.get_sregs().ok()?);
    if (sregs.cs.base, regs.rip) == RESET_VECTOR {
        return Some(CrashPlace::Lost);
    }
    let translate = |linear| {
        let translated = fd.translate_gva(linear).ok()?;
        (translated.valid != 0).then_some(GuestAddress(translated.physical_address))
    };
    // In 64-bit mode the base is 0.
    let linear = sregs.cs.base.wrapping_add(regs.rip);
    let bytes = read_linear(memory, linear, MAX_INSTRUCTION, translate);
    Some(CrashPlace::At(regs.rip, bytes))
}

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

/// Without the file the answer is yes: there is nothing to say then.
fn has_virtualization() -> bool {
    let Ok(cpuinfo) = fs::read_to_string("/proc/cpuinfo") else {
        return true;
    };
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"));
    let mut flags = flags.unwrap_or_default().split_whitespace();
    flags.any(|flag| flag == "svm" || flag == "vmx")
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
