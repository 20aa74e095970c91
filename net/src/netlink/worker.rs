//! A time limit for calls that have none of their own.
//!
//! The kernel carries out a netlink message while it is being sent, and waits for its lock (RTNL) there, whatever signals
//! come and whatever time limit the socket has. So a thread of its own sends and receives, and the caller waits for that
//! thread, not for the kernel: for each call ([`Worker`]), or for all that it does ([`watched`]).

use std::cell::Cell;
use std::io;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::client::{LIMIT, timed_out};

type Job = Box<dyn FnOnce() + Send>;

/// The calls of a thread that is [`watched`]: odd while it is in one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Steps(Arc<AtomicU64>);

impl Steps {
    /// Makes a call that may wait for the kernel.
    pub(super) fn take<T>(&self, call: impl FnOnce() -> T) -> T {
        self.0.fetch_add(1, Ordering::Relaxed);
        let result = call();
        self.0.fetch_add(1, Ordering::Relaxed);
        result
    }

    fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Runs `work` on a thread of its own, which begins in the caller's network namespace, and waits as long as none of its
/// calls takes longer than the kernel may.
///
/// When one does, the rest of `work` still takes its turn, and its result is dropped.
pub(crate) fn watched<T: Send + 'static>(
    work: impl FnOnce(&Steps) -> T + Send + 'static,
) -> io::Result<T> {
    watched_within(LIMIT, work)
}

fn watched_within<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce(&Steps) -> T + Send + 'static,
) -> io::Result<T> {
    let steps = Steps::default();
    let its_steps = steps.clone();
    // Dropped at the end of the thread, which is what the caller waits for.
    let (running, has_ended) = mpsc::channel::<()>();
    let thread = thread::Builder::new().name("net".to_owned());
    let thread = thread.spawn(move || {
        let _running = running;
        work(&its_steps)
    })?;
    loop {
        let before = steps.count();
        match has_ended.recv_timeout(limit) {
            Err(RecvTimeoutError::Timeout) if before % 2 == 1 && steps.count() == before => {
                return Err(timed_out());
            }
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => {
                return Ok(thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
            }
        }
    }
}

/// The thread, in the network namespace of the one that started it. It ends with this value.
#[derive(Debug)]
pub(super) struct Worker {
    limit: Duration,
    /// None when it is to end.
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    /// It did not answer in time: its end is not waited for.
    is_given_up: Cell<bool>,
}

impl Worker {
    /// Starts it, for calls that take no longer than `limit`.
    pub(super) fn start(limit: Duration) -> io::Result<Self> {
        let (jobs, to_do) = mpsc::channel::<Job>();
        let work = move || to_do.into_iter().for_each(|job| job());
        let thread = thread::Builder::new().name("rtnetlink".to_owned());
        Ok(Self {
            limit,
            jobs: Some(jobs),
            thread: Some(thread.spawn(work)?),
            is_given_up: Cell::new(false),
        })
    }

    /// Has `work` done by the thread.
    ///
    /// The outcome of a call that took too long is unknown. Later ones still take their turn, to put back what can be put
    /// back, and return an error at once.
    pub(super) fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let ended = || io::Error::other("the thread that speaks to rtnetlink has ended");
        let (answer, result) = mpsc::sync_channel(1);
        let job: Job = Box::new(move || {
            // The caller may have given up.
            let _ = answer.send(work());
        });
        let jobs = self.jobs.as_ref().ok_or_else(ended)?;
        jobs.send(job).map_err(|_| ended())?;
        if self.is_given_up.get() {
            return Err(timed_out());
        }
        match result.recv_timeout(self.limit) {
            Ok(result) => result,
            Err(RecvTimeoutError::Disconnected) => Err(ended()),
            Err(RecvTimeoutError::Timeout) => {
                self.is_given_up.set(true);
                Err(timed_out())
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.jobs.take());
        // One that is given up may never end.
        let thread = self.thread.take().filter(|_| !self.is_given_up.get());
        if thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread that speaks to rtnetlink has panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watched_thread_is_given_up_when_one_of_its_calls_does_not_end() {
        let limit = Duration::from_millis(20);
        // What is slow by itself is no call.
        let slow = watched_within(limit, move |_| {
            thread::sleep(2 * limit);
            7
        });
        assert_eq!(slow.unwrap(), 7);

        let (go_on, wait) = mpsc::channel::<()>();
        let (done, later) = mpsc::channel();
        let stuck = watched_within(limit, move |steps| {
            let _ = steps.take(|| wait.recv());
            let _ = done.send(());
        });
        assert_eq!(stuck.unwrap_err().kind(), io::ErrorKind::TimedOut);
        // What was asked for still comes about.
        drop(go_on);
        later.recv().unwrap();
    }

    #[test]
    fn call_that_does_not_end_is_given_up_and_later_ones_take_their_turn() {
        let worker = Worker::start(Duration::from_millis(20)).unwrap();
        let (go_on, wait) = mpsc::channel::<()>();
        let stuck = worker.call(move || {
            let _ = wait.recv();
            Ok(())
        });
        assert_eq!(stuck.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let (done, later) = mpsc::channel();
        let result = worker.call(move || {
            let _ = done.send(());
            Ok(())
        });
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::TimedOut);

        // It waits for nothing, and what was asked for still comes about.
        drop(worker);
        assert!(later.try_recv().is_err());
        drop(go_on);
        later.recv().unwrap();
    }
}
