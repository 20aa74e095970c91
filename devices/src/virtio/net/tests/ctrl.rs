//! The control queue's commands.

use serde_json::json;

use super::*;
use crate::virtio::net::RxFilterInfo;
use crate::virtio::net::ctrl::{Control, CtrlQueue};

/// A command and its answer's place, as one chain.
pub fn command(driver: &mut Driver, head: u16, bytes: &[u8]) {
    driver.write(0x8000, bytes);
    driver.write(0x7000, &[0xaa]);
    driver.offer_chain(head, &[(0x8000, bytes.len() as u32, 0), (0x7000, 1, WRITE)]);
}

/// A device's end of the control queue, without the device.
struct Bench {
    wires: Vec<Arc<Wire>>,
    config: Arc<ConfigSpace>,
    filter: Arc<Filter>,
    driver: Driver,
    queue: CtrlQueue<Wire>,
}

impl Bench {
    fn new(features: Features, permissions: Permissions) -> Self {
        Self::reporting(features, permissions, EventSink::default())
    }

    fn reporting(features: Features, permissions: Permissions, events: EventSink) -> Self {
        let wires: Vec<_> = (0..3).map(|_| Arc::new(Wire::new().0)).collect();
        let config = config();
        let filter = Arc::new(Filter::new(Arc::clone(&config), events));
        filter.change(|rules| *rules = Rules::new(features));
        let driver = Driver::new();
        let control = Control {
            backends: wires.clone(),
            config: Arc::clone(&config),
            filter: Arc::clone(&filter),
            features,
            permissions,
        };
        Self {
            queue: CtrlQueue::new(driver.queue(false), control),
            wires,
            config,
            filter,
            driver,
        }
    }

    fn any() -> Self {
        Self::new(Features::all(), Permissions::default())
    }

    /// Sends a command; whether the answer is OK.
    fn send(&mut self, bytes: &[u8]) -> bool {
        command(&mut self.driver, 0, bytes);
        assert_eq!(self.queue.handle(10), (Stop::Idle, true));
        assert_eq!(self.driver.take_used(), [(0, 1)]);
        match self.driver.read(0x7000, 1)[0] {
            0 => true,
            1 => false,
            other => panic!("{bytes:?}: {other}"),
        }
    }

    fn rules(&self) -> Rules {
        self.filter.change(|rules| rules.clone())
    }

    fn enabled(&self) -> usize {
        let is_enabled = |wire: &&Arc<Wire>| wire.enabled.load(Ordering::SeqCst);
        self.wires.iter().filter(is_enabled).count()
    }
}

#[test]
fn command_sets_how_many_pairs_take_frames() {
    let mut bench = Bench::any();
    for (bytes, done, pairs) in [
        (&[4, 0, 2, 0][..], true, 2),
        (&[4, 0, 1, 0], true, 1),
        (&[4, 0, 0, 0], false, 1),
        (&[4, 0, 4, 0], false, 1),
        (&[4, 0, 3], false, 1),
        (&[4, 1, 3, 0], false, 1),
        (&[9, 0, 1, 0], false, 1),
        (&[4], false, 1),
        (&[4, 0, 3, 0], true, 3),
    ] {
        assert_eq!(bench.send(bytes), done, "{bytes:?}");
        assert_eq!(bench.enabled(), pairs, "{bytes:?}");
    }
    // No room for the answer, or a question from nowhere.
    bench.driver.offer_chain(2, &[(0x4000, 4, 0)]);
    bench
        .driver
        .offer_chain(4, &[(u64::MAX - 1, 4, 0), (0x5000, 1, WRITE)]);
    bench.queue.handle(10);
    assert_eq!(bench.driver.take_used(), [(2, 0), (4, 0)]);
    let counters = bench.queue.counters;
    assert_eq!((counters.commands, counters.refused), (9, 6));
    assert_eq!(counters.bad_chains, 2);
}

#[test]
fn requests_without_room_for_an_answer_cost_budget() {
    let mut bench = Bench::any();
    for head in 0..5 {
        bench.driver.offer_chain(head, &[(0x4000, 4, 0)]);
    }
    assert_eq!(bench.queue.handle(3), (Stop::Budget, true));
    assert_eq!(bench.driver.take_used(), [(0, 0), (1, 0), (2, 0)]);
    assert_eq!(bench.queue.handle(3), (Stop::Idle, true));
    assert_eq!(bench.driver.take_used(), [(3, 0), (4, 0)]);
}

#[test]
fn control_queue_without_requests_does_not_interrupt() {
    let mut bench = Bench::any();
    assert_eq!(bench.queue.handle(10), (Stop::Idle, false));
    assert!(bench.send(&[4, 0, 2, 0]));
    assert_eq!(bench.queue.handle(10), (Stop::Idle, false));
}

#[test]
fn broken_ring_of_the_control_queue_is_told() {
    let mut bench = Bench::any();
    bench.driver.set_available(SIZE + 1);
    assert_eq!(bench.queue.handle(10), (Stop::Broken, false));
}

