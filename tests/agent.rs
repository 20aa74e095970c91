//! The agent as init of a guest, in QEMU by translation, with no more on the host than what listens for its boot connection,
//! and `minivmm exec`.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;

use agent_protocol::boot::{Access, Boot, FromInit, Part, Root, Share, ToInit, Usage};
use agent_protocol::{BOOT_PORT, VERSION};
use harness::PATIENCE;
use harness::assets::assets;
use harness::disk::run;
use harness::initramfs::{self, find};
use harness::netns::is_root;
use harness::process::Killed;
use harness::vm::{Vm, binary, in_lab};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;

/// A guest whose init has connected, or not yet.
struct Guest {
    dir: TempDir,
    vm: Vm,
    listener: UnixListener,
}

/// The other end of the boot connection, after the init's hello.
struct Host {
    stream: UnixStream,
}

impl Guest {
    /// Starts a guest with these options besides. Its initramfs has these modules, and loads all of them at once but those
    /// of file systems.
    fn start(args: &[&str]) -> Self {
        Self::start_with("", args)
    }

    /// The same with more on the kernel's command line.
    fn start_with(cmdline: &str, args: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("vsock");
        let listener = UnixListener::bind(format!("{}_{BOOT_PORT}", socket.display())).unwrap();
        let initrd = dir.path().join("initrd");
        let agent = Path::new(env!("MINIVMM_AGENT"));
        fs::write(&initrd, initramfs::of_agent(agent, &assets().modules())).unwrap();
        let mut command = Command::new(binary());
        command
            .args(["qemu", "--memory", "256M", "--cmdline"])
            // As in the suite of QEMU: on a loaded machine the kernel's test of the timer can fail.
            .arg(format!(
                "console=ttyS0 quiet no_timer_check cryptomgr.notests {cmdline}"
            ))
            .arg("--kernel")
            .arg(assets().bzimage())
            .arg("--initrd")
            .arg(initrd)
            .arg("--vsock")
            .arg(socket)
            .args(args)
            .stdin(Stdio::null());
        let vm = Vm::spawn(command);
        Self { dir, vm, listener }
    }

    /// Waits for the init.
    fn connected(&self) -> Host {
        let mut ready = [PollFd::new(&self.listener, PollFlags::IN)];
        let patience = Timespec {
            tv_sec: PATIENCE.as_secs() as i64,
            tv_nsec: 0,
        };
        let came = poll(&mut ready, Some(&patience)).unwrap();
        assert_eq!(came, 1, "{}", self.vm.transcript());
        let (stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let host = Host { stream };
        let FromInit::Hello {
            version, kernel, ..
        } = host.read()
        else {
            panic!("no hello");
        };
        assert_eq!(version, VERSION);
        assert!(kernel.contains("cloud-amd64"), "{kernel}");
        host
    }

    /// What a shell's command in the guest writes, and its exit status.
    fn sh(&self, script: &str) -> (String, i32) {
        let mut command = Command::new(binary());
        command.arg("exec").arg(self.dir.path().join("vsock"));
        command.args(["--", "sh", "-c", script]);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        (text, output.status.code().unwrap())
    }

    /// Waits for the end of a guest that powers off.
    fn ended(mut self) -> String {
        let status = self.vm.wait_exit();
        assert_eq!(status.code(), Some(0), "{}", self.vm.transcript());
        self.vm.console()
    }
}

impl Host {
    fn read(&self) -> FromInit {
        agent_protocol::read(&self.stream).unwrap()
    }

    fn write(&self, message: &ToInit) {
        agent_protocol::write(&self.stream, message).unwrap();
    }

    /// Says what the guest is to be, and returns what the init says before it is ready or has failed, and that.
    fn boot(&self, boot: Boot) -> (Vec<FromInit>, FromInit) {
        self.write(&ToInit::Boot(Box::new(boot)));
        let mut before = Vec::new();
        loop {
            match self.read() {
                last @ (FromInit::Ready { .. } | FromInit::Failed { .. }) => return (before, last),
                message => before.push(message),
            }
        }
    }

    fn power_off(self) -> Usage {
        self.write(&ToInit::PowerOff);
        match self.read() {
            FromInit::Ended(usage) => usage,
            other => panic!("{other:?}"),
        }
    }
}

/// A guest whose root is the share `root`, below an overlay.
fn on_the_host() -> Boot {
    Boot {
        hostname: "guest".into(),
        root: Root::Share { tag: "root".into() },
        access: Access::Overlay,
        shares: Vec::new(),
        nics: Vec::new(),
        network_patience: 0,
    }
}

fn share(tag: &str, path: &str, optional: bool) -> Share {
    Share {
        tag: tag.into(),
        path: path.into(),
        access: Access::ReadWrite,
        optional,
    }
}

/// What `minivmm` with these words says and returns.
fn minivmm(words: &[&str], input: &[u8]) -> Output {
    let mut command = Command::new(binary());
    command.env_remove("RUST_LOG").args(words);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).unwrap());
        child.wait_with_output().unwrap()
    })
}

