//! How other threads have the control thread do something.

use std::fmt;
use std::io;
use std::sync::mpsc::{self, Receiver, Sender};

use vmm_sys_util::eventfd::EventFd;

use super::event_loop::Control;

/// What the control thread is to do.
type Request = Box<dyn FnOnce(&mut Control) + Send>;

/// The control thread's end.
pub struct Requests {
    queue: Receiver<Request>,
    event: EventFd,
}

/// The other threads' end.
#[derive(Debug)]
pub struct Handle {
    queue: Sender<Request>,
    event: EventFd,
}

impl fmt::Debug for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Requests").finish_non_exhaustive()
    }
}

impl Requests {
    /// Both ends.
    ///
    /// # Errors
    ///
    /// Fails when the process has no file descriptor left.
    pub fn new() -> io::Result<(Self, Handle)> {
        let (sender, queue) = mpsc::channel();
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let handle = Handle {
            queue: sender,
            event: event.try_clone()?,
        };
        Ok((Self { queue, event }, handle))
    }

    /// Readable while there are requests.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// The requests so far.
    pub fn take(&self) -> Vec<Request> {
        let _ = self.event.read();
        self.queue.try_iter().collect()
    }
}

impl Handle {
    /// Has the control thread run `work`, and waits for the value that `work` sends; `None` when it ends without.
    pub fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Control, Sender<T>) + Send + 'static,
    ) -> Option<T> {
        let (reply, answer) = mpsc::channel();
        let request: Request = Box::new(move |control| work(control, reply));
        // Without a receiver there is no answer either.
        let _ = self.queue.send(request);
        let _ = self.event.write(1);
        answer.recv().ok()
    }
}
