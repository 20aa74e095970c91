//! What the machine's KVM can run.
//!
//! Some machines offer a `/dev/kvm` that emulates the guest's privileged code instruction by instruction (without VMX
//! or SVM underneath). It is good for small guests, but a stock Linux takes minutes to boot there or fails on an
//! instruction that the emulator lacks. No name or flag tells such a KVM apart for sure, so [`probe`] runs a loop of
//! known length in a guest of its own, at privilege level 0, and takes the time.

use std::time::{Duration, Instant};

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// How this KVM runs a guest's privileged code.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Privileged {
    /// By the processor: a stock Linux boots.
    Native,
    /// By an emulator, at about this speed: a stock Linux does not boot in useful time, or at all.
    Emulated {
        /// Simple instructions a second.
        instructions_per_second: u64,
    },
}

/// Why the KVM could not be probed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/kvm` is absent, or not for this user.
    #[error("cannot open /dev/kvm")]
    Open(#[source] kvm_ioctls::Error),
    /// A page of memory for the guest could not be had.
    #[error("cannot allocate a page for the KVM probe")]
    Memory(#[source] vm_memory::mmap::FromRangesError),
    /// The page could not be filled.
    #[error("cannot write the KVM probe's code")]
    Code(#[source] vm_memory::GuestMemoryError),
    /// A request to KVM failed.
    #[error("the KVM probe cannot {what}")]
    Request {
        /// What was requested.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The guest did something else than to run its loop and halt.
    #[error("the KVM probe's guest ended with {0}, not with HLT")]
    UnexpectedExit(String),
}

const NOT_KVM: &str = "see that it is KVM's device, as by `mknod /dev/kvm c 10 232`";

impl Error {
    /// What to do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Open(error) => match error.errno() {
                libc::ENOENT | libc::ENODEV | libc::ENXIO => {
                    "turn virtualization on in the firmware, and load it with `modprobe kvm-intel` or \
                     `modprobe kvm-amd`; in a container or VM have it passed in"
                }
                libc::EACCES | libc::EPERM => {
                    "run this as root, or join its group with `sudo usermod -aG kvm $USER` and log \
                     in again"
                }
                _ => NOT_KVM,
            },
            Self::Request { source, .. } if source.errno() == libc::ENOTTY => NOT_KVM,
            Self::Memory(_) => "free some memory, or raise the limit (`ulimit -v`)",
            Self::Request { source, .. } if source.errno() == libc::EBUSY => {
                "end what else uses the processor's virtualization, such as VirtualBox or VMware"
            }
            Self::Code(_) | Self::Request { .. } | Self::UnexpectedExit(_) => {
                "look for KVM's reason with `dmesg | grep -i kvm`, and try another kernel"
            }
        }
    }
}

/// Rounds of the loop.
const ROUNDS: u32 = 300_000;
/// Instructions a round.
const ROUND_LENGTH: u32 = 2;
/// A processor needs 1 ms at most for the loop, an emulated level 0 more than 100 ms.
const LIMIT: Duration = Duration::from_millis(15);
/// Tries before a slow result is believed: another load on the machine may have delayed the first.
const TRIES: u32 = 3;
/// Further tries are made for as long, since on a loaded machine each of the first may be delayed.
const PATIENCE: Duration = Duration::from_secs(1);
/// Where the code lies, and the page's address.
const CODE: GuestAddress = GuestAddress(0);
const PAGE_SIZE: usize = 0x1000;

/// Finds out how this machine's KVM runs privileged guest code: a millisecond where it is native, about a second where
/// it is emulated.
///
/// # Errors
///
/// When there is no usable `/dev/kvm`, or a request to it fails.
pub fn probe() -> Result<Privileged, Error> {
    let kvm = Kvm::new().map_err(Error::Open)?;
    Ok(judge(best_time(|| run_loop(&kvm))?))
}

/// The shortest time of the loop, tried again as long as that may help.
fn best_time(mut run: impl FnMut() -> Result<Duration, Error>) -> Result<Duration, Error> {
    let mut best = run()?;
    let (mut tries, mut spent) = (1, best);
    while best >= LIMIT && (tries < TRIES || spent < PATIENCE) {
        let time = run()?;
        best = best.min(time);
        spent += time;
        tries += 1;
    }
    Ok(best)
}

