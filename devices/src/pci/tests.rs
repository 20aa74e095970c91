use std::sync::Mutex;

use proptest::prelude::*;

use super::config::{CapabilityId, ConfigSpace, Identity};
use super::*;
use crate::irq::IrqLine;

/// A function with a BAR and MSI-X, as a guest finds it.
#[derive(Debug)]
struct Function {
    config: ConfigSpace,
    msix: Msix,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    Connect(usize, u64, u32),
    Disconnect(usize),
}

#[derive(Debug, Default)]
struct Routes(Arc<Mutex<Vec<Route>>>);

impl MsixRoutes for Routes {
    fn connect(&self, vector: usize, address: u64, data: u32) {
        self.0
            .lock()
            .unwrap()
            .push(Route::Connect(vector, address, data));
    }
    fn disconnect(&self, vector: usize) {
        self.0.lock().unwrap().push(Route::Disconnect(vector));
    }
}

const BASE: u32 = 0xe800_0000;
const SIZE: u32 = 0x8000;

fn function() -> (Function, Arc<Mutex<Vec<Route>>>) {
    let routes = Routes::default();
    let log = Arc::clone(&routes.0);
    let mut config = ConfigSpace::new(Identity {
        vendor: 0x1af4,
        device: 0x1041,
        class: 0x02_0000,
        ..Identity::default()
    });
    config.set_bar_0(BASE, SIZE);
    let msix = Msix::new(&mut config, 2, 0x4000, 0x5000, Box::new(routes));
    config.add_capability(CapabilityId::Vendor, &[4, 0]);
    (Function { config, msix }, log)
}

impl PciFunction for Function {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.config.read(offset, data);
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        self.msix.update(&self.config);
    }
}

fn bus() -> Arc<PciBus> {
    let mut bus = PciBus::default();
    let function = Arc::new(Mutex::new(function().0));
    assert!(bus.insert(1, function.clone()));
    assert!(!bus.insert(1, function.clone()), "taken");
    assert!(!bus.insert(0, function.clone()), "the bridge's");
    assert!(!bus.insert(SLOTS, function), "none");
    Arc::new(bus)
}

fn read<const N: usize>(device: &mut dyn BusDevice, offset: u64) -> [u8; N] {
    let mut data = [0xaa; N];
    device.read(offset, &mut data);
    data
}

fn dword(device: &mut dyn BusDevice, offset: u64) -> u32 {
    u32::from_le_bytes(read(device, offset))
}

#[test]
fn bus_after_a_reset_is_a_new_one() {
    let devices = || {
        let bus = bus();
        (Ecam(Arc::clone(&bus)), ConfigPorts::new(bus))
    };
    let ((mut ecam, mut ports), (new_ecam, new_ports)) = (devices(), devices());
    ports.write(0, &0x8000_0800_u32.to_le_bytes());
    for offset in (0..ConfigSpace::LEN as u64).step_by(4) {
        ecam.write(offset, &[0xff; 4]);
    }
    assert_ne!(ecam.save().unwrap(), new_ecam.save().unwrap());
    ecam.reset();
    ports.reset();
    assert_eq!(ecam.save().unwrap(), new_ecam.save().unwrap());
    assert_eq!(ports.save().unwrap(), new_ports.save().unwrap());
}

#[test]
fn both_mechanisms_show_the_same_functions() {
    let bus = bus();
    let (mut ecam, mut ports) = (Ecam(Arc::clone(&bus)), ConfigPorts::new(bus));
    for slot in 0..SLOTS as u64 {
        ports.write(0, &(0x8000_0000 | (slot as u32) << 11).to_le_bytes());
        let by_ports = dword(&mut ports, 4);
        assert_eq!(by_ports, dword(&mut ecam, slot << 15));
        assert_eq!(
            by_ports,
            [0x0008_1b36, 0x1041_1af4]
                .get(slot as usize)
                .copied()
                .unwrap_or(!0)
        );
    }
    assert_eq!(dword(&mut ecam, 1 << 15 | 1 << 12), !0, "a second function");
    assert_eq!(
        dword(&mut ecam, 1 << 15 | 0x100),
        0,
        "no extended capabilities"
    );
    ports.write(0, &0x8001_0800_u32.to_le_bytes());
    assert_eq!(dword(&mut ports, 4), !0, "another bus");
    assert_eq!(dword(&mut ports, 0), 0x8001_0800);
}

