//! `minivmm net open` and the programs that it runs.

use super::*;

/// Shows what it has, and stays until it is killed.
const SHOW: &str = "echo uid=$(id -u) gid=$(id -g) groups=$(id -G); env | grep ^MINIVMM_NET_; \
                    echo home=$HOME user=$USER,$LOGNAME runtime=$XDG_RUNTIME_DIR; \
                    grep ^Cap /proc/self/status; echo pid=$$; exec sleep 60";

/// The descriptor `number` of another process.
fn descriptor_of(pid: u32, number: i32) -> OwnedFd {
    let pid = Pid::from_raw(pid as i32).unwrap();
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty()).unwrap()
}

/// SIOCGIFHWADDR on a queue.
fn mac_of_queue(queue: &OwnedFd) -> String {
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: SIOCGIFHWADDR fills an ifreq, which lives on.
    let done = unsafe { libc::ioctl(queue.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the call has filled this member of the union.
    let address = unsafe { request.ifr_ifru.ifru_hwaddr };
    let bytes = address.sa_data[..6]
        .iter()
        .map(|&byte| format!("{:02x}", byte as u8));
    bytes.collect::<Vec<_>>().join(":")
}

/// The numbers of a process's descriptors, without 0 to 2 and those that the tests inherited.
fn descriptors(pid: u32) -> Vec<i32> {
    let numbers = |process: &str| -> Vec<i32> {
        let fds = fs::read_dir(format!("/proc/{process}/fd")).unwrap();
        let names = fds.filter_map(|fd| fd.unwrap().file_name().into_string().ok());
        names.map(|name| name.parse().unwrap()).collect()
    };
    let is_inherited = |fd: &i32| {
        // SAFETY: F_GETFD takes any number, and only asks.
        let flags = unsafe { libc::fcntl(*fd, libc::F_GETFD) };
        flags >= 0 && flags & libc::FD_CLOEXEC == 0
    };
    let inherited: Vec<i32> = numbers("self").into_iter().filter(is_inherited).collect();
    let mut own = numbers(&pid.to_string());
    own.retain(|fd| *fd > 2 && !inherited.contains(fd));
    own.sort_unstable();
    own
}

guest_test!(net_open_passes_queue_environment_and_users_rights, || {
    let place = Place::new();
    place.net.host.ip("link set lower mtu 1400");
    // The queues, then the socket that watches and the lock of its record.
    for (keys, fds, numbers) in [("", "3", vec![3]), (",queues=2", "3:4", vec![3, 4])] {
        let watch = 3 + numbers.len() as i32;
        for netns in ["private", "host"] {
            let spec = format!("lower,mac={MAC},netns={netns},name=mine{keys}");
            let open = ["net", "open", &spec, "--user", USER];
            let show = ["--", "sh", "-c", SHOW];
            let mut vm = Vm::spawn(place.minivmm_on_a_desktop(&[&open[..], &show].concat()));
            let shown = vm.wait_for("pid=");
            let pid = vm.wait_for("\n").trim().parse().unwrap();
            let (user, more) = (USER_ID, USER_ID + 1);
            for line in [
                format!("uid={user} gid={user} groups={user} {more}\n"),
                format!("home=/ user={USER},{USER} runtime=\n"),
                format!("MINIVMM_NET_FDS={fds}\n"),
                format!("MINIVMM_NET_MAC={MAC}\n"),
                "MINIVMM_NET_MTU=1400\n".to_owned(),
                "MINIVMM_NET_NAME=mine\n".to_owned(),
                "MINIVMM_NET_LOWER=lower\n".to_owned(),
                "MINIVMM_NET_MODE=bridge\n".to_owned(),
                format!("MINIVMM_NET_WATCH={watch}\n"),
            ] {
                assert!(shown.contains(&line), "no {line:?} in {shown}");
            }
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
                assert_eq!(after(&shown, set), "0000000000000000", "{set} {shown}");
            }
            for &number in &numbers {
                assert_eq!(mac_of_queue(&descriptor_of(pid, number)), MAC);
            }
            // A program that has just started has its libraries open.
            let all = [&numbers[..], &[watch, watch + 1]].concat();
            let has_no_other = eventually(|| descriptors(pid) == all);
            assert!(has_no_other, "{:?}, not {all:?}", descriptors(pid));
            let listing = succeeds(place.minivmm(&["net", "list", "lower"]));
            let own = format!("macvtap mine on lower  bridge  {MAC}  mtu 1400  not watched");
            assert!(listing.contains(&own), "{listing}");
            vm.signal(Signal::TERM);
            vm.wait_exit();
            assert!(place.mac_gets_free(), "{spec}");
            assert_eq!(place.net.host.links(), ["lower"]);
        }
    }
});

guest_test!(net_open_passes_the_programs_exit_status_on, || {
    let place = Place::new();
    for netns in ["private", "host"] {
        let spec = format!("lower,netns={netns}");
        let status = |script: &str| {
            run(place.minivmm(&["net", "open", &spec, "--", "sh", "-c", script])).status
        };
        assert_eq!(status("exit 0").code(), Some(0));
        assert_eq!(status("exit 7").code(), Some(7));
        // minivmm has become the program in a private namespace, and reports as a shell does
        // otherwise.
        let killed = status("kill -KILL $$");
        let status = killed.code().or(killed.signal().map(|signal| 128 + signal));
        assert_eq!(status, Some(128 + 9), "{netns}");
        assert_eq!(place.net.host.links(), ["lower"]);
    }
});

guest_test!(net_open_without_user_or_program_leaves_nothing, || {
    let place = Place::new();
    for netns in ["private", "host"] {
        let spec = format!("lower,mac={MAC},netns={netns}");
        let refused = |args: &[&str], texts: &[&str]| {
            let args = [&["net", "open", &spec], args].concat();
            is_refused(place.minivmm(&args), FAILED, texts);
            assert_eq!(place.net.host.links(), ["lower"]);
            assert!(place.mac_gets_free(), "{args:?}");
        };
        refused(
            &["--user", "no-such-user", "--", "true"],
            &["there is no user \"no-such-user\""],
        );
    }
    is_refused(
        place.minivmm(&["net", "open", "nolink", "--", "true"]),
        FAILED,
        &["`nolink`"],
    );
    is_refused(
        place.minivmm(&["net", "open", "lower"]),
        USAGE,
        &["COMMAND"],
    );
    is_refused(
        place.minivmm(&["net", "open", "lower,colour=red", "--", "true"]),
        USAGE,
        &["colour"],
    );
});

guest_test!(net_open_private_link_is_gone_after_end_and_sigkill, || {
    let place = Place::new();
    let spec = format!("lower,mac={MAC}");
    for signal in [Signal::TERM, Signal::KILL] {
        let show = ["net", "open", &spec, "--", "sh", "-c", SHOW];
        let mut vm = Vm::spawn(place.minivmm(&show));
        vm.wait_for("pid=");
        assert_eq!(place.net.host.links(), ["lower"]);
        vm.signal(signal);
        assert_eq!(vm.wait_exit().signal(), Some(signal.as_raw()));
        assert!(place.mac_gets_free());
    }
});

guest_test!(net_open_with_netns_host_forwards_sigterm, || {
    let place = Place::new();
    let script = "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done";
    let spec = "lower,netns=host,name=mine";
    let mut vm = Vm::spawn(place.minivmm(&[
        "net", "open", spec, "--user", "nobody", "--", "sh", "-c", script,
    ]));
    vm.wait_for("up\n");
    let shown = place.net.host.ip("-d link show dev mine");
    assert!(
        shown.contains("alias owner: minivmm pid="),
        "no owner in {shown}"
    );
    assert!(shown.contains(&format!("pid={} ", vm.pid())), "{shown}");
    assert!(shown.contains("macvtap mode bridge"), "{shown}");
    vm.signal(Signal::TERM);
    assert_eq!(vm.wait_exit().code(), Some(9), "{}", vm.transcript());
    assert_eq!(place.net.host.links(), ["lower"]);
});

guest_test!(netns_host_program_ends_when_net_open_is_killed, || {
    let place = Place::new();
    let spec = "lower,netns=host,name=mine";
    let open = ["net", "open", spec, "--user", USER, "--"];
    let mut vm = Vm::spawn(place.minivmm_on_a_desktop(&[&open[..], &["sh", "-c", SHOW]].concat()));
    vm.wait_for("pid=");
    let pid: u32 = vm.wait_for("\n").trim().parse().unwrap();
    assert_ne!(pid, vm.pid());
    vm.signal(Signal::KILL);
    assert!(
        eventually(|| !is_running(pid)),
        "its link may be deleted by any process"
    );
    vm.wait_exit();
    let deleted = succeeds(place.minivmm(&["net", "gc"]));
    assert!(deleted.starts_with("deleted mine (macvtap)"), "{deleted}");
    assert_eq!(place.net.host.links(), ["lower"]);
});

guest_test!(unprivileged_minivmm_in_net_open_serves_its_guest, || {
    let place = Place::new();
    // A descriptor does not show its interface's MTU, and the default would be too large.
    place.net.host.ip("link set lower mtu 1400");
    for (keys, fds) in [
        ("netns=private", "fd=3"),
        ("netns=host", "fd=3"),
        ("queues=2", "fd=3:4"),
    ] {
        let spec = format!("lower,mac={MAC},{keys}");
        let program = place.path("minivmm");
        let open = ["net", "open", &spec, "--user", USER, "--"];
        let start = |options: &str| {
            let guest = place.guest(2, options);
            let inner = with(&guest, &["--macvtap", fds]);
            let outer = [&open[..], &[program.to_str().unwrap()], &inner].concat();
            Vm::spawn(place.minivmm_on_a_desktop(&outer))
        };
        let console = guest::succeed(start("mode=info"));
        assert_eq!(mac_in_guest(&console), MAC);
        assert!(console.contains(" mtu=1400"), "{console}");
        let vm = place.until_it_serves(start("mode=echo"));
        vm.wait_for_log("NIC on lower: ");
        for ip in addresses(2) {
            assert!(place.net.far.pings(&ip, 3), "{ip}\n{}", vm.transcript());
        }
        // Everybody's `net list` knows it, once, with what it says of itself.
        let listing = || succeeds(place.minivmm(&["net", "list", "lower"]));
        let is_listed = eventually(|| {
            let text = listing();
            let line = text
                .lines()
                .find(|line| line.contains(&format!("  bridge  {MAC}  mtu 1400  up  addr")));
            line.is_some_and(|line| addresses(2).iter().all(|ip| line.contains(ip)))
        });
        assert!(is_listed, "{}", listing());
        assert_eq!(listing().matches(" of pid ").count(), 1, "{}", listing());
        // The wire of a macvtap that it cannot see.
        place.net.far.down("wire");
        vm.wait_for_log("the link is down");
        assert!(
            eventually(|| listing().contains("no carrier  addr")),
            "{}",
            listing()
        );
        place.net.far.up("wire");
        vm.wait_for_log("the link is up");
        place.net.far.address("wire", &format!("{}/64", PEER[1]));
        place.net.quit(2, vm);
        assert_eq!(place.net.host.links(), ["lower"]);
        assert_eq!(listing().matches(" of pid ").count(), 0, "{}", listing());
    }
});

/// All that minivmm asks of QEMU here.
const NOT_REALLY_QEMU: &str = "#!/bin/sh
case $1 in
--version) echo QEMU emulator version 8.0.0 ;;
*) exec sleep 60 ;;
esac
";

