//! The test harness itself: what the tests of links and guests rely on.

#[path = "../../tests/harness/netns.rs"]
mod netns;

use netns::{Netns, root_test};

root_test!(ping_is_answered_by_those_who_have_the_address_alone, || {
    let (host, peer, third) = (Netns::new(), Netns::new(), Netns::new());
    host.veth("v0", &peer, "v1");
    third.macvlan("mv0", &host, "v0");
    for (address, own, absent) in [
        ("192.0.2.1", "192.0.2.3", "192.0.2.9"),
        ("fd00::1", "fd00::3", "fd00::9"),
    ] {
        let mask = if address.contains(':') { 64 } else { 24 };
        peer.address("v1", &format!("{address}/{mask}"));
        third.address("mv0", &format!("{own}/{mask}"));
        assert!(third.pings(address, 5), "{address}");
        assert!(!third.pings(absent, 1), "{absent}");
    }
});

root_test!(namespace_is_gone_after_a_panic, || {
    let path = std::sync::Mutex::new(None);
    let result = std::panic::catch_unwind(|| {
        let netns = Netns::new();
        *path.lock().expect("not poisoned") = Some(netns.path());
        assert!(netns.path().exists());
        panic!("on purpose");
    });
    assert!(result.is_err());
    let path = path.into_inner().expect("not poisoned").expect("made");
    assert!(!path.exists());
});
