use proptest::prelude::*;
use vm_memory::GuestMemoryBackend;

use super::super::testing::{Buffer, Descriptor, Driver, END, INDIRECT, NEXT, REGION, SIZE, WRITE};
use super::*;

fn lengths(iovecs: &[libc::iovec]) -> Vec<usize> {
    iovecs.iter().map(|iovec| iovec.iov_len).collect()
}

fn next(ring: &mut Ring, direction: Direction) -> (Next<Chain>, Vec<usize>) {
    let mut iovecs = Vec::new();
    let next = ring.next(direction, &mut iovecs);
    (next, lengths(&iovecs))
}

#[test]
fn chain_of_the_right_direction_becomes_iovecs() {
    let mut driver = Driver::new();
    let mut ring = driver.ring(false);
    driver.offer_chain(3, &[(0x4000, 12, 0), (0x5000, 100, 0)]);
    let (chain, lengths) = next(&mut ring, Direction::FromDriver);
    assert_eq!(
        chain,
        Next::Chain(Chain {
            head: 3,
            len: 112,
            segments: 2
        })
    );
    assert_eq!(lengths, [12, 100]);
    assert_eq!(next(&mut ring, Direction::FromDriver).0, Next::Empty);
    ring.add_used(3, 7);
    assert_eq!(driver.take_used(), [(3, 7)]);
}

#[test]
fn chain_points_into_guest_memory() {
    let mut driver = Driver::new();
    let mut ring = driver.ring(false);
    driver.offer_chain(0, &[(0x4321, 8, WRITE)]);
    let mut iovecs = Vec::new();
    ring.next(Direction::ToDriver, &mut iovecs);
    let expected = driver
        .memory
        .get_host_address(GuestAddress(0x4321))
        .unwrap();
    assert_eq!(iovecs[0].iov_base.cast::<u8>(), expected);
}

#[test]
fn chain_across_two_regions_is_split() {
    let mut driver = Driver::new();
    let mut ring = driver.ring(false);
    driver.offer_chain(0, &[(REGION - 10, 30, 0)]);
    let (chain, lengths) = next(&mut ring, Direction::FromDriver);
    assert_eq!(
        chain,
        Next::Chain(Chain {
            head: 0,
            len: 30,
            segments: 2
        })
    );
    assert_eq!(lengths, [10, 20]);
}

#[test]
fn chain_that_cannot_be_used_is_completed_with_nothing() {
    let outside = END - 10;
    let cases: [(&str, &[Buffer]); 7] = [
        ("other direction", &[(0x4000, 10, WRITE)]),
        ("mixed directions", &[(0x4000, 10, 0), (0x4000, 10, WRITE)]),
        ("past the end", &[(outside, 11, 0)]),
        ("outside", &[(END + 0x1000, 1, 0)]),
        ("address overflow", &[(u64::MAX - 3, 16, 0)]),
        ("no bytes", &[(0x4000, 0, 0)]),
        ("more than 4 GiB", &[(0, u32::MAX, 0), (0, u32::MAX, 0)]),
    ];
    for (name, descriptors) in cases {
        let mut driver = Driver::new();
        let mut ring = driver.ring(false);
        driver.offer_chain(2, descriptors);
        let (chain, lengths) = next(&mut ring, Direction::FromDriver);
        assert_eq!((chain, lengths.len()), (Next::Bad, 0), "{name}");
        assert_eq!(driver.take_used(), [(2, 0)], "{name}");
    }
}

#[test]
fn chain_that_never_ends_is_bad() {
    let mut driver = Driver::new();
    let mut ring = driver.ring(false);
    driver.write_descriptor(0, Descriptor::new(0x4000, 1, NEXT, 1));
    driver.write_descriptor(1, Descriptor::new(0x4000, 1, NEXT, 0));
    driver.offer(0);
    assert_eq!(next(&mut ring, Direction::FromDriver).0, Next::Bad);
    driver.write_descriptor(5, Descriptor::new(0x4000, 1, NEXT, SIZE));
    driver.offer(5);
    assert_eq!(next(&mut ring, Direction::FromDriver).0, Next::Bad);
    assert_eq!(driver.take_used(), [(0, 0), (5, 0)]);
}

