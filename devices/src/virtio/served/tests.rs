//! The entropy device, served to the crate's front end.

use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::GuestMemoryBackend;

use super::*;
use crate::events::EventSink;
use crate::virtio::rng::Rng;
use crate::virtio::tests::{Driver, END, REGION, SIZE, WRITE};

/// Guest memory of a file, which another process could map too.
fn shared_memory() -> Arc<GuestMemoryMmap> {
    let file = Arc::new(tempfile::tempfile().unwrap());
    file.set_len(END).unwrap();
    let ranges = [0, REGION].map(|at| {
        let place = FileOffset::from_arc(Arc::clone(&file), at);
        (GuestAddress(at), REGION as usize, Some(place))
    });
    Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap())
}

/// A front end and the driver of its guest.
struct Guest {
    frontend: Frontend,
    driver: Driver,
    kick: EventFd,
    call: EventFd,
    _served: Served,
}

impl Guest {
    fn new() -> Self {
        let (ours, its) = UnixStream::pair().unwrap();
        let rng = Box::new(Rng::new("rng", EventSink::default()).unwrap());
        let served = Served::start("rng", rng, 1, its).unwrap();
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        Self {
            frontend: Frontend::from_stream(ours, 1),
            driver: Driver::on(shared_memory()),
            kick: eventfd(),
            call: eventfd(),
            _served: served,
        }
    }

    /// Sets up everything but the ring's enabling, which goes on where it is.
    fn set_up(&mut self, next_avail: u16) {
        let frontend = &mut self.frontend;
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        // The driver wants every notification.
        let event_idx = 1 << VIRTIO_RING_F_EVENT_IDX;
        frontend.set_features(features & !event_idx).unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        let regions = self.driver.memory.iter();
        let regions = regions.map(VhostUserMemoryRegionInfo::from_guest_region);
        let regions: Vec<_> = regions.map(|region| region.unwrap()).collect();
        frontend.set_mem_table(&regions).unwrap();
        let address = |at| {
            let place = self.driver.memory.get_host_address(GuestAddress(at));
            place.unwrap() as u64
        };
        let config = Driver::config();
        let rings = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: address(config.descriptors),
            used_ring_addr: address(config.used),
            avail_ring_addr: address(config.available),
            log_addr: None,
        };
        frontend.set_vring_num(0, SIZE).unwrap();
        frontend.set_vring_addr(0, &rings).unwrap();
        frontend.set_vring_base(0, next_avail).unwrap();
        frontend.set_vring_call(0, &self.call).unwrap();
        frontend.set_vring_kick(0, &self.kick).unwrap();
    }

    /// Asks for random numbers, and waits until they are there.
    fn ask(&mut self) {
        self.driver.write(0x8000, &[0; 16]);
        self.driver.offer_chain(0, &[(0x8000, 16, WRITE)]);
        self.kick.write(1).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.call.read().is_err() {
            assert!(Instant::now() < deadline, "the driver is not notified");
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.driver.take_used(), [(0, 16)]);
        assert_ne!(self.driver.read(0x8000, 16), [0; 16]);
    }
}

#[test]
fn device_serves_the_guest_of_another_monitor_across_stops() {
    let mut guest = Guest::new();
    guest.set_up(0);
    guest.frontend.set_vring_enable(0, true).unwrap();
    guest.ask();
    guest.ask();
    for stops in 1..=3 {
        let next_avail = guest.frontend.get_vring_base(0).unwrap();
        assert_eq!(next_avail, stops + 1);
        // What is offered meanwhile waits.
        guest.set_up(next_avail as u16);
        guest.frontend.set_vring_enable(0, true).unwrap();
        guest.ask();
        // Disabled and enabled it is the same ring.
        guest.frontend.set_vring_enable(0, false).unwrap();
        guest.frontend.set_vring_enable(0, true).unwrap();
    }
    guest.ask();
}

#[test]
fn front_end_that_cannot_enable_queues_has_them_enabled() {
    let mut guest = Guest::new();
    let features = guest.frontend.get_features().unwrap();
    guest.set_up(0);
    let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    guest.frontend.set_features(features & !protocol).unwrap();
    // The first notification comes with and without an event index.
    guest.ask();
}

#[test]
fn ring_outside_guest_memory_ends_the_connection_alone() {
    let mut guest = Guest::new();
    guest.set_up(0);
    let nowhere = VringConfigData {
        queue_max_size: SIZE,
        queue_size: SIZE,
        flags: 0,
        desc_table_addr: 0x1000,
        used_ring_addr: 0x2000,
        avail_ring_addr: 0x3000,
        log_addr: None,
    };
    let _ = guest.frontend.set_vring_addr(0, &nowhere);
    assert!(guest.frontend.get_vring_base(0).is_err());
}

#[test]
fn configuration_is_the_devices_whatever_is_asked_for() {
    let mut guest = Guest::new();
    guest.set_up(0);
    let flags = VhostUserConfigFlags::empty();
    let (_, bytes) = guest.frontend.get_config(0, 8, flags, &[0; 8]).unwrap();
    assert_eq!(bytes, [0; 8]);
}
