//! How much is offered for a frame that may be long.

use super::*;

/// Long frames are negotiated.
const LONG: RxLayout = RxLayout {
    mergeable: true,
    largest_frame: 9000,
};
/// Where buffers are, and how large.
const BUFFERS: u64 = 0x1_0000;
const BUFFER: u64 = 0x400;

struct Bench {
    wire: Wire,
    far: UnixDatagram,
    driver: Driver,
    rx: RxQueue,
}

impl Bench {
    fn new() -> Self {
        let (wire, far) = Wire::new();
        let mut driver = Driver::new();
        for head in 0..SIZE {
            let at = BUFFERS + BUFFER * u64::from(head);
            driver.offer_chain(head, &[(at, BUFFER as u32, WRITE)]);
        }
        let rx = RxQueue::new(driver.queue(false), LONG, filter());
        Self {
            wire,
            far,
            driver,
            rx,
        }
    }

    /// A frame of this length arrives whole. Returns for how much the chains offered had room.
    fn pass(&mut self, len: usize) -> usize {
        self.far.send(&frame(len)).unwrap();
        self.rx.receive(&self.wire, 1);
        let offered = self.wire.offered.load(Ordering::SeqCst);
        // A long one waits for the rest of its chains.
        self.rx.receive(&self.wire, 1);
        let used = self.driver.take_used();
        let bytes = used.iter().flat_map(|&(head, len)| {
            let at = BUFFERS + BUFFER * u64::from(head);
            self.driver.read(at, len as usize)
        });
        let bytes: Vec<u8> = bytes.collect();
        assert!(bytes == received(len, used.len() as u16), "{len}");
        for (head, _) in used {
            self.driver.offer(head);
        }
        offered
    }
}

#[test]
fn rx_frame_is_offered_less_after_many_short_ones_until_one_is_long() {
    let mut bench = Bench::new();
    for _ in 0..2 {
        assert_eq!(bench.pass(5000), 9, "chains for 9,000 bytes");
        for n in 0..63 {
            assert!(bench.pass(60) >= 9, "{n}");
        }
        while bench.pass(1514) > 3 {}
        for _ in 0..200 {
            assert_eq!(bench.pass(1514), 3, "two chains and what they may not hold");
        }
        assert_eq!(bench.pass(8999), 3);
        assert_eq!(bench.pass(8999), 9);
    }
}

#[test]
fn rx_long_frames_among_short_ones_arrive_whole() {
    for every in [1, 2, 63, 64, 65, 66, 67, 100] {
        let mut bench = Bench::new();
        for n in 0..300 {
            let is_long = n % every == every - 1;
            bench.pass(if is_long { 2000 + 23 * n } else { 60 + n });
        }
        assert_eq!(bench.rx.counters.frames, 300);
    }
}
