//! The device of a share: its queues, and the file system that serves them.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::{BackendReqHandler, Result};
use virtiofsd::server::Server;

use crate::backend::Backend;
use crate::files::{Files, Numbered};
use crate::inflight::{Inflight, QUEUES};
use crate::requests;
use crate::ring::Ring;

/// The queues of a share, without threads that serve them and without a sandbox: [`serve`](crate::serve) adds both.
pub struct Device<F: Numbered + Sync> {
    server: Arc<Server<Files<F>>>,
    rings: Vec<Arc<Ring>>,
}

impl<F: Numbered + Send + Sync + 'static> Device<F> {
    /// A device that serves `files`, which may have `budget` descriptors, with so many threads for each queue. `inflight` is
    /// a file of [`RECORD`](crate::RECORD) bytes.
    ///
    /// # Errors
    ///
    /// Fails when the record cannot be mapped, or there are no descriptors left for the queues.
    pub fn new(
        files: F,
        budget: u64,
        threads: [usize; QUEUES],
        inflight: OwnedFd,
    ) -> io::Result<Self> {
        let rings = Inflight::map(inflight)?.into_iter().zip(threads);
        let rings = rings.map(|(part, threads)| Ring::new(part, threads).map(Arc::new));
        Ok(Self {
            server: Arc::new(Server::new(Files::new(files, budget))),
            rings: rings.collect::<io::Result<_>>()?,
        })
    }

    /// Handles one message of the monitor's from `socket`, each time it is called.
    pub fn messages(&self, socket: UnixStream) -> impl FnMut() -> Result<()> + use<F> {
        let backend = Backend::new(self.rings.clone(), self.server.clone());
        let mut handler = BackendReqHandler::from_stream(socket, Arc::new(Mutex::new(backend)));
        move || handler.handle_request()
    }

    /// Serves one request of a queue; `false` when it has none, or there is no such queue.
    pub fn serve_one(&self, queue: usize) -> bool {
        let serve = |ring: &Arc<Ring>| {
            ring.serve_one(|memory, chain| requests::serve(&self.server, memory, chain))
        };
        self.rings.get(queue).is_some_and(serve)
    }

    /// Serves a queue as one of its threads, for as long as the process runs.
    pub(crate) fn run(&self, queue: usize, thread: usize) {
        if let Some(ring) = self.rings.get(queue) {
            ring.run(thread, |memory, chain| {
                requests::serve(&self.server, memory, chain)
            });
        }
    }
}

impl<F: Numbered + Sync> fmt::Debug for Device<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").finish_non_exhaustive()
    }
}
