//! Queues that another process has opened. In network namespaces of the tests' own; they need root.

#![allow(
    clippy::unwrap_used,
    reason = "all of this file is tests, and the lint spares #[test] functions alone"
)]

#[path = "../../tests/harness/netns.rs"]
mod netns;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};

use net::{ExistingTapError, Macvtap, MacvtapSpec, Passed, inherit};
use netns::{Netns, root_test};

/// Queues of a new macvtap `name` on `v0`, without an owner.
fn macvtap(netns: &Netns, name: &str, count: u32) -> Vec<OwnedFd> {
    netns.macvtap(name, "v0", "bridge");
    queues(netns, name, count)
}

fn queues(netns: &Netns, name: &str, count: u32) -> Vec<OwnedFd> {
    let mut spec = MacvtapSpec::new(name.parse().unwrap());
    spec.queues = count;
    netns.enter(|| Macvtap::open(&spec)).unwrap().into_parts().0
}

fn from_fds(fds: Vec<OwnedFd>) -> Result<Macvtap, ExistingTapError> {
    Macvtap::from_fds(fds, None)
}

fn refusal(fds: Vec<OwnedFd>) -> ExistingTapError {
    let error = from_fds(fds).expect_err("a refusal");
    eprintln!("{error}");
    error
}

root_test!(queues_of_a_macvtap_are_taken_with_mac_and_mtu, || {
    let netns = Netns::new();
    netns.wire("v0");
    let fds = macvtap(&netns, "mine", 3);
    netns.ip("link set mine mtu 1300");
    for fd in &fds {
        rustix::fs::fcntl_setfl(fd, rustix::fs::OFlags::empty()).unwrap();
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).unwrap();
    }
    let copies = || fds.iter().map(|fd| fd.try_clone().unwrap()).collect();
    let elsewhere = from_fds(copies()).unwrap();
    // Its namespace cannot be seen from here.
    let unseen = elsewhere.info().clone();
    assert_eq!(
        (unseen.mtu, unseen.id, elsewhere.is_passed()),
        (1500, None, false)
    );
    let existing = netns.enter(|| from_fds(copies())).unwrap();
    let seen = existing.info().clone();
    assert_eq!((seen.name.as_str(), seen.mtu), ("mine", 1300));
    assert_eq!(
        (seen.lower.as_str(), seen.mode),
        ("v0", Some(net::Mode::Bridge))
    );
    assert_eq!(seen.mac.to_string(), netns.mac("mine"));
    // What is passed on counts where nothing is seen, and about the same interface alone.
    let passed = |info| Some(Passed { info, watch: None });
    let told = Macvtap::from_fds(copies(), passed(seen.clone())).unwrap();
    assert_eq!((told.info(), told.is_passed()), (&seen, true));
    let mut other = seen;
    other.mac = "02:00:00:00:00:99".parse().unwrap();
    let told = Macvtap::from_fds(copies(), passed(other)).unwrap();
    assert_eq!((told.info(), told.is_passed()), (&unseen, false));
    assert_eq!(existing.queues().len(), 3);
    for fd in existing.queues() {
        let flags = rustix::fs::fcntl_getfl(fd).unwrap();
        assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
        let flags = rustix::io::fcntl_getfd(fd).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
});

root_test!(queue_of_a_tap_is_taken_if_its_headers_fit, || {
    let netns = Netns::new();
    let fit = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let existing = netns
        .enter(|| from_fds(vec![netns.tun("tap0", fit)]))
        .unwrap();
    let info = existing.info();
    assert_eq!((info.name.as_str(), info.mtu), ("tap0", 1500));
    assert!(info.id.is_some());
    let error = refusal(vec![netns.tun("tap1", libc::IFF_TAP | libc::IFF_NO_PI)]);
    assert!(matches!(error, ExistingTapError::Headers { name, .. } if name == "tap1"));
});

