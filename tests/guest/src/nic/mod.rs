//! The NIC as smoltcp sees it: one of two drivers.

mod by_crate;
mod own;

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;

use smoltcp::phy::{Device, DeviceCapabilities, Medium, PacketMeta, RxToken, TxToken};
use smoltcp::time::Instant;

use crate::options::Driver;
use crate::virtio::device::VirtioDevice;
use by_crate::CrateNic;
use own::OwnNic;

/// The largest Ethernet frame without offloads.
pub const FRAME: usize = 1514;

/// A NIC, up.
pub enum Nic {
    /// Driven by the virtio-drivers crate.
    Crate(Box<CrateNic>),
    /// Driven by hand.
    Own(Box<OwnNic>),
}

impl Nic {
    /// Brings a NIC up.
    pub fn start(nic: VirtioDevice, driver: Driver) -> Result<Self, String> {
        Ok(match driver {
            Driver::Crate => Self::Crate(Box::new(CrateNic::start(nic)?)),
            Driver::Own => Self::Own(Box::new(OwnNic::start(nic)?)),
        })
    }

    /// Its address.
    pub fn mac(&self) -> [u8; 6] {
        match self {
            Self::Crate(nic) => nic.mac(),
            Self::Own(nic) => nic.mac(),
        }
    }

    /// Acknowledges interrupts. Only the crate's driver asks for any.
    pub fn acknowledge_interrupt(&mut self) -> Result<bool, &'static str> {
        match self {
            Self::Crate(nic) => Ok(nic.acknowledge_interrupt()),
            Self::Own(_) => Err("guest.nic=own asks for no interrupts"),
        }
    }

    /// The next received frame.
    fn take(&mut self) -> Option<Vec<u8>> {
        match self {
            Self::Crate(nic) => nic.take(),
            Self::Own(nic) => nic.take(),
        }
    }

    /// Whether the device has not taken all frames yet.
    pub fn is_sending(&mut self) -> bool {
        self.can_send();
        match self {
            Self::Crate(nic) => nic.is_sending(),
            Self::Own(nic) => nic.is_sending(),
        }
    }

    /// Whether a frame can be sent now.
    fn can_send(&mut self) -> bool {
        match self {
            Self::Crate(nic) => nic.can_send(),
            Self::Own(nic) => nic.can_send(),
        }
    }
}

impl Device for Nic {
    type RxToken<'a> = Received;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Room<'_>)> {
        // An answer may be due to what is received: without room for it, leave the frame where it
        // is.
        if !self.can_send() {
            return None;
        }
        let frame = self.take()?;
        Some((
            Received(frame),
            Room {
                nic: self,
                meta: PacketMeta::default(),
            },
        ))
    }

    fn transmit(&mut self, _: Instant) -> Option<Room<'_>> {
        self.can_send().then_some(Room {
            nic: self,
            meta: PacketMeta::default(),
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME;
        if let Self::Own(nic) = self {
            nic.add_capabilities(&mut capabilities);
        }
        capabilities
    }
}

/// A received frame.
pub struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

/// Room for a frame to send.
pub struct Room<'a> {
    nic: &'a mut Nic,
    meta: PacketMeta,
}

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        match self.nic {
            Nic::Crate(nic) => nic.send(length, fill),
            Nic::Own(nic) => nic.send(length, self.meta, fill),
        }
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.meta = meta;
    }
}
