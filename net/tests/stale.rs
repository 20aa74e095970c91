//! Which links count as stale, and which do not.

#![allow(
    clippy::unwrap_used,
    reason = "all of this file is tests, and the lint spares #[test] functions alone"
)]

#[path = "../../tests/harness/netns.rs"]
mod netns;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use net::{HostLinkGuard, HostLinkSpec, Macvtap, MacvtapSpec, Placement};
use netns::{Netns, root_test};

const WHAT: &str = "NET_TEST_STALE";

/// A process of this test binary that has a link, and a program that it has passed the link's queue
/// to.
struct Owner {
    process: Child,
    stdin: Option<ChildStdin>,
    /// Open until its end: the test harness in it has words to say then.
    stdout: BufReader<ChildStdout>,
    program: u32,
    link: String,
}

impl Owner {
    /// `what` is `macvtap` or `host link`.
    fn start(netns: &Netns, what: &str) -> Self {
        let mut command = netns.command(std::env::current_exe().unwrap());
        command.args(["--exact", "has_a_link_until_it_ends", "--nocapture"]);
        let pipes = command
            .env(WHAT, what)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut process = pipes.spawn().unwrap();
        let mut stdout = BufReader::new(process.stdout.take().unwrap());
        // The test harness puts its own words before, on the same line.
        let said = stdout
            .by_ref()
            .lines()
            .map_while(Result::ok)
            .find_map(|line| line.split_once("CHILD ").map(|(_, said)| said.to_owned()));
        let said = said.expect("the child has its link");
        let (link, program) = said.split_once(' ').unwrap();
        Self {
            stdin: process.stdin.take(),
            stdout,
            process,
            program: program.parse().unwrap(),
            link: link.to_owned(),
        }
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Lets it end by itself.
    fn end(mut self) {
        drop(self.stdin.take());
        std::io::copy(&mut self.stdout, &mut std::io::sink()).unwrap();
        assert!(self.process.wait().unwrap().success());
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // It fails when the process was killed before.
        let _ = self.process.kill();
        let _ = self.process.wait();
        end_program(self.program);
    }
}

/// Ends the program and waits for that: it is an orphan, not our child.
fn end_program(pid: u32) {
    let Some(pid) = rustix::process::Pid::from_raw(pid as i32) else {
        return;
    };
    let Ok(pidfd) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else {
        return;
    };
    let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
    let mut ended = [rustix::event::PollFd::new(
        &pidfd,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut ended, None).unwrap();
}

/// Not a test by itself: the body of the processes.
#[test]
fn has_a_link_until_it_ends() {
    let Ok(what) = std::env::var(WHAT) else {
        return;
    };
    let mut until = String::new();
    let say = |link: &str, program: u32| {
        println!("CHILD {link} {program}");
        std::io::stdout().flush().unwrap();
    };
    if what == "host link" {
        let mut spec = HostLinkSpec::new("v0".parse().unwrap());
        spec.addresses = vec!["192.0.2.1/24".parse().unwrap()];
        let guard = HostLinkGuard::create(&spec).unwrap();
        say(&guard.link().name, 0);
        std::io::stdin().read_line(&mut until).unwrap();
        return;
    }
    let mut spec = MacvtapSpec::new("v0".parse().unwrap());
    spec.netns = Placement::Host;
    let macvtap = Macvtap::open(&spec).unwrap();
    let name = macvtap.info().name.clone();
    let (mut queues, guard) = macvtap.into_parts();
    let mut program = Command::new("sleep");
    program.arg("600").stdin(queues.pop().unwrap());
    let mut program = program.stdout(Stdio::null()).spawn().unwrap();
    say(&name, program.id());
    std::io::stdin().read_line(&mut until).unwrap();
    drop(guard);
    program.kill().unwrap();
    program.wait().unwrap();
}

fn place() -> Netns {
    let netns = Netns::new();
    netns.wire("v0");
    netns
}

fn deleted(netns: &Netns) -> Vec<String> {
    let deleted = netns.enter(net::delete_stale).unwrap();
    deleted.into_iter().map(|link| link.name).collect()
}

/// Whether the inventory says that `link` was left, and whose it is.
fn leaked(netns: &Netns, link: &str) -> (bool, Option<u32>) {
    let lowers = netns.enter(|| net::inventory(None)).unwrap();
    let mut uppers = lowers.into_iter().flat_map(|lower| lower.uppers);
    let upper = uppers.find(|upper| upper.name == link).unwrap();
    (upper.leaked, upper.owner.map(|owner| owner.pid()))
}

root_test!(macvtap_of_a_killed_process_lives_with_its_queue, || {
    let netns = place();
    let mut owner = Owner::start(&netns, "macvtap");
    owner.kill();
    assert!(!leaked(&netns, "mvt0").0);
    assert_eq!(deleted(&netns), [""; 0]);
    // The next start does not delete it either.
    drop(
        netns
            .enter(|| Macvtap::open(&MacvtapSpec::new("v0".parse().unwrap())))
            .unwrap(),
    );
    assert!(netns.links().contains(&"mvt0".to_owned()));
    end_program(owner.program);
    assert!(leaked(&netns, "mvt0").0);
    assert_eq!(deleted(&netns), ["mvt0"]);
});

root_test!(macvtap_with_a_changed_alias_is_deleted, || {
    changed_alias_hides_nothing("macvtap")
});

root_test!(host_link_with_a_changed_alias_is_deleted, || {
    changed_alias_hides_nothing("host link")
});

fn changed_alias_hides_nothing(what: &str) {
    let netns = place();
    // As udev does by Alias= in a .link file.
    let start = || {
        let owner = Owner::start(&netns, what);
        netns.ip(&format!("link set {} alias uplink", owner.link));
        owner
    };
    start().end();
    assert_eq!(netns.links().len(), 2, "{:?}", netns.links());

    let mut owner = start();
    let pid = Some(owner.process.id());
    assert_eq!(leaked(&netns, &owner.link), (false, pid));
    assert_eq!(deleted(&netns), [""; 0]);
    owner.kill();
    end_program(owner.program);
    assert_eq!(leaked(&netns, &owner.link), (true, pid));
    assert_eq!(deleted(&netns), [owner.link.as_str()]);
}

root_test!(queue_of_a_deleted_macvtap_keeps_no_other, || {
    let netns = place();
    let gone = Owner::start(&netns, "macvtap");
    let device = |link: &str| {
        let show = format!("cat /sys/class/net/{link}/tap*/dev");
        netns.exec(&["sh", "-c", &show]).stdout
    };
    let number = device("mvt0");
    netns.ip("link delete mvt0");
    // The kernel gives out the lowest number that is free; others may take it meanwhile.
    let mut taken = Vec::new();
    for _ in 0..50 {
        let owner = Owner::start(&netns, "macvtap");
        let is_it = device(&owner.link) == number;
        taken.push(owner);
        if is_it {
            break;
        }
    }
    for mut owner in taken {
        owner.kill();
        end_program(owner.program);
        assert_eq!(deleted(&netns), [owner.link.as_str()]);
    }
    drop(gone);
});

root_test!(stale_host_link_of_a_killed_process_is_no_obstacle, || {
    let netns = place();
    let mut spec = HostLinkSpec::new("v0".parse().unwrap());
    spec.addresses = vec!["192.0.2.1/24".parse().unwrap()];
    let mut owner = Owner::start(&netns, "host link");
    netns.enter(|| HostLinkGuard::create(&spec)).unwrap_err();
    owner.kill();
    let guard = netns.enter(|| HostLinkGuard::create(&spec)).unwrap();
    drop(guard);
    let mut owner = Owner::start(&netns, "host link");
    owner.kill();
    netns.enter(|| net::HostLink::create(&spec)).unwrap();
});

// As between the two calls that make and lock the record of a link.
root_test!(link_whose_record_is_not_locked_yet_is_not_stale, || {
    let netns = place();
    let mut owner = Owner::start(&netns, "host link");
    let index = netns.exec(&["cat", &format!("/sys/class/net/{}/ifindex", owner.link)]);
    let index = String::from_utf8(index.stdout).unwrap();
    let namespace = std::fs::metadata(format!("/proc/{}/ns/net", owner.process.id())).unwrap();
    let record = format!(
        "/run/minivmm/link-{}-{}.lock",
        namespace.ino(),
        index.trim()
    );
    std::fs::remove_file(&record).unwrap();
    std::fs::File::create(&record).unwrap();
    assert!(!leaked(&netns, &owner.link).0);
    assert_eq!(deleted(&netns), [""; 0]);
    owner.kill();
    assert_eq!(deleted(&netns), [owner.link.as_str()]);
    assert!(!std::path::Path::new(&record).exists());
});
