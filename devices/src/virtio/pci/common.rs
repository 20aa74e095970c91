//! The common configuration structure (virtio 1.2, 4.1.4.3).

use vm_memory::ByteValued;

use super::super::Interrupt as _;
use super::super::transport::{set_high, set_low};
use super::PciTransport;

/// `struct virtio_pci_common_cfg`, little-endian as this host.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Common {
    device_feature_select: u32,
    device_feature: u32,
    driver_feature_select: u32,
    driver_feature: u32,
    config_vector: u16,
    num_queues: u16,
    status: u8,
    config_generation: u8,
    queue_select: u16,
    queue_size: u16,
    queue_vector: u16,
    queue_enable: u16,
    queue_notify_off: u16,
    queue_desc: u64,
    queue_driver: u64,
    queue_device: u64,
}

// SAFETY: integers only, and no padding between them: 4 of 32 bits, 2 of 16, 2 of 8, 5 of 16 and 3
// of 64.
unsafe impl ByteValued for Common {}

pub(super) const LEN: usize = size_of::<Common>();

/// The offsets of the fields that a driver writes.
pub(super) mod offset {
    use std::mem::offset_of;

    use super::Common;

    pub const DEVICE_FEATURE_SELECT: usize = offset_of!(Common, device_feature_select);
    pub const DRIVER_FEATURE_SELECT: usize = offset_of!(Common, driver_feature_select);
    pub const DRIVER_FEATURE: usize = offset_of!(Common, driver_feature);
    pub const CONFIG_VECTOR: usize = offset_of!(Common, config_vector);
    pub const STATUS: usize = offset_of!(Common, status);
    pub const QUEUE_SELECT: usize = offset_of!(Common, queue_select);
    pub const QUEUE_SIZE: usize = offset_of!(Common, queue_size);
    pub const QUEUE_VECTOR: usize = offset_of!(Common, queue_vector);
    pub const QUEUE_ENABLE: usize = offset_of!(Common, queue_enable);
    pub const QUEUE_DESC: usize = offset_of!(Common, queue_desc);
    pub const QUEUE_DRIVER: usize = offset_of!(Common, queue_driver);
    pub const QUEUE_DEVICE: usize = offset_of!(Common, queue_device);
}

impl PciTransport {
    /// The structure as it is now. The driver may read any part of it.
    pub(super) fn common(&self) -> Common {
        let common = Common {
            device_feature_select: self.device_features_sel,
            device_feature: self.device_features(),
            driver_feature_select: self.driver_features_sel,
            driver_feature: self.driver_features(),
            config_vector: self.interrupt.config_vector.get(),
            num_queues: self.queues.len() as u16,
            status: self.status().bits(),
            config_generation: self.device.config_generation() as u8,
            queue_select: self.queue_sel as u16,
            ..Common::default()
        };
        let index = self.queue_sel as usize;
        let vector = self.interrupt.queue_vectors.get(index);
        let (Some(queue), Some(vector)) = (self.queues.get(index), vector) else {
            return common;
        };
        Common {
            queue_size: queue.size,
            queue_vector: vector.get(),
            queue_enable: queue.ready.into(),
            queue_notify_off: self.queue_sel as u16,
            queue_desc: queue.descriptors,
            queue_driver: queue.available,
            queue_device: queue.used,
            ..common
        }
    }

    /// Takes a write of a field's own width; a 64-bit field may also come in halves (4.1.3.1).
    pub(super) fn write_common(&mut self, offset: usize, data: &[u8]) {
        match *data {
            [value] if offset == offset::STATUS => {
                self.set_status(value);
                self.warn_without_msix();
            }
            [a, b] => self.write_common_16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_common_32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if offset.is_multiple_of(8) => {
                self.write_queue_address(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_queue_address(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    fn write_common_16(&mut self, offset: usize, value: u16) {
        let select = self.queue_sel as u16;
        let interrupt = &self.interrupt;
        match offset {
            offset::CONFIG_VECTOR => interrupt.assign(&interrupt.config_vector, value),
            offset::QUEUE_SELECT => self.queue_sel = value.into(),
            offset::QUEUE_SIZE => {
                if let Some(queue) = self.queue_in_setup() {
                    queue.size = value;
                }
            }
            offset::QUEUE_VECTOR => {
                if let Some(vector) = interrupt.queue_vectors.get(usize::from(select)) {
                    interrupt.assign(vector, value);
                    let line = interrupt.call_eventfd(select);
                    self.device.interrupt_changed(select, line);
                }
            }
            // Only a reset disables a queue here (4.1.4.3.2).
            offset::QUEUE_ENABLE if value == 1 => self.set_queue_ready(true),
            _ => {}
        }
    }

    fn write_common_32(&mut self, offset: usize, value: u32) {
        match offset {
            offset::DEVICE_FEATURE_SELECT => self.device_features_sel = value,
            offset::DRIVER_FEATURE_SELECT => self.driver_features_sel = value,
            offset::DRIVER_FEATURE => self.set_driver_features(value),
            _ => self.write_queue_address(offset, value),
        }
    }

    fn write_queue_address(&mut self, offset: usize, value: u32) {
        let Some(queue) = self.queue_in_setup() else {
            return;
        };
        let half = if offset.is_multiple_of(8) {
            set_low
        } else {
            set_high
        };
        match offset & !7 {
            offset::QUEUE_DESC => half(&mut queue.descriptors, value),
            offset::QUEUE_DRIVER => half(&mut queue.available, value),
            offset::QUEUE_DEVICE => half(&mut queue.used, value),
            _ => {}
        }
    }
}
