//! The front end: what is agreed with a server, and which rings it has.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserInflight, VhostUserMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddr, VhostUserVringState,
};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::channel::Channel;
use super::outstanding::{Inflight, used_index};
use crate::virtio::{ActiveQueue, Interrupt, VIRTIO_F_VERSION_1};

/// How often it is looked whether a ring that has stopped is drained.
const LOOK: Duration = Duration::from_millis(1);
/// Regions that every server takes (VHOST_MEMORY_BASELINE_NREGIONS).
const MAX_REGIONS: usize = 8;

/// What a server did not do. It is cut off then.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// It cannot be used for this device.
    #[error("the vhost-user server cannot be used: it has no {0}")]
    Lacks(&'static str),
    /// It keeps to itself what the guest has open.
    #[error("the vhost-user server does not pass on what the guest has open (DEVICE_STATE)")]
    NoState,
    /// Guest memory is private to this process.
    #[error("guest memory is not such that a vhost-user server can map it")]
    Memory,
    /// A request failed.
    #[error("the vhost-user server does not {what}")]
    Request {
        /// What it was to do.
        what: &'static str,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
}

pub(super) fn failed_to(what: &'static str) -> impl Fn(io::Error) -> VhostUserError {
    move |source| VhostUserError::Request { what, source }
}

/// A server that has been agreed with, and its rings.
#[derive(Debug)]
pub struct FrontEnd {
    pub(super) channel: Channel,
    /// The virtio features that it offers, of those that were asked for.
    features: u64,
    pub(super) protocol: Protocol,
    queues: u16,
    inflight: Option<Inflight>,
    /// What the server gets its record of chains in flight back with, where it has made that itself: the
    /// bytes of a `VhostUserInflight`.
    passed: Option<Vec<u8>>,
    /// The queues that the server has, and where their used rings are.
    started: Vec<(u16, u64)>,
}

impl FrontEnd {
    /// Agrees with the server at the other end of `socket` on those of `features` that it has, for a
    /// device with so many `queues` of `queue_size`. It has `limit` for each reply. `inflight` is the
    /// record of chains in flight, where the server was started with one; others are asked for it.
    ///
    /// # Errors
    ///
    /// Says what the server lacks, or did not do.
    pub fn connect(
        socket: UnixStream,
        limit: Duration,
        features: u64,
        (queues, queue_size): (u16, u16),
        inflight: Option<Inflight>,
    ) -> Result<Self, VhostUserError> {
        let mut channel = Channel::new(socket, limit).map_err(failed_to("take a deadline"))?;
        channel
            .order(FrontendReq::SET_OWNER, &[], &[])
            .map_err(failed_to("take an owner"))?;
        let offered: u64 = channel
            .ask(FrontendReq::GET_FEATURES, &[])
            .map_err(failed_to("give its features"))?;
        let extended = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if offered & VIRTIO_F_VERSION_1 == 0 {
            return Err(VhostUserError::Lacks("virtio 1.0"));
        }
        if offered & extended == 0 {
            return Err(VhostUserError::Lacks("protocol features"));
        }
        let protocol: u64 = channel
            .ask(FrontendReq::GET_PROTOCOL_FEATURES, &[])
            .map_err(failed_to("give its protocol features"))?;
        let mut wanted = Protocol::REPLY_ACK | Protocol::MQ | Protocol::RESET_DEVICE;
        wanted |= Protocol::DEVICE_STATE;
        if inflight.is_none() {
            wanted |= Protocol::INFLIGHT_SHMFD;
        }
        let protocol = Protocol::from_bits_truncate(protocol) & wanted;
        if !protocol.contains(Protocol::REPLY_ACK) {
            return Err(VhostUserError::Lacks("acknowledgements (REPLY_ACK)"));
        }
        channel
            .order(
                FrontendReq::SET_PROTOCOL_FEATURES,
                protocol.bits().as_slice(),
                &[],
            )
            .map_err(failed_to("take the protocol's features"))?;
        channel.acknowledges = true;
        let mut new = Self {
            channel,
            features: offered & (features | extended | VIRTIO_F_VERSION_1),
            protocol,
            queues,
            inflight,
            passed: None,
            started: Vec::new(),
        };
        new.check_queues()?;
        if protocol.contains(Protocol::INFLIGHT_SHMFD) {
            new.get_inflight(queue_size)?;
        }
        Ok(new)
    }

    fn check_queues(&mut self) -> Result<(), VhostUserError> {
        if !self.protocol.contains(Protocol::MQ) {
            return Ok(());
        }
        let queues = self.channel.ask::<u64>(FrontendReq::GET_QUEUE_NUM, &[]);
        match queues.map_err(failed_to("say how many queues it has"))? {
            queues if queues < self.queues.into() => {
                Err(VhostUserError::Lacks("queues that are enough for it"))
            }
            _ => Ok(()),
        }
    }

    fn get_inflight(&mut self, queue_size: u16) -> Result<(), VhostUserError> {
        let wanted = VhostUserInflight::new(0, 0, self.queues, queue_size);
        let failed = failed_to("give a record of what is in flight");
        let (reply, file) = self
            .channel
            .ask_file::<VhostUserInflight>(FrontendReq::GET_INFLIGHT_FD, wanted.as_slice(), &[])
            .map_err(&failed)?;
        let file = file.ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
        self.inflight = Some(Inflight::at(file, reply.mmap_offset, queue_size));
        self.passed = Some(reply.as_slice().to_vec());
        Ok(())
    }

    /// The virtio features that it has, of those that were asked for.
    pub fn features(&self) -> u64 {
        self.features & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    /// Whether the server has been cut off, or has gone by itself as far as requests have shown.
    pub fn is_dead(&self) -> bool {
        self.channel.is_broken()
    }

    /// How long the server has for a reply.
    pub fn limit(&self) -> Duration {
        self.channel.limit()
    }

    /// Cuts the server off.
    pub fn cut_off(&mut self) {
        self.channel.close();
    }

    /// Takes the record of what is in flight: of a server that is dead, and has no more use for it.
    pub fn take_inflight(&mut self) -> Option<Inflight> {
        self.inflight.take()
    }

    /// Gives the server these queues, with their numbers, from where they stand.
    ///
    /// # Errors
    ///
    /// Says what the server did not do.
    pub fn start(
        &mut self,
        memory: &GuestMemoryMmap,
        features: u64,
        queues: &[(u16, ActiveQueue)],
        interrupt: &dyn Interrupt,
    ) -> Result<(), VhostUserError> {
        let extended = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let features = (features | extended) & self.features;
        self.order(
            FrontendReq::SET_FEATURES,
            features.as_slice(),
            &[],
            "take the features",
        )?;
        self.set_memory(memory)?;
        if let (Some(passed), Some(inflight)) = (&self.passed, &self.inflight) {
            let fds = [inflight.as_raw_fd()];
            let done = self
                .channel
                .order(FrontendReq::SET_INFLIGHT_FD, passed, &fds);
            done.map_err(failed_to("take the record of what is in flight"))?;
        }
        for (index, queue) in queues {
            self.set_up(memory, *index, queue, interrupt.call_eventfd(*index))?;
        }
        for (index, queue) in queues {
            let enabled = VhostUserVringState::new((*index).into(), 1);
            let what = "enable a queue";
            self.order(FrontendReq::SET_VRING_ENABLE, enabled.as_slice(), &[], what)?;
            // Either may have been due while the queue was paused.
            let _ = queue.kick.write(1);
            let _ = interrupt.call_eventfd(*index).write(1);
        }
        Ok(())
    }

    fn set_memory(&mut self, memory: &GuestMemoryMmap) -> Result<(), VhostUserError> {
        let regions = memory
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region);
        let regions: Result<Vec<_>, _> = regions.collect();
        let regions = regions.map_err(|_| VhostUserError::Memory)?;
        if regions.len() > MAX_REGIONS {
            return Err(VhostUserError::Memory);
        }
        let mut body = [regions.len() as u32, 0].map(u32::to_ne_bytes).concat();
        for region in &regions {
            body.extend_from_slice(VhostUserMemoryRegion::as_slice(&region.to_region()));
        }
        let fds: Vec<_> = regions.iter().map(|region| region.mmap_handle).collect();
        let what = "map the guest's memory";
        self.order(FrontendReq::SET_MEM_TABLE, &body, &fds, what)
    }

    fn set_up(
        &mut self,
        memory: &GuestMemoryMmap,
        index: u16,
        queue: &ActiveQueue,
        line: &EventFd,
    ) -> Result<(), VhostUserError> {
        let number = u32::from(index);
        let config = &queue.config;
        // The server finds the rings by where they are in this process.
        let host = |address: u64| {
            let at = memory.get_host_address(GuestAddress(address));
            at.map(|at| at as u64).map_err(|_| VhostUserError::Memory)
        };
        let size = VhostUserVringState::new(number, config.size.into());
        self.order(
            FrontendReq::SET_VRING_NUM,
            size.as_slice(),
            &[],
            "take the size of a queue",
        )?;
        let base = VhostUserVringState::new(number, queue.queue.next_avail().into());
        self.order(
            FrontendReq::SET_VRING_BASE,
            base.as_slice(),
            &[],
            "take the beginning of a queue",
        )?;
        let addresses = VhostUserVringAddr {
            index: number,
            flags: 0,
            descriptor: host(config.descriptors)?,
            used: host(config.used)?,
            available: host(config.available)?,
            log: 0,
        };
        self.order(
            FrontendReq::SET_VRING_ADDR,
            addresses.as_slice(),
            &[],
            "take the addresses of a queue",
        )?;
        // From here on it may have to be stopped.
        self.started.push((index, config.used));
        self.set_interrupt(index, line)?;
        self.order(
            FrontendReq::SET_VRING_KICK,
            u64::from(index).as_slice(),
            &[queue.kick.as_raw_fd()],
            "take the notifications of a queue",
        )
    }

    fn set_interrupt(&mut self, index: u16, line: &EventFd) -> Result<(), VhostUserError> {
        self.order(
            FrontendReq::SET_VRING_CALL,
            u64::from(index).as_slice(),
            &[line.as_raw_fd()],
            "take the interrupt of a queue",
        )
    }

    /// Lets a queue interrupt by another line, if the server has it.
    ///
    /// # Errors
    ///
    /// Says what the server did not do.
    pub fn change_interrupt(&mut self, index: u16, line: &EventFd) -> Result<(), VhostUserError> {
        if self.is_dead() || self.started.iter().all(|&(started, _)| started != index) {
            return Ok(());
        }
        self.set_interrupt(index, line)?;
        // Of what was signalled just before, the driver heard nothing by this one.
        let _ = line.write(1);
        Ok(())
    }

    /// Takes the queues back from the server, and returns where each stands. It touches guest memory no
    /// more once this has returned without an error.
    ///
    /// # Errors
    ///
    /// Says what the server did not do.
    pub fn stop(&mut self, memory: &GuestMemoryMmap) -> Result<Vec<(u16, u16)>, VhostUserError> {
        let started = std::mem::take(&mut self.started);
        let stop = |(index, used)| {
            let state = VhostUserVringState::new(u32::from(index), 0);
            let reply = self
                .channel
                .ask::<VhostUserVringState>(FrontendReq::GET_VRING_BASE, state.as_slice());
            let base = reply.map_err(failed_to("stop a queue"))?.num as u16;
            self.drain(memory, used, base)?;
            Ok((index, base))
        };
        started.into_iter().map(stop).collect()
    }

    /// Waits until a server with several threads has used what it had taken from a ring by then.
    fn drain(
        &mut self,
        memory: &GuestMemoryMmap,
        used: u64,
        base: u16,
    ) -> Result<(), VhostUserError> {
        let deadline = Instant::now() + self.channel.limit();
        while used_index(memory, used).is_some_and(|used| used != base) {
            if Instant::now() > deadline {
                self.cut_off();
                let late = io::ErrorKind::TimedOut.into();
                return Err(failed_to("complete what it has begun")(late));
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Has the server forget what the driver had open. Its queues have been stopped.
    ///
    /// # Errors
    ///
    /// Says what the server did not do.
    pub fn reset(&mut self) -> Result<(), VhostUserError> {
        match self.protocol.contains(Protocol::RESET_DEVICE) {
            true => self.order(FrontendReq::RESET_DEVICE, &[], &[], "reset the device"),
            false => Ok(()),
        }
    }

    fn order(
        &mut self,
        request: FrontendReq,
        body: &[u8],
        fds: &[RawFd],
        what: &'static str,
    ) -> Result<(), VhostUserError> {
        let done = self.channel.order(request, body, fds);
        done.map_err(failed_to(what))
    }
}

/// The socket, which hangs up when the server is gone.
impl AsRawFd for FrontEnd {
    fn as_raw_fd(&self) -> RawFd {
        self.channel.as_raw_fd()
    }
}
