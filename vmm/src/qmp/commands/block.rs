//! Disks.

use std::error::Error;
use std::thread;

use devices::disk::Format;
use serde::{Deserialize, Serialize};

use super::{Command, Done, NoArguments};
use crate::control::GuestError;
use crate::control::event_loop::Control;
use crate::control::exit::chain;
use crate::disk::Disk;
use crate::qmp::{QmpError, Reply};

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "query-block",
        run: |control, arguments, reply| {
            arguments.answer(reply, |NoArguments {}| {
                Ok(control.disks.iter().map(BlockInfo::of).collect::<Vec<_>>())
            });
        },
    },
    Command {
        name: "block_resize",
        run: |control, arguments, reply| match arguments.read() {
            Ok(resize) => resize_disk(control, resize, reply),
            Err(error) => reply.fail(error),
        },
    },
];

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Resize {
    device: Option<String>,
    node_name: Option<String>,
    size: i64,
}

fn resize_disk(control: &Control, resize: Resize, reply: Reply) {
    let Resize {
        device,
        node_name,
        size,
    } = resize;
    // A disk and its image have one name.
    let name = device.as_deref().or(node_name.as_deref());
    let mut disks = control.disks.iter().enumerate();
    let found = disks.find(|(_, disk)| Some(disk.name.as_str()) == name);
    let Some((number, disk)) = found else {
        let (device, node) = (device.unwrap_or_default(), node_name.unwrap_or_default());
        return reply.fail(QmpError::new(format!(
            "Cannot find device='{device}' nor node-name='{node}'"
        )));
    };
    let Ok(size) = u64::try_from(size) else {
        return reply.fail(QmpError::new("Parameter 'size' expects a >0 size"));
    };
    let handle = disk.handle.clone();
    // A file system may take its time. When there is no thread, the reply that is dropped says so.
    let work = move || match handle.grow(size) {
        Ok(()) => reply.send(Ok(Done {})),
        Err(why) => {
            let error = GuestError::Resize(number, size, why);
            reply.fail(QmpError::new(chain(&error as &dyn Error)));
        }
    };
    let thread = thread::Builder::new().name("resize".into()).spawn(work);
    if let Err(error) = thread {
        log::debug!("QMP: cannot start a thread: {error}");
    }
}

/// BlockInfo of QEMU.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct BlockInfo<'a> {
    device: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    removable: bool,
    locked: bool,
    io_status: &'static str,
    inserted: Inserted<'a>,
}

/// BlockDeviceInfo of QEMU.
#[derive(Debug, Serialize)]
struct Inserted<'a> {
    file: String,
    #[serde(rename = "node-name")]
    node_name: &'a str,
    ro: bool,
    drv: &'static str,
    backing_file_depth: u32,
    encrypted: bool,
    detect_zeroes: &'static str,
    bps: u64,
    bps_rd: u64,
    bps_wr: u64,
    iops: u64,
    iops_rd: u64,
    iops_wr: u64,
    image: Image,
    cache: Cache,
    write_threshold: u64,
}

/// ImageInfo of QEMU.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Image {
    filename: String,
    format: &'static str,
    virtual_size: u64,
}

/// BlockdevCacheInfo of QEMU.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Cache {
    writeback: bool,
    direct: bool,
    no_flush: bool,
}

impl<'a> BlockInfo<'a> {
    fn of(disk: &'a Disk) -> Self {
        let file = disk.config.image.path.display().to_string();
        Self {
            device: &disk.name,
            kind: "unknown",
            removable: false,
            locked: false,
            io_status: "ok",
            inserted: Inserted {
                node_name: &disk.name,
                ro: disk.config.image.readonly,
                drv: format_name(disk),
                backing_file_depth: u32::from(disk.config.image.backing.is_some()),
                encrypted: false,
                detect_zeroes: "off",
                bps: disk.config.limit.bandwidth.unwrap_or(0),
                bps_rd: 0,
                bps_wr: 0,
                iops: disk.config.limit.iops.unwrap_or(0),
                iops_rd: 0,
                iops_wr: 0,
                image: Image {
                    filename: file.clone(),
                    format: format_name(disk),
                    virtual_size: disk.handle.size(),
                },
                cache: Cache {
                    writeback: true,
                    direct: disk.config.image.direct,
                    no_flush: false,
                },
                write_threshold: 0,
                file,
            },
        }
    }
}

/// As QEMU calls the image's driver.
pub(super) fn format_name(disk: &Disk) -> &'static str {
    match disk.config.image.format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
    }
}
