//! The disks of a machine.

use std::sync::Arc;

use devices::disk::Storage;
use devices::virtio::blk::{Blk, BlkHandle, BlkOptions};

use crate::config::DiskConfig;
use crate::machine::{Machine, MachineError};

/// A disk of a guest that runs.
#[derive(Debug)]
pub struct Disk {
    /// By its place in the configuration: disk0, disk1 and so on.
    pub name: String,
    /// What it was asked to be.
    pub config: DiskConfig,
    /// What it is, and is resized by.
    pub handle: Arc<BlkHandle>,
}

/// Puts each disk into the machine.
///
/// # Errors
///
/// See [`MachineError`].
pub fn add(
    machine: &mut Machine,
    configs: &[DiskConfig],
    storages: Vec<Storage>,
) -> Result<Vec<Disk>, MachineError> {
    let mut disks = Vec::new();
    for (n, (config, storage)) in configs.iter().zip(storages).enumerate() {
        let name = format!("disk{n}");
        let options = BlkOptions {
            label: format!("{name} on {:?}", config.image.path),
            readonly: config.image.readonly,
            serial: config.serial.bytes(),
            queues: config.queues,
            limit: config.limit.rate(),
            io: config.io,
            events: machine.event_sink(&name),
        };
        let device = Blk::new(name.clone(), storage, options).map_err(MachineError::Device)?;
        disks.push(Disk {
            name,
            config: config.clone(),
            handle: device.handle(),
        });
        machine.add_virtio(device)?;
    }
    Ok(disks)
}
