//! Which device gets which ports, window and interrupt. The boot tables and the devices both
//! read it here, so that they cannot disagree.

use boot::layout::{self, PCI_WINDOW, VIRTIO_MMIO_BASE, VIRTIO_MMIO_SIZE};
use boot::{Platform, VirtioMmio};
use devices::pci;
use devices::virtio::pci::BAR_LEN;
use vm_memory::GuestAddress;

/// A global system interrupt: an input of the I/O APIC, which has 24.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gsi(u32);

impl Gsi {
    /// The number, as KVM and ACPI take it.
    pub fn get(self) -> u32 {
        self.0
    }
}

/// How the guest reaches its virtio devices.
///
/// PCI is the default by measurement: with a stock kernel a ping takes 13 to 18 % fewer
/// instructions, and TCP carries 3 to 12 % more, since an interrupt costs no exits. Its enumeration
/// costs a boot 1 % more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// virtio-mmio: registers and an interrupt line for each device.
    Mmio,
    /// virtio-pci: a function on the PCI bus with an MSI-X vector for each queue.
    #[default]
    Pci,
}

/// Where a virtio device stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VirtioSlot {
    /// On virtio-mmio.
    Mmio {
        /// Where its [`VIRTIO_MMIO_SIZE`] bytes of registers begin.
        base: GuestAddress,
        /// Its interrupt.
        gsi: Gsi,
    },
    /// On the PCI bus.
    Pci {
        /// The number of the device on the bus.
        device: u8,
        /// Where its BAR 0 lies.
        bar: GuestAddress,
    },
}

/// COM1's interrupt.
pub const SERIAL_GSI: Gsi = Gsi(layout::SERIAL_GSI);
/// First port of the i8042.
pub const I8042_PORT: u16 = 0x60;
/// Ports of the i8042.
pub const I8042_PORTS: u64 = 5;
/// The power button's interrupt, through the ACPI generic event device.
pub const POWER_BUTTON_GSI: Gsi = Gsi(layout::POWER_BUTTON_GSI);
const FIRST_VIRTIO_GSI: u32 = 6;
/// Inputs of the I/O APIC that KVM emulates. MSI vectors have numbers from here on.
pub const GSIS: u32 = 24;
/// The most virtio-mmio devices: each gets an interrupt of its own.
pub const MAX_MMIO: usize = (GSIS - FIRST_VIRTIO_GSI) as usize;
/// The most virtio-pci devices: the bus has 32, and the host bridge is one.
pub const MAX_PCI: usize = pci::SLOTS - 1;

impl Transport {
    /// The most devices that it carries.
    pub fn max_devices(self) -> usize {
        match self {
            Self::Mmio => MAX_MMIO,
            Self::Pci => MAX_PCI,
        }
    }
}

/// More devices than the machine has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{wanted} virtio devices are more than the {max} that a guest can have: omit some --disk, --macvtap, --share, \
     --balloon or --vsock, or give --rng off"
)]
pub struct TooManyDevices {
    wanted: usize,
    max: usize,
}

/// The machine that the guest will find.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    cpus: u8,
    transport: Transport,
    virtio: Vec<VirtioSlot>,
    serial: bool,
}

impl Plan {
    /// A machine with `cpus` vCPUs, `devices` virtio devices, and COM1 if `serial`.
    pub fn new(
        cpus: u8,
        transport: Transport,
        devices: usize,
        serial: bool,
    ) -> Result<Self, TooManyDevices> {
        let max = transport.max_devices();
        if devices > max {
            return Err(TooManyDevices {
                wanted: devices,
                max,
            });
        }
        let slot = |n: u32| match transport {
            Transport::Mmio => VirtioSlot::Mmio {
                base: GuestAddress(VIRTIO_MMIO_BASE + u64::from(n) * u64::from(VIRTIO_MMIO_SIZE)),
                gsi: Gsi(FIRST_VIRTIO_GSI + n),
            },
            Transport::Pci => VirtioSlot::Pci {
                device: n as u8 + 1,
                bar: GuestAddress(PCI_WINDOW.0 + u64::from(n) * u64::from(BAR_LEN)),
            },
        };
        Ok(Self {
            cpus,
            transport,
            virtio: (0..devices as u32).map(slot).collect(),
            serial,
        })
    }

    /// How the guest reaches its devices.
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// The place of each virtio device, in order.
    pub fn virtio(&self) -> &[VirtioSlot] {
        &self.virtio
    }

    /// The machine in the boot tables' terms. A guest finds the devices on a PCI bus by itself.
    pub fn platform(&self) -> Platform {
        let as_mmio = |slot: &VirtioSlot| match *slot {
            VirtioSlot::Mmio { base, gsi } => Some(VirtioMmio {
                base,
                gsi: gsi.get(),
            }),
            VirtioSlot::Pci { .. } => None,
        };
        Platform {
            cpus: self.cpus,
            serial: self.serial,
            virtio_mmio: self.virtio.iter().filter_map(as_mmio).collect(),
            pci: self.transport == Transport::Pci,
        }
    }
}

#[cfg(test)]
mod tests {
    use boot::layout::{IOAPIC, MMIO_HOLE_END, MMIO_HOLE_START, PCI_ECAM, PCI_WINDOW_SIZE};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn plan_with_too_many_devices_is_refused() {
        for transport in [Transport::Mmio, Transport::Pci] {
            let max = transport.max_devices();
            assert!(Plan::new(1, transport, max, true).is_ok());
            assert!(Plan::new(1, transport, max + 1, true).is_err());
        }
    }

    proptest! {
        #[test]
        fn plan_windows_and_interrupts_are_disjoint(devices in 0..=MAX_MMIO, cpus in 1..=254u8) {
            let platform = Plan::new(cpus, Transport::Mmio, devices, true).unwrap().platform();
            let mut gsis = vec![SERIAL_GSI.get(), POWER_BUTTON_GSI.get()];
            let mut end = MMIO_HOLE_START.0;
            for device in &platform.virtio_mmio {
                prop_assert!(device.base.0 >= end);
                end = device.base.0 + u64::from(VIRTIO_MMIO_SIZE);
                gsis.push(device.gsi);
            }
            prop_assert!(end <= PCI_ECAM.0);
            gsis.sort_unstable();
            prop_assert!(gsis.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert!(gsis.iter().all(|&gsi| gsi < GSIS));
        }

        #[test]
        fn plan_bars_lie_in_the_bridges_window(devices in 0..=MAX_PCI) {
            let plan = Plan::new(1, Transport::Pci, devices, false).unwrap();
            prop_assert!(plan.platform().pci);
            prop_assert!(PCI_ECAM.0 + pci::ECAM_BUS_LEN <= PCI_WINDOW.0);
            let last = PCI_WINDOW.0 + u64::from(PCI_WINDOW_SIZE);
            prop_assert!(last <= u64::from(IOAPIC) && last < MMIO_HOLE_END.0);
            let mut end = PCI_WINDOW.0;
            for (n, slot) in (1..).zip(plan.virtio()) {
                let VirtioSlot::Pci { device, bar } = *slot else { panic!() };
                prop_assert_eq!(device, n);
                prop_assert!(bar.0 >= end && bar.0.is_multiple_of(BAR_LEN.into()));
                end = bar.0 + u64::from(BAR_LEN);
            }
            prop_assert!(end <= last);
        }
    }
}
