//! Requests by a pool of threads, where io_uring is refused or not wanted.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::EventFd;

use super::super::disk::Disk;
use super::super::pending::Pending;
use super::Engine;
use crate::lock;

/// Threads of a disk: as many requests does the host have at once.
const THREADS: usize = 8;

/// The threads of a disk, which all its queues share.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    todo: Mutex<Todo>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Todo {
    tasks: VecDeque<Task>,
    ends: bool,
}

#[derive(Debug)]
struct Task {
    pending: Pending,
    disk: Arc<Disk>,
    replies: Arc<Replies>,
}

/// What has been done for one queue.
#[derive(Debug)]
struct Replies {
    done: Mutex<VecDeque<(Pending, io::Result<()>)>>,
    changed: Condvar,
    event: EventFd,
}

impl Pool {
    /// Threads named after the disk.
    ///
    /// # Errors
    ///
    /// Fails when the process may not have so many.
    pub fn new(name: &str) -> io::Result<Self> {
        let mut pool = Self {
            shared: Arc::default(),
            threads: Vec::new(),
        };
        for n in 0..THREADS {
            let shared = Arc::clone(&pool.shared);
            let thread = thread::Builder::new().name(format!("{name}.io{n}"));
            pool.threads.push(thread.spawn(move || work(&shared))?);
        }
        Ok(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.todo).ends = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// What each thread does.
fn work(shared: &Shared) {
    let mut todo = lock(&shared.todo);
    loop {
        if let Some(task) = todo.tasks.pop_front() {
            drop(todo);
            task.carry_out();
            todo = lock(&shared.todo);
        } else if todo.ends {
            return;
        } else {
            let waited = shared.changed.wait(todo);
            todo = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Task {
    fn carry_out(self) {
        let Self {
            pending,
            disk,
            replies,
        } = self;
        let result = catch_unwind(AssertUnwindSafe(|| disk.execute(&pending)));
        let result = result.unwrap_or_else(|_| Err(io::Error::other("the disk's thread panicked")));
        lock(&replies.done).push_back((pending, result));
        replies.changed.notify_one();
        let _ = replies.event.write(1);
    }
}

/// A queue's share of the pool.
#[derive(Debug)]
pub(super) struct Client {
    pool: Arc<Pool>,
    disk: Arc<Disk>,
    replies: Arc<Replies>,
    under_way: usize,
}

impl Client {
    /// For a queue of `disk`.
    pub fn new(pool: Arc<Pool>, disk: Arc<Disk>) -> io::Result<Self> {
        let replies = Arc::new(Replies {
            done: Mutex::default(),
            changed: Condvar::new(),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        });
        Ok(Self {
            pool,
            disk,
            replies,
            under_way: 0,
        })
    }
}

impl Engine for Client {
    fn start(&mut self, pending: Pending) -> Option<Pending> {
        let task = Task {
            pending,
            disk: Arc::clone(&self.disk),
            replies: Arc::clone(&self.replies),
        };
        lock(&self.pool.shared.todo).tasks.push_back(task);
        self.pool.shared.changed.notify_one();
        self.under_way += 1;
        None
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn completed(&mut self) -> Option<(Pending, io::Result<()>)> {
        let done = lock(&self.replies.done).pop_front()?;
        self.under_way -= 1;
        Some(done)
    }

    fn under_way(&self) -> usize {
        self.under_way
    }

    fn wait(&mut self) -> io::Result<()> {
        let done = lock(&self.replies.done);
        if self.under_way > 0 {
            let nothing = |done: &mut VecDeque<_>| done.is_empty();
            drop(self.replies.changed.wait_while(done, nothing));
        }
        Ok(())
    }

    fn event(&self) -> RawFd {
        self.replies.event.as_raw_fd()
    }
}

impl Drop for Client {
    /// Until the threads are done, they may write to guest memory.
    fn drop(&mut self) {
        while self.under_way > 0 {
            let _ = self.wait();
            self.completed();
        }
    }
}
