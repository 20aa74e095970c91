//! The device's life out of order: status, features, notifications and resets (virtio 1.2, 3.1).

use alloc::format;

use super::rig::{Bench, Rig};
use super::{Failure, Runner, settle};
use crate::virtio::device::{VirtioDevice, status};
use crate::virtio::net::{RX, TX, feature, go, negotiate};

const STARTED: u32 = status::ACKNOWLEDGE | status::DRIVER;

/// Runs them; the resets as often as the runner says.
pub fn run(runner: &mut Runner<'_>) {
    let rounds = runner.rounds;
    runner.attack("life-driver-ok-at-once", |bench| {
        bench.nic.reset();
        bench.nic.set_status(status::DRIVER_OK);
        notify_all(bench.nic);
        Ok(())
    });
    runner.attack("life-driver-ok-without-features-ok", |bench| {
        bench.nic.reset();
        bench.nic.set_status(STARTED);
        bench.nic.set_status(STARTED | status::DRIVER_OK);
        notify_all(bench.nic);
        Ok(())
    });
    runner.attack("life-features-not-offered", |bench| {
        refused(bench, u64::MAX)
    });
    runner.attack("life-features-without-version-1", |bench| {
        refused(bench, feature::MAC)
    });
    runner.attack("life-features-after-features-ok", |bench| {
        let _rig = Rig::start(bench, feature::PLAIN)?;
        bench.nic.accept(u64::MAX);
        notify_all(bench.nic);
        settle();
        Ok(())
    });
    runner.attack("life-feature-selectors", |bench| {
        for selector in [2, 31, u32::MAX] {
            bench.nic.accept_word(selector, u32::MAX);
            match bench.nic.offered_word(selector) {
                0 => {}
                bits => return Err(format!("features {bits:#x} in word {selector}")),
            }
        }
        Ok(())
    });
    runner.attack("life-status-garbage", |bench| {
        for value in [0xff, 0x80, 0x40, u32::MAX, 0x100, 0x0f] {
            bench.nic.set_status(value);
            notify_all(bench.nic);
        }
        Ok(())
    });
    runner.attack("life-status-backwards", |bench| {
        let _rig = Rig::start(bench, feature::PLAIN)?;
        [STARTED, status::ACKNOWLEDGE, status::DRIVER_OK]
            .into_iter()
            .for_each(|value| bench.nic.set_status(value));
        go(bench.nic);
        settle();
        Ok(())
    });
    runner.attack("life-notify-before-anything", |bench| {
        bench.nic.reset();
        notify_all(bench.nic);
        Ok(())
    });
    runner.attack("life-notify-before-driver-ok", |bench| {
        negotiate(bench.nic, feature::PLAIN)?;
        notify_all(bench.nic);
        Ok(())
    });
    runner.attack("life-notify-unknown-queues", |bench| {
        let _rig = Rig::start(bench, feature::PLAIN)?;
        [2, 100, 0xffff, 0x1_0000, u32::MAX]
            .into_iter()
            .for_each(|n| bench.nic.notify_any(n));
        settle();
        Ok(())
    });
    runner.attack("life-interrupts-acknowledged", |bench| {
        let mut rig = Rig::start(bench, feature::PLAIN)?;
        rig.offer_buffers();
        bench.nic.acknowledge(u32::MAX);
        if !rig.arp() {
            return Err("no answer to ARP".into());
        }
        bench.nic.wait_interrupt(1)?;
        bench.nic.acknowledge(u32::MAX);
        Ok(())
    });
    runner.attack("life-resets", |bench| {
        (0..rounds).for_each(|_| bench.nic.reset());
        Ok(())
    });
    runner.attack("life-resets-in-traffic", |bench| {
        resets_in_traffic(bench, rounds)
    });
}

/// Offers features that the device must not take: FEATURES_OK must not stay (virtio 1.2, 3.1.1 and
/// 6.2).
fn refused(bench: &Bench, features: u64) -> Result<(), Failure> {
    bench.nic.reset();
    bench.nic.set_status(STARTED);
    bench.nic.accept(features);
    bench.nic.set_status(STARTED | status::FEATURES_OK);
    let taken = bench.nic.status() & status::FEATURES_OK != 0;
    go(bench.nic);
    notify_all(bench.nic);
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

fn notify_all(nic: VirtioDevice) {
    [RX, TX, 2].into_iter().for_each(|queue| nic.notify(queue));
}
