use std::collections::BTreeMap;
use std::sync::Mutex;

use proptest::prelude::*;

use super::super::queue::QueueConfig;
use super::super::tests::Driver;
use super::super::{Activation, Interrupt, VIRTIO_F_VERSION_1};
use super::common::offset;
use super::interrupt::NO_VECTOR;
use super::*;

#[derive(Debug, Default)]
struct Probe {
    active: Arc<Mutex<Option<Activation>>>,
}

impl VirtioDevice for Probe {
    fn device_id(&self) -> u32 {
        1
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 64]
    }
    fn features(&self) -> u64 {
        0b11
    }
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_at(&[1, 2, 3, 4, 5, 6, 7, 8], offset, data);
    }
    fn activate(&mut self, activation: Activation) -> Result<(), BoxError> {
        *self.active.lock().unwrap() = Some(activation);
        Ok(())
    }
    fn pause(&mut self) -> Vec<Option<u16>> {
        self.active.lock().unwrap().take();
        vec![Some(3), Some(4)]
    }
    fn reset(&mut self) {
        *self.active.lock().unwrap() = None;
    }
}

/// The messages of the vectors that are connected.
#[derive(Clone, Debug, Default)]
struct Routes(Arc<Mutex<BTreeMap<usize, (u64, u32)>>>);

impl MsixRoutes for Routes {
    fn connect(&self, vector: usize, address: u64, data: u32) {
        self.0.lock().unwrap().insert(vector, (address, data));
    }
    fn disconnect(&self, vector: usize) {
        self.0.lock().unwrap().remove(&vector);
    }
}

struct Guest {
    transport: PciTransport,
    active: Arc<Mutex<Option<Activation>>>,
    routes: Routes,
}

impl Guest {
    fn new() -> Self {
        let (active, routes) = (Arc::default(), Routes::default());
        let device = Probe {
            active: Arc::clone(&active),
        };
        let lines = (0..PciTransport::vectors(&device))
            .map(|_| IrqLine::new().unwrap())
            .collect();
        let memory = Driver::new().memory;
        let transport = PciTransport::new(
            Box::new(device),
            memory,
            0xe800_0000,
            lines,
            Box::new(routes.clone()),
        );
        Self {
            transport: transport.unwrap(),
            active,
            routes,
        }
    }

    fn read<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0xaa; N];
        BusDevice::read(&mut self.transport, offset, &mut data);
        data
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        BusDevice::write(&mut self.transport, offset as u64, data);
    }

    fn status(&mut self) -> u8 {
        self.read::<1>(offset::STATUS as u64)[0]
    }

    fn set_status(&mut self, value: u8) {
        self.write(offset::STATUS, &[value]);
    }

    fn negotiate(&mut self, features: u64) {
        for status in [0, 1, 3] {
            self.set_status(status);
        }
        for select in [0u32, 1] {
            self.write(offset::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
            let half = (features >> (32 * select)) as u32;
            self.write(offset::DRIVER_FEATURE, &half.to_le_bytes());
        }
        self.set_status(11);
    }

    fn set_up_queue(&mut self, index: u16, config: QueueConfig, vector: u16) {
        self.write(offset::QUEUE_SELECT, &index.to_le_bytes());
        self.write(offset::QUEUE_SIZE, &config.size.to_le_bytes());
        self.write(offset::QUEUE_VECTOR, &vector.to_le_bytes());
        self.write(offset::QUEUE_DESC, &config.descriptors.to_le_bytes());
        for (offset, address) in [
            (offset::QUEUE_DRIVER, config.available),
            (offset::QUEUE_DEVICE, config.used),
        ] {
            self.write(offset, &(address as u32).to_le_bytes());
            self.write(offset + 4, &((address >> 32) as u32).to_le_bytes());
        }
        self.write(offset::QUEUE_ENABLE, &1u16.to_le_bytes());
    }
}

