//! What drivers of the crate `virtio-drivers` need: memory, and a way to a device.

use alloc::format;
use alloc::string::String;
use core::ptr::NonNull;

use virtio_drivers::transport::SomeTransport;
use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::pci::PciTransport;
use virtio_drivers::transport::pci::bus::{Cam, DeviceFunction, MmioCam, PciRoot};
use virtio_drivers::{BufferDirection, Hal, PhysAddr};

use super::device::VirtioDevice;
use super::mmio::{WINDOW_SIZE, Window};
use crate::memory::Shared;
use crate::pci::{Function, ecam};

/// The crate's view of memory: virtual addresses are physical ones.
#[derive(Debug)]
pub struct Identity;

// SAFETY: the pages come from the heap, zeroed and aligned, and have no other owner until they are
// freed; everything below 4 GiB is mapped one to one.
unsafe impl Hal for Identity {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        Shared::new(pages * virtio_drivers::PAGE_SIZE).into_raw()
    }

    unsafe fn dma_dealloc(_: PhysAddr, base: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: the crate frees what `dma_alloc` returned, with the same number of pages.
        drop(unsafe { Shared::from_raw(base, pages * virtio_drivers::PAGE_SIZE) });
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, _: usize) -> NonNull<u8> {
        NonNull::new(address as *mut u8).unwrap_or(NonNull::dangling())
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr() as PhysAddr
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

/// The crate's way to a device.
pub fn transport(device: VirtioDevice) -> Result<SomeTransport<'static>, String> {
    Ok(match device {
        VirtioDevice::Mmio(window) => by_window(window)?.into(),
        VirtioDevice::Pci(function) => by_bus(function.function)?.into(),
    })
}

fn by_window(window: Window) -> Result<MmioTransport<'static>, String> {
    let base = window.registers.base as *mut _;
    let header = NonNull::new(base).ok_or("the window is at address 0")?;
    // SAFETY: the window is mapped, was probed as a virtio-mmio device, and is there as long as the
    // machine.
    let transport = unsafe { MmioTransport::new(header, WINDOW_SIZE as usize) };
    transport.map_err(|error| format!("transport: {error}"))
}

fn by_bus(function: Function) -> Result<PciTransport, String> {
    // SAFETY: all of it is mapped and no RAM, and there as long as the machine; the crate looks at
    // bus 0 only.
    let access = unsafe { MmioCam::new(ecam() as *mut u8, Cam::Ecam) };
    let place = DeviceFunction {
        bus: 0,
        device: function.slot,
        function: 0,
    };
    PciTransport::new::<Identity, _>(&mut PciRoot::new(access), place)
        .map_err(|error| format!("transport: {error}"))
}
