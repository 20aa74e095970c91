//! Shares work between this thread and a second one: copying keeps one CPU busy for milliseconds, and the guest's first
//! instruction waits for it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, Scope, ScopedJoinHandle};

/// Much less than a thread gets by default: nothing here recurses.
const STACK_SIZE: usize = 128 << 10;

/// Runs `work` on a thread of its own. Where the host allows no more threads, runs it here and returns its result.
pub(crate) fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl Fn() -> T + Clone + Send + 'scope,
) -> Running<'scope, T> {
    let builder = thread::Builder::new().name("boot".into());
    let builder = builder.stack_size(STACK_SIZE);
    match builder.spawn_scoped(scope, work.clone()) {
        Ok(thread) => Running::There(thread),
        Err(_) => Running::Done(work()),
    }
}

/// What [`spawn`] has started.
pub(crate) enum Running<'scope, T> {
    There(ScopedJoinHandle<'scope, T>),
    Done(T),
}

impl<T> Running<'_, T> {
    pub(crate) fn join(self) -> T {
        match self {
            Self::There(thread) => thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Self::Done(value) => value,
        }
    }
}

/// Calls `work` for each of `jobs`, on this thread and on a second one, each with tools of its own. Fails with
/// the first error.
pub(crate) fn share<J: Sync, T: Default, E: Send>(
    jobs: &[J],
    work: impl Fn(&mut T, &J) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let next = AtomicUsize::new(0);
    let do_some = || {
        let mut tools = T::default();
        let take = || jobs.get(next.fetch_add(1, Ordering::Relaxed));
        while let Some(job) = take() {
            work(&mut tools, job)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let second = (jobs.len() > 1).then(|| spawn(scope, do_some));
        let here = do_some();
        second.map_or(Ok(()), Running::join).and(here)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn each_job_is_done_once() {
        for count in [0, 1, 2, 100] {
            let jobs: Vec<_> = (0..count).collect();
            let done = Mutex::new(Vec::new());
            let work = |_: &mut (), job: &i32| {
                done.lock().unwrap().push(*job);
                Ok::<_, ()>(())
            };
            share(&jobs, work).unwrap();
            let mut done = done.into_inner().unwrap();
            done.sort_unstable();
            assert_eq!(done, jobs);
        }
    }

    #[test]
    fn error_of_any_job_is_returned() {
        for bad in 0..10 {
            let jobs: Vec<_> = (0..10).collect();
            let work = |_: &mut (), job: &i32| if *job == bad { Err(bad) } else { Ok(()) };
            assert_eq!(share(&jobs, work), Err(bad));
        }
    }
}
