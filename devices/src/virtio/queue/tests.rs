use proptest::prelude::*;
use vm_memory::GuestMemoryBackend;

use super::super::tests::{Buffer, Descriptor, Driver, END, INDIRECT, NEXT, REGION, SIZE, WRITE};
use super::*;

fn lengths(iovecs: &[libc::iovec]) -> Vec<usize> {
    iovecs.iter().map(|iovec| iovec.iov_len).collect()
}

/// The next chain, and the lengths of its iovecs: readable ones, then writable ones.
fn next(queue: &mut Queue) -> (Next, [Vec<usize>; 2]) {
    let mut buffers = Buffers::default();
    let next = queue.pop(&mut buffers);
    (
        next,
        [&buffers.readable, &buffers.writable].map(|iovecs| lengths(iovecs)),
    )
}

fn chain(head: u16, [readable, writable]: [(usize, usize); 2]) -> Next {
    let part = |(len, segments)| Part { len, segments };
    Next::Chain(Chain {
        head,
        readable: part(readable),
        writable: part(writable),
    })
}

#[test]
fn chain_becomes_iovecs_by_who_writes_them() {
    let mut driver = Driver::new();
    let mut queue = driver.queue(false);
    driver.offer_chain(3, &[(0x4000, 12, 0), (0x5000, 100, 0), (0x6000, 1, WRITE)]);
    let (popped, lengths) = next(&mut queue);
    assert_eq!(popped, chain(3, [(112, 2), (1, 1)]));
    assert_eq!(lengths, [vec![12, 100], vec![1]]);
    assert_eq!(next(&mut queue).0, Next::Empty);
    queue.add_used(3, 7);
    assert_eq!(driver.take_used(), [(3, 7)]);
}

#[test]
fn buffers_of_several_chains_lie_in_a_row_until_dropped() {
    let mut driver = Driver::new();
    let mut queue = driver.queue(false);
    driver.offer_chain(0, &[(0x4000, 12, WRITE)]);
    driver.offer_chain(1, &[(0x4000, 5, 0), (0x5000, 7, WRITE), (0x6000, 9, WRITE)]);
    let mut buffers = Buffers::default();
    assert_eq!(queue.pop(&mut buffers), chain(0, [(0, 0), (12, 1)]));
    let Next::Chain(second) = queue.pop(&mut buffers) else {
        panic!("no second chain");
    };
    assert_eq!(lengths(&buffers.writable), [12, 7, 9]);
    buffers.drop_last(&second);
    assert_eq!(
        (buffers.readable.len(), lengths(&buffers.writable)),
        (0, vec![12])
    );
}

#[test]
fn chain_points_into_guest_memory() {
    let mut driver = Driver::new();
    let mut queue = driver.queue(false);
    driver.offer_chain(0, &[(0x4321, 8, WRITE)]);
    let mut buffers = Buffers::default();
    queue.pop(&mut buffers);
    let expected = driver
        .memory
        .get_host_address(GuestAddress(0x4321))
        .unwrap();
    assert_eq!(buffers.writable[0].iov_base.cast::<u8>(), expected);
}

#[test]
fn chain_across_two_regions_is_split() {
    let mut driver = Driver::new();
    let mut queue = driver.queue(false);
    driver.offer_chain(0, &[(REGION - 10, 30, 0)]);
    let (popped, lengths) = next(&mut queue);
    assert_eq!(popped, chain(0, [(30, 2), (0, 0)]));
    assert_eq!(lengths[0], [10, 20]);
}

#[test]
fn chain_that_cannot_be_used_is_completed_with_nothing() {
    let outside = END - 10;
    let cases: [(&str, &[Buffer]); 6] = [
        ("past the end", &[(outside, 11, 0)]),
        ("outside", &[(0x4000, 10, 0), (END + 0x1000, 1, WRITE)]),
        ("address overflow", &[(u64::MAX - 3, 16, 0)]),
        ("no bytes", &[(0x4000, 0, 0)]),
        (
            "no bytes, however many buffers",
            &[(0x4000, 0, 0), (0x4000, 0, WRITE)],
        ),
        ("more than 4 GiB", &[(0, u32::MAX, 0), (0, u32::MAX, 0)]),
    ];
    for (name, descriptors) in cases {
        let mut driver = Driver::new();
        let mut queue = driver.queue(false);
        driver.offer_chain(2, descriptors);
        assert_eq!(next(&mut queue), (Next::Bad, [vec![], vec![]]), "{name}");
        assert_eq!(driver.take_used(), [(2, 0)], "{name}");
    }
}