/// The host's commands and copies, through the guest's socket device. The guest has `shared` as /tmp/new/work.
fn commands_and_copies_pass(name: &str, shared: &Path) {
    let waited = minivmm(&["wait", name, "--for", "agent"], &[]);
    assert!(waited.status.success(), "{waited:?}");

    let sent: Vec<u8> = (0..1 << 18).flat_map(u32::to_le_bytes).collect();
    let script = "cat; uname -n >&2; exit 37";
    let output = minivmm(&["exec", name, "--", "sh", "-c", script], &sent);
    assert_eq!(output.status.code(), Some(37), "{:?}", output.stderr);
    assert!(output.stdout == sent, "{} bytes", output.stdout.len());
    assert_eq!(output.stderr, b"guest\n");

    let script = "echo $$; kill -9 $$";
    let output = minivmm(&["exec", "-t", name, "--", "sh", "-c", script], &[]);
    assert_eq!(output.status.code(), Some(128 + 9));
    assert!(output.stdout.ends_with(b"\r\n"), "{:?}", output.stdout);

    let copy = shared.join("copy").display().to_string();
    let there = format!("{name}:/tmp/new/work");
    fs::write(&copy, &sent).unwrap();
    for (from, to) in [
        (&copy[..], &format!("{there}/there")[..]),
        (&format!("{name}:/proc/version"), &copy),
    ] {
        let copied = minivmm(&["cp", from, to], &[]);
        assert!(copied.status.success(), "{copied:?}");
    }
    assert!(fs::read(shared.join("there")).unwrap() == sent);
    // A file of which the kernel does not say how long it is.
    assert!(fs::read(&copy).unwrap().starts_with(b"Linux version "));
}

/// A test whose guests run by translation.
fn by_translation(body: impl FnOnce()) {
    if !in_lab() && is_root() {
        body();
    }
}

#[test]
fn guest_on_the_hosts_root_boots_works_and_powers_off() {
    by_translation(|| {
        let shared = TempDir::new().unwrap();
        let work = format!("{}:work", shared.path().display());
        let name = format!("agent-{}", std::process::id());
        let guest = Guest::start(&["--name", &name, "--share", "/:root:ro", "--share", &work]);
        let host = guest.connected();
        let (before, ready) = host.boot(Boot {
            shares: vec![
                share("work", "/tmp/new/work", false),
                share("work", "/proc/not/possible", true),
            ],
            ..on_the_host()
        });
        let FromInit::Ready { nics, at } = ready else {
            panic!("{ready:?}\n{}", guest.vm.transcript());
        };
        assert_eq!(nics, []);
        check_stages(&before, at);
        check_files(&guest, shared.path());
        check_processes(&guest);
        check_agent_serves_the_host_alone(&guest);

        let _hung = hang(&guest);
        commands_and_copies_pass(&name, shared.path());
        let _full = fill(&guest, &name);

        let usage = host.power_off();
        // The process that needed more than all has got most of it.
        assert!(
            (128 << 20..256 << 20).contains(&usage.peak_memory),
            "{usage:?}"
        );
        assert_eq!(usage.oom_kills, 1);
        let console = guest.ended();
        assert!(!console.contains("minivmm-agent"), "{console}");
    });
}

/// The init says how far it is, and what the guest does without.
fn check_stages(before: &[FromInit], ready: u64) {
    let stages: Vec<_> = before
        .iter()
        .filter_map(|message| match message {
            FromInit::Stage { name, at } => Some((name.as_str(), *at)),
            _ => None,
        })
        .collect();
    assert_eq!(
        stages.iter().map(|stage| stage.0).collect::<Vec<_>>(),
        ["init", "modules", "root", "shares", "network"]
    );
    assert!(stages.is_sorted_by_key(|stage| stage.1));
    assert!(stages.iter().all(|stage| (1..=ready).contains(&stage.1)));
    let start = "cannot make the directory \"/proc/not/possible\": ";
    let warned = before
        .iter()
        .any(|message| matches!(message, FromInit::Warning(text) if text.starts_with(start)));
    assert!(warned, "{before:?}");
}

