//! The back end of vhost-user: what the monitor says of the guest's memory and of the queues.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestRegionMmap};

use crate::inflight::QUEUE_SIZE;
use crate::ring::{Memory, Ring, State};
use crate::state::Session;

const VIRTIO_RING_F_INDIRECT_DESC: u64 = 1 << 28;
const VIRTIO_RING_F_EVENT_IDX: u64 = 1 << 29;
const VIRTIO_F_VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
const FEATURES: u64 =
    VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_RING_F_EVENT_IDX | VIRTIO_F_VERSION_1 | PROTOCOL_FEATURES;

/// Where a part of the guest's memory is for the front end.
struct Mapping {
    user_addr: u64,
    guest: u64,
    size: u64,
}

/// The state of a session with the front end.
pub(crate) struct Backend {
    rings: Vec<Arc<Ring>>,
    mappings: Vec<Mapping>,
    session: Arc<dyn Session>,
}

impl Backend {
    pub fn new(rings: Vec<Arc<Ring>>, session: Arc<dyn Session>) -> Self {
        Self {
            rings,
            mappings: Vec::new(),
            session,
        }
    }

    fn change<T>(&self, index: u32, change: impl FnOnce(&mut State) -> T) -> Result<T> {
        let ring = self.rings.get(index as usize).ok_or(Error::InvalidParam)?;
        Ok(ring.change(|state, _| change(state)))
    }

    fn guest_address(&self, user_addr: u64) -> Result<GuestAddress> {
        let found = self.mappings.iter().find_map(|mapping| {
            let offset = user_addr.checked_sub(mapping.user_addr)?;
            (offset < mapping.size).then(|| GuestAddress(mapping.guest + offset))
        });
        found.ok_or(Error::InvalidParam)
    }

    fn stop(state: &mut State) {
        state.queue.set_ready(false);
        state.kick = None;
        state.call = None;
    }
}

/// A feature that is not offered.
fn not_offered<T>() -> Result<T> {
    Err(Error::InvalidOperation("not offered"))
}

fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        not_offered()
    }

    fn reset_device(&mut self) -> Result<()> {
        for ring in &self.rings {
            ring.change(|state, _| {
                Self::stop(state);
                state.enabled = false;
            });
        }
        self.session.forget();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !FEATURES != 0 {
            return Err(Error::InvalidParam);
        }
        for ring in &self.rings {
            ring.change(|state, _| {
                let event_idx = features & VIRTIO_RING_F_EVENT_IDX != 0;
                state.queue.set_event_idx(event_idx);
                // Otherwise the front end enables each of them.
                state.enabled |= features & PROTOCOL_FEATURES == 0;
            });
        }
        Ok(())
    }

    fn set_mem_table(&mut self, table: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        let mut regions = Vec::new();
        let mut mappings = Vec::new();
        for (region, file) in table.iter().zip(files) {
            let start = GuestAddress(region.guest_phys_addr);
            let mapped = GuestRegionMmap::new(region.mmap_region(file)?, start);
            regions.push(mapped.ok_or(Error::InvalidParam)?);
            mappings.push(Mapping {
                user_addr: region.user_addr,
                guest: region.guest_phys_addr,
                size: region.memory_size,
            });
        }
        let memory = Arc::new(Memory::from_regions(regions).map_err(failed)?);
        self.mappings = mappings;
        for ring in &self.rings {
            ring.change(|state, _| state.memory = Some(memory.clone()));
        }
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        if !size.is_power_of_two() || size > QUEUE_SIZE {
            return Err(Error::InvalidParam);
        }
        self.change(index, |state| state.queue.set_size(size))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let [descriptor, used, available] =
            [descriptor, used, available].map(|address| self.guest_address(address));
        let (descriptor, used, available) = (descriptor?, used?, available?);
        let ring = self.rings.get(index as usize).ok_or(Error::InvalidParam)?;
        ring.change(|state, inflight| {
            let queue = &mut state.queue;
            let memory = state.memory.as_ref().ok_or(Error::InvalidParam)?;
            queue
                .try_set_desc_table_address(descriptor)
                .map_err(failed)?;
            queue.try_set_used_ring_address(used).map_err(failed)?;
            queue
                .try_set_avail_ring_address(available)
                .map_err(failed)?;
            let used = queue
                .used_idx(&**memory, Ordering::Relaxed)
                .map_err(failed)?;
            queue.set_next_used(used.0);
            inflight.start(used.0);
            Ok(())
        })
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.change(index, |state| state.queue.set_next_avail(base as u16))
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let next = self.change(index, |state| {
            Self::stop(state);
            state.queue.next_avail()
        })?;
        Ok(VhostUserVringState::new(index, next.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.change(index.into(), |state| {
            state.queue.set_ready(fd.is_some());
            state.kick = fd.map(|fd| Arc::new(OwnedFd::from(fd)));
        })
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.change(index.into(), |state| state.call = fd.map(OwnedFd::from))
    }

    fn set_vring_err(&mut self, index: u8, _fd: Option<File>) -> Result<()> {
        self.change(index.into(), |_| ())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::DEVICE_STATE)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.change(index, |state| state.enabled = enable)
    }

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        not_offered()
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        not_offered()
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        not_offered()
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        not_offered()
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        not_offered()
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        not_offered()
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        not_offered()
    }

    fn add_mem_region(&mut self, _: &VhostUserSingleMemoryRegion, _: File) -> Result<()> {
        not_offered()
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        not_offered()
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        file: File,
    ) -> Result<Option<File>> {
        let is_served = |ring: &Arc<Ring>| ring.change(|state, _| state.kick.is_some());
        if self.rings.iter().any(is_served) {
            return Err(Error::InvalidOperation("the queues have not been stopped"));
        }
        let done = match direction {
            VhostTransferStateDirection::SAVE => self.session.save(file),
            VhostTransferStateDirection::LOAD => self.session.restore(file),
        };
        // The front end hears of no reason.
        done.inspect_err(|error| log::error!("cannot transfer what the guest has open: {error}"))
            .map(|()| None)
            .map_err(failed)
    }

    /// The transfer was over when the request for it had its reply.
    fn check_device_state(&mut self) -> Result<()> {
        Ok(())
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_offered()
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        not_offered()
    }
}
