//! How other threads have the control thread do something.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use vmm_sys_util::eventfd::EventFd;

use super::event_loop::Control;

/// What the control thread is to do.
type Request = Box<dyn FnOnce(&mut Control) + Send>;

/// The control thread's end.
#[derive(Debug)]
pub struct Requests {
    queue: Receiver<Request>,
    event: EventFd,
}

/// The other threads' end.
#[derive(Clone, Debug)]
pub struct Handle {
    queue: Sender<Request>,
    event: Arc<EventFd>,
}

impl Requests {
    /// Both ends.
    pub fn new() -> io::Result<(Self, Handle)> {
        let (sender, queue) = mpsc::channel();
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let handle = Handle {
            queue: sender,
            event: Arc::new(event.try_clone()?),
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
    /// Has the control thread run `work`, and returns its value; `None` when the thread has ended.
    pub fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Control) -> T + Send + 'static,
    ) -> Option<T> {
        self.start(|control, reply| {
            // The receiver waits for it.
            let _ = reply.send(work(control));
        })
    }

    /// The same for work that is done later, by whoever it gives the sender to.
    pub fn start<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Control, Sender<T>) + Send + 'static,
    ) -> Option<T> {
        let (reply, answer) = mpsc::channel();
        self.post(move |control| work(control, reply));
        answer.recv().ok()
    }

    /// The same for work that is not waited for, and is dropped when the thread has ended.
    pub fn post(&self, work: impl FnOnce(&mut Control) + Send + 'static) {
        let _ = self.queue.send(Box::new(work));
        let _ = self.event.write(1);
    }
}