#[test]
fn chain_with_a_head_outside_the_table_is_bad_and_not_given_back() {
    let mut driver = Driver::new();
    let mut ring = driver.ring(false);
    driver.offer(SIZE);
    assert_eq!(next(&mut ring, Direction::FromDriver).0, Next::Bad);
    assert_eq!(driver.take_used(), []);
}

#[test]
fn indirect_chain_is_followed_once() {
    const TABLE: u64 = 0x6000;
    let mut driver = Driver::new();
    let mut ring = driver.ring(false);
    driver.write_descriptor_at(TABLE, 0, Descriptor::new(0x4000, 12, NEXT, 1));
    driver.write_descriptor_at(TABLE, 1, Descriptor::new(0x5000, 50, 0, 0));
    driver.offer_chain(0, &[(TABLE, 32, INDIRECT)]);
    assert_eq!(next(&mut ring, Direction::FromDriver).1, [12, 50]);
    // A table inside a table, a length that is no multiple of 16, and none at all.
    driver.write_descriptor_at(TABLE, 0, Descriptor::new(TABLE, 32, INDIRECT, 0));
    for len in [32, 33, 0] {
        driver.offer_chain(0, &[(TABLE, len, INDIRECT)]);
        assert_eq!(next(&mut ring, Direction::FromDriver).0, Next::Bad, "{len}");
    }
}

#[test]
fn indirect_chain_of_too_many_descriptors_is_bad_even_if_they_are_empty() {
    const TABLE: u64 = 0x1_0000;
    let mut driver = Driver::new();
    let mut ring = driver.ring(false);
    let most = MAX_SEGMENTS as u16;
    for (count, len, good) in [(most, 1, true), (most + 1, 1, false), (most + 1, 0, false)] {
        for n in 0..count {
            let (len, flags) = if n + 1 == count {
                (1, WRITE)
            } else {
                (len, NEXT | WRITE)
            };
            driver.write_descriptor_at(TABLE, n, Descriptor::new(0x4000, len, flags, n + 1));
        }
        for _ in 0..2 {
            driver.offer_chain(0, &[(TABLE, 16 * u32::from(count), INDIRECT)]);
        }
        let chain = next(&mut ring, Direction::ToDriver).0;
        assert_eq!(matches!(chain, Next::Chain(_)), good, "{count} of {len}");
        let request = ring.next_request(100);
        assert_eq!(matches!(request, Next::Chain(_)), good, "{count} of {len}");
    }
}

#[test]
fn available_index_that_jumps_breaks_the_ring() {
    let driver = Driver::new();
    let mut ring = driver.ring(false);
    driver.set_available(SIZE + 1);
    assert_eq!(next(&mut ring, Direction::FromDriver).0, Next::Broken);
}

#[test]
fn ring_outside_memory_or_of_a_bad_size_is_refused() {
    let memory = Driver::new().memory;
    let good = Driver::config();
    for config in [
        QueueConfig { size: 0, ..good },
        QueueConfig { size: 3, ..good },
        QueueConfig {
            size: 2 * SIZE,
            ..good
        },
        QueueConfig {
            descriptors: END,
            ..good
        },
        QueueConfig {
            descriptors: 0x1001,
            ..good
        },
        QueueConfig {
            available: END - 2,
            ..good
        },
        QueueConfig {
            available: 0x2001,
            ..good
        },
        QueueConfig {
            used: END - 4,
            ..good
        },
        QueueConfig {
            used: 0x3002,
            ..good
        },
        QueueConfig {
            used: u64::MAX - 3,
            ..good
        },
        QueueConfig {
            ready: false,
            ..good
        },
    ] {
        assert!(
            Ring::new(&config, SIZE, false, Arc::clone(&memory)).is_err(),
            "{config:?}"
        );
    }
    assert!(Ring::new(&good, SIZE, false, memory).is_ok());
}

