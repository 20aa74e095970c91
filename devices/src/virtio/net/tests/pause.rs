//! Pausing and saving a device: what was under way goes on, here or in another device.

use super::*;
use crate::virtio::rate::RateLimit;

/// A device with one pair and its control queue, and the driver's side of them.
struct Guest {
    device: Net<Wire>,
    far: UnixDatagram,
    features: Features,
    drivers: [Driver; 3],
    kicks: [Arc<EventFd>; 3],
    recorder: Arc<Recorder>,
}

impl Guest {
    fn new(features: Features, options: NetOptions) -> Self {
        let (wire, far) = Wire::new();
        Self {
            device: device(vec![wire], 1500, options),
            far,
            features: features | Features::CTRL_VQ,
            drivers: [(); 3].map(|()| Driver::new()),
            kicks: [(); 3].map(|()| kick()),
            recorder: Arc::default(),
        }
    }

    fn activation(&self, positions: Option<&[Option<u16>]>) -> Activation {
        let queue = |index: usize| {
            let mut active = queue(&self.drivers[index], &self.kicks[index]).unwrap();
            if let Some(positions) = positions {
                active.queue.resume(positions[index]?);
            }
            Some(active)
        };
        Activation {
            memory: Arc::clone(&self.drivers[0].memory),
            features: self.features.bits(),
            queues: (0..3).map(queue).collect(),
            resumed: positions.is_some(),
            interrupt: self.recorder.clone(),
        }
    }

    fn start(&mut self) {
        self.device.activate(self.activation(None)).unwrap();
    }

    fn resume(&mut self, positions: &[Option<u16>]) {
        self.device
            .activate(self.activation(Some(positions)))
            .unwrap();
    }

    /// The same guest on a fresh device, paused as this one is.
    fn moved(self, options: NetOptions) -> Self {
        let state = self.device.save().unwrap();
        let mut new = Self::new(self.features, options);
        new.device.restore(state.clone()).unwrap();
        assert_eq!(new.device.save().unwrap(), state);
        new.drivers = self.drivers;
        new
    }

    fn command(&mut self, bytes: &[u8]) {
        ctrl::command(&mut self.drivers[2], 0, bytes);
        self.kicks[2].write(1).unwrap();
        let driver = &mut self.drivers[2];
        eventually("the status", || driver.take_used() == [(0, 1)]);
        assert_eq!(driver.read(0x7000, 1), [0]);
    }

    fn offer(&mut self, queue: usize, head: u16, address: u64, len: u32) {
        let flags = if queue == 0 { WRITE } else { 0 };
        self.drivers[queue].offer_chain(head, &[(address, len, flags)]);
        self.kicks[queue].write(1).unwrap();
    }
}

/// A frame with a number in it.
fn numbered(n: u32) -> Vec<u8> {
    let mut frame = frame(100);
    frame[60..64].copy_from_slice(&n.to_le_bytes());
    frame
}

fn number(frame: &[u8]) -> u32 {
    u32::from_le_bytes(frame[60..64].try_into().unwrap())
}

/// Moves frames both ways while `pause` is called now and then; every frame has to arrive once, in
/// order.
fn traffic(mut guest: Guest, mut pause: impl FnMut(Guest) -> Guest) {
    const FRAMES: u32 = 3000;
    let (mut sent, mut received) = ([0; 2], [0; 2]);
    for head in 0..SIZE {
        guest.offer(0, head, 0x4000 + 0x100 * u64::from(head), 256);
    }
    let mut free: Vec<u16> = (0..SIZE).collect();
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut rounds = 0;
    while received != [FRAMES; 2] {
        assert!(Instant::now() < deadline, "{sent:?} {received:?}");
        if sent[0] < FRAMES && guest.far.send(&numbered(sent[0])).is_ok() {
            sent[0] += 1;
        }
        if sent[1] < FRAMES
            && let Some(head) = free.pop()
        {
            let at = 0x4000 + 0x100 * u64::from(head);
            guest.drivers[1].write(at, &numbered(sent[1]));
            guest.offer(1, head, at, 100);
            sent[1] += 1;
        }
        free.extend(
            guest.drivers[1]
                .take_used()
                .into_iter()
                .map(|(head, _)| head),
        );
        let mut buffer = [0; 200];
        while let Ok(100) = guest.far.recv(&mut buffer) {
            assert_eq!(number(&buffer), received[1]);
            received[1] += 1;
        }
        for (head, len) in guest.drivers[0].take_used() {
            let at = 0x4000 + 0x100 * u64::from(head);
            assert_eq!(
                (len, number(&guest.drivers[0].read(at, 100))),
                (100, received[0])
            );
            received[0] += 1;
            guest.offer(0, head, at, 256);
        }
        rounds += 1;
        if rounds % 97 == 0 {
            guest = pause(guest);
        }
    }
}

