//! The threads of devices: made with their device, and parked while its driver is not ready.
//!
//! A driver's DRIVER_OK can so fail neither for want of a thread nor of a file descriptor, and a
//! seccomp filter that forbids both can stand before the guest's first instruction.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::Interrupt;

/// What a [`Worker`] does between DRIVER_OK and the reset.
pub trait Job: Send + 'static {
    /// What wakes it: descriptors, each with a token of the job's own and the events to wait for.
    fn wakeups(&self) -> Vec<(RawFd, u32, EventSet)>;
    /// Of these the one whose events change from turn to turn, as they are now.
    fn varying(&self) -> Option<(RawFd, u32, EventSet)> {
        None
    }
    /// One of them is ready.
    fn wake(&mut self, token: u32, events: EventSet);
    /// The time that [`Turn::wake_at`] named has come.
    fn timeout(&mut self) {}
    /// Does what there is to do, but not so much that other events would wait long. The first turn
    /// comes without an event: the driver may have notified before there was a job.
    fn turn(&mut self) -> Turn;
}

/// When a job wants its next turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// There is more to do at once.
    pub more: bool,
    /// Otherwise, at this time if no event comes before it.
    pub wake_at: Option<Instant>,
}

/// A thread that does a job, or is parked.
#[derive(Debug)]
pub struct Worker<J> {
    epoll: Arc<Epoll>,
    stop: EventFd,
    /// Closed to end the thread.
    jobs: Option<Sender<(J, Arc<dyn Interrupt>)>>,
    /// Jobs that were stopped; nothing where one has panicked.
    stopped: Receiver<Option<J>>,
    thread: Option<JoinHandle<()>>,
    /// Descriptors of the job that is being done.
    watched: Vec<RawFd>,
    running: bool,
}

const STOP: u32 = u32::MAX;
const TIMER: u32 = u32::MAX - 1;

impl<J: Job> Worker<J> {
    /// A parked thread of this name.
    ///
    /// # Errors
    ///
    /// Fails when the process may not have another thread or descriptor.
    pub fn new(name: String) -> io::Result<Self> {
        let (epoll, timer) = (Arc::new(Epoll::new()?), TimerFd::new()?);
        let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        watch(&epoll, stop.as_raw_fd(), STOP, EventSet::IN)?;
        // Setting it takes its event back: it is never read.
        let expiry = EventSet::IN | EventSet::EDGE_TRIGGERED;
        watch(&epoll, timer.as_raw_fd(), TIMER, expiry)?;
        let (jobs, todo) = channel();
        let (parked, stopped) = channel();
        let thread = thread::Builder::new().name(name).spawn({
            let epoll = Arc::clone(&epoll);
            move || work(&todo, &parked, &epoll, timer)
        })?;
        Ok(Self {
            epoll,
            stop,
            jobs: Some(jobs),
            stopped,
            thread: Some(thread),
            watched: Vec::new(),
            running: false,
        })
    }

    /// Gives the parked thread a job. Should that fail later, it is `interrupt` that says so.
    ///
    /// # Errors
    ///
    /// Fails when a descriptor of the job cannot be watched.
    pub fn start(&mut self, job: J, interrupt: Arc<dyn Interrupt>) -> io::Result<()> {
        for (fd, token, events) in job.wakeups() {
            watch(&self.epoll, fd, token, events).inspect_err(|_| self.unwatch())?;
            self.watched.push(fd);
        }
        let sent = self.jobs.as_ref().map(|jobs| jobs.send((job, interrupt)));
        self.running = matches!(sent, Some(Ok(())));
        Ok(())
    }
}

impl<J> Worker<J> {
    /// Asks the thread to park. [`Worker::join`] waits for it.
    pub fn stop(&self) {
        if self.running {
            let _ = self.stop.write(1);
        }
    }

    /// Waits until the thread that was stopped is parked, and takes its job back. There is none
    /// where it was parked anyway, or its job has panicked.
    pub fn join(&mut self) -> Option<J> {
        if !std::mem::take(&mut self.running) {
            return None;
        }
        let job = self.stopped.recv().ok().flatten();
        let _ = self.stop.read();
        self.unwatch();
        job
    }