#[test]
fn bar_tells_its_size_and_stays_at_its_place() {
    let mut ecam = Ecam(bus());
    let bar = 1 << 15 | 0x10;
    assert_eq!(dword(&mut ecam, bar), BASE);
    ecam.write(bar, &[0xff; 4]);
    assert_eq!(dword(&mut ecam, bar), !(SIZE - 1));
    ecam.write(bar, &BASE.to_le_bytes());
    assert_eq!(dword(&mut ecam, bar), BASE);
    ecam.write(bar, &0xe900_0000_u32.to_le_bytes());
    assert_eq!(dword(&mut ecam, bar), BASE);
    for other in [0x14, 0x18, 0x1c, 0x20, 0x24, 0x30] {
        ecam.write(1 << 15 | other, &[0xff; 4]);
        assert_eq!(dword(&mut ecam, 1 << 15 | other), 0);
    }
}

#[test]
fn capabilities_form_a_list() {
    let mut ecam = Ecam(bus());
    let function = 1 << 15;
    assert_ne!(read::<1>(&mut ecam, function | 6)[0] & 1 << 4, 0);
    let (mut found, mut at) = (
        Vec::new(),
        u64::from(read::<1>(&mut ecam, function | 0x34)[0]),
    );
    while at != 0 {
        let [id, next] = read(&mut ecam, function | at);
        found.push(id);
        at = next.into();
    }
    assert_eq!(
        found,
        [CapabilityId::MsiX as u8, CapabilityId::Vendor as u8]
    );
}

#[test]
fn identity_and_capabilities_cannot_be_written() {
    let mut ecam = Ecam(bus());
    let function = 1 << 15;
    let before: Vec<_> = (0..64)
        .map(|n| dword(&mut ecam, function | (4 * n)))
        .collect();
    for n in (0..64).filter(|n| ![1, 3, 4, 15, 16].contains(n)) {
        ecam.write(function | (4 * n), &[0xff; 4]);
        ecam.write(function | (4 * n), &[0; 4]);
        assert_eq!(
            dword(&mut ecam, function | (4 * n)),
            before[n as usize],
            "{n}"
        );
    }
}

#[test]
fn vector_is_connected_while_enabled_and_unmasked() {
    let (mut function, log) = function();
    let routes = || std::mem::take(&mut *log.lock().unwrap());
    let control = |function: &mut Function, value: u16| {
        function.write_config(0x42, &value.to_le_bytes());
    };
    let Function { config, msix } = &mut function;
    msix.write_table(config, 16, &0xfee0_1000_u64.to_le_bytes());
    msix.write_table(config, 24, &0x41_u32.to_le_bytes());
    msix.write_table(config, 28, &0_u32.to_le_bytes());
    assert_eq!(routes(), []);
    control(&mut function, 1 << 15);
    assert_eq!(routes(), [Route::Connect(1, 0xfee0_1000, 0x41)]);
    control(&mut function, 1 << 15 | 1 << 14);
    assert_eq!(routes(), [Route::Disconnect(1)]);
    control(&mut function, 1 << 15);
    assert_eq!(routes().len(), 1);
    let Function { config, msix } = &mut function;
    msix.write_table(config, 24, &0x42_u32.to_le_bytes());
    assert_eq!(routes(), [Route::Connect(1, 0xfee0_1000, 0x42)]);
    msix.write_table(config, 28, &1_u32.to_le_bytes());
    assert_eq!(routes(), [Route::Disconnect(1)]);
    let mut entry = [0; 16];
    msix.read_table(16, &mut entry);
    assert_eq!(entry[8..], [0x42, 0, 0, 0, 1, 0, 0, 0]);
}

#[test]
fn masked_vector_that_fires_is_pending() {
    let (function, _log) = function();
    let lines = [IrqLine::new().unwrap(), IrqLine::new().unwrap()];
    let pending = || {
        let mut bits = [0; 8];
        function.msix.read_pending(&lines, 0, &mut bits);
        u64::from_le_bytes(bits)
    };
    assert_eq!(pending(), 0);
    lines[1].raise();
    assert_eq!(pending(), 2);
    assert_eq!(pending(), 2, "looking takes nothing away");
}

proptest! {
    #[test]
    fn whatever_is_written_configuration_space_lives(
        accesses in proptest::collection::vec((0..ECAM_BUS_LEN, 1..=8usize, any::<u64>()), 0..100),
        low in proptest::collection::vec((0..0x200u64, 1..=8usize, any::<u64>()), 0..100),
    ) {
        let bus = bus();
        let (mut ecam, mut ports) = (Ecam(Arc::clone(&bus)), ConfigPorts::new(bus));
        let near = low.iter().map(|&(offset, len, value)| (1 << 15 | offset, len, value));
        for (offset, len, value) in accesses.iter().copied().chain(near) {
            let bytes = value.to_le_bytes();
            ecam.write(offset, &bytes[..len]);
            ecam.read(offset, &mut [0; 8][..len]);
            ports.write(offset % 8, &bytes[..len]);
            ports.read(offset % 8, &mut [0; 8][..len]);
        }
        prop_assert_eq!(dword(&mut ecam, 1 << 15), 0x1041_1af4);
    }
}
