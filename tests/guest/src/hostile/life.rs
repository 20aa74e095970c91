//! The device's life out of order: status, features, notifications and resets (virtio 1.2, 3.1).

use alloc::format;

use super::rig::{Bench, Rig};
use super::{Failure, Runner};
use crate::virtio::card::{Card, status};
use crate::virtio::net::{RX, TX, feature, go, negotiate};

const STARTED: u32 = status::ACKNOWLEDGE | status::DRIVER;

/// Runs them; the resets as often as the runner says.
pub fn run(runner: &mut Runner<'_>) {
    let rounds = runner.rounds;
    runner.attack("life-driver-ok-at-once", |bench| {
        bench.card.reset();
        bench.card.set_status(status::DRIVER_OK);
        notify_all(bench.card);
        Ok(())
    });
    runner.attack("life-driver-ok-without-features-ok", |bench| {
        bench.card.reset();
        bench.card.set_status(STARTED);
        bench.card.set_status(STARTED | status::DRIVER_OK);
        notify_all(bench.card);
        Ok(())
    });
    runner.attack("life-features-not-offered", |bench| {
        refused(bench, u64::MAX)
    });
    runner.attack("life-features-without-version-1", |bench| {
        refused(bench, feature::MAC)
    });
    runner.attack("life-features-after-features-ok", |bench| {
        let rig = Rig::start(bench, feature::PLAIN)?;
        bench.card.accept(u64::MAX);
        notify_all(bench.card);
        rig.settle();
        Ok(())
    });
    runner.attack("life-feature-selectors", |bench| {
        for selector in [2, 31, u32::MAX] {
            bench.card.accept_word(selector, u32::MAX);
            match bench.card.offered_word(selector) {
                0 => {}
                bits => return Err(format!("features {bits:#x} in word {selector}")),
            }
        }
        Ok(())
    });
    runner.attack("life-status-garbage", |bench| {
        for value in [0xff, 0x80, 0x40, u32::MAX, 0x100, 0x0f] {
            bench.card.set_status(value);
            notify_all(bench.card);
        }
        Ok(())
    });
    runner.attack("life-status-backwards", |bench| {
        let rig = Rig::start(bench, feature::PLAIN)?;
        [STARTED, status::ACKNOWLEDGE, status::DRIVER_OK]
            .into_iter()
            .for_each(|value| bench.card.set_status(value));
        go(bench.card);
        rig.settle();
        Ok(())
    });
    runner.attack("life-notify-before-anything", |bench| {
        bench.card.reset();
        notify_all(bench.card);
        Ok(())
    });
    runner.attack("life-notify-before-driver-ok", |bench| {
        negotiate(bench.card, feature::PLAIN)?;
        notify_all(bench.card);
        Ok(())
    });
    runner.attack("life-notify-unknown-queues", |bench| {
        let rig = Rig::start(bench, feature::PLAIN)?;
        [2, 100, 0xffff, 0x1_0000, u32::MAX]
            .into_iter()
            .for_each(|n| bench.card.notify_any(n));
        rig.settle();
        Ok(())
    });
    runner.attack("life-interrupts-acknowledged", |bench| {
        let mut rig = Rig::start(bench, feature::PLAIN)?;
        rig.offer_buffers();
        bench.card.acknowledge(u32::MAX);
        if !rig.arp() {
            return Err("no answer to ARP".into());
        }
        if bench.card.interrupt_status() & 1 == 0 {
            return Err("used buffers do not show in the interrupt status".into());
        }
        bench.card.acknowledge(u32::MAX);
        Ok(())
    });
    runner.attack("life-resets", |bench| {
        (0..rounds).for_each(|_| bench.card.reset());
        Ok(())
    });
    runner.attack("life-resets-in-traffic", |bench| {
        resets_in_traffic(bench, rounds)
    });
}

/// Offers features that the device must not take: FEATURES_OK must not stay (virtio 1.2, 3.1.1 and 6.2).
fn refused(bench: &Bench, features: u64) -> Result<(), Failure> {
    bench.card.reset();
    bench.card.set_status(STARTED);
    bench.card.accept(features);
    bench.card.set_status(STARTED | status::FEATURES_OK);
    let taken = bench.card.status() & status::FEATURES_OK != 0;
    go(bench.card);
    notify_all(bench.card);
    if taken {
        Err(format!("features {features:#x} were accepted"))
    } else {
        Ok(())
    }
}

/// Brings the device up, lets frames flow, and resets it in their midst.
fn resets_in_traffic(bench: &Bench, rounds: u32) -> Result<(), Failure> {
    for round in 0..rounds {
        let features = if round % 2 == 0 {
            feature::PLAIN
        } else {
            feature::OFFLOADS | feature::EVENT_IDX
        };
        let mut rig = Rig::start(bench, features).map_err(|why| format!("round {round}: {why}"))?;
        rig.offer_buffers();
        (0..4).for_each(|_| rig.prompt());
    }
    Ok(())
}

fn notify_all(card: Card) {
    [RX, TX, 2].into_iter().for_each(|queue| card.notify(queue));
}