/// The guest has the host's files, may write all of them, and the host sees what is written to a share alone.
fn check_files(guest: &Guest, shared: &Path) {
    let written = "echo guest >/etc/of-the-guest && cat /etc/of-the-guest && hostname";
    assert_eq!(guest.sh(written), ("guest\nguest\n".into(), 0));
    assert!(!Path::new("/etc/of-the-guest").exists());

    // rename(2) copies no directory of the host's, and says EXDEV where it would have to.
    let renamed =
        r#"perl -e 'rename("/usr/share", "/usr/moved") or die "$!\n"' && ls /usr/moved | wc -l"#;
    let count = fs::read_dir("/usr/share").unwrap().count();
    assert_eq!(guest.sh(renamed), (format!("{count}\n"), 0));

    // /tmp is the root's, so that a command can start in it.
    let mounted = "mount | grep -c ' on /tmp type '";
    assert_eq!(guest.sh(mounted), ("0\n".into(), 1));
    let shares = "echo guest >/tmp/new/work/file && chmod 600 /dev/shm/. && mount | grep -c ' /lower \\| /memory '";
    assert_eq!(guest.sh(shares), ("0\n".into(), 1));
    assert_eq!(fs::read_to_string(shared.join("file")).unwrap(), "guest\n");
    assert!(!Path::new("/tmp/new").exists());
}

/// The init lives on whatever a command does, and has all of it end.
fn check_processes(guest: &Guest) {
    // It spares the shell itself, as kill(2) says.
    assert_eq!(
        guest.sh("kill -9 -1; kill -9 1; echo on"),
        ("on\n".into(), 0)
    );
    let oom = guest.sh("exec perl -e 'push @x, \"x\" x 1000000 . $_ for 1 .. 1000'");
    assert_eq!(oom.1, 128 + 9, "{}", oom.0);
    // Of a process that waits for none of its children, init inherits what is left.
    let zombies = "exec perl -e 'for (1 .. 200) { fork or exit } exit 6'";
    assert_eq!(guest.sh(zombies), (String::new(), 6));
    // Orphans that end are reaped.
    let orphans = "for n in $(seq 50); do (true &); done; \
        until ! grep -qs '^State:.Z' /proc/[0-9]*/status; do :; done; echo none";
    assert_eq!(guest.sh(orphans), ("none\n".into(), 0));
    // A file system that is full is an error of the command's.
    let (text, status) =
        guest.sh("dd if=/dev/zero of=/run/full bs=1M; status=$?; rm /run/full; exit $status");
    assert!(text.contains("No space left on device"), "{text}");
    assert_eq!(status, 1);
    // Those that stay are ended when the guest is, also when they ignore that.
    let stay = "for n in $(seq 50); do sleep 1000 >/dev/null 2>&1 & done; \
        (trap '' TERM; exec sleep 1000) >/dev/null 2>&1 & kill -STOP $!; exit 5";
    assert_eq!(guest.sh(stay), (String::new(), 5));
}

/// A program of the guest's is not greeted.
fn check_agent_serves_the_host_alone(guest: &Guest) {
    // socket(AF_VSOCK, SOCK_STREAM) and a sockaddr_vm: the agent's port of VMADDR_CID_LOCAL.
    let script = "exec perl -e 'socket(S, 40, 1, 0) && \
        connect(S, pack(\"SxxLLx4\", 40, 28022, 1)) or die \"$!\\n\"; \
        print sysread(S, $byte, 1) ? \"greeted\" : \"closed\"'";
    assert_eq!(guest.sh(script), ("closed".into(), 0));
}

/// A program is executed from a file system that never answers (FUSE, whose server does nothing), which holds up nothing else.
fn hang(guest: &Guest) -> [Killed; 2] {
    let exec = |words: &[&str]| {
        let mut command = Command::new(binary());
        command.arg("exec").arg(guest.dir.path().join("vsock"));
        command.arg("--").args(words).stdin(Stdio::null());
        Killed(command.stdout(Stdio::piped()).spawn().unwrap())
    };
    let script = "exec 3<>/dev/fuse && mkdir /run/hangs && \
        mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 hangs /run/hangs && \
        echo mounted && exec sleep 1000";
    let mut server = exec(&["sh", "-c", script]);
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "mounted\n");
    let hangs = exec(&["/run/hangs/program"]);
    let waits = "until grep -qs fuse_ /proc/[0-9]*/wchan; do :; done; exit 4";
    assert_eq!(guest.sh(waits), (String::new(), 4));
    [server, hangs]
}

