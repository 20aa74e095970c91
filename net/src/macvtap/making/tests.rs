use super::*;

use crate::harness::{self, Netns};

#[test]
fn index_that_is_taken_is_drawn_again_once() {
    if !harness::is_root() {
        return;
    }
    let host = Netns::new();
    host.wire("v0");
    host.enter(|| {
        let netlink = Netlink::connect().unwrap();
        let links = netlink.links().unwrap();
        let lower = diagnose::find(&links, "v0").unwrap();
        let wish = Wish {
            links: &links,
            lower,
            mode: Mode::Bridge,
            mac: None,
            mtu: None,
        };
        let spec = MacvtapSpec::new("v0".parse().unwrap());
        let namespace = netns::enter_new().unwrap();
        let make = |mut indexes: Vec<u32>| {
            create(&netlink, &wish, &spec, namespace.as_fd(), || {
                Ok(indexes.remove(0))
            })
        };
        // The loopback interface's.
        let taken = 1;
        let free = random_index().unwrap();
        assert_eq!(make(vec![taken, free]).unwrap(), free);
        assert!(matches!(
            make(vec![taken, taken]),
            Err(Problem::NameTaken { .. })
        ));
    });
}

#[test]
fn other_address_than_asked_for_is_told_with_both() {
    let [wanted, has] = ["02:00:00:00:00:01", "02:00:00:00:00:02"].map(|mac| mac.parse().unwrap());
    let text = other_mac("mvt0", wanted, has);
    for part in ["mvt0", "02:00:00:00:00:01", "02:00:00:00:00:02", "udev"] {
        assert!(text.contains(part), "{text}");
    }
}
