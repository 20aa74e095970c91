//! Many macvtaps at once, and many one after the other whose processes are killed. One test at a
//! time, as descriptors and namespaces are counted.

#![allow(
    clippy::unwrap_used,
    reason = "all of this file is tests, and the lint spares #[test] functions alone"
)]

#[allow(dead_code, reason = "other test binaries use the rest")]
mod child;
#[path = "../../tests/harness/netns.rs"]
mod netns;
#[allow(dead_code, reason = "other test binaries use the rest")]
mod wire;

use std::collections::HashSet;
use std::sync::Mutex;

use child::soon;
use net::{Macvtap, MacvtapSpec, Mode, Placement};
use netns::{Netns, root_test};
use wire::{frame, receives, send};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn spec(link: &str, placement: Placement) -> MacvtapSpec {
    let mut spec = MacvtapSpec::new(link.parse().unwrap());
    spec.netns = placement;
    spec
}

root_test!(sixty_four_on_one_lower_all_hear_the_wire, || {
    let _alone = ONE_AT_A_TIME.lock();
    let (host, peer) = (Netns::new(), Netns::new());
    host.veth("v0", &peer, "v1");
    let theirs = peer
        .enter(|| Macvtap::open(&spec("v1", Placement::Private)))
        .unwrap();
    for placement in [Placement::Private, Placement::Host] {
        // By eight threads, so that they run into each other.
        let open_eight = || {
            let open = |_| {
                host.enter(|| Macvtap::open(&spec("v0", placement)))
                    .unwrap()
            };
            (0..8).map(open).collect::<Vec<_>>()
        };
        let all: Vec<Macvtap> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(open_eight)).collect();
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .collect()
        });
        let macs: HashSet<_> = all.iter().map(|one| one.info().mac).collect();
        assert_eq!(macs.len(), 64);
        let expected = if placement == Placement::Host { 65 } else { 1 };
        assert_eq!(host.links().len(), expected);

        let hello = frame([0xff; 6], theirs.info().mac.octets());
        send(theirs.queue(), &hello);
        for one in &all {
            assert!(
                receives(one.queue(), |frame| frame == hello),
                "{}",
                one.info().name.as_str()
            );
        }
        let (first, last) = (&all[0], &all[63]);
        let hello = frame(last.info().mac.octets(), first.info().mac.octets());
        send(first.queue(), &hello);
        assert!(receives(last.queue(), |frame| frame == hello));
        drop(all);
        assert_eq!(host.links(), ["v0"]);
    }
});

root_test!(two_hundred_killed_leave_nothing, || {
    let _alone = ONE_AT_A_TIME.lock();
    let netns = Netns::new();
    netns.wire("v0");
    let links = netns.links();
    let (fds, namespaces) = (count("/proc/self/fd"), namespaces());
    for placement in [Placement::Private, Placement::Host] {
        let mut nodes = HashSet::new();
        for _ in 0..200 {
            let killed = child::start(&netns, &spec("v0", placement));
            assert_eq!(killed.nodes.len(), 1);
            nodes.extend(killed.nodes.clone());
            killed.kill();
        }
        assert_eq!(nodes.len(), 200);
        // Each start has deleted the one before.
        let left = if placement == Placement::Host { 1 } else { 0 };
        assert_eq!(netns.links().len(), links.len() + left);
        assert_eq!(netns.enter(net::delete_stale).unwrap().len(), left);
        assert_eq!(netns.links(), links);
        soon("no node is left", || {
            !nodes.iter().any(|node| node.exists())
        });
        // Passthru mode wants the lower alone: so there is none in a namespace out of sight either.
        let mut alone = spec("v0", Placement::Private);
        alone.mode = Some(Mode::Passthru);
        soon("no macvtap is left", || {
            netns.enter(|| Macvtap::open(&alone)).is_ok()
        });
    }
    assert_eq!(count("/proc/self/fd"), fds);
    match namespaces {
        // Others on this machine may make some meanwhile; ours would be 400.
        Some(before) => soon("no namespace is left", || {
            self::namespaces().is_none_or(|after| after < before + 50)
        }),
        None => {
            netns::skip::not_tested("this kernel does not count its namespaces in /proc/slabinfo")
        }
    }
});

fn count(directory: &str) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

/// How many network namespaces the kernel has, about.
fn namespaces() -> Option<u32> {
    let slabs = std::fs::read_to_string("/proc/slabinfo").ok()?;
    let line = slabs
        .lines()
        .find(|line| line.starts_with("net_namespace "))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
