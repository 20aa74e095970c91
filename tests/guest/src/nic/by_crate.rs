//! The NIC driven by the virtio-drivers crate: no offloads, frames of one buffer each.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ptr::NonNull;

use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::transport::SomeTransport;
use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::pci::PciTransport;
use virtio_drivers::transport::pci::bus::{Cam, DeviceFunction, MmioCam, PciRoot};
use virtio_drivers::{BufferDirection, Hal, PhysAddr};

use super::FRAME;
use crate::memory::Shared;
use crate::pci::{ECAM, Function};
use crate::virtio::mmio::{WINDOW_SIZE, Window};
use crate::virtio::net::HEADER;
use crate::virtio::net_device::NetDevice;

const QUEUE_SIZE: usize = 128;
const BUFFER: usize = 2048;

type Buffer = Box<[u8; BUFFER]>;

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

/// The NIC and its buffers, by the token that the crate gave for each.
pub struct CrateNic {
    raw: VirtIONetRaw<Identity, SomeTransport<'static>, QUEUE_SIZE>,
    receiving: [Option<Buffer>; QUEUE_SIZE],
    sending: [Option<(Buffer, usize)>; QUEUE_SIZE],
    spare: Vec<Buffer>,
}

impl CrateNic {
    /// Brings the device up and gives it buffers to receive into.
    pub fn start(nic: NetDevice) -> Result<Self, String> {
        let transport = match nic {
            NetDevice::Mmio(window) => by_window(window)?.into(),
            NetDevice::Pci(nic) => by_bus(nic.function)?.into(),
        };
        let raw =
            VirtIONetRaw::new(transport).map_err(|error| format!("virtio-drivers: {error}"))?;
        let mut nic = Self {
            raw,
            receiving: [const { None }; QUEUE_SIZE],
            sending: [const { None }; QUEUE_SIZE],
            spare: Vec::new(),
        };
        for _ in 0..QUEUE_SIZE {
            nic.receive_into(Box::new([0; BUFFER]))
                .map_err(|error| format!("virtio-drivers: {error}"))?;
        }
        Ok(nic)
    }

    /// Its address.
    pub fn mac(&self) -> [u8; 6] {
        self.raw.mac_address()
    }

    /// Acknowledges an interrupt. True when there was one.
    pub fn acknowledge_interrupt(&mut self) -> bool {
        !self.raw.ack_interrupt().is_empty()
    }

    /// The next received frame.
    pub fn take(&mut self) -> Option<Vec<u8>> {
        let token = self.raw.poll_receive()?;
        let mut buffer = self.receiving[usize::from(token)].take()?;
        // SAFETY: it is the buffer that was begun with this token.
        let done = unsafe { self.raw.receive_complete(token, &mut buffer[..]) };
        let frame = done
            .ok()
            .and_then(|(start, length)| Some(buffer.get(start..start + length)?.to_vec()));
        // The queue has just got room for one, and the buffer's size is right: it cannot be
        // refused.
        let _ = self.receive_into(buffer);
        frame
    }

    /// Whether frames are on their way out, as of the last [`CrateNic::can_send`].
    pub fn is_sending(&self) -> bool {
        self.sending.iter().any(Option::is_some)
    }

    /// Whether a frame can be sent now.
    pub fn can_send(&mut self) -> bool {
        while let Some(token) = self.raw.poll_transmit() {
            let Some((buffer, length)) = self.sending[usize::from(token)].take() else {
                return false;
            };
            // SAFETY: it is the buffer that was begun with this token.
            let _ = unsafe { self.raw.transmit_complete(token, &buffer[..length]) };
            self.spare.push(buffer);
        }
        self.raw.can_send()
    }

    /// Sends a frame that `fill` writes. It is lost when there is no room, see
    /// [`CrateNic::can_send`].
    pub fn send<R>(&mut self, length: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        assert!(length <= FRAME, "a frame of {length} bytes");
        let mut buffer = self.spare.pop().unwrap_or_else(|| Box::new([0; BUFFER]));
        let end = HEADER + length;
        buffer[..HEADER].fill(0);
        let result = fill(&mut buffer[HEADER..end]);
        // SAFETY: the buffer rests in `sending`, untouched, until the device has completed it.
        if let Ok(token) = unsafe { self.raw.transmit_begin(&buffer[..end]) } {
            self.sending[usize::from(token)] = Some((buffer, end));
        }
        result
    }

    fn receive_into(&mut self, mut buffer: Buffer) -> virtio_drivers::Result {
        // SAFETY: the buffer rests in `receiving`, untouched, until the device has completed it.
        let token = unsafe { self.raw.receive_begin(&mut buffer[..])? };
        self.receiving[usize::from(token)] = Some(buffer);
        Ok(())
    }
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
    // bus 0 only, where minivmm has the configuration space.
    let access = unsafe { MmioCam::new(ECAM as *mut u8, Cam::Ecam) };
    let place = DeviceFunction {
        bus: 0,
        device: function.slot,
        function: 0,
    };
    PciTransport::new::<Identity, _>(&mut PciRoot::new(access), place)
        .map_err(|error| format!("transport: {error}"))
}