/// No number of a process is left in the guest, and its file systems are out of sight or only read: the agent says why it can
/// start nothing, and still ends the guest.
fn fill(guest: &Guest, name: &str) -> Killed {
    let script = "echo 400 >/proc/sys/kernel/pid_max && mount -o remount,ro / && \
        umount -l /sys /run /dev/shm /dev/pts /proc && \
        exec perl -e '$| = 1; while (defined(my $pid = fork)) { $pid or sleep(1000), exit } \
        print \"full\\n\"; sleep 1000'";
    let mut command = Command::new(binary());
    command.arg("exec").arg(guest.dir.path().join("vsock"));
    command
        .args(["--", "sh", "-c", script])
        .stdin(Stdio::null());
    let mut full = Killed(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(full.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "full\n");
    let (text, status) = guest.sh("exit 0");
    assert_eq!(status, 125, "{text}");
    let why = "cannot start a process for \"sh\": Resource temporarily unavailable";
    assert!(text.contains(why), "{text}");
    let to = guest.dir.path().join("copy").display().to_string();
    let copied = minivmm(&["cp", &format!("{name}:/etc/passwd"), &to], &[]);
    let text = String::from_utf8_lossy(&copied.stderr);
    assert!(
        text.contains("cannot start a thread for the copy"),
        "{text}"
    );
    full
}

#[test]
fn root_that_is_only_read_has_places_to_write_to() {
    by_translation(|| {
        let guest = Guest::start(&["--share", "/:root:ro"]);
        let host = guest.connected();
        let (_, ready) = host.boot(Boot {
            access: Access::ReadOnly,
            ..on_the_host()
        });
        assert!(
            matches!(ready, FromInit::Ready { .. }),
            "{ready:?}\n{}",
            guest.vm.transcript()
        );
        let (text, status) = guest.sh("touch /etc/of-the-guest");
        assert!(text.contains("Read-only file system"), "{text}");
        assert_eq!(status, 1);
        let places = "touch /tmp/file /run/file /dev/shm/file && ls -A /tmp";
        assert_eq!(guest.sh(places), ("file\n".into(), 0));
        host.power_off();
        guest.ended();
    });
}

#[test]
fn root_that_is_not_there_is_said_with_its_reason() {
    by_translation(|| {
        // A kernel that takes no module without its signature gets it: else there were no connection.
        let guest = Guest::start_with("module.sig_enforce=1", &["--share", "/:root:ro"]);
        let host = guest.connected();
        let tag = "other".to_owned();
        let (_, failed) = host.boot(Boot {
            root: Root::Share { tag },
            ..on_the_host()
        });
        let FromInit::Failed { part, text } = failed else {
            panic!("{failed:?}");
        };
        assert_eq!(part, Part::Root);
        assert!(text.contains("other (virtiofs)"), "{text}");
        // The host goes, and the guest ends.
        drop(host);
        guest.ended();
    });
}

#[test]
fn root_of_a_disk_is_mounted_and_written_until_the_end() {
    by_translation(|| {
        let dir = TempDir::new().unwrap();
        let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
        fs::create_dir_all(tree.join("etc")).unwrap();
        let mkfs = find("mke2fs", "e2fsprogs");
        run(Command::new(mkfs)
            .args(["-q", "-t", "ext4", "-d"])
            .args([&tree, &image])
            .arg("16M"));
        let disk = format!("{},format=raw", image.display());
        let guest = Guest::start(&["--disk", &disk]);
        let host = guest.connected();
        let (_, ready) = host.boot(Boot {
            root: Root::Disk,
            access: Access::ReadWrite,
            ..on_the_host()
        });
        assert!(
            matches!(ready, FromInit::Ready { .. }),
            "{ready:?}\n{}",
            guest.vm.transcript()
        );
        host.power_off();
        guest.ended();
        // The mount points that the root lacked are on it, and its journal is empty.
        let fsck = find("e2fsck", "e2fsprogs");
        run(Command::new(fsck).args(["-f", "-n"]).arg(&image));
        let debugfs = find("debugfs", "e2fsprogs");
        let run = run(Command::new(debugfs).args(["-R", "ls /"]).arg(&image));
        let names = String::from_utf8_lossy(&run.stdout).into_owned();
        for name in ["proc", "sys", "dev", "run"] {
            assert!(names.contains(name), "{names}");
        }
    });
}

#[test]
fn guest_whose_host_does_not_listen_says_so_and_powers_off() {
    by_translation(|| {
        let mut guest = Guest::start(&[]);
        let socket = guest.dir.path().join(format!("vsock_{BOOT_PORT}"));
        fs::remove_file(socket).unwrap();
        let status = guest.vm.wait_exit();
        let console = guest.vm.console();
        assert_eq!(status.code(), Some(0), "{console}");
        assert!(
            console.contains("minivmm-agent: cannot connect to port 28023 of the host by vsock: "),
            "{console}"
        );
    });
}
