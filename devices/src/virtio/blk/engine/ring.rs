//! Requests by io_uring.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread;

use io_uring::{IoUring, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use super::super::disk::Disk;
use super::super::pending::Pending;
use super::super::request::Request;
use super::{DEPTH, Engine};
use crate::disk::RawFile;
use crate::virtio::Segments;

/// Requests that are submitted to the kernel at once.
const SUBMITTED_AT_ONCE: u32 = 64;
/// The disk's file, by its place in the table of registered ones.
const FILE: types::Fixed = types::Fixed(0);

/// A queue's own io_uring.
pub struct Ring {
    ring: IoUring,
    event: EventFd,
    disk: Arc<Disk>,
    file: Arc<RawFile>,
    /// Those under way, each at the index by which the kernel names it.
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
}

impl Ring {
    /// A ring for requests of `disk`, whose image is `file`.
    ///
    /// # Errors
    ///
    /// Fails where the kernel has no io_uring, or refuses it as containers do.
    pub fn new(disk: Arc<Disk>, file: Arc<RawFile>) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_cqsize(DEPTH as u32)
            .build(SUBMITTED_AT_ONCE)?;
        // What iovecs say has to be read when a request is submitted, and no completion to be lost.
        if !ring.params().is_feature_submit_stable() || !ring.params().is_feature_nodrop() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Self {
            ring,
            event,
            disk,
            file,
            pending: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH).rev().collect(),
        })
    }

    /// How the kernel is asked; none for what it cannot be asked.
    fn entry(&self, pending: &Pending) -> Option<squeue::Entry> {
        match *pending.request() {
            Request::Read { offset } => self.transfer(
                pending.wanted(),
                |piece, len| opcode::Read::new(FILE, piece, len).offset(offset).build(),
                |iovecs, count| {
                    opcode::Readv::new(FILE, iovecs, count)
                        .offset(offset)
                        .build()
                },
            ),
            Request::Write { offset } => {
                let flags = match self.disk.is_writeback() {
                    true => 0,
                    false => libc::RWF_DSYNC,
                };
                self.transfer(
                    pending.sent(),
                    |piece, len| {
                        let write = opcode::Write::new(FILE, piece, len).offset(offset);
                        write.rw_flags(flags).build()
                    },
                    |iovecs, count| {
                        let write = opcode::Writev::new(FILE, iovecs, count).offset(offset);
                        write.rw_flags(flags).build()
                    },
                )
            }
            Request::Flush => {
                let fsync = opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC);
                Some(fsync.build())
            }
            Request::Serial | Request::Discard(_) | Request::WriteZeroes { .. } => None,
        }
    }

    /// A transfer of one piece of memory, which is quicker, or of more.
    fn transfer(
        &self,
        segments: Segments<'_>,
        one: impl FnOnce(*mut u8, u32) -> squeue::Entry,
        many: impl FnOnce(*const libc::iovec, u32) -> squeue::Entry,
    ) -> Option<squeue::Entry> {
        if !self.file.takes(segments) {
            return None;
        }
        match segments.iovecs() {
            [piece] => Some(one(
                piece.iov_base.cast(),
                u32::try_from(piece.iov_len).ok()?,
            )),
            iovecs => Some(many(iovecs.as_ptr(), iovecs.len() as u32)),
        }
    }

    fn enter(&mut self, wait_for: usize) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(wait_for) {
                Ok(_) => return Ok(()),
                // The host is short of memory for a moment.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::yield_now(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Engine for Ring {
    fn start(&mut self, pending: Pending) -> Option<Pending> {
        let Some(entry) = self.entry(&pending) else {
            return Some(pending);
        };
        let Some(index) = self.free.pop() else {
            return Some(pending);
        };
        let entry = entry.user_data(index as u64);
        let is_full = self.ring.submission().is_full();
        if is_full && self.enter(0).is_err() {
            self.free.push(index);
            return Some(pending);
        }
        // SAFETY: what the entry points to lies in guest memory and in the vectors of `pending`,
        // which is kept until the kernel is done with it.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.free.push(index);
            return Some(pending);
        }
        self.pending[index] = Some(pending);
        None
    }

    fn submit(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        self.enter(0)
    }

    fn completed(&mut self) -> Option<(Pending, io::Result<()>)> {
        let entry = self.ring.completion().next()?;
        let index = entry.user_data() as usize;
        let pending = self.pending.get_mut(index)?.take()?;
        self.free.push(index);
        let result = match usize::try_from(entry.result()) {
            Ok(done) if done as u64 == pending.moved() => Ok(()),
            // The rest of a short transfer.
            Ok(done) => self.disk.finish_transfer(&pending, done),
            Err(_) => match -entry.result() {
                libc::EAGAIN | libc::EINTR => self.disk.execute(&pending),
                errno => Err(io::Error::from_raw_os_error(errno)),
            },
        };
        Some((pending, result))
    }

    fn under_way(&self) -> usize {
        DEPTH - self.free.len()
    }

    fn wait(&mut self) -> io::Result<()> {
        match self.under_way() {
            0 => Ok(()),
            _ => self.enter(1),
        }
    }

    fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl Drop for Ring {
    /// Until the kernel is done, it may write to guest memory.
    fn drop(&mut self) {
        while self.under_way() > 0 && self.wait().is_ok() {
            while self.completed().is_some() {}
        }
        // Else the image would stay locked until the kernel comes to free the ring.
        let _ = self.ring.submitter().unregister_files();
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("fd", &self.ring.as_raw_fd())
            .field("under_way", &self.under_way())
            .finish_non_exhaustive()
    }
}
