use std::collections::BTreeSet;
use std::io::Write;

use proptest::prelude::*;

use super::*;
use crate::virtio::tests::{Driver, SIZE};

/// A record of two queues, in the second of which these heads are in flight.
fn record(heads: &[u16], used: u16, last_batch: u16) -> Inflight {
    let mut bytes = vec![0; Inflight::len(2, SIZE) as usize];
    let part = Inflight::len(1, SIZE) as usize;
    for &head in heads {
        bytes[part + HEADER_LEN + usize::from(head) * STATE_LEN] = 1;
    }
    let mut put = |at: usize, word: u16| {
        bytes[part + at..part + at + 2].copy_from_slice(&word.to_ne_bytes());
    };
    put(USED_INDEX, used);
    put(LAST_BATCH_HEAD, last_batch);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    Inflight::new(file, SIZE)
}

fn find(driver: &Driver, inflight: Option<&Inflight>) -> Option<(Vec<u16>, u16)> {
    let found = Outstanding::find(&driver.memory, 1, &Driver::config(), inflight)?;
    Some((found.heads, found.next_avail))
}

#[test]
fn record_says_which_chains_were_taken() {
    let mut driver = Driver::new();
    let mut queue = driver.queue(false);
    [3, 9, 4, 7, 1]
        .into_iter()
        .for_each(|head| driver.offer(head));
    // 4 is done. 3 and 9 are in flight, 7 and 1 have not been taken.
    queue.add_used(4, 0);
    let inflight = record(&[3, 9], 1, 0);
    assert_eq!(find(&driver, Some(&inflight)), Some((vec![3, 9], 3)));
}

#[test]
fn record_counts_no_chain_that_the_driver_has_back() {
    let mut driver = Driver::new();
    let mut queue = driver.queue(false);
    [3, 9, 4].into_iter().for_each(|head| driver.offer(head));
    queue.add_used(9, 0);
    // It died before it noted that.
    let inflight = record(&[3, 9, 4], 0, 9);
    assert_eq!(find(&driver, Some(&inflight)), Some((vec![3, 4], 3)));
}

#[test]
fn record_that_cannot_be_right_is_not_used() {
    let mut driver = Driver::new();
    driver.offer(3);
    let wrong = record(&[1, 2], 0, 0);
    assert_eq!(find(&driver, Some(&wrong)), Some((vec![3], 1)));
    let cut = Inflight::new(tempfile::tempfile().unwrap(), SIZE);
    assert_eq!(find(&driver, Some(&cut)), Some((vec![3], 1)));
}

#[test]
fn index_that_makes_no_sense_is_nothing_to_go_by() {
    let driver = Driver::new();
    driver.set_available(SIZE + 1);
    assert_eq!(find(&driver, None), None);
}

proptest! {
    /// A driver that offers chains whose heads are free, and a server that uses them in order.
    #[test]
    fn rings_alone_say_it_of_a_server_that_keeps_the_order(
        steps in prop::collection::vec(prop::option::of(0..SIZE), 0..200),
    ) {
        let mut driver = Driver::new();
        let mut queue = driver.queue(false);
        let (mut offered, mut outstanding) = (0_u16, Vec::new());
        for step in steps {
            match step {
                Some(head) if !outstanding.contains(&head) => {
                    driver.offer(head);
                    outstanding.push(head);
                    offered += 1;
                }
                None if !outstanding.is_empty() => queue.add_used(outstanding.remove(0), 0),
                _ => {}
            }
        }
        let (found, next) = find(&driver, None).unwrap();
        prop_assert_eq!(next, offered);
        prop_assert_eq!(found.len(), outstanding.len());
        prop_assert_eq!(BTreeSet::from_iter(found), BTreeSet::from_iter(outstanding));
    }

    /// One that uses them in any order, while the ring still has the places of all that are outstanding.
    #[test]
    fn rings_alone_find_no_chain_that_is_not_outstanding_while_they_are_fresh(
        count in 1..=SIZE,
        done in prop::collection::btree_set(0..SIZE, 0..16),
    ) {
        let mut driver = Driver::new();
        let mut queue = driver.queue(false);
        (0..count).for_each(|head| driver.offer(head));
        let done: BTreeSet<u16> = done.into_iter().filter(|&head| head < count).collect();
        done.iter().rev().for_each(|&head| queue.add_used(head, 0));
        let (found, _) = find(&driver, None).unwrap();
        prop_assert_eq!(found.len(), usize::from(count) - done.len());
    }

    #[test]
    fn rings_full_of_anything_are_survived(
        bytes in prop::collection::vec(any::<u8>(), 0x2100),
        record_bytes in prop::collection::vec(any::<u8>(), 700),
    ) {
        let driver = Driver::new();
        driver.write(0x1000, &bytes);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&record_bytes).unwrap();
        let inflight = Inflight::new(file, SIZE);
        if let Some((heads, _)) = find(&driver, Some(&inflight)) {
            prop_assert!(heads.len() <= usize::from(SIZE));
            prop_assert!(heads.iter().all(|&head| head < SIZE));
        }
    }
}