#[test]
fn driver_finds_features_queues_and_configuration() {
    let mut guest = Guest::new();
    assert_eq!(u32::from_le_bytes(guest.read(4)), 3);
    guest.write(offset::DEVICE_FEATURE_SELECT, &1u32.to_le_bytes());
    assert_eq!(u32::from_le_bytes(guest.read(4)), 1, "VERSION_1");
    assert_eq!(u16::from_le_bytes(guest.read(18)), 2);
    for (queue, size) in [(0u16, 16), (1, 64), (2, 0), (0xffff, 0)] {
        guest.write(offset::QUEUE_SELECT, &queue.to_le_bytes());
        assert_eq!(
            u16::from_le_bytes(guest.read(offset::QUEUE_SIZE as u64)),
            size
        );
    }
    assert_eq!(guest.read(u64::from(DEVICE)), [1, 2, 3, 4]);
    assert_eq!(guest.read(u64::from(DEVICE) + 7), [8, 0]);
}

#[test]
fn driver_ok_hands_over_the_queues_and_their_vectors() {
    let mut guest = Guest::new();
    guest.negotiate(VIRTIO_F_VERSION_1 | 1);
    assert_eq!(guest.status(), 11);
    guest.set_up_queue(0, Driver::config(), 1);
    guest.set_up_queue(1, Driver::config(), 2);
    guest.write(offset::CONFIG_VECTOR, &0u16.to_le_bytes());
    assert_eq!(
        u16::from_le_bytes(guest.read(offset::QUEUE_ENABLE as u64)),
        1
    );
    guest.set_status(15);
    let active = guest.active.lock().unwrap().take().unwrap();
    assert_eq!(active.features, VIRTIO_F_VERSION_1 | 1);
    assert!(active.queues.iter().all(Option::is_some));
    active.interrupt.queue(1);
    active.interrupt.config();
    let lines = &guest.transport.interrupt.lines;
    let raised: Vec<_> = lines.iter().map(IrqLine::is_raised).collect();
    assert_eq!(raised, [true, false, true]);
}

#[test]
fn isr_status_tells_what_happened_until_it_is_read() {
    let mut guest = Guest::new();
    let interrupt = Arc::clone(&guest.transport.interrupt);
    let isr = u64::from(ISR);
    assert_eq!(guest.read(isr), [0]);
    // Without vectors too: a driver that polls has nothing else (4.1.4.5.1).
    interrupt.queue(1);
    assert_eq!(guest.read(isr + 1), [0]);
    assert_eq!(guest.read(isr), [1, 0, 0, 0]);
    interrupt.config();
    interrupt.queue(0);
    assert_eq!(guest.read(isr), [3]);
    assert_eq!(guest.read(isr), [0]);
    interrupt.needs_reset();
    guest.write(ISR as usize, &[0xff]);
    assert_eq!(guest.read(isr), [2]);
    interrupt.config();
    guest.set_status(0);
    assert_eq!(guest.read(isr), [0]);
}

#[test]
fn vector_that_does_not_exist_reads_back_as_none() {
    let mut guest = Guest::new();
    for (wanted, got) in [(2u16, 2), (3, NO_VECTOR), (NO_VECTOR, NO_VECTOR)] {
        guest.write(offset::CONFIG_VECTOR, &wanted.to_le_bytes());
        assert_eq!(
            u16::from_le_bytes(guest.read(offset::CONFIG_VECTOR as u64)),
            got
        );
        guest.write(offset::QUEUE_VECTOR, &wanted.to_le_bytes());
        assert_eq!(
            u16::from_le_bytes(guest.read(offset::QUEUE_VECTOR as u64)),
            got
        );
    }
}

#[test]
fn reset_takes_everything_back() {
    let mut guest = Guest::new();
    guest.negotiate(VIRTIO_F_VERSION_1);
    guest.set_up_queue(0, Driver::config(), 1);
    guest.set_status(15);
    guest.transport.interrupt.needs_reset();
    assert_eq!(guest.status(), 15 | 64);
    guest.set_status(0);
    assert_eq!(guest.status(), 0);
    assert!(guest.active.lock().unwrap().is_none());
    assert_eq!(
        u16::from_le_bytes(guest.read(offset::QUEUE_ENABLE as u64)),
        0
    );
    assert_eq!(
        u16::from_le_bytes(guest.read(offset::QUEUE_VECTOR as u64)),
        NO_VECTOR
    );
}

