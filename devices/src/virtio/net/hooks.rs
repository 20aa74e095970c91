//! What happens to each frame of a queue besides being moved.

use std::sync::Arc;
use std::time::Instant;

use super::backend::HEADER_LEN;
use super::capture::{Capture, Direction};
use crate::virtio::rate::Limiter;

/// The limit and the capture of a queue, where it has them. Those of one direction are shared by all
/// pairs of a NIC.
#[derive(Clone, Debug, Default)]
pub struct Hooks {
    /// Holds frames back.
    pub limiter: Option<Arc<Limiter>>,
    /// Records them.
    pub capture: Option<Arc<Capture>>,
}

impl Hooks {
    /// Until when the limit lets nothing pass.
    pub fn held_until(&self) -> Option<Instant> {
        self.limiter.as_ref()?.held_until()
    }

    /// A frame has passed that lies in `iovecs`, `len` bytes with its header.
    ///
    /// # Safety
    ///
    /// Each iovec must describe memory that may be read for as long as the call lasts.
    pub unsafe fn passed(&self, direction: Direction, iovecs: &[libc::iovec], len: usize) {
        if let Some(capture) = &self.capture {
            // SAFETY: as for this function.
            unsafe { capture.record(direction, iovecs, HEADER_LEN, len) };
        }
        if let Some(limiter) = &self.limiter {
            limiter.charge(len.saturating_sub(HEADER_LEN));
        }
    }
}
