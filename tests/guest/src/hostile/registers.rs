//! Each register with each width, at each offset.

use alloc::format;

use super::rig::{Bench, Rig};
use super::{Failure, Runner, pci, settle};
use crate::region::Region;
use crate::virtio::device::VirtioDevice;
use crate::virtio::mmio::{MAGIC_VALUE, WINDOW_SIZE, Window, at};
use crate::virtio::net::feature;

/// What is written.
pub const VALUES: [u64; 3] = [0, u64::MAX, 0x0102_0304_0506_0708];

/// Where the registers and the configuration in a window end; beyond, fewer offsets are tried.
const REGISTERS: u64 = 0x140;
/// How far those are apart.
pub const STRIDE: usize = 0x75;

/// Reads and writes all of the NIC's registers.
pub fn run(runner: &mut Runner<'_>) {
    match runner.bench.nic {
        VirtioDevice::Mmio(window) => {
            for value in VALUES {
                in_both_states(runner, &format!("registers-{value:#x}"), |_| {
                    touch_all(window, value)
                });
            }
        }
        VirtioDevice::Pci(nic) => pci::run(runner, nic),
    }
}

/// Runs an attack on a device that was reset, and on one that runs.
pub fn in_both_states(
    runner: &mut Runner<'_>,
    name: &str,
    attack: impl Fn(&Bench) -> Result<(), Failure>,
) {
    runner.attack(&format!("{name}-after-reset"), |bench| {
        bench.nic.reset();
        attack(bench)
    });
    runner.attack(&format!("{name}-while-running"), |bench| {
        let mut rig = Rig::start(bench, feature::OFFLOADS)?;
        rig.offer_buffers();
        rig.prompt();
        let result = attack(bench);
        settle();
        result
    });
}

fn touch_all(window: Window, value: u64) -> Result<(), Failure> {
    let sparse = (REGISTERS..WINDOW_SIZE - 8).step_by(STRIDE);
    for offset in (0..REGISTERS).chain(sparse).chain([WINDOW_SIZE - 8]) {
        touch(window.registers, offset, value);
    }
    match window.registers.read::<u32>(at::MAGIC) {
        MAGIC_VALUE => Ok(()),
        other => Err(format!("the magic number became {other:#x}")),
    }
}

/// Writes and reads one offset with each width.
pub fn touch(region: Region, offset: u64, value: u64) {
    region.write(offset, value as u8);
    let _: u8 = region.read(offset);
    region.write(offset, value as u16);
    let _: u16 = region.read(offset);
    region.write(offset, value as u32);
    let _: u32 = region.read(offset);
    region.write(offset, value);
    let _: u64 = region.read(offset);
}