#[test]
fn command_without_its_feature_is_refused() {
    let mut bench = Bench::new(Features::CTRL_VQ, Permissions::default());
    for bytes in [
        &[0, 1, 1][..],
        &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[1, 1, 2, 3, 4, 5, 6, 7],
        &[2, 0, 5, 0],
        &[3, 0],
        &[4, 0, 1, 0],
        &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ] {
        assert!(!bench.send(bytes), "{bytes:?}");
    }
}

#[test]
fn receive_modes_are_acknowledged_where_the_host_delivers() {
    let mut bench = Bench::any();
    assert!(bench.send(&[0, 1, 1]) && bench.rules().all_multicast);
    assert!(bench.send(&[0, 1, 0]) && !bench.rules().all_multicast);
    // The host has no frames for others, but the driver gets what there is.
    assert!(!bench.send(&[0, 0, 1]) && bench.rules().promiscuous);
    assert!(bench.send(&[0, 0, 0]) && !bench.rules().promiscuous);
    for wrong in [
        &[0, 0, 2][..],
        &[0, 0],
        &[0, 0, 1, 1],
        &[0, 2, 1],
        &[0, 5, 1],
    ] {
        assert!(!bench.send(wrong), "{wrong:?}");
    }
    let permissions = Permissions {
        allow_promisc: true,
        ..Permissions::default()
    };
    assert!(Bench::new(Features::all(), permissions).send(&[0, 0, 1]));
}

#[test]
fn table_of_addresses_is_taken_whole_or_not_at_all() {
    let group = [1, 0, 0x5e, 0, 0, 1];
    let other = [2, 9, 9, 9, 9, 9];
    let table = |unicast: &[[u8; 6]], multicast: &[[u8; 6]]| {
        let list = |macs: &[[u8; 6]]| {
            [&(macs.len() as u32).to_le_bytes()[..], macs.as_flattened()].concat()
        };
        [&[1, 0][..], &list(unicast), &list(multicast)].concat()
    };
    let mut bench = Bench::any();
    assert!(bench.send(&table(&[], &[group])));
    let rules = bench.rules();
    assert!(rules.pass(MAC, group, None) && !rules.pass(MAC, [1, 0, 0x5e, 0, 0, 2], None));
    // Frames to another address would never come; the groups count all the same.
    assert!(!bench.send(&table(&[MAC, other], &[])));
    assert!(!bench.rules().pass(MAC, group, None));
    assert!(bench.send(&table(&[MAC], &[group])));
    let whole = table(&[MAC], &[group]);
    for cut in 2..whole.len() {
        assert!(!bench.send(&whole[..cut]), "{cut}");
    }
    assert!(!bench.send(&[&whole[..], &[0]].concat()));
    assert!(!bench.send(&[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]));
    assert!(
        bench.rules().pass(MAC, group, None),
        "what is wrong changes nothing"
    );
    let many = vec![group; 1400];
    assert!(
        !bench.send(&table(&[], &many)),
        "longer than what is looked at"
    );
    let permissions = Permissions {
        allow_promisc: true,
        ..Permissions::default()
    };
    let mut passthru = Bench::new(Features::all(), permissions);
    assert!(passthru.send(&table(&[other], &[])));
    assert!(passthru.rules().pass(MAC, other, None));
}

#[test]
fn mac_address_changes_only_by_permission() {
    let new = [2, 0, 0, 0, 0, 9];
    let set = |mac: [u8; 6]| [&[1, 1][..], &mac].concat();
    let mut bench = Bench::any();
    assert!(!bench.send(&set(new)));
    assert!(bench.send(&set(MAC)), "the one that it has");
    let permissions = Permissions {
        change_mac: true,
        ..Permissions::default()
    };
    let mut bench = Bench::new(Features::all(), permissions);
    for wrong in [[1, 0, 0, 0, 0, 9], [0; 6], [0xff; 6]] {
        assert!(!bench.send(&set(wrong)));
    }
    assert!(!bench.send(&set(new)[..7]));
    assert_eq!(*bench.wires[0].mac.lock().unwrap(), None);
    assert!(bench.send(&set(new)));
    assert_eq!(*bench.wires[0].mac.lock().unwrap(), Some(new));
    let mut seen = [0; 6];
    bench.config.read(0, &mut seen);
    assert_eq!((seen, bench.filter.own()), (new, new));
    bench.config.reset_mac(bench.wires[0].as_ref()).unwrap();
    assert_eq!(*bench.wires[0].mac.lock().unwrap(), Some(MAC));
    assert_eq!((bench.config.mac(), bench.filter.own()), (MAC, MAC));
}

#[test]
fn vlans_are_added_and_taken_away() {
    let mut bench = Bench::any();
    assert!(bench.send(&[2, 0, 5, 0]) && bench.rules().pass(MAC, MAC, Some(5)));
    assert!(bench.send(&[2, 1, 5, 0]) && !bench.rules().pass(MAC, MAC, Some(5)));
    for wrong in [&[2, 0, 0, 0x10][..], &[2, 0, 5], &[2, 2, 5, 0], &[2, 0]] {
        assert!(!bench.send(wrong), "{wrong:?}");
    }
}