guest_test!(nic_of_qemu_is_listed_while_it_runs_and_never_shared, || {
    let place = Place::new();
    place.macvtap("mine");
    let (script, program) = (place.path("script"), place.path("qemu"));
    fs::write(&script, NOT_REALLY_QEMU).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    copy_program(&script, &program);
    let program = program.to_str().unwrap();
    let qemu = |macvtaps: &[&str]| {
        let mut args = vec!["qemu", "--qemu", program];
        macvtaps
            .iter()
            .for_each(|spec| args.extend(["--macvtap", spec]));
        place.minivmm(&[&args[..], &["--", "-M", "q35"]].concat())
    };
    is_refused(qemu(&["mine", "mine"]), FAILED, &["two NICs are on mine"]);
    let private = format!("lower,mac={MAC},mode=private");
    let mut vm = Vm::spawn(qemu(&["mine", &private]));
    let listing = || succeeds(place.minivmm(&["net", "list", "lower"]));
    let own = format!("program of pid {}, {program}\n", vm.pid());
    assert!(eventually(|| listing().contains(&own)), "{}", listing());
    let nic = format!("macvtap macvtap0 on lower  private  {MAC}  mtu 1500");
    assert!(listing().contains(&nic), "{}", listing());
    let texts = [program, "a part of its frames"];
    is_refused(qemu(&["mine"]), FAILED, &texts);
    vm.signal(Signal::TERM);
    vm.wait_exit();
    assert!(!listing().contains(&own), "{}", listing());
});