#[test]
fn chain_that_never_ends_is_bad() {
    let mut driver = Driver::new();
    let mut queue = driver.queue(false);
    driver.write_descriptor(0, Descriptor::new(0x4000, 1, NEXT, 1));
    driver.write_descriptor(1, Descriptor::new(0x4000, 1, NEXT, 0));
    driver.offer(0);
    assert_eq!(next(&mut queue).0, Next::Bad);
    driver.write_descriptor(5, Descriptor::new(0x4000, 1, NEXT, SIZE));
    driver.offer(5);
    assert_eq!(next(&mut queue).0, Next::Bad);
    assert_eq!(driver.take_used(), [(0, 0), (5, 0)]);
}

#[test]
fn chain_with_a_head_outside_the_table_is_bad_and_not_given_back() {
    let mut driver = Driver::new();
    let mut queue = driver.queue(false);
    driver.offer(SIZE);
    assert_eq!(next(&mut queue).0, Next::Bad);
    assert_eq!(driver.take_used(), []);
}

#[test]
fn indirect_chain_is_followed_once() {
    const TABLE: u64 = 0x6000;
    let mut driver = Driver::new();
    let mut queue = driver.queue(false);
    driver.write_descriptor_at(TABLE, 0, Descriptor::new(0x4000, 12, NEXT, 1));
    driver.write_descriptor_at(TABLE, 1, Descriptor::new(0x5000, 50, 0, 0));
    driver.offer_chain(0, &[(TABLE, 32, INDIRECT)]);
    assert_eq!(next(&mut queue).1[0], [12, 50]);
    // A table inside a table, a length that is no multiple of 16, and none at all.
    driver.write_descriptor_at(TABLE, 0, Descriptor::new(TABLE, 32, INDIRECT, 0));
    for len in [32, 33, 0] {
        driver.offer_chain(0, &[(TABLE, len, INDIRECT)]);
        assert_eq!(next(&mut queue).0, Next::Bad, "{len}");
    }
}

#[test]
fn indirect_chain_of_too_many_descriptors_is_bad_even_if_they_are_empty() {
    const TABLE: u64 = 0x1_0000;
    let mut driver = Driver::new();
    let mut queue = driver.queue(false);
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
        driver.offer_chain(0, &[(TABLE, 16 * u32::from(count), INDIRECT)]);
        let chain = next(&mut queue).0;
        assert_eq!(matches!(chain, Next::Chain(_)), good, "{count} of {len}");
    }
}

#[test]
fn available_index_that_jumps_breaks_the_queue() {
    let driver = Driver::new();
    let mut queue = driver.queue(false);
    driver.set_available(SIZE + 1);
    assert_eq!(next(&mut queue).0, Next::Broken);
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
            Queue::new(&config, SIZE, false, Arc::clone(&memory)).is_err(),
            "{config:?}"
        );
    }
    assert!(Queue::new(&good, SIZE, false, memory).is_ok());
}

#[test]
fn pushed_chains_become_visible_together() {
    let mut driver = Driver::new();
    let mut queue = driver.queue(false);
    queue.push_used(1, 10);
    queue.push_used(2, 20);
    assert_eq!(driver.used_index(), 0);
    queue.flush_used();
    assert_eq!(driver.take_used(), [(1, 10), (2, 20)]);
}

#[test]
fn interrupt_without_event_idx_follows_the_drivers_flag() {
    let driver = Driver::new();
    let mut queue = driver.queue(false);
    assert!(!queue.needs_notification(), "nothing has been used");
    queue.add_used(0, 0);
    assert!(queue.needs_notification());
    assert!(!queue.needs_notification(), "it has been told");
    driver.set_available_flags(1);
    queue.add_used(0, 0);
    assert!(!queue.needs_notification());
}

