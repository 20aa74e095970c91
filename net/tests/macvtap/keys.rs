//! What is asked for is what the kernel then shows.

use net::{MacAddr, Placement, QueueError};

use super::child::soon;
use super::*;

root_test!(every_key_shows_on_the_link, || {
    let netns = Netns::new();
    netns.wire("v0");
    let senders = ["02:00:00:00:00:01", "02:00:00:00:00:02"];
    for mode in ["bridge", "vepa", "private", "source"] {
        let spec = with("v0", |spec| {
            spec.netns = Placement::Host;
            spec.name = Some("guest".parse().unwrap());
            spec.mode = Some(mode.parse().unwrap());
            spec.mac = Some(MAC.parse().unwrap());
            spec.mtu = Some(1400);
            spec.tx_queue_len = Some(77);
            spec.bc_queue_len = Some(3333);
            if mode == "source" {
                spec.source_macs = senders.map(|mac| mac.parse().unwrap()).to_vec();
            }
        });
        let macvtap = open(&netns, &spec);
        assert_eq!(
            (
                macvtap.info().name.as_str(),
                macvtap.info().lower.as_str(),
                macvtap.info().mtu
            ),
            ("guest", "v0", 1400)
        );
        assert_eq!(macvtap.info().mac.to_string(), MAC);
        let details = details(&netns, "guest");
        for expected in [
            "guest@v0: <BROADCAST,MULTICAST,ALLMULTI,UP,LOWER_UP>",
            "mtu 1400 ",
            "qlen 77 ",
            &format!("link/ether {MAC} "),
            &format!("macvtap mode {mode} "),
            "bcqueuelen 3333 ",
            "alias owner: macvtap-",
            &format!(" pid={} ", std::process::id()),
        ] {
            assert!(details.contains(expected), "{expected} in {details}");
        }
        let listed = senders.iter().filter(|mac| details.contains(*mac)).count();
        assert_eq!(listed, if mode == "source" { 2 } else { 0 }, "{details}");
        let ipv6 = netns.ip("-6 address show dev guest");
        assert_eq!(ipv6, "", "the host must have no IPv6 on it");
        drop(macvtap);
        assert!(!netns.links().contains(&"guest".to_owned()));
    }
});

root_test!(receive_ring_holds_as_many_frames_as_asked_for, || {
    let (host, peer) = (Netns::new(), Netns::new());
    host.veth("v0", &peer, "v1");
    let theirs = open(&peer, &spec("v1"));
    for placement in [Placement::Private, Placement::Host] {
        let ours = open(
            &host,
            &with("v0", |spec| {
                spec.netns = placement;
                spec.tx_queue_len = Some(5);
            }),
        );
        let unicast = frame(ours.info().mac.octets(), theirs.info().mac.octets());
        for _ in 0..20 {
            send(theirs.queue(), &unicast);
        }
        let received = wire::collect(ours.queue(), Duration::from_millis(300));
        // A frame of the kernel's own may have taken a place, or come when there was room again.
        let ours = received.iter().filter(|frame| **frame == unicast).count();
        assert!(ours <= 5 && received.len() >= 5, "{received:?}");
    }
});

root_test!(longest_receive_ring_opens, || {
    let netns = Netns::new();
    netns.wire("v0");
    let longest = |spec: &mut MacvtapSpec| spec.tx_queue_len = Some(MacvtapSpec::MAX_TX_QUEUE_LEN);
    open(&netns, &with("v0", longest));
});

root_test!(every_queue_is_open_and_takes_its_share, || {
    let (host, peer) = (Netns::new(), Netns::new());
    host.veth("v0", &peer, "v1");
    let theirs = open(&peer, &spec("v1"));
    for placement in [Placement::Private, Placement::Host] {
        let ours = open(
            &host,
            &with("v0", |spec| {
                spec.netns = placement;
                spec.queues = 4;
            }),
        );
        assert_eq!(ours.queues().len(), 4);
        for queue in ours.queues() {
            let hello = frame(theirs.info().mac.octets(), ours.info().mac.octets());
            send(queue.as_fd(), &hello);
            assert!(receives(theirs.queue(), |frame| frame == hello));
        }
        // 64 flows: UDP from as many ports. None may be lost, and all on one queue is next to
        // impossible.
        for port in 0..64 {
            send(
                theirs.queue(),
                &udp(ours.info().mac.octets(), theirs.info().mac.octets(), port),
            );
        }
        let received = ours.queues().iter().map(|queue| {
            let all = wire::collect(queue.as_fd(), Duration::from_millis(200));
            all.iter().filter(|frame| frame[12..14] == [8, 0]).count()
        });
        let received: Vec<usize> = received.collect();
        assert_eq!(received.iter().sum::<usize>(), 64, "{received:?}");
        assert!(
            received.iter().filter(|count| **count > 0).count() > 1,
            "{received:?}"
        );
    }
});