#[test]
fn pending_bits_end_at_a_reset() {
    let mut guest = Guest::new();
    guest.negotiate(VIRTIO_F_VERSION_1);
    guest.set_up_queue(0, Driver::config(), 1);
    guest.write(offset::CONFIG_VECTOR, &0u16.to_le_bytes());
    guest.set_status(15);
    let interrupt = Arc::clone(&guest.transport.interrupt);
    interrupt.queue(0);
    interrupt.config();
    assert_eq!(guest.read(u64::from(MSIX_PENDING)), [0b11]);
    guest.set_status(0);
    assert_eq!(guest.read(u64::from(MSIX_PENDING)), [0]);
}

#[test]
fn device_stops_when_it_may_not_reach_memory_any_more() {
    const COMMAND: usize = 4;
    let mut guest = Guest::new();
    guest.transport.write_config(COMMAND, &[6, 0]);
    guest.negotiate(VIRTIO_F_VERSION_1);
    guest.set_up_queue(0, Driver::config(), 1);
    guest.set_status(15);
    guest.transport.write_config(COMMAND, &[6, 4]);
    assert!(guest.active.lock().unwrap().is_some());
    guest.transport.write_config(COMMAND, &[2, 4]);
    assert!(guest.active.lock().unwrap().is_none());
    assert_eq!(guest.status(), 11);
    // The next driver begins as always.
    guest.transport.write_config(COMMAND, &[6, 0]);
    guest.negotiate(VIRTIO_F_VERSION_1);
    guest.set_up_queue(0, Driver::config(), 1);
    guest.set_status(15);
    assert!(guest.active.lock().unwrap().is_some());
}

#[test]
fn notification_without_ioeventfd_reaches_its_queue() {
    let mut guest = Guest::new();
    guest.write((NOTIFY + NOTIFY_STRIDE) as usize, &1u16.to_le_bytes());
    assert!(guest.transport.kicks()[0].read().is_err());
    assert_eq!(guest.transport.kicks()[1].read().unwrap(), 1);
}

#[test]
fn window_in_configuration_space_reads_and_writes_the_bar() {
    let mut guest = Guest::new();
    let window = guest.transport.registers.pci_cfg;
    let aim = |guest: &mut Guest, offset: u32, len: u32| {
        guest.transport.write_config(window + 4, &[0]);
        guest
            .transport
            .write_config(window + 8, &offset.to_le_bytes());
        guest
            .transport
            .write_config(window + 12, &len.to_le_bytes());
    };
    aim(&mut guest, DEVICE + 4, 2);
    let mut data = [0xaa; 4];
    guest
        .transport
        .read_config(window + PCI_CFG_DATA, &mut data);
    assert_eq!(data, [5, 6, 0, 0]);
    aim(&mut guest, offset::STATUS as u32, 1);
    guest.transport.write_config(window + PCI_CFG_DATA, &[1]);
    assert_eq!(guest.status(), 1);
    for (offset, len) in [(BAR_LEN, 4), (2, 4), (0, 3), (0, 0), (u32::MAX, 1)] {
        aim(&mut guest, offset, len);
        guest
            .transport
            .read_config(window + PCI_CFG_DATA, &mut data);
        guest
            .transport
            .write_config(window + PCI_CFG_DATA, &[0xff; 4]);
    }
}

/// A guest whose driver runs. Vectors 0 and 1 are unmasked, 2 is not, and waits.
fn running() -> Guest {
    const COMMAND: usize = 4;
    let mut guest = Guest::new();
    guest.transport.write_config(COMMAND, &[6, 0]);
    guest.negotiate(VIRTIO_F_VERSION_1 | 1);
    for (queue, vector) in [(0, 1), (1, 2)] {
        guest.set_up_queue(queue, Driver::config(), vector);
    }
    guest.write(offset::CONFIG_VECTOR, &0u16.to_le_bytes());
    guest.set_status(15);
    for vector in [0, 1] {
        let entry = MSIX_TABLE as usize + vector * MSIX_ENTRY_LEN;
        guest.write(entry, &(0xfee0_0000 + vector as u64).to_le_bytes());
        guest.write(entry + 8, &0x41u32.to_le_bytes());
        guest.write(entry + 12, &0u32.to_le_bytes());
    }
    let control = 0x40 + 2;
    guest.transport.write_config(control, &[0, 0x80]);
    guest.transport.interrupt.queue(1);
    guest
}

