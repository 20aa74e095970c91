//! A link is found by each of its names: `ip link property add dev LINK altname NAME` gives it
//! more. They need root.

#![allow(
    clippy::unwrap_used,
    reason = "all of this file is tests, and the lint spares #[test] functions alone"
)]

#[path = "../../tests/harness/netns.rs"]
mod netns;

use net::{
    HostLink, HostLinkSpec, LinkName, Macvtap, MacvtapSpec, Status, current_name, diagnose_host,
    inventory,
};
use netns::{Netns, root_test};

/// A host with the link `v0`, which has two more names, the second as long as one can be.
fn host() -> (Netns, [LinkName; 2]) {
    let host = Netns::new();
    host.wire("v0");
    let names = ["enp3s0".to_owned(), "x".repeat(127)];
    for name in &names {
        host.ip(&format!("link property add dev v0 altname {name}"));
    }
    (host, names.map(|name| name.parse().unwrap()))
}

root_test!(macvtap_is_made_on_a_link_by_any_of_its_names, || {
    let (host, names) = host();
    let elsewhere = Netns::new();
    for name in names {
        let mut spec = MacvtapSpec::new(name);
        let macvtap = host.enter(|| Macvtap::open(&spec)).unwrap();
        assert_eq!(macvtap.info().lower.as_str(), "v0");
        spec.lower_netns = Some(host.path());
        let macvtap = elsewhere.enter(|| Macvtap::open(&spec)).unwrap();
        assert_eq!(macvtap.info().lower.as_str(), "v0");
    }
});

root_test!(macvtap_that_exists_is_used_by_any_of_its_names, || {
    let (host, _) = host();
    host.macvtap("mvt0", "v0", "bridge");
    host.ip("link property add dev mvt0 altname tap-of-my-guest");
    let spec = MacvtapSpec::new("tap-of-my-guest".parse().unwrap());
    let macvtap = host.enter(|| Macvtap::open(&spec)).unwrap();
    assert_eq!(
        (macvtap.info().name.as_str(), macvtap.info().lower.as_str()),
        ("mvt0", "v0")
    );
});

root_test!(host_link_is_made_and_deleted_by_any_name, || {
    let (host, names) = host();
    for name in names {
        let mut spec = HostLinkSpec::new(name.clone());
        spec.addresses = vec!["10.7.0.1/24".parse().unwrap()];
        let made = host.enter(|| HostLink::create(&spec)).unwrap();
        assert_eq!(made.lower, "v0");
        let gone = host.enter(|| HostLink::delete(&name)).unwrap();
        assert_eq!(gone.index, made.index);

        host.enter(|| HostLink::create(&spec)).unwrap();
        host.ip("link property add dev macvlan0 altname hosts-own");
        let own = "hosts-own".parse().unwrap();
        host.enter(|| HostLink::delete(&own)).unwrap();
    }
    assert_eq!(host.links(), ["v0-far", "v0"]);
});

root_test!(link_is_listed_and_judged_by_any_of_its_names, || {
    let (host, names) = host();
    host.macvtap("mvt0", "v0", "bridge");
    host.wire("v1");
    host.macvtap("mvt1", "v1", "bridge");
    host.enter(|| {
        let v0: LinkName = "v0".parse().unwrap();
        let listed = inventory(Some(&v0)).unwrap();
        assert_eq!(listed[0].uppers.len(), 1);
        // The nodes in /dev are of other tests' macvtaps too, which come and go.
        let judge = |link: &LinkName| {
            let mut checks = diagnose_host(Some(link), &[]);
            checks.retain(|check| check.name != "device nodes");
            checks
        };
        let judged = judge(&v0);
        assert!(judged.iter().any(|check| check.status == Status::Ok));
        for name in names {
            assert_eq!(inventory(Some(&name)).unwrap(), listed);
            assert_eq!(judge(&name), judged);
            assert_eq!(current_name(&name).unwrap().as_deref(), Some("v0"));
        }
        let absent: LinkName = "absent".parse().unwrap();
        assert_eq!(current_name(&absent).unwrap(), None);
    });
});