/// An IPv4 UDP frame without checksums.
fn udp(to: [u8; 6], from: [u8; 6], port: u16) -> Vec<u8> {
    let ip = [
        0x45, 0, 0, 46, 0, 0, 0x40, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2,
    ];
    let [high, low] = (10_000 + port).to_be_bytes();
    let udp = [high, low, 0, 9, 0, 26, 0, 0];
    [&to[..], &from, &[8, 0], &ip, &udp, &[0; 18]].concat()
}

root_test!(queues_beyond_what_the_driver_opens_are_refused, || {
    let netns = Netns::new();
    netns.wire("v0");
    let many = |link, count| with(link, |spec| spec.queues = count);
    assert!(matches!(
        problem(&netns, &many("v0", 257)),
        Problem::OutOfRange {
            key: "queues",
            wanted: 257,
            ..
        }
    ));
    assert!(matches!(
        problem(&netns, &many("v0", 0)),
        Problem::OutOfRange {
            key: "queues",
            wanted: 0,
            ..
        }
    ));
    netns.macvtap("mine", "v0", "bridge");
    let all = open(&netns, &many("mine", 256));
    assert_eq!(all.queues().len(), 256);
    let refusal = problem(&netns, &spec("mine"));
    assert!(matches!(refusal, Problem::Queue(QueueError::AllOpen(link)) if link == "mine"));
    drop(all);
    // A child that another test is just starting holds them too, until it runs its program.
    soon("closed queues can be opened again", || {
        netns.enter(|| Macvtap::open(&spec("mine"))).is_ok()
    });
});

fn differs(refusal: &Problem, what: &str, has: &str) -> bool {
    matches!(refusal, Problem::Existing { difference, .. } if difference.what == what && difference.has == has)
}

root_test!(existing_macvtap_refuses_what_would_change_it, || {
    let netns = Netns::new();
    netns.wire("v0");
    netns.macvtap("mine", "v0", "bridge");
    let refusal = problem(&netns, &with("mine", |spec| spec.tx_queue_len = Some(100)));
    assert!(differs(&refusal, "txqueuelen", "500"), "{refusal}");
    let refusal = problem(&netns, &with("mine", |spec| spec.bc_queue_len = Some(5)));
    assert!(differs(&refusal, "bcqueuelen", "1000"), "{refusal}");
    netns.ip("link set mine type macvtap mode source");
    let sender: MacAddr = "02:00:00:00:00:01".parse().unwrap();
    let hears_one = with("mine", |spec| {
        spec.mode = Some(Mode::Source);
        spec.source_macs = vec![sender];
    });
    let refusal = problem(&netns, &hears_one);
    assert!(differs(&refusal, "source-mac", "none"), "{refusal}");
    // The remedy is a command that works.
    let text = refusal.remedy().unwrap();
    let command = text.split('`').nth(1).unwrap().strip_prefix("ip ").unwrap();
    netns.ip(command);
    drop(open(&netns, &hears_one));
    netns.ip("link set mine type macvtap mode bridge");
    let renamed = with("mine", |spec| spec.name = Some("other".parse().unwrap()));
    assert!(differs(&problem(&netns, &renamed), "name", "mine"));
    let same = with("mine", |spec| {
        spec.name = Some("mine".parse().unwrap());
        spec.tx_queue_len = Some(500);
        spec.bc_queue_len = Some(1000);
        spec.netns = Placement::Host;
    });
    drop(open(&netns, &same));
    assert!(netns.links().contains(&"mine".to_owned()));
});