root_test!(what_is_no_tap_queue_is_refused_with_what_it_is, || {
    let netns = Netns::new();
    assert!(matches!(refusal(vec![]), ExistingTapError::None));
    let file: OwnedFd = tempfile::tempfile().unwrap().into();
    let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
    let (pipe, _) = std::io::pipe().unwrap();
    let cases = [
        (file, "a file"),
        (socket.into(), "a socket"),
        (pipe.into(), "a pipe"),
        (File::open("/").unwrap().into(), "a directory"),
        (File::open("/dev/null").unwrap().into(), "some other device"),
    ];
    for (fd, expected) in cases {
        let error = refusal(vec![fd]);
        assert!(matches!(error, ExistingTapError::NotTap { what, .. } if what == expected));
    }
    let error = refusal(vec![netns.tun("tun0", libc::IFF_TUN | libc::IFF_NO_PI)]);
    assert!(matches!(error, ExistingTapError::Tun { name, .. } if name == "tun0"));
    let unused = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    assert!(matches!(
        refusal(vec![unused.into()]),
        ExistingTapError::NoInterface { .. }
    ));
});

root_test!(queue_of_a_deleted_macvtap_is_refused, || {
    let netns = Netns::new();
    netns.wire("v0");
    let fds = macvtap(&netns, "mine", 1);
    netns.ip("link delete mine");
    assert!(matches!(refusal(fds), ExistingTapError::NoInterface { .. }));
});

root_test!(queues_of_two_links_and_a_queue_twice_are_refused, || {
    let netns = Netns::new();
    netns.wire("v0");
    let mut fds = macvtap(&netns, "one", 1);
    fds.extend(macvtap(&netns, "two", 1));
    let error = refusal(fds);
    assert!(
        matches!(error, ExistingTapError::Different { name, first_name, .. }
        if name == "two" && first_name == "one")
    );
    // Even if they look alike, as in two namespaces.
    let other = Netns::new();
    other.wire("v0");
    other.macvtap("one", "v0", "bridge");
    other.down("one");
    other.ip(&format!("link set one address {}", netns.mac("one")));
    other.up("one");
    let mut fds = queues(&netns, "one", 1);
    fds.extend(queues(&other, "one", 1));
    assert!(matches!(refusal(fds), ExistingTapError::Different { .. }));

    let mut fds = queues(&netns, "one", 2);
    fds.push(fds[0].as_fd().try_clone_to_owned().unwrap());
    let (first, third) = (fds[0].as_raw_fd(), fds[2].as_raw_fd());
    let error = refusal(fds);
    assert!(
        matches!(error, ExistingTapError::SameQueue { fd, other } if (fd, other) == (third, first))
    );
});

#[test]
fn numbers_that_are_not_open_or_occur_twice_are_refused() {
    // High enough that no parallel test is given it.
    for closed in [-1, 900_000] {
        // SAFETY: what is not open has no owner.
        let error = unsafe { inherit(&[closed]) }.unwrap_err();
        assert!(
            matches!(error, ExistingTapError::Closed { fd } if fd == closed),
            "{error}"
        );
    }
    let number = File::open("/dev/null").unwrap().into_raw_fd();
    // SAFETY: the number was given away just now.
    let error = unsafe { inherit(&[number, number]) }.unwrap_err();
    assert!(
        matches!(error, ExistingTapError::Twice { fd } if fd == number),
        "{error}"
    );
    // SAFETY: it has no owner yet.
    let owned = unsafe { inherit(&[number]) }.unwrap();
    assert_eq!(owned[0].as_raw_fd(), number);
}

const CHILD: &str = "NET_TEST_INHERITED";

/// Not a test by itself: the body of the process that the next one starts.
#[test]
fn child_process_takes_descriptor_three() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    const NOBODY: libc::c_long = 65_534;
    // SAFETY: setresuid takes three numbers.
    let result = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
    assert_eq!(result, 0);
    // SAFETY: the shell opened it, and nothing here has touched it.
    let fds = unsafe { inherit(&[3]) }.unwrap();
    let existing = from_fds(fds).unwrap();
    let info = existing.info();
    println!("CHILD {} {} {}", info.name, info.mac, info.mtu);
}

root_test!(ordinary_user_takes_what_a_shell_opened, || {
    let netns = Netns::new();
    netns.wire("v0");
    let index = 3_000_000 + std::process::id();
    netns.ip(&format!(
        "link add link v0 name mine index {index} type macvtap mode bridge"
    ));
    netns.up("mine");
    let script = format!(
        "exec 3<>/dev/tap{index}; exec \"$0\" --exact child_process_takes_descriptor_three --nocapture"
    );
    let output = netns
        .command("sh")
        .args(["-c", &script])
        .arg(std::env::current_exe().unwrap())
        .env(CHILD, "")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let expected = format!("CHILD mine {} 1500", netns.mac("mine"));
    assert!(
        text.contains(&expected),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
});
