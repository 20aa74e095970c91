//! A device with several queue pairs, of which its driver uses as many as it likes.

use super::*;

/// A device, and its driver's end of each queue and each wire.
struct Pairs {
    device: Net<Wire>,
    fars: Vec<UnixDatagram>,
    drivers: Vec<Driver>,
    kicks: Vec<Arc<EventFd>>,
}

impl Pairs {
    fn new(pairs: usize) -> Self {
        let (wires, fars) = (0..pairs).map(|_| Wire::new()).unzip();
        Self {
            device: device(wires, 1500, options()),
            fars,
            drivers: Vec::new(),
            kicks: Vec::new(),
        }
    }

    /// A driver that sets up these queues, with fresh rings. Whether the device starts.
    fn start(&mut self, queues: &[usize]) -> bool {
        let count = self.device.queue_sizes().len();
        self.drivers = (0..count).map(|_| Driver::new()).collect();
        self.kicks = (0..count).map(|_| kick()).collect();
        let ends = self.drivers.iter().zip(&self.kicks).enumerate();
        let activation = Activation {
            memory: Driver::new().memory,
            features: (Features::MQ | Features::CTRL_VQ).bits(),
            queues: ends
                .map(|(index, (driver, kick))| {
                    queue(driver, kick).filter(|_| queues.contains(&index))
                })
                .collect(),
            resumed: false,
            interrupt: Arc::new(Recorder::default()),
        };
        self.device.activate(activation).is_ok()
    }

    /// Says how many pairs are to take frames. Whether the answer is OK.
    fn set_pairs(&mut self, pairs: u8) -> bool {
        let control = self.drivers.last_mut().unwrap();
        ctrl::command(control, 0, &[4, 0, pairs, 0]);
        self.kicks.last().unwrap().write(1).unwrap();
        eventually("the answer", || control.take_used() == [(0, 1)]);
        control.read(0x7000, 1) == [0]
    }

    /// Which pairs take frames.
    fn enabled(&self) -> Vec<bool> {
        let wires = self.device.backends.iter();
        wires
            .map(|wire| wire.enabled.load(Ordering::SeqCst))
            .collect()
    }

    /// Whether a frame gets through each way of a pair.
    fn passes(&mut self, pair: usize) {
        let [rx, tx] = &mut self.drivers[2 * pair..][..2] else {
            panic!("no pair {pair}");
        };
        rx.offer_chain(0, &[(0x4000, 2000, WRITE)]);
        self.kicks[2 * pair].write(1).unwrap();
        self.fars[pair].send(&frame(99)).unwrap();
        eventually("a frame for the guest", || rx.take_used() == [(0, 99)]);
        tx.offer_chain(0, &[(0x4000, 77, 0)]);
        self.kicks[2 * pair + 1].write(1).unwrap();
        eventually("a frame from the guest", || {
            self.fars[pair].recv(&mut [0; 100]).is_ok_and(|n| n == 77)
        });
    }
}

#[test]
fn device_of_two_pairs_uses_the_second_when_told() {
    let mut pairs = Pairs::new(2);
    assert_eq!(pairs.enabled(), [true, false], "nobody reads it yet");
    assert!(pairs.start(&[0, 1, 2, 3, 4]));
    assert!(pairs.set_pairs(2));
    assert_eq!(pairs.enabled(), [true, true]);
    pairs.passes(1);
    pairs.device.reset();
    assert_eq!(pairs.enabled(), [true, false]);
    let received = |pair: usize| pairs.device.handle().pairs()[pair].rx.frames;
    assert_eq!([received(0), received(1)], [0, 1]);
}

#[test]
fn driver_may_do_without_all_pairs_but_the_first() {
    let mut pairs = Pairs::new(4);
    assert!(pairs.start(&[0, 1, 2, 3, 8]));
    assert!(!pairs.set_pairs(3) && !pairs.set_pairs(4));
    assert_eq!(pairs.enabled(), [true, false, false, false]);
    assert!(pairs.set_pairs(2));
    assert_eq!(pairs.enabled(), [true, true, false, false]);
    pairs.passes(0);
    pairs.passes(1);
    // The next driver has fewer, and the one after it all.
    pairs.device.reset();
    assert!(pairs.start(&[0, 1, 8]));
    assert!(!pairs.set_pairs(2) && pairs.set_pairs(1));
    pairs.passes(0);
    pairs.device.reset();
    assert!(pairs.start(&[0, 1, 2, 3, 4, 5, 6, 7, 8]));
    assert!(pairs.set_pairs(4));
    pairs.passes(3);
}

#[test]
fn pair_after_a_gap_sends_but_is_never_told_to_receive() {
    let mut pairs = Pairs::new(3);
    assert!(pairs.start(&[0, 1, 4, 5, 6]));
    assert!(!pairs.set_pairs(3) && !pairs.set_pairs(2));
    assert_eq!(pairs.enabled(), [true, false, false]);
    pairs.passes(2);
}

#[test]
fn half_a_pair_is_refused_and_the_next_driver_served() {
    let mut pairs = Pairs::new(2);
    for queues in [&[][..], &[0], &[1], &[2, 3], &[0, 1, 2], &[0, 1, 3, 4]] {
        assert!(!pairs.start(queues), "{queues:?}");
        pairs.device.reset();
    }
    assert!(pairs.start(&[0, 1, 4]));
    pairs.passes(0);
}