#[test]
fn offloads_change_within_what_was_agreed() {
    let agreed = Features::CTRL_GUEST_OFFLOADS | Features::GUEST_CSUM | Features::GUEST_TSO4;
    let mut bench = Bench::new(agreed, Permissions::default());
    let set = |features: Features| [&[5, 0][..], &features.bits().to_le_bytes()].concat();
    assert!(bench.send(&set(Features::GUEST_CSUM)));
    assert!(bench.send(&set(Features::GUEST_CSUM | Features::GUEST_TSO4)));
    let offloads = Offloads::CSUM | Offloads::TSO4;
    assert_eq!(bench.rules().offloads, offloads);
    assert!(bench.send(&set(Features::empty())));
    for wrong in [Features::GUEST_TSO6, Features::MQ, Features::all()] {
        assert!(!bench.send(&set(wrong)), "{wrong:?}");
    }
    assert!(!bench.send(&[5, 0, 0, 0, 0, 0, 0, 0, 0, 0x80]));
    assert!(!bench.send(&[5, 0, 1]));
    assert_eq!(bench.rules().offloads, Offloads::empty());
    let seen = bench.wires[0].offloads.lock().unwrap().clone();
    let csum = Offloads::CSUM;
    assert_eq!(seen, [csum, csum | Offloads::TSO4, Offloads::empty()]);
}

#[test]
fn driver_that_can_is_asked_to_announce_itself() {
    let mut bench = Bench::any();
    let recorder = Arc::new(Recorder::default());
    let status = |config: &ConfigSpace| {
        let mut bytes = [0; 2];
        config.read(6, &mut bytes);
        bytes[0]
    };
    bench.config.attach(recorder.clone(), true, false);
    bench.config.ask_to_announce();
    assert_eq!(status(&bench.config), 3);
    assert_eq!(recorder.config_changes.load(Ordering::SeqCst), 1);
    assert!(bench.send(&[3, 0]));
    assert_eq!(status(&bench.config), 1);
    assert!(!bench.send(&[3, 1]));
    // Not without a link, which also ends a request.
    bench.config.ask_to_announce();
    bench.config.set_carrier(false);
    bench.config.ask_to_announce();
    assert_eq!(status(&bench.config), 0);
    bench.config.set_carrier(true);
    assert_eq!(status(&bench.config), 1);
    // Nor a driver that cannot.
    bench.config.attach(recorder, false, false);
    bench.config.ask_to_announce();
    assert_eq!(status(&bench.config), 1);
}

#[test]
fn filter_that_the_driver_changes_is_reported_once_until_it_is_asked_for() {
    let permissions = Permissions {
        change_mac: true,
        allow_promisc: true,
    };
    let (events, seen) = record();
    let mut bench = Bench::reporting(Features::all(), permissions, events);
    let reports = || std::mem::take(&mut *seen.lock().unwrap()).len();
    // Of no concern to the filter, or without effect.
    for bytes in [
        &[4, 0, 2, 0][..],
        &[3, 0],
        &[0, 0, 2],
        &[1, 1, 1, 0, 0, 0, 0, 0],
    ] {
        bench.send(bytes);
        assert_eq!(reports(), 0, "{bytes:?}");
    }
    for _ in 0..3 {
        for on in [1, 0] {
            assert!(bench.send(&[0, 0, on]));
        }
    }
    assert_eq!(reports(), 1);
    let group = [1, 0, 0x5e, 0, 0, 1];
    for (bytes, shown) in [
        (&[0, 0, 1][..], "promiscuous"),
        (
            &[&[1, 0, 0, 0, 0, 0, 1, 0, 0, 0][..], &group].concat(),
            "multicast-table",
        ),
        (&[0, 1, 1], "multicast"),
        (&[2, 0, 5, 0], "vlan-table"),
        (&[1, 1, 2, 0, 0, 0, 0, 9], "main-mac"),
    ] {
        let shows = |info: RxFilterInfo| json!(info)[shown].clone();
        let before = shows(bench.filter.query("net0"));
        assert!(bench.send(bytes), "{bytes:?}");
        assert_eq!(reports(), 1, "{bytes:?}");
        assert_ne!(shows(bench.filter.query("net0")), before, "{bytes:?}");
    }
    // The same address again.
    assert!(bench.send(&[1, 1, 2, 0, 0, 0, 0, 9]));
    assert_eq!(reports(), 0);
}

proptest::proptest! {
    #[test]
    fn no_command_is_too_odd(class in 0..8u8, kind in 0..4u8, operand: Vec<u8>) {
        let permissions = Permissions { change_mac: true, allow_promisc: true };
        let mut bench = Bench::new(Features::all(), permissions);
        bench.send(&[&[class, kind][..], &operand].concat());
    }
}
