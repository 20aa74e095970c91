//! What all queues of a disk share, and how a request is carried out.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use super::request::{Range, Request};
use crate::disk::{Image, Storage};
use crate::virtio::iovec::scatter;
use crate::virtio::rate::{Limiter, RateLimit};
use crate::virtio::{Complaints, Segments};

/// Bytes of a serial number (virtio 1.2, 5.2.6).
pub(super) const SERIAL_LEN: usize = 20;

/// A disk: its image and what holds for every request.
#[derive(Debug)]
pub struct Disk {
    label: String,
    storage: Storage,
    readonly: bool,
    serial: [u8; SERIAL_LEN],
    pub(super) limiter: Limiter,
    /// A write may complete before it is durable.
    writeback: AtomicBool,
    complaints: Complaints,
}

impl Disk {
    /// The disk of this image. `label` is its name in what is said of its guest.
    pub fn new(
        label: String,
        storage: Storage,
        readonly: bool,
        serial: [u8; SERIAL_LEN],
        limit: RateLimit,
    ) -> Self {
        Self {
            label,
            storage,
            readonly,
            serial,
            limiter: Limiter::new(limit),
            writeback: AtomicBool::new(true),
            complaints: Complaints::default(),
        }
    }

    pub(super) fn label(&self) -> &str {
        &self.label
    }

    pub(super) fn image(&self) -> &dyn Image {
        self.storage.image()
    }

    pub(super) fn is_readonly(&self) -> bool {
        self.readonly
    }

    pub(super) fn set_writeback(&self, on: bool) {
        self.writeback.store(on, Ordering::SeqCst);
    }

    /// Carries out `request` in this thread. The driver has sent `sent` with it, and wants what it
    /// asks for in `wanted`.
    pub(super) fn execute(
        &self,
        request: &Request,
        sent: Segments<'_>,
        wanted: Segments<'_>,
    ) -> io::Result<()> {
        let image = self.image();
        match request {
            Request::Read { offset } => return image.read(*offset, wanted),
            Request::Write { offset } => return self.write(*offset, sent),
            Request::Flush => return image.flush(),
            Request::Serial => {
                // SAFETY: `Segments` vouches for what the iovecs describe.
                unsafe { scatter(wanted.iovecs(), 0, &self.serial) };
                return Ok(());
            }
            Request::Discard(ranges) => {
                for Range { offset, len } in ranges.iter().filter(|range| range.len > 0) {
                    image.discard(*offset, *len)?;
                }
            }
            Request::WriteZeroes { range, may_unmap } if range.len > 0 => {
                image.write_zeroes(range.offset, range.len, *may_unmap)?;
            }
            Request::WriteZeroes { .. } => {}
        }
        match self.writeback.load(Ordering::SeqCst) {
            true => Ok(()),
            false => image.flush(),
        }
    }

    fn write(&self, offset: u64, from: Segments<'_>) -> io::Result<()> {
        let writeback = self.writeback.load(Ordering::SeqCst);
        match &self.storage {
            Storage::Raw(file) => file.write_with(offset, from, !writeback),
            Storage::Image(image) => {
                image.write(offset, from)?;
                if writeback { Ok(()) } else { image.flush() }
            }
        }
    }

    /// The host has failed a request.
    pub(super) fn complain(&self, request: &Request, error: &io::Error) {
        if self.complaints.may_warn() {
            log::warn!("{}: cannot {request}: {error}", self.label);
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read { offset } => write!(f, "read at {offset}"),
            Self::Write { offset } => write!(f, "write at {offset}"),
            Self::Flush => write!(f, "flush"),
            Self::Serial => write!(f, "tell the serial number"),
            Self::Discard(ranges) => {
                let offset = ranges.first().map_or(0, |range| range.offset);
                write!(f, "discard {} ranges from {offset} on", ranges.len())
            }
            Self::WriteZeroes { range, .. } => {
                write!(f, "write {} zeros at {}", range.len, range.offset)
            }
        }
    }
}