#[test]
fn staged_chains_become_visible_together() {
    let mut driver = Driver::new();
    let mut ring = driver.ring(false);
    ring.push_used(1, 10);
    ring.push_used(2, 20);
    assert_eq!(driver.used_index(), 0);
    ring.flush_used();
    assert_eq!(driver.take_used(), [(1, 10), (2, 20)]);
}

#[test]
fn interrupt_without_event_idx_follows_the_drivers_flag() {
    let driver = Driver::new();
    let mut ring = driver.ring(false);
    assert!(!ring.needs_interrupt(), "nothing has been used");
    ring.add_used(0, 0);
    assert!(ring.needs_interrupt());
    assert!(!ring.needs_interrupt(), "it has been told");
    driver.set_available_flags(1);
    ring.add_used(0, 0);
    assert!(!ring.needs_interrupt());
}

#[test]
fn interrupt_with_event_idx_comes_when_the_index_is_passed() {
    let driver = Driver::new();
    let mut ring = driver.ring(true);
    driver.set_used_event(2);
    for (completed, wanted) in [(1, false), (2, false), (3, true), (4, false)] {
        ring.add_used(0, 0);
        assert_eq!(ring.needs_interrupt(), wanted, "{completed}");
    }
    // Passed within a batch.
    driver.set_used_event(5);
    for _ in 0..4 {
        ring.push_used(0, 0);
    }
    ring.flush_used();
    assert!(ring.needs_interrupt());
}

#[test]
fn chain_put_back_comes_again() {
    let mut driver = Driver::new();
    let mut ring = driver.ring(false);
    driver.offer_chain(4, &[(0x4000, 20, 0)]);
    let first = next(&mut ring, Direction::FromDriver);
    ring.undo_next();
    assert_eq!(next(&mut ring, Direction::FromDriver), first);
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![0..END + 0x100, any::<u64>()];
    let len = prop_oneof![0..200u32, any::<u32>()];
    (address, len, 0..8u16, 0..SIZE + 2)
        .prop_map(|(address, len, flags, next)| Descriptor::new(address, len, flags, next))
}

proptest! {
    #[test]
    fn whatever_the_driver_writes_iovecs_stay_inside_guest_memory(
        table in proptest::collection::vec(descriptor(), usize::from(SIZE)),
        heads in proptest::collection::vec(0..SIZE + 2, 1..usize::from(SIZE)),
        to_driver in any::<bool>(),
    ) {
        let mut driver = Driver::new();
        let mut ring = driver.ring(false);
        for (n, &descriptor) in (0..).zip(&table) {
            driver.write_descriptor(n, descriptor);
        }
        // The rings themselves may be overwritten by no one here, so each head comes up once.
        for &head in &heads {
            driver.offer(head);
        }
        let direction = if to_driver { Direction::ToDriver } else { Direction::FromDriver };
        let hosts: Vec<_> = [0, REGION]
            .map(|start| driver.memory.get_host_address(GuestAddress(start)).unwrap() as usize)
            .into();
        for _ in &heads {
            let mut iovecs = Vec::new();
            let next = ring.next(direction, &mut iovecs);
            prop_assert!(matches!(next, Next::Chain(_) | Next::Bad));
            if let Next::Chain(chain) = next {
                prop_assert_eq!(chain.len, lengths(&iovecs).iter().sum::<usize>());
                prop_assert!(chain.segments == iovecs.len() && chain.segments <= MAX_SEGMENTS);
            } else {
                prop_assert!(iovecs.is_empty());
            }
            for iovec in iovecs {
                let start = iovec.iov_base as usize;
                let inside = |&host: &usize| {
                    start >= host && start + iovec.iov_len <= host + REGION as usize
                };
                prop_assert!(hosts.iter().any(inside));
            }
        }
        prop_assert_eq!(next(&mut ring, direction).0, Next::Empty);
    }
}