#[test]
fn interrupt_with_event_idx_comes_when_the_index_is_passed() {
    let driver = Driver::new();
    let mut queue = driver.queue(true);
    driver.set_used_event(2);
    for (completed, wanted) in [(1, false), (2, false), (3, true), (4, false)] {
        queue.add_used(0, 0);
        assert_eq!(queue.needs_notification(), wanted, "{completed}");
    }
    // Passed within a batch.
    driver.set_used_event(5);
    for _ in 0..4 {
        queue.push_used(0, 0);
    }
    queue.flush_used();
    assert!(queue.needs_notification());
}

#[test]
fn chain_put_back_comes_again() {
    let mut driver = Driver::new();
    let mut queue = driver.queue(false);
    driver.offer_chain(4, &[(0x4000, 20, 0)]);
    let first = next(&mut queue);
    queue.undo_pop();
    assert_eq!(next(&mut queue), first);
}

#[test]
fn chains_put_back_come_again_in_a_queue_that_goes_on() {
    let mut driver = Driver::new();
    let mut queue = driver.queue(true);
    for head in 0..5 {
        driver.offer_chain(head, &[(0x4000, 20, 0)]);
    }
    for _ in 0..4 {
        next(&mut queue);
    }
    queue.add_used(0, 0);
    queue.put_back(&[1, 2, 3]);
    assert_eq!(queue.next_avail(), 1);
    let mut other = driver.queue(true);
    other.resume(queue.next_avail());
    driver.set_used_event(1);
    assert!(!other.needs_notification(), "what was used before");
    for head in 1..5 {
        assert_eq!(next(&mut other).0, chain(head, [(20, 1), (0, 0)]));
        other.add_used(head, 0);
    }
    assert_eq!(next(&mut other).0, Next::Empty);
    assert!(other.needs_notification());
    assert_eq!(driver.take_used(), [0, 1, 2, 3, 4].map(|head| (head, 0)));
}

#[test]
fn chains_put_back_past_a_bad_one_are_completed() {
    let mut driver = Driver::new();
    let mut queue = driver.queue(false);
    driver.offer_chain(0, &[(0x4000, 20, 0)]);
    driver.offer_chain(1, &[(END, 20, 0)]);
    driver.offer_chain(2, &[(0x4000, 20, 0)]);
    for _ in 0..3 {
        next(&mut queue);
    }
    queue.put_back(&[0, 2]);
    assert_eq!(driver.take_used(), [(1, 0), (0, 0), (2, 0)]);
    assert_eq!(next(&mut queue).0, Next::Empty);
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
    ) {
        let mut driver = Driver::new();
        let mut queue = driver.queue(false);
        for (n, &descriptor) in (0..).zip(&table) {
            driver.write_descriptor(n, descriptor);
        }
        // The rings themselves may be overwritten by no one here, so each head comes up once.
        for &head in &heads {
            driver.offer(head);
        }
        let hosts: Vec<_> = [0, REGION]
            .map(|start| driver.memory.get_host_address(GuestAddress(start)).unwrap() as usize)
            .into();
        for _ in &heads {
            let mut buffers = Buffers::default();
            let next = queue.pop(&mut buffers);
            prop_assert!(matches!(next, Next::Chain(_) | Next::Bad));
            let popped = match next {
                Next::Chain(chain) => [chain.readable, chain.writable],
                _ => [Part::default(); 2],
            };
            let iovecs = [&buffers.readable, &buffers.writable];
            for (part, iovecs) in popped.iter().zip(iovecs) {
                prop_assert_eq!(part.len, lengths(iovecs).iter().sum::<usize>());
                prop_assert!(part.segments == iovecs.len() && part.segments <= MAX_SEGMENTS);
            }
            for iovec in iovecs.into_iter().flat_map(|iovecs| iovecs.iter()) {
                let start = iovec.iov_base as usize;
                let inside = |&host: &usize| {
                    start >= host && start + iovec.iov_len <= host + REGION as usize
                };
                prop_assert!(hosts.iter().any(inside));
            }
        }
        prop_assert_eq!(next(&mut queue).0, Next::Empty);
    }
}
