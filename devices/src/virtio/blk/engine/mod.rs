//! Who carries out the requests for which a queue's thread would have to wait.

mod pool;
mod ring;

use std::fmt::Debug;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::device::IoChoice;
use super::disk::Disk;
use super::pending::Pending;
use crate::disk::Storage;

pub(super) use pool::Pool;
pub(super) use ring::Ring;

/// The most requests that a queue has under way at once.
const DEPTH: usize = 256;

/// Carries out a queue's requests while its thread does something else. To be dropped, or parked
/// with its device, when nothing is under way.
pub(super) trait Engine: Send + Debug {
    /// Begins with it, or gives back what it cannot do. There has to be room.
    fn start(&mut self, pending: Pending) -> Option<Pending>;
    /// Tells the kernel of all that has been started.
    ///
    /// # Errors
    ///
    /// The kernel's, which then may not know of everything: to be called again.
    fn submit(&mut self) -> io::Result<()>;
    /// One that is done, and how it ended.
    fn completed(&mut self) -> Option<(Pending, io::Result<()>)>;
    /// How many have been started that [`Engine::completed`] has not returned.
    fn under_way(&self) -> usize;
    /// Waits until another one is done, if any is under way.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn wait(&mut self) -> io::Result<()>;
    /// What becomes readable whenever one is done. It is never read.
    fn event(&self) -> RawFd;

    /// Whether another one may be started.
    fn has_room(&self) -> bool {
        self.under_way() < DEPTH
    }
}

/// An engine for each queue of `disk`; none where its image is only ever used by the queues' own
/// threads. `name` is the threads'.
///
/// # Errors
///
/// Fails when the process may not have the threads or descriptors, or the kernel refuses the
/// io_uring that was asked for.
pub(super) fn engines(
    name: &str,
    disk: &Arc<Disk>,
    queues: u16,
    choice: IoChoice,
) -> io::Result<Vec<Option<Box<dyn Engine>>>> {
    let Storage::Raw(file) = disk.storage() else {
        return Ok((0..queues).map(|_| None).collect());
    };
    if choice != IoChoice::Threads {
        let ring = |_| {
            let ring = Ring::new(Arc::clone(disk), Arc::clone(file))?;
            Ok(Some(Box::new(ring) as Box<dyn Engine>))
        };
        match (0..queues).map(ring).collect() {
            Err(error) if choice == IoChoice::Auto => {
                log::debug!("{name}: threads instead of io_uring: {error}");
            }
            result => return result,
        }
    }
    let pool = Arc::new(Pool::new(name)?);
    let client = |_| {
        let client = pool::Client::new(Arc::clone(&pool), Arc::clone(disk))?;
        Ok(Some(Box::new(client) as Box<dyn Engine>))
    };
    (0..queues).map(client).collect()
}
