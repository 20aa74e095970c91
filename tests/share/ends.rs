//! The ends of the server and of its monitor, and what it may do until then.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::Shutdown;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::client::{Guest, REQUESTS};
use crate::fuse::*;
use crate::harness::netns::{self, root_test};
use crate::harness::{eventually, vm};
use crate::{USER, as_user, directory, lease, mounted};

/// The directory that [`monitor_that_serves`] is to serve, and the program that serves it.
const DIRECTORY: &str = "MINIVMM_TEST_SHARE";
const PROGRAM: &str = "MINIVMM_TEST_PROGRAM";

/// The processes of a program that this process has started, without those that have ended.
fn descendants(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.unwrap_or_default();
    let children = children.split_whitespace().map(|pid| pid.parse().unwrap());
    let mut all: Vec<u32> = children.collect();
    let deeper: Vec<u32> = all.iter().flat_map(|pid| descendants(*pid)).collect();
    all.extend(deeper);
    all
}

fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().unwrap_or_default();
    !stat.is_empty() && !state.starts_with(['Z', 'X'])
}

/// Both processes of a server that a monitor has started.
fn processes(guest: &Guest) -> [u32; 2] {
    let outer = guest.server.service.pid();
    let [inner] = descendants(outer)[..] else {
        panic!("{:?}", descendants(outer))
    };
    [outer, inner]
}

/// A line of /proc/PID/status.
fn status(pid: u32, field: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.unwrap().trim_start_matches(':').trim().to_owned()
}

#[test]
#[ignore = "not a test: a monitor for monitor_that_is_killed_leaves_no_process"]
fn monitor_that_serves() {
    let directory = std::env::var_os(DIRECTORY).unwrap();
    let program = std::env::var_os(PROGRAM).unwrap();
    let guest = Guest::by(Path::new(&directory), false, Path::new(&program));
    println!("serves {:?}", processes(&guest));
    let _ = std::io::stdin().read(&mut [0]);
}

fn monitor_that_is_killed_leaves_no_process(directory: &Path, program: &Path) {
    let mut monitor = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--nocapture",
            "--exact",
            "ends::monitor_that_serves",
        ])
        .env(DIRECTORY, directory)
        .env(PROGRAM, program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(monitor.stdout.take().unwrap()).lines();
    let serves = lines.find_map(|line| {
        let line = line.unwrap();
        let (_, pids) = line.split_once("serves [")?;
        let pids = pids.trim_end_matches(']').split(", ");
        Some(pids.map(|pid| pid.parse().unwrap()).collect::<Vec<u32>>())
    });
    let serves = serves.unwrap();
    assert!(
        serves.len() == 2 && serves.iter().all(|pid| runs(*pid)),
        "{serves:?}"
    );
    monitor.kill().unwrap();
    monitor.wait().unwrap();
    assert!(
        eventually(|| !serves.iter().any(|pid| runs(*pid))),
        "{serves:?}"
    );
}

root_test!(monitor_of_root_that_is_killed_leaves_no_process, || {
    let directory = directory();
    monitor_that_is_killed_leaves_no_process(directory.path(), &vm::binary());
});

root_test!(monitor_of_a_user_that_is_killed_leaves_no_process, || {
    let directory = directory();
    let program = as_user(&directory);
    monitor_that_is_killed_leaves_no_process(directory.path(), &program);
});

root_test!(server_ends_with_its_connection, || {
    let directory = directory();
    let guest = mounted(&directory);
    let pids = processes(&guest);
    guest.socket().shutdown(Shutdown::Both).unwrap();
    assert!(
        eventually(|| !pids.iter().any(|pid| runs(*pid))),
        "{pids:?}"
    );
});

root_test!(server_whose_inner_process_is_killed_ends, || {
    let directory = directory();
    let guest = mounted(&directory);
    let [outer, inner] = processes(&guest);
    kill_process(Pid::from_raw(inner as i32).unwrap(), Signal::KILL).unwrap();
    assert!(eventually(|| !runs(outer)));
    // The monitor sees it by the connection.
    assert_eq!(guest.socket().read(&mut [0]).unwrap(), 0);
});