#[test]
fn pausing_in_full_traffic_neither_loses_nor_repeats_a_frame() {
    let mut guest = Guest::new(Features::MRG_RXBUF | Features::EVENT_IDX, options());
    guest.start();
    traffic(guest, |mut guest| {
        let positions = guest.device.pause();
        assert!(positions.iter().all(Option::is_some));
        let used = [0, 1].map(|queue: usize| guest.drivers[queue].used_index());
        thread::sleep(Duration::from_millis(1));
        assert_eq!(
            used,
            [0, 1].map(|queue: usize| guest.drivers[queue].used_index())
        );
        guest.resume(&positions);
        guest
    });
}

#[test]
fn device_restored_in_full_traffic_goes_on_where_the_saved_one_stopped() {
    let mut guest = Guest::new(Features::MRG_RXBUF, options());
    guest.start();
    traffic(guest, |mut guest| {
        let positions = guest.device.pause();
        let state = guest.device.save().unwrap();
        // The wire stays: another one would lose what is in it.
        let wire = guest.device.backends.remove(0);
        let wire = Arc::try_unwrap(wire).unwrap_or_else(|wire| {
            panic!(
                "a paused device holds its wire: {}",
                Arc::strong_count(&wire)
            )
        });
        guest.device = device(vec![wire], 1500, options());
        guest.device.restore(state).unwrap();
        guest.resume(&positions);
        guest
    });
}

#[test]
fn frame_that_waits_for_buffers_survives_a_move() {
    let mut guest = Guest::new(Features::MRG_RXBUF, options());
    guest.offer(0, 0, 0x4000, 100);
    guest.offer(0, 1, 0x4064, 100);
    guest.far.send(&frame(350)).unwrap();
    guest.start();
    let handle = guest.device.handle();
    let starved = || handle.pairs()[0].rx.starved > 0;
    eventually("the frame", starved);
    let positions = guest.device.pause();
    assert_eq!(positions[0], Some(0), "both chains are put back");
    let mut guest = guest.moved(options());
    guest.resume(&positions);
    guest.offer(0, 2, 0x40c8, 100);
    guest.offer(0, 3, 0x412c, 100);
    let mut used = Vec::new();
    eventually("the whole frame", || {
        used.extend(guest.drivers[0].take_used());
        used == [(0, 100), (1, 100), (2, 100), (3, 50)]
    });
    assert_eq!(guest.drivers[0].read(0x4000, 350), received(350, 4));
}

