//! Each register with each width, at each offset.

use alloc::format;

use super::rig::Rig;
use super::{Failure, Runner};
use crate::virtio::card::Card;
use crate::virtio::mmio::{MAGIC_VALUE, WINDOW_SIZE, Window, at};
use crate::virtio::net::feature;

/// Where the registers and the configuration end; beyond, fewer offsets are tried.
const REGISTERS: u64 = 0x140;
const STRIDE: u64 = 0x75;

/// Reads and writes all of the window, on a device that was reset and on one that runs.
pub fn run(runner: &mut Runner<'_>) {
    let Card::Mmio(window) = runner.bench.card else {
        return;
    };
    for value in [0, u64::MAX, 0x0102_0304_0506_0708] {
        runner.attack(&format!("registers-{value:#x}-after-reset"), |bench| {
            bench.card.reset();
            touch_all(window, value)
        });
        runner.attack(&format!("registers-{value:#x}-while-running"), |bench| {
            let mut rig = Rig::start(bench, feature::OFFLOADS)?;
            rig.offer_buffers();
            rig.prompt();
            let result = touch_all(window, value);
            rig.settle();
            result
        });
    }
}

fn touch_all(window: Window, value: u64) -> Result<(), Failure> {
    let sparse = (REGISTERS..WINDOW_SIZE - 8).step_by(STRIDE as usize);
    for offset in (0..REGISTERS).chain(sparse).chain([WINDOW_SIZE - 8]) {
        let window = &window.registers;
        window.write(offset, value as u8);
        let _: u8 = window.read(offset);
        window.write(offset, value as u16);
        let _: u16 = window.read(offset);
        window.write(offset, value as u32);
        let _: u32 = window.read(offset);
        window.write(offset, value);
        let _: u64 = window.read(offset);
    }
    match window.registers.read::<u32>(at::MAGIC) {
        MAGIC_VALUE => Ok(()),
        other => Err(format!("the magic number became {other:#x}")),
    }
}
