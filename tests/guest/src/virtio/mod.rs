//! virtio-mmio by hand: windows, registers, rings and the bring-up of a NIC (virtio 1.2, 4.2 and 5.1).

pub mod net;
pub mod registers;
pub mod ring;