#[test]
fn what_the_driver_commanded_survives_a_move() {
    let permitted = || NetOptions {
        permissions: Permissions {
            change_mac: true,
            allow_promisc: false,
        },
        rx_limit: Some(RateLimit {
            bits: Some(8),
            frames: None,
            burst: Duration::from_secs(3600),
        }),
        ..options()
    };
    let features = Features::CTRL_RX
        | Features::CTRL_VLAN
        | Features::CTRL_MAC_ADDR
        | Features::CTRL_GUEST_OFFLOADS
        | Features::GUEST_CSUM;
    let mut guest = Guest::new(features, permitted());
    guest.start();
    let mac = [2, 0, 0, 0, 0, 9];
    guest.command(&[&[1, 1][..], &mac].concat());
    guest.command(&[2, 0, 5, 0]);
    guest.command(&[0, 1, 1]);
    guest.command(&[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let positions = guest.device.pause();
    let mut guest = guest.moved(permitted());
    let wire = Arc::clone(&guest.device.backends[0]);
    assert_eq!(*wire.mac.lock().unwrap(), Some(mac));
    assert_eq!(
        wire.offloads.lock().unwrap().as_slice(),
        [Offloads::empty()]
    );
    guest.resume(&positions);
    let mut seen = [0; 6];
    guest.device.read_config(0, &mut seen);
    assert_eq!(seen, mac);
    // Link and MTU may be others now.
    assert_eq!(guest.recorder.config_changes.load(Ordering::SeqCst), 1);
    guest.command(&[2, 1, 5, 0]);
    guest.device.reset();
    assert_eq!(*wire.mac.lock().unwrap(), Some(MAC), "its own again");
}

#[test]
fn changed_mac_address_is_the_one_that_counts_before_and_after_a_move() {
    let permitted = || NetOptions {
        permissions: Permissions {
            change_mac: true,
            allow_promisc: false,
        },
        ..options()
    };
    let features = Features::CTRL_RX | Features::CTRL_MAC_ADDR | Features::MRG_RXBUF;
    let mut guest = Guest::new(features, permitted());
    guest.start();
    let new = [2, 0, 0, 0, 0, 9];
    guest.command(&[&[1, 1][..], &new].concat());
    // No address besides its own, and no group.
    guest.command(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    for head in 0..4 {
        guest.offer(0, head, 0x4000 + 0x100 * u64::from(head), 256);
    }
    for head in [0, 1] {
        for mac in [MAC, new] {
            let mut frame = frame(100);
            frame[HEADER_LEN..HEADER_LEN + 6].copy_from_slice(&mac);
            guest.far.send(&frame).unwrap();
            frame[HEADER_LEN + 6..HEADER_LEN + 12].copy_from_slice(&mac);
            guest.drivers[1].write(0x5000, &frame);
            guest.offer(1, 0, 0x5000, 100);
            eventually("it is sent", || guest.drivers[1].take_used() == [(0, 0)]);
        }
        eventually("the second", || {
            guest.drivers[0].take_used() == [(head, 100)]
        });
        assert_eq!(guest.device.handle().observer().wrong_source(), 1);
        // The other buffers are in the device's hands.
        let positions = guest.device.pause();
        assert_eq!(positions[0], Some(head + 1));
        guest = guest.moved(permitted());
        guest.resume(&positions);
    }
}

#[test]
fn link_change_during_a_pause_is_told_after_it() {
    let mut guest = Guest::new(Features::empty(), options());
    guest.start();
    let changes = |guest: &Guest| guest.recorder.config_changes.load(Ordering::SeqCst);
    for (change, wanted) in [(false, 0), (true, 1)] {
        let positions = guest.device.pause();
        guest.device.config().set_carrier(!change);
        assert_eq!(changes(&guest), 0);
        guest.resume(&positions);
        assert_eq!(changes(&guest), wanted);
    }
}

#[test]
fn device_without_a_driver_pauses_and_moves_too() {
    let mut guest = Guest::new(Features::empty(), options());
    assert!(guest.device.pause().iter().all(Option::is_none));
    let mut guest = guest.moved(options());
    guest.start();
    guest.device.reset();
}

#[test]
fn state_that_does_not_fit_is_refused() {
    let state = Guest::new(Features::empty(), options())
        .device
        .save()
        .unwrap();
    let mut two = device(vec![Wire::new().0, Wire::new().0], 1500, options());
    assert!(two.restore(state.clone()).is_err());
    let mut one = Guest::new(Features::empty(), options()).device;
    for (key, value) in [
        ("frames", serde_json::json!([[0, 0, 0, 0, 0]])),
        ("frames", serde_json::json!(null)),
        ("rules", serde_json::json!({})),
    ] {
        let mut wrong = state.clone();
        wrong[key] = value;
        assert!(one.restore(wrong.clone()).is_err(), "{wrong}");
    }
    assert!(one.restore(state).is_ok());
}
