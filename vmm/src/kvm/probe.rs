//! What the machine's KVM can run.
//!
//! Some machines offer a `/dev/kvm` that emulates the guest's privileged code instruction by
//! instruction (without VMX or SVM underneath). It is good for small guests, but a stock Linux
//! takes minutes to boot there or fails on an instruction that the emulator lacks. No name or flag
//! identifies such a KVM for sure, so [`probe`] runs a loop of known length in a guest of its own,
//! at privilege level 0, and takes the time.

use std::io;
use std::time::Duration;

use kvm_bindings::kvm_segment;
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::vm::{Hypervisor, VmError, add_memory, call};

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

/// Rounds of the loop.
const ROUNDS: u32 = 60_000;
/// Instructions a round.
const ROUND_LENGTH: u32 = 2;
/// A processor needs 0.2 ms at most for the loop, an emulated level 0 more than 20 ms.
const LIMIT: Duration = Duration::from_millis(3);
/// Tries before a slow result is believed. What else runs on this machine does not count, but where the machine is a guest
/// its host may have delayed the first.
const TRIES: u32 = 3;
/// Further tries are made for as long, since on a loaded host each of the first may be delayed.
const PATIENCE: Duration = Duration::from_millis(100);
/// Where the code lies, and the page's address.
const CODE: GuestAddress = GuestAddress(0);
const PAGE_SIZE: usize = 0x1000;

/// Finds out how this machine's KVM runs privileged guest code: a millisecond where it is native,
/// about a tenth of a second where it is emulated.
///
/// # Errors
///
/// When there is no usable `/dev/kvm`, or a request to it fails.
pub fn probe() -> Result<Privileged, VmError> {
    let kvm = Hypervisor::open()?;
    Ok(judge(best_time(|| run_loop(&kvm.0))?))
}

/// The shortest time of the loop, tried again as long as that may help.
fn best_time(mut run: impl FnMut() -> Result<Duration, VmError>) -> Result<Duration, VmError> {
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

/// Runs the loop once in a fresh VM of one page; returns the time of this thread's from its first instruction to its HLT.
fn run_loop(kvm: &Kvm) -> Result<Duration, VmError> {
    let no_page = |error| VmError::Call("get a page for its probe", error);
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(CODE, PAGE_SIZE)])
        .map_err(|error| no_page(io::Error::other(error)))?;
    // mov ecx, ROUNDS; round: dec ecx; jnz round; hlt
    let [a, b, c, d] = ROUNDS.to_le_bytes();
    memory
        .write_slice(&[0xb9, a, b, c, d, 0x49, 0x75, 0xfd, 0xf4], CODE)
        .map_err(|error| no_page(io::Error::other(error)))?;
    let vm = kvm.create_vm().map_err(call("create a virtual machine"))?;
    // `memory` is dropped after `vm`.
    for region in memory.iter() {
        add_memory(&vm, 0, region)?;
    }
    let mut vcpu = vm.create_vcpu(0).map_err(call("create a vCPU"))?;
    let failed = call("set a vCPU's registers");
    let mut sregs = vcpu.get_sregs().map_err(&failed)?;
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
    vcpu.set_sregs(&sregs).map_err(&failed)?;
    let mut regs = vcpu.get_regs().map_err(&failed)?;
    regs.rip = CODE.0;
    regs.rflags = 2; // the bit that is always set
    vcpu.set_regs(&regs).map_err(&failed)?;

    let start = cpu_time();
    match vcpu.run().map_err(call("run a vCPU"))? {
        VcpuExit::Hlt => Ok(cpu_time().saturating_sub(start)),
        other => Err(VmError::Exit(format!("{other:?}"))),
    }
}

/// How long this thread has run.
fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: it writes to `time` alone, which outlives the call.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    debug_assert_eq!(failed, 0, "every Linux has this clock");
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
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
    fn loop_that_is_delayed_several_times_is_tried_again() {
        let mut times = [40, 30, 25, 1].map(Duration::from_millis).into_iter();
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
        assert_eq!(judge(Duration::from_millis(80)), emulated);
    }
}