    fn unwatch(&mut self) {
        for fd in self.watched.drain(..) {
            // It may be closed, and is not watched any more then.
            let _ = self
                .epoll
                .ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }
}

impl<J> Drop for Worker<J> {
    fn drop(&mut self) {
        self.stop();
        self.join();
        self.jobs = None;
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn watch(epoll: &Epoll, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
    epoll.ctl(
        ControlOperation::Add,
        fd,
        EpollEvent::new(events, token.into()),
    )
}

/// The thread: does each job until it is stopped.
fn work<J: Job>(
    todo: &Receiver<(J, Arc<dyn Interrupt>)>,
    parked: &Sender<Option<J>>,
    epoll: &Epoll,
    mut timer: TimerFd,
) {
    while let Ok((mut job, interrupt)) = todo.recv() {
        let done = catch_unwind(AssertUnwindSafe(|| run(&mut job, epoll, &mut timer)));
        let failed = !matches!(done, Ok(Ok(())));
        if failed {
            let name = thread::current().name().unwrap_or_default().to_owned();
            log::error!("{name} stopped: {done:?}");
            interrupt.needs_reset();
        }
        if parked.send((!failed).then_some(job)).is_err() {
            return;
        }
    }
}

fn run(job: &mut impl Job, epoll: &Epoll, timer: &mut TimerFd) -> io::Result<()> {
    let mut events = [EpollEvent::default(); 8];
    let (mut armed, mut varying) = (None, job.varying());
    loop {
        let Turn { more, wake_at } = job.turn();
        if !more {
            if wake_at != armed {
                arm(timer, wake_at)?;
                armed = wake_at;
            }
            let now = job.varying();
            if let Some((fd, token, events)) = now
                && now != varying
            {
                let event = EpollEvent::new(events, token.into());
                epoll.ctl(ControlOperation::Modify, fd, event)?;
                varying = now;
            }
        }
        // With work left, only look at what else became ready.
        let ready = match epoll.wait(if more { 0 } else { -1 }, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        for event in &events[..ready] {
            match event.data() as u32 {
                STOP => return arm(timer, None),
                TIMER => {
                    armed = None;
                    job.timeout();
                }
                token => job.wake(token, event.event_set()),
            }
        }
    }
}

fn arm(timer: &mut TimerFd, at: Option<Instant>) -> io::Result<()> {
    let Some(at) = at else {
        return Ok(timer.clear()?);
    };
    // Nothing would disarm it.
    let wait = at.saturating_duration_since(Instant::now());
    Ok(timer.reset(wait.max(Duration::from_nanos(1)), None)?)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::super::tests::Recorder;
    use super::*;

    /// Counts its turns, and panics at a chosen one.
    #[derive(Debug)]
    struct Count {
        kick: Arc<EventFd>,
        turns: Arc<AtomicU32>,
        panics_at: u32,
        wake_at: Option<Instant>,
    }

    impl Job for Count {
        fn wakeups(&self) -> Vec<(RawFd, u32, EventSet)> {
            vec![(self.kick.as_raw_fd(), 7, EventSet::IN)]
        }

        fn wake(&mut self, token: u32, events: EventSet) {
            assert_eq!((token, events), (7, EventSet::IN));
            self.kick.read().unwrap();
        }

        fn timeout(&mut self) {
            self.wake_at = None;
        }

        fn turn(&mut self) -> Turn {
            let turn = self.turns.fetch_add(1, Ordering::SeqCst) + 1;
            assert_ne!(turn, self.panics_at, "as the test wants it");
            Turn {
                more: false,
                wake_at: self.wake_at,
            }
        }
    }

    struct Bench {
        worker: Worker<Count>,
        kick: Arc<EventFd>,
        turns: Arc<AtomicU32>,
        recorder: Arc<Recorder>,
    }

    impl Bench {
        fn new() -> Self {
            Self {
                worker: Worker::new("test".into()).unwrap(),
                kick: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
                turns: Arc::default(),
                recorder: Arc::default(),
            }
        }

        fn job(&self) -> Count {
            Count {
                kick: Arc::clone(&self.kick),
                turns: Arc::clone(&self.turns),
                panics_at: 0,
                wake_at: None,
            }
        }

        fn start(&mut self, job: Count) {
            self.worker.start(job, self.recorder.clone()).unwrap();
        }

        #[track_caller]
        fn wait_for(&self, turns: u32) {
            let deadline = Instant::now() + Duration::from_secs(10);
            while self.turns.load(Ordering::SeqCst) < turns {
                assert!(Instant::now() < deadline, "{:?}", self.turns);
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    #[test]
    fn job_runs_between_start_and_stop_alone() {
        let mut bench = Bench::new();
        for round in 0..3 {
            bench.start(bench.job());
            bench.wait_for(2 * round + 1);
            bench.kick.write(1).unwrap();
            bench.wait_for(2 * round + 2);
            bench.worker.stop();
            assert!(bench.worker.join().is_some());
            bench.kick.write(1).unwrap();
            bench.kick.read().unwrap();
            assert_eq!(bench.turns.load(Ordering::SeqCst), 2 * round + 2);
        }
        bench.worker.stop();
        assert!(bench.worker.join().is_none(), "it is parked");
    }

    #[test]
    fn job_is_woken_at_the_time_that_it_names() {
        let mut bench = Bench::new();
        let start = Instant::now();
        let job = Count {
            wake_at: Some(start + Duration::from_millis(30)),
            ..bench.job()
        };
        bench.start(job);
        bench.wait_for(2);
        assert!(start.elapsed() >= Duration::from_millis(30));
        bench.worker.stop();
        assert!(bench.worker.join().is_some());
    }

    #[test]
    fn job_that_panics_asks_for_a_reset_and_the_next_one_runs() {
        let mut bench = Bench::new();
        let job = Count {
            panics_at: 2,
            ..bench.job()
        };
        bench.start(job);
        bench.wait_for(1);
        bench.kick.write(1).unwrap();
        bench.wait_for(2);
        bench.worker.stop();
        assert!(bench.worker.join().is_none());
        assert!(bench.recorder.needs_reset.load(Ordering::SeqCst));
        bench.start(bench.job());
        bench.wait_for(3);
    }

    #[test]
    fn job_whose_descriptor_cannot_be_watched_does_not_start() {
        let mut bench = Bench::new();
        bench.start(bench.job());
        // One worker cannot watch a descriptor twice.
        let error = bench.worker.start(bench.job(), bench.recorder.clone());
        assert_eq!(error.unwrap_err().raw_os_error(), Some(libc::EEXIST));
    }
}
