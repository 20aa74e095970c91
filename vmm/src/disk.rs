//! The disks of a machine.

use std::sync::Arc;

use devices::disk::Storage;
use devices::events::EventSink;
use devices::virtio::blk::{Blk, BlkHandle, BlkOptions};

use crate::config::DiskConfig;
use crate::machine::{Machine, MachineError};

/// Puts each disk into the machine, and returns what it is resized by while the guest runs.
///
/// # Errors
///
/// See [`MachineError`].
pub fn add(
    machine: &mut Machine,
    configs: &[DiskConfig],
    storages: Vec<Storage>,
) -> Result<Vec<Arc<BlkHandle>>, MachineError> {
    let mut handles = Vec::new();
    for (n, (config, storage)) in configs.iter().zip(storages).enumerate() {
        let name = format!("disk{n}");
        let options = BlkOptions {
            label: format!("{name} on {:?}", config.image.path),
            readonly: config.image.readonly,
            serial: config.serial.bytes(),
            queues: config.queues,
            limit: config.limit.rate(),
            io: config.io,
            events: EventSink::default(),
        };
        let device = Blk::new(name, storage, options).map_err(MachineError::Device)?;
        handles.push(device.handle());
        machine.add_virtio(device)?;
    }
    Ok(handles)
}
