use std::sync::Mutex;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::super::queue::QueueConfig;
use super::super::tests::{Driver, END};
use super::super::{Activation, VIRTIO_F_VERSION_1};
use super::*;
use crate::bus::{BoxError, BusDevice};
use crate::events::tests::record;
use crate::events::{DeviceEvent, EventSink};

/// What the transport asked of its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Activate { features: u64, queues: [bool; 2] },
    Resume(Option<u16>),
    Reset,
}

#[derive(Debug, Default)]
struct Probe {
    calls: Arc<Mutex<Vec<Call>>>,
    fail: bool,
    events: EventSink,
}

const FEATURES: u64 = 0b1010_0001 | 1 << VIRTIO_RING_F_EVENT_IDX;

impl VirtioDevice for Probe {
    fn device_id(&self) -> u32 {
        42
    }
    fn events(&self) -> Option<&EventSink> {
        Some(&self.events)
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 64]
    }
    fn features(&self) -> u64 {
        FEATURES
    }
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        super::super::read_at(&[1, 2, 3, 4, 5, 6], offset, data);
    }
    fn activate(&mut self, activation: Activation) -> Result<(), BoxError> {
        if activation.resumed {
            let [None, Some(second)] = &activation.queues[..] else {
                return Err("other queues than those in use".into());
            };
            let call = Call::Resume(Some(second.queue.next_avail()));
            self.calls.lock().unwrap().push(call);
            return Ok(());
        }
        let queues = [0, 1].map(|n| activation.queues[n].is_some());
        let features = activation.features;
        self.calls
            .lock()
            .unwrap()
            .push(Call::Activate { features, queues });
        if self.fail { Err("no".into()) } else { Ok(()) }
    }
    fn pause(&mut self) -> Vec<Option<u16>> {
        vec![None, Some(5)]
    }
    fn save(&self) -> Result<Value, BoxError> {
        Ok(json!("probe"))
    }
    fn check(&self, state: &Value) -> Result<(), BoxError> {
        match state == "probe" {
            true => Ok(()),
            false => Err("no probe".into()),
        }
    }
    fn restore(&mut self, state: Value) -> Result<(), BoxError> {
        assert_eq!(state, "probe");
        Ok(())
    }
    fn reset(&mut self) {
        self.calls.lock().unwrap().push(Call::Reset);
    }
}

struct Guest {
    transport: MmioTransport,
    calls: Arc<Mutex<Vec<Call>>>,
    events: Arc<Mutex<Vec<DeviceEvent>>>,
}

impl Guest {
    fn new(fail: bool) -> Self {
        let calls = Arc::default();
        let (sink, events) = record();
        let device = Probe {
            calls: Arc::clone(&calls),
            fail,
            events: sink,
        };
        let memory = Driver::new().memory;
        let transport = MmioTransport::new(Box::new(device), memory, IrqLine::new().unwrap());
        Self {
            transport: transport.unwrap(),
            calls,
            events,
        }
    }

    fn read(&mut self, offset: u32) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset.into(), &mut word);
        u32::from_le_bytes(word)
    }

    fn write(&mut self, offset: u32, value: u32) {
        self.transport.write(offset.into(), &value.to_le_bytes());
    }

    /// Takes `features` and goes on to FEATURES_OK; true when the device agreed.
    fn negotiate(&mut self, features: u64) -> bool {
        self.write(register::VIRTIO_MMIO_STATUS, 0);
        self.write(register::VIRTIO_MMIO_STATUS, 1);
        self.write(register::VIRTIO_MMIO_STATUS, 3);
        for select in [0, 1] {
            self.write(register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.write(
                register::VIRTIO_MMIO_DRIVER_FEATURES,
                (features >> (32 * select)) as u32,
            );
        }
        self.write(register::VIRTIO_MMIO_STATUS, 11);
        self.read(register::VIRTIO_MMIO_STATUS) == 11
    }

    fn set_up_queue(&mut self, index: u32, config: QueueConfig) {
        self.write(register::VIRTIO_MMIO_QUEUE_SEL, index);
        self.write(register::VIRTIO_MMIO_QUEUE_NUM, config.size.into());
        for (low, address) in [
            (register::VIRTIO_MMIO_QUEUE_DESC_LOW, config.descriptors),
            (register::VIRTIO_MMIO_QUEUE_AVAIL_LOW, config.available),
            (register::VIRTIO_MMIO_QUEUE_USED_LOW, config.used),
        ] {
            self.write(low, address as u32);
            self.write(low + 4, (address >> 32) as u32);
        }
        self.write(register::VIRTIO_MMIO_QUEUE_READY, config.ready.into());
    }

    fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().drain(..).collect()
    }
}