#[test]
fn function_after_a_reset_of_the_machine_is_a_new_one() {
    for is_paused in [false, true] {
        let mut guest = running();
        // The pci_cfg capability, to its data; and the size of the BAR is asked for.
        guest.transport.write_config(0x40, &[0xff; 192]);
        guest.transport.write_config(0x10, &[0xff; 4]);
        guest.transport.kicks()[0].write(1).unwrap();
        if is_paused {
            guest.transport.pause();
        }
        BusDevice::reset(&mut guest.transport);
        let new = Guest::new();
        assert_eq!(
            BusDevice::save(&guest.transport).unwrap(),
            BusDevice::save(&new.transport).unwrap()
        );
        assert!(guest.active.lock().unwrap().is_none());
        assert!(guest.routes.0.lock().unwrap().is_empty());
        assert!(guest.transport.kicks()[0].read().is_err());
        guest.transport.resume();
        assert!(guest.active.lock().unwrap().is_none());
    }
}

#[test]
fn restored_function_is_the_saved_one_with_its_routes_and_goes_on() {
    let mut guest = running();
    guest.transport.pause();
    let state = BusDevice::save(&guest.transport).unwrap();
    let mut other = Guest::new();
    BusDevice::restore(&mut other.transport, state.clone()).unwrap();
    assert_eq!(BusDevice::save(&other.transport).unwrap(), state);
    let routes = |guest: &Guest| guest.routes.0.lock().unwrap().clone();
    assert_eq!(
        routes(&other),
        BTreeMap::from([(0, (0xfee0_0000, 0x41)), (1, (0xfee0_0001, 0x41))])
    );
    assert_eq!(routes(&other), routes(&guest));
    for offset in (0..u64::from(ISR))
        .chain(u64::from(DEVICE)..u64::from(BAR_LEN))
        .step_by(4)
    {
        assert_eq!(other.read::<4>(offset), guest.read(offset), "{offset:#x}");
    }
    for offset in (0..256).step_by(4) {
        let [mut a, mut b] = [[0; 4]; 2];
        other.transport.read_config(offset, &mut a);
        guest.transport.read_config(offset, &mut b);
        assert_eq!(a, b, "{offset:#x}");
    }
    for (structure, key) in [("registers", "msix"), ("interrupt", "pending")] {
        let mut wrong = state.clone();
        wrong[structure][key] = json!([{}]);
        let mut other = Guest::new();
        assert!(BusDevice::restore(&mut other.transport, wrong).is_err());
        let saved = BusDevice::save(&other.transport).unwrap();
        assert_eq!(saved, BusDevice::save(&Guest::new().transport).unwrap());
    }
    assert_eq!(other.read(u64::from(ISR)), [1]);
    other.transport.resume();
    let active = other.active.lock().unwrap().take().unwrap();
    assert_eq!(active.features, VIRTIO_F_VERSION_1 | 1);
    let positions = active
        .queues
        .iter()
        .flatten()
        .map(|queue| queue.queue.next_avail());
    assert_eq!(positions.collect::<Vec<_>>(), [3, 4]);
}

proptest! {
    #[test]
    fn whatever_is_written_the_transport_lives_and_can_be_reset(
        accesses in proptest::collection::vec(
            (prop_oneof![0..0x60u64, 0..u64::from(BAR_LEN)], 1..=8usize, any::<u64>()), 0..200,
        ),
        config in proptest::collection::vec((0..256usize, 1..=4usize, any::<u32>()), 0..100),
    ) {
        let mut guest = Guest::new();
        for (offset, len, value) in accesses {
            guest.write(offset as usize, &value.to_le_bytes()[..len]);
            BusDevice::read(&mut guest.transport, offset, &mut [0; 8][..len]);
        }
        for (offset, len, value) in config {
            let len = len.min(256 - offset);
            guest.transport.write_config(offset, &value.to_le_bytes()[..len]);
            guest.transport.read_config(offset, &mut [0; 4][..len]);
        }
        guest.negotiate(VIRTIO_F_VERSION_1);
        prop_assert_eq!(guest.status(), 11);
    }
}