fn judge(time: Duration) -> Privileged {
    if time < LIMIT {
        return Privileged::Native;
    }
    let instructions = f64::from(ROUNDS * ROUND_LENGTH);
    Privileged::Emulated {
        instructions_per_second: (instructions / time.as_secs_f64()) as u64,
    }
}

/// Runs the loop once in a fresh VM of one page; returns the time from its first instruction to its HLT.
fn run_loop(kvm: &Kvm) -> Result<Duration, Error> {
    let request = |what| move |source| Error::Request { what, source };
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(CODE, PAGE_SIZE)]).map_err(Error::Memory)?;
    // mov ecx, ROUNDS; round: dec ecx; jnz round; hlt
    let [a, b, c, d] = ROUNDS.to_le_bytes();
    memory
        .write_slice(&[0xb9, a, b, c, d, 0x49, 0x75, 0xfd, 0xf4], CODE)
        .map_err(Error::Code)?;
    let userspace_addr = memory.get_host_address(CODE).map_err(Error::Code)? as u64;

    let vm = kvm.create_vm().map_err(request("create a VM"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: CODE.0,
        memory_size: PAGE_SIZE as u64,
        userspace_addr,
    };
    // SAFETY: the region must be valid memory as long as the VM exists: `memory` is PAGE_SIZE bytes there, and is
    // dropped after `vm`.
    unsafe { vm.set_user_memory_region(region) }.map_err(request("give the VM its memory"))?;

    let mut vcpu = vm.create_vcpu(0).map_err(request("create a vCPU"))?;
    let mut sregs = vcpu
        .get_sregs()
        .map_err(request("read the vCPU's segments"))?;
    sregs.cs = flat(0xb, 0x8);
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = flat(0x3, 0x10);
    }
    sregs.cr0 |= 1; // protected mode, no paging
    vcpu.set_sregs(&sregs)
        .map_err(request("write the vCPU's segments"))?;
    let mut regs = vcpu
        .get_regs()
        .map_err(request("read the vCPU's registers"))?;
    regs.rip = CODE.0;
    regs.rflags = 2; // the bit that is always set
    vcpu.set_regs(&regs)
        .map_err(request("write the vCPU's registers"))?;

    let start = Instant::now();
    match vcpu.run().map_err(request("run the vCPU"))? {
        VcpuExit::Hlt => Ok(start.elapsed()),
        other => Err(Error::UnexpectedExit(format!("{other:?}"))),
    }
}

/// A 32-bit segment over all of the address space, of a code or data type (Intel SDM 3, 3.4.5.1).
fn flat(type_: u8, selector: u16) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loop_within_the_limit_is_native() {
        assert_eq!(judge(Duration::from_micros(200)), Privileged::Native);
    }

    #[test]
    fn every_failure_has_a_remedy_of_its_own() {
        let request = |number| Error::Request {
            what: "create a VM",
            source: kvm_ioctls::Error::new(number),
        };
        let open = |number| Error::Open(kvm_ioctls::Error::new(number));
        for (error, remedy) in [
            (open(libc::ENOENT), "modprobe kvm-intel"),
            (open(libc::EACCES), "usermod -aG kvm"),
            (open(libc::EIO), "c 10 232"),
            (request(libc::ENOTTY), "c 10 232"),
            (request(libc::EBUSY), "VirtualBox"),
            (request(libc::EIO), "dmesg"),
            (Error::UnexpectedExit("Shutdown".into()), "dmesg"),
        ] {
            assert!(error.remedy().contains(remedy), "{error:?}");
        }
    }

    #[test]
    fn loop_that_is_delayed_several_times_is_tried_again() {
        let mut times = [40, 30, 25, 60, 1].map(Duration::from_millis).into_iter();
        let best = best_time(|| Ok(times.next().unwrap())).unwrap();
        assert_eq!(judge(best), Privileged::Native);
    }

    #[test]
    fn loop_that_is_always_slow_is_given_up() {
        let mut tries = 0;
        let run = || {
            tries += 1;
            Ok(Duration::from_millis(400))
        };
        best_time(run).unwrap();
        assert_eq!(tries, 3);
    }

    #[test]
    fn slow_loop_is_emulated_at_its_speed() {
        let emulated = Privileged::Emulated {
            instructions_per_second: 1_500_000,
        };
        assert_eq!(judge(Duration::from_millis(400)), emulated);
    }
}