#[test]
fn registers_identify_the_device() {
    let mut guest = Guest::new(false);
    assert_eq!(
        guest.read(register::VIRTIO_MMIO_MAGIC_VALUE),
        u32::from_le_bytes(*b"virt")
    );
    assert_eq!(guest.read(register::VIRTIO_MMIO_VERSION), 2);
    assert_eq!(guest.read(register::VIRTIO_MMIO_DEVICE_ID), 42);
    assert_eq!(
        guest.read(register::VIRTIO_MMIO_VENDOR_ID),
        u32::from_le_bytes(*b"mini")
    );
    guest.write(register::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    assert_eq!(
        guest.read(register::VIRTIO_MMIO_DEVICE_FEATURES),
        1,
        "VERSION_1"
    );
    guest.write(register::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(guest.read(register::VIRTIO_MMIO_DEVICE_FEATURES), 0);
    assert_eq!(guest.read(register::VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    for (queue, max) in [(0, 16), (1, 64), (2, 0), (u32::MAX, 0)] {
        guest.write(register::VIRTIO_MMIO_QUEUE_SEL, queue);
        assert_eq!(guest.read(register::VIRTIO_MMIO_QUEUE_NUM_MAX), max);
    }
}

#[test]
fn config_is_read_at_any_width_and_offset() {
    let mut guest = Guest::new(false);
    for (offset, bytes) in [
        (0, vec![1]),
        (1, vec![2, 3]),
        (4, vec![5, 6, 0, 0]),
        (7, vec![0; 8]),
    ] {
        let mut data = vec![0xaa; bytes.len()];
        guest.transport.read(0x100 + offset, &mut data);
        assert_eq!(data, bytes, "{offset}");
    }
}

#[test]
fn registers_of_other_widths_do_nothing() {
    let mut guest = Guest::new(false);
    for width in [1, 2, 3, 8] {
        let mut data = vec![0xaa; width];
        guest
            .transport
            .read(register::VIRTIO_MMIO_MAGIC_VALUE.into(), &mut data);
        assert_eq!(data, vec![0; width]);
        guest
            .transport
            .write(register::VIRTIO_MMIO_STATUS.into(), &vec![1; width]);
    }
    guest
        .transport
        .write((register::VIRTIO_MMIO_STATUS + 1).into(), &[1, 0, 0, 0]);
    assert_eq!(guest.read(register::VIRTIO_MMIO_STATUS), 0);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let mut guest = Guest::new(false);
    assert!(guest.negotiate(VIRTIO_F_VERSION_1 | 1));
    assert!(!guest.negotiate(VIRTIO_F_VERSION_1 | 2), "not offered");
    assert!(!guest.negotiate(1), "no VERSION_1");
    guest.write(register::VIRTIO_MMIO_STATUS, 0);
    guest.write(register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 7);
    guest.write(register::VIRTIO_MMIO_DRIVER_FEATURES, 1);
    guest.write(register::VIRTIO_MMIO_STATUS, 3);
    guest.write(register::VIRTIO_MMIO_STATUS, 11);
    assert_eq!(guest.read(register::VIRTIO_MMIO_STATUS), 3, "bits above 63");
}

#[test]
fn status_wider_than_the_field_is_neither_a_reset_nor_a_status() {
    let mut guest = Guest::new(false);
    guest.negotiate(VIRTIO_F_VERSION_1);
    for value in [0x100, 0xff00, 0x10f, 1 << 31] {
        guest.write(register::VIRTIO_MMIO_STATUS, value);
        assert_eq!(guest.read(register::VIRTIO_MMIO_STATUS), 11, "{value:#x}");
    }
}

#[test]
fn driver_ok_hands_over_the_queues() {
    let mut guest = Guest::new(false);
    let features = VIRTIO_F_VERSION_1 | 0x21;
    assert!(guest.negotiate(features));
    guest.set_up_queue(1, Driver::config());
    guest.write(register::VIRTIO_MMIO_STATUS, 15);
    let expected = Call::Activate {
        features,
        queues: [false, true],
    };
    assert_eq!(guest.calls(), [Call::Reset, expected]);
    assert_eq!(guest.read(register::VIRTIO_MMIO_STATUS), 15);
    guest.write(register::VIRTIO_MMIO_STATUS, 0);
    assert_eq!(guest.calls(), [Call::Reset]);
    assert_eq!(guest.read(register::VIRTIO_MMIO_STATUS), 0);
    guest.write(register::VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(guest.read(register::VIRTIO_MMIO_QUEUE_READY), 0);
}

#[test]
fn queue_that_cannot_be_used_needs_a_reset() {
    let good = Driver::config();
    for config in [
        QueueConfig { size: 0, ..good },
        QueueConfig { size: 17, ..good },
        QueueConfig { size: 128, ..good },
        QueueConfig { used: END, ..good },
        QueueConfig {
            descriptors: u64::MAX - 15,
            ..good
        },
    ] {
        let mut guest = Guest::new(false);
        guest.negotiate(VIRTIO_F_VERSION_1);
        guest.set_up_queue(0, config);
        guest.write(register::VIRTIO_MMIO_STATUS, 15);
        assert_eq!(
            guest.read(register::VIRTIO_MMIO_STATUS),
            15 | 64,
            "{config:?}"
        );
        assert_eq!(
            guest.read(register::VIRTIO_MMIO_INTERRUPT_STATUS),
            2,
            "{config:?}"
        );
        assert_eq!(guest.calls(), [Call::Reset]);
        guest.write(register::VIRTIO_MMIO_STATUS, 0);
        assert_eq!(guest.read(register::VIRTIO_MMIO_STATUS), 0);
        assert_eq!(guest.read(register::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    }
}

#[test]
fn device_that_cannot_start_needs_a_reset() {
    let mut guest = Guest::new(true);
    guest.negotiate(VIRTIO_F_VERSION_1);
    guest.write(register::VIRTIO_MMIO_STATUS, 15);
    assert_eq!(guest.read(register::VIRTIO_MMIO_STATUS), 15 | 64);
}

#[test]
fn queue_in_use_keeps_its_setup() {
    let mut guest = Guest::new(false);
    guest.negotiate(VIRTIO_F_VERSION_1);
    guest.set_up_queue(0, Driver::config());
    guest.write(register::VIRTIO_MMIO_QUEUE_NUM, 8);
    assert_eq!(guest.transport.queues[0], Driver::config(), "ready");
    guest.write(register::VIRTIO_MMIO_STATUS, 15);
    guest.write(register::VIRTIO_MMIO_QUEUE_NUM, 8);
    assert_eq!(guest.transport.queues[0], Driver::config(), "running");
}

#[test]
fn queue_stopped_while_running_stops_the_device_and_reads_as_stopped() {
    let mut guest = Guest::new(false);
    guest.negotiate(VIRTIO_F_VERSION_1);
    guest.set_up_queue(0, Driver::config());
    guest.write(register::VIRTIO_MMIO_STATUS, 15);
    guest.calls();
    guest.write(register::VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(guest.read(register::VIRTIO_MMIO_QUEUE_READY), 0);
    guest.write(register::VIRTIO_MMIO_QUEUE_READY, 1);
    guest.write(register::VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(
        guest.read(register::VIRTIO_MMIO_QUEUE_READY),
        0,
        "no way back but a reset"
    );
    assert_eq!(guest.calls(), [Call::Reset]);
}

#[test]
fn ready_driver_is_reported_but_not_as_often_as_it_likes() {
    let mut guest = Guest::new(false);
    for count in 1..=3 {
        guest.negotiate(VIRTIO_F_VERSION_1);
        guest.set_up_queue(1, Driver::config());
        assert_eq!(guest.events.lock().unwrap().len(), count - 1);
        guest.write(register::VIRTIO_MMIO_STATUS, 15);
        let ready = vec![DeviceEvent::DriverReady; count];
        assert_eq!(*guest.events.lock().unwrap(), ready);
    }
    guest.transport.pause();
    guest.transport.resume();
    assert_eq!(guest.events.lock().unwrap().len(), 3, "it was ready before");
    for _ in 0..1000 {
        guest.negotiate(VIRTIO_F_VERSION_1);
        guest.write(register::VIRTIO_MMIO_STATUS, 15);
    }
    let seen = guest.events.lock().unwrap().len();
    assert!(seen < 1000 / 2, "{seen}");

    let mut guest = Guest::new(true);
    guest.negotiate(VIRTIO_F_VERSION_1);
    guest.write(register::VIRTIO_MMIO_STATUS, 15);
    assert_eq!(*guest.events.lock().unwrap(), [], "the device has failed");
}

#[test]
fn interrupt_status_is_cleared_by_its_acknowledgement() {
    let mut guest = Guest::new(false);
    guest.transport.interrupt.queue(0);
    guest.transport.interrupt.needs_reset();
    assert_eq!(guest.read(register::VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    assert_eq!(guest.transport.interrupt.line.eventfd().read().unwrap(), 2);
    guest.write(register::VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(guest.read(register::VIRTIO_MMIO_INTERRUPT_STATUS), 2);
}

#[test]
fn notification_reaches_the_queues_eventfd() {
    let mut guest = Guest::new(false);
    for index in [0, 1, 2, u32::MAX] {
        guest.write(register::VIRTIO_MMIO_QUEUE_NOTIFY, index);
    }
    let kicks = guest.transport.kicks();
    assert_eq!((kicks[0].read().unwrap(), kicks[1].read().unwrap()), (1, 1));
}

#[test]
fn transport_after_a_reset_of_the_machine_is_a_new_one() {
    let mut guest = Guest::new(false);
    guest.negotiate(VIRTIO_F_VERSION_1 | 0x21);
    guest.set_up_queue(1, Driver::config());
    guest.write(register::VIRTIO_MMIO_STATUS, 15);
    guest.write(register::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    guest.transport.interrupt.call_eventfd(1);
    guest.transport.interrupt.queue(1);
    guest.transport.interrupt.needs_reset();
    BusDevice::reset(&mut guest.transport);
    assert_eq!(
        guest.transport.save().unwrap(),
        Guest::new(false).transport.save().unwrap()
    );
    assert_eq!(guest.calls().last(), Some(&Call::Reset));
}

#[test]
fn restored_transport_is_the_saved_one_and_goes_on() {
    let mut guest = Guest::new(false);
    guest.negotiate(VIRTIO_F_VERSION_1 | 0x21);
    guest.set_up_queue(1, Driver::config());
    guest.write(register::VIRTIO_MMIO_STATUS, 15);
    guest.write(register::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    guest.transport.interrupt.queue(1);
    guest.transport.interrupt.needs_reset();
    guest.transport.pause();
    guest.transport.pause();
    let state = guest.transport.save().unwrap();
    let mut other = Guest::new(false);
    other.transport.restore(state.clone()).unwrap();
    assert_eq!(other.transport.save().unwrap(), state);
    for register in (0..0x100).step_by(4) {
        assert_eq!(other.read(register), guest.read(register), "{register:#x}");
    }
    guest.calls();
    for mut guest in [guest, other] {
        guest.transport.resume();
        guest.transport.resume();
        assert_eq!(guest.calls(), [Call::Resume(Some(5))]);
    }
    for (key, value) in [
        ("device_id", json!(1)),
        ("queues", json!([])),
        ("driver_features", json!(u64::MAX)),
        ("status", json!("SOME")),
        ("device", json!("other")),
        ("interrupt", json!("many")),
    ] {
        let mut wrong = state.clone();
        wrong[key] = value;
        let mut other = Guest::new(false);
        assert!(other.transport.restore(wrong).is_err(), "{key}");
        assert_eq!(
            other.transport.save().unwrap(),
            Guest::new(false).transport.save().unwrap()
        );
    }
}

proptest::proptest! {
    #[test]
    fn whatever_is_written_the_transport_lives_and_can_be_reset(
        accesses in proptest::collection::vec(
            (0..0x140u64, 1..=8usize, proptest::prelude::any::<u64>()), 0..200,
        ),
    ) {
        let mut guest = Guest::new(false);
        for (offset, width, value) in accesses {
            guest.transport.write(offset, &value.to_le_bytes()[..width]);
            guest.transport.read(offset, &mut [0; 8][..width]);
        }
        guest.write(register::VIRTIO_MMIO_STATUS, 0);
        proptest::prop_assert_eq!(guest.read(register::VIRTIO_MMIO_STATUS), 0);
        proptest::prop_assert!(guest.negotiate(VIRTIO_F_VERSION_1));
    }
}