/// A queue's part of the record: the last head that was used, the used index, and what is said of the chain at 0.
fn record(guest: &Guest, queue: u64) -> (u16, u16, u8) {
    let part = queue * (16 + 16 * u64::from(fileserver::QUEUE_SIZE)).next_multiple_of(64);
    let mut bytes = [0; 17];
    guest
        .server
        .inflight
        .read_exact_at(&mut bytes, part)
        .unwrap();
    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    assert_eq!((word(8), word(10)), (1, fileserver::QUEUE_SIZE));
    (word(12), word(14), bytes[16])
}

root_test!(record_has_the_request_that_a_killed_server_was_at, || {
    let directory = directory();
    let path = directory.path().join("file");
    fs::write(&path, "text").unwrap();
    let mut guest = mounted(&directory);
    let file = guest.lookup(ROOT, "file").unwrap();
    assert_eq!(record(&guest, 1), (0, 2, 0));
    let _held = lease(&path);
    let open = request(OPEN, file.node, GUEST_ROOT, &[0; 8]);
    guest.prepare(REQUESTS, &open, 0x1000);
    guest.offer(REQUESTS, 0);
    assert!(eventually(|| record(&guest, 1) == (0, 2, 1)));
    let [outer, inner] = processes(&guest);
    kill_process(Pid::from_raw(inner as i32).unwrap(), Signal::KILL).unwrap();
    assert!(eventually(|| !runs(outer)));
    assert_eq!(
        (record(&guest, 1), record(&guest, 0)),
        ((0, 2, 1), (0, 0, 0))
    );
    assert_eq!(guest.used(REQUESTS), 2);
});

/// What the process of a server that serves may do, and the other one may not.
fn assert_few_rights(guest: &Guest, namespaces: &[&str]) {
    let [outer, inner] = processes(guest);
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID and SETUID.
    for (pid, capabilities) in [(outer, "0000000000000000"), (inner, "00000000000000db")] {
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            assert_eq!(status(pid, set), capabilities, "{set} of {pid}");
        }
        for set in ["CapInh", "CapAmb"] {
            assert_eq!(status(pid, set), "0000000000000000", "{set} of {pid}");
        }
        assert_eq!(status(pid, "NoNewPrivs"), "1");
    }
    assert_eq!(status(inner, "Groups"), "");
    let tasks = fs::read_dir(format!("/proc/{inner}/task")).unwrap();
    let tasks = tasks.map(|task| task.unwrap().file_name().into_string().unwrap());
    let filters = tasks.map(|task| status(task.parse().unwrap(), "Seccomp"));
    let filters: Vec<_> = filters.collect();
    assert!(
        filters.len() > 1 && filters.iter().all(|filter| filter == "2"),
        "{filters:?}"
    );
    let link = |pid: &str, name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
    for namespace in ["mnt", "net", "pid", "user"] {
        let is_own = link(&inner.to_string(), namespace) != link("self", namespace);
        assert_eq!(is_own, namespaces.contains(&namespace), "{namespace}");
    }
    let mounts = fs::read_to_string(format!("/proc/{inner}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    let root = fs::read_dir(format!("/proc/{inner}/root")).unwrap();
    let root = root.map(|entry| entry.unwrap().file_name());
    assert!(root.into_iter().any(|name| name == "made"));
}

root_test!(server_of_root_has_few_rights, || {
    let directory = directory();
    let mut guest = mounted(&directory);
    let user = User { uid: 5, gid: 6 };
    guest.create(user, ROOT, "made").unwrap();
    assert_few_rights(&guest, &["mnt", "net", "pid"]);
});

// Its capabilities are those of a user namespace, in which there is that user alone.
root_test!(server_of_a_user_has_few_rights, || {
    let directory = directory();
    let program = as_user(&directory);
    let mut guest = Guest::by(directory.path(), false, &program).mount();
    guest.create(GUEST_ROOT, ROOT, "made").unwrap();
    assert_few_rights(&guest, &["mnt", "net", "pid", "user"]);
    let [_, inner] = processes(&guest);
    for map in ["uid_map", "gid_map"] {
        let map = fs::read_to_string(format!("/proc/{inner}/{map}")).unwrap();
        let numbers: Vec<_> = map.split_whitespace().collect();
        let user = USER.to_string();
        assert_eq!(numbers, [&user, &user, "1"]);
    }
});
