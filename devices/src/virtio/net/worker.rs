//! The thread of a queue pair: maps what became ready to the queue that has work.

use std::io;
use std::sync::Arc;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::EventFd;

use super::backend::Backend;
use super::ctrl::CtrlQueue;
use super::rx::{RxCounters, RxQueue, RxStop};
use super::tx::{TxCounters, TxQueue, TxStop};
use crate::virtio::Interrupt;

/// Frames that one queue may move before the other has its turn.
const BUDGET: usize = 256;

/// The eventfds that wake the worker.
#[derive(Debug)]
pub struct Wakeups {
    /// The driver has made receive buffers available.
    pub rx_kick: Arc<EventFd>,
    /// The driver has made frames available.
    pub tx_kick: Arc<EventFd>,
    /// The driver has sent a command, where this pair's thread has the control queue too.
    pub ctrl_kick: Option<Arc<EventFd>>,
    /// The device is being reset.
    pub stop: EventFd,
}

const BACKEND: u32 = 0;
const RX_KICK: u32 = 1;
const TX_KICK: u32 = 2;
const STOP: u32 = 3;
const CTRL_KICK: u32 = 4;

/// One queue pair and what it knows of itself.
#[derive(Debug)]
pub struct Worker<B> {
    backend: Arc<B>,
    rx: RxQueue,
    tx: TxQueue,
    ctrl: Option<CtrlQueue<B>>,
    wakeups: Wakeups,
    interrupt: Arc<dyn Interrupt>,
    /// Which pair this is: its queues are 2n and 2n + 1 (virtio 1.2, 5.1.2).
    pair: u16,
    /// The number of the control queue.
    ctrl_index: u16,
    rx_ready: bool,
    tx_ready: bool,
    ctrl_ready: bool,
    /// The driver has no receive buffers: only its kick makes the receive queue ready again.
    rx_starved: bool,
    broken: bool,
    stopped: bool,
}

impl<B: Backend> Worker<B> {
    /// A pair that has not started yet.
    pub fn new(
        backend: Arc<B>,
        rx: RxQueue,
        tx: TxQueue,
        wakeups: Wakeups,
        interrupt: Arc<dyn Interrupt>,
        pair: u16,
    ) -> Self {
        // Both start as ready: the driver may have kicked before there was a worker.
        Self {
            backend,
            rx,
            tx,
            ctrl: None,
            wakeups,
            interrupt,
            pair,
            ctrl_index: 0,
            ctrl_ready: false,
            rx_ready: true,
            tx_ready: true,
            rx_starved: false,
            broken: false,
            stopped: false,
        }
    }

    /// Gives the pair the control queue, whose number is `index`.
    pub fn with_ctrl(mut self, ctrl: CtrlQueue<B>, index: u16) -> Self {
        self.ctrl = Some(ctrl);
        self.ctrl_index = index;
        self.ctrl_ready = true;
        self
    }

    /// Moves frames until `stop` is signalled; returns what has passed.
    ///
    /// # Errors
    ///
    /// Fails when the process has no file descriptor left for the epoll instance.
    pub fn run(self) -> io::Result<(RxCounters, TxCounters)> {
        let failed = |error| io::Error::other(format!("event loop of the network device: {error}"));
        let mut events = EventManager::<Self>::new().map_err(failed)?;
        let id = events.add_subscriber(self);
        loop {
            let worker = events.subscriber_mut(id).map_err(failed)?;
            if worker.stopped {
                return Ok((worker.rx.counters(), worker.tx.counters()));
            }
            worker.turn();
            // With work left, only look at what else became ready.
            let work_left = worker.rx_ready || worker.tx_ready || worker.ctrl_ready;
            let wait = if work_left { 0 } else { -1 };
            match events.run_with_timeout(wait) {
                Ok(_) => {}
                Err(event_manager::Error::Epoll(errno)) if errno.errno() == libc::EINTR => {}
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// Gives each queue that is ready one turn.
    fn turn(&mut self) {
        if std::mem::take(&mut self.ctrl_ready)
            && let Some(ctrl) = &mut self.ctrl
        {
            let (more, interrupt) = ctrl.handle();
            self.ctrl_ready = more;
            if interrupt {
                self.interrupt.queue(self.ctrl_index);
            }
        }
        if std::mem::take(&mut self.tx_ready) {
            let (stop, interrupt) = self.tx.send(self.backend.as_ref(), BUDGET);
            if interrupt {
                self.interrupt.queue(2 * self.pair + 1);
            }
            match stop {
                TxStop::Budget => self.tx_ready = true,
                TxStop::Broken => self.give_up("transmit"),
                TxStop::Empty | TxStop::Full => {}
            }
        }
        if std::mem::take(&mut self.rx_ready) {
            let (stop, interrupt) = self.rx.receive(self.backend.as_ref(), BUDGET);
            if interrupt {
                self.interrupt.queue(2 * self.pair);
            }
            self.rx_starved = stop == RxStop::Starved;
            match stop {
                RxStop::Budget => self.rx_ready = true,
                RxStop::Broken => self.give_up("receive"),
                RxStop::Idle | RxStop::Starved => {}
            }
        }
    }

    /// A ring makes no sense: nothing moves until the driver resets the device.
    fn give_up(&mut self, queue: &str) {
        log::debug!("network device: the {queue} queue's available index is impossible");
        self.broken = true;
        self.rx_ready = false;
        self.tx_ready = false;
        self.interrupt.needs_reset();
    }
}

impl<B: Backend> MutEventSubscriber for Worker<B> {
    fn init(&mut self, ops: &mut EventOps) {
        // The backend is edge-triggered: while the driver has no buffers (or the tap no room),
        // frames that wait must not wake the thread again and again.
        let backend = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let ctrl = self.wakeups.ctrl_kick.as_ref();
        let ctrl = ctrl.map(|kick| Events::with_data(kick.as_ref(), CTRL_KICK, EventSet::IN));
        let queues = [
            Events::with_data(self.backend.as_ref(), BACKEND, backend),
            Events::with_data(self.wakeups.rx_kick.as_ref(), RX_KICK, EventSet::IN),
            Events::with_data(self.wakeups.tx_kick.as_ref(), TX_KICK, EventSet::IN),
            Events::with_data(&self.wakeups.stop, STOP, EventSet::IN),
        ];
        for events in queues.into_iter().chain(ctrl) {
            if let Err(error) = ops.add(events) {
                log::error!("network device: cannot watch a file descriptor: {error}");
                self.interrupt.needs_reset();
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let (mut rx, mut tx) = (false, false);
        match events.data() {
            BACKEND => {
                rx = events.event_set().contains(EventSet::IN) && !self.rx_starved;
                tx = events.event_set().contains(EventSet::OUT);
            }
            RX_KICK => rx = self.wakeups.rx_kick.read().is_ok(),
            TX_KICK => tx = self.wakeups.tx_kick.read().is_ok(),
            CTRL_KICK => {
                let kick = self.wakeups.ctrl_kick.as_ref();
                self.ctrl_ready |= kick.is_some_and(|kick| kick.read().is_ok());
            }
            _ => self.stopped = true,
        }
        self.rx_ready |= rx && !self.broken;
        self.tx_ready |= tx && !self.broken;
    }
}
