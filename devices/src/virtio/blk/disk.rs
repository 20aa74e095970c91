//! What all queues of a disk share, and how a request is carried out.

use std::fmt;
use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::pending::Pending;
use super::request::{Range, Request};
use crate::disk::{Image, Storage, advance};
use crate::events::{DeviceEvent, EventSink, IoError, Throttle};
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
    /// The queues' threads use the page cache themselves.
    cached: bool,
    /// A write may complete before it is durable.
    writeback: AtomicBool,
    complaints: Complaints,
    events: EventSink,
    /// Bounds how many errors are reported.
    reports: Throttle,
}

impl Disk {
    /// The disk of this image. `label` is its name in what is said of its guest. Without
    /// `cached`, or past the page cache anyway, no queue's thread reads or writes a raw image if
    /// another can.
    pub fn new(
        label: String,
        storage: Storage,
        readonly: bool,
        serial: [u8; SERIAL_LEN],
        limit: RateLimit,
        cached: bool,
    ) -> Self {
        let is_direct = matches!(&storage, Storage::Raw(file) if file.is_direct());
        Self {
            cached: cached && !is_direct,
            label,
            storage,
            readonly,
            serial,
            limiter: Limiter::new(limit),
            writeback: AtomicBool::new(true),
            complaints: Complaints::default(),
            events: EventSink::default(),
            reports: Throttle::default(),
        }
    }

    /// Reports errors of the host's to `events`.
    pub(super) fn with_events(mut self, events: EventSink) -> Self {
        self.events = events;
        self
    }

    pub(super) fn events(&self) -> &EventSink {
        &self.events
    }

    pub(super) fn label(&self) -> &str {
        &self.label
    }

    pub(super) fn storage(&self) -> &Storage {
        &self.storage
    }

    pub(super) fn image(&self) -> &dyn Image {
        self.storage.image()
    }

    pub(super) fn is_readonly(&self) -> bool {
        self.readonly
    }

    /// Whether a write may complete before it is durable.
    pub(super) fn is_writeback(&self) -> bool {
        self.writeback.load(Ordering::SeqCst)
    }

    /// Lets writes complete before they are durable, or not.
    pub fn set_writeback(&self, on: bool) {
        self.writeback.store(on, Ordering::SeqCst);
    }

    /// Carries out what the page cache can answer, and does not wait for more than memory. None
    /// where that is not enough, or where the image has no page cache of its own.
    pub(super) fn execute_now(&self, pending: &Pending) -> Option<io::Result<()>> {
        let Storage::Raw(file) = &self.storage else {
            return None;
        };
        match *pending.request() {
            Request::Serial => Some(self.execute(pending)),
            Request::Read { offset } if self.cached => {
                let done = file.read_now(offset, pending.wanted());
                done.map(|done| done.then_some(())).transpose()
            }
            // The page cache takes it, if need be after it has written others.
            Request::Write { offset } if self.cached && self.is_writeback() => {
                Some(file.write(offset, pending.sent()))
            }
            _ => None,
        }
    }

    /// Carries out a request in this thread.
    pub(super) fn execute(&self, pending: &Pending) -> io::Result<()> {
        let image = self.image();
        match pending.request() {
            Request::Read { offset } => return image.read(*offset, pending.wanted()),
            Request::Write { offset } => return self.write(*offset, pending.sent()),
            Request::Flush => return image.flush(),
            Request::Serial => {
                // SAFETY: `Segments` vouches for what the iovecs describe.
                unsafe { scatter(pending.wanted().iovecs(), 0, &self.serial) };
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
        match self.is_writeback() {
            true => Ok(()),
            false => image.flush(),
        }
    }

    /// Carries out what is left of a transfer after the first `done` bytes.
    pub(super) fn finish_transfer(&self, pending: &Pending, done: usize) -> io::Result<()> {
        let rest = |segments: Segments<'_>| {
            let mut iovecs = segments.iovecs().to_vec();
            advance(&mut iovecs, done);
            iovecs
        };
        match *pending.request() {
            Request::Read { offset } => {
                let rest = rest(pending.wanted());
                // SAFETY: they are parts of what `Segments` vouches for.
                let rest = unsafe { Segments::new(&rest) };
                self.image().read(offset + done as u64, rest)
            }
            Request::Write { offset } => {
                let rest = rest(pending.sent());
                // SAFETY: as above.
                let rest = unsafe { Segments::new(&rest) };
                self.write(offset + done as u64, rest)
            }
            _ => Ok(()),
        }
    }

    fn write(&self, offset: u64, from: Segments<'_>) -> io::Result<()> {
        let writeback = self.is_writeback();
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
        if self.reports.may_pass(Instant::now()) {
            self.events.report(DeviceEvent::IoError(IoError {
                is_write: !matches!(request, Request::Read { .. } | Request::Serial),
                no_space: matches!(
                    error.kind(),
                    ErrorKind::StorageFull | ErrorKind::QuotaExceeded
                ),
                reason: format!("cannot {request}: {error}"),
            }));
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
