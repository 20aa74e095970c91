//! The agent as init of a guest, in QEMU by translation, with no more on the host than what listens for its boot connection.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use agent_protocol::boot::{Access, Boot, FromInit, Part, Root, Share, ToInit, Usage};
use agent_protocol::{BOOT_PORT, VERSION};
use harness::PATIENCE;
use harness::assets::assets;
use harness::disk::run;
use harness::initramfs::{self, find};
use harness::netns::is_root;
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
            .arg("console=ttyS0 quiet no_timer_check cryptomgr.notests")
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
        read_only: false,
        optional,
    }
}

/// A test whose guests run by translation.
fn by_translation(body: impl FnOnce()) {
    if !in_lab() && is_root() {
        body();
    }
}

#[test]
fn guest_on_the_hosts_root_boots_and_powers_off() {
    by_translation(|| {
        let shared = TempDir::new().unwrap();
        let work = format!("{}:work", shared.path().display());
        let guest = Guest::start(&["--share", "/:root:ro", "--share", &work]);
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
        assert!(stages.iter().all(|stage| (1..=at).contains(&stage.1)));
        let warned = before.iter().any(|message| {
            matches!(message, FromInit::Warning(text) if text.starts_with("cannot make the directory \"/proc/not/possible\""))
        });
        assert!(warned, "{before:?}");

        let usage = host.power_off();
        assert!(
            (1 << 20..256 << 20).contains(&usage.peak_memory),
            "{usage:?}"
        );
        assert_eq!(usage.oom_kills, 0);
        let console = guest.ended();
        assert!(!console.contains("minivmm-agent"), "{console}");
        assert!(!Path::new("/tmp/new/work").exists());
    });
}

#[test]
fn root_that_is_not_there_is_said_with_its_reason() {
    by_translation(|| {
        let guest = Guest::start(&["--share", "/:root:ro"]);
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
