//! `minivmm run`: a command in a guest of its own.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

#[path = "run_command/failures.rs"]
mod failures;
mod harness;
#[path = "run_command/kernels.rs"]
mod kernels;

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};

use harness::assets::assets;
use harness::guest::Transport::Pci;
use harness::initramfs::find;
use harness::process::{Killed, all_children, is_running};
use harness::runtime::Runtime;
use harness::vm::{self, Vm};
use harness::{AT_ONCE, PATIENCE, eventually, images, kvm_test, netns};
use rustix::net::{AddressFamily, SocketType, socket};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

kvm_test!(
    vm_of_run_has_its_sockets_in_its_directory_and_ends_with_it,
    || {
        let runtime = Runtime::new();
        let (leash, run) = io::pipe().unwrap();
        let boot = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        let mut command = runtime.minivmm(&["--name", "tied", "--runner", "100:101"]);
        let guest = images::command(Pci, &[], "mode=vsock interrupts=on");
        command.args(guest.get_args()).stdin(Stdio::null());
        let its_boot = boot.try_clone().unwrap();
        let place = move || {
            for (fd, number) in [(leash.as_raw_fd(), 100), (its_boot.as_raw_fd(), 101)] {
                // SAFETY: it takes numbers, and this process is about to become another program.
                if unsafe { libc::dup2(fd, number) } < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: it makes system calls alone.
        unsafe { command.pre_exec(place) };
        let mut vm = Vm::spawn(command);
        vm.wait_for("READY vsock cid=3\n");
        let directory = runtime.directory.path().join("vms/tied");
        assert!(UnixStream::connect(directory.join("vsock")).is_ok());
        // The guest would connect so, and run gets that.
        let _guest = UnixStream::connect(directory.join("vsock_28023")).unwrap();
        UnixListener::from(boot).accept().unwrap();
        drop(run);
        assert_eq!(
            vm.wait_exit_within(AT_ONCE).code(),
            Some(130),
            "{}",
            vm.log()
        );
        let left = fs::read_dir(runtime.directory.path().join("vms")).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| name != "tied"), "{left:?}");
    }
);

/// The place of the VMs that a test starts.
struct Host {
    runtime: Runtime,
    directory: TempDir,
}

/// Runs a test's body on this host by root: natively where its KVM can run Linux, and else by emulation.
fn on_host(body: impl FnOnce(Host)) {
    if !vm::in_lab() && netns::is_root() {
        body(Host {
            runtime: Runtime::new(),
            directory: TempDir::new().unwrap(),
        });
    }
}

impl Host {
    /// `minivmm run` with these options, then `--` and the command.
    fn run(&self, options: &[&str], command: &[&str]) -> Running {
        self.run_in(".", options, command)
    }

    /// The same, started in a directory.
    fn run_in(&self, directory: &str, options: &[&str], command: &[&str]) -> Running {
        Running::start(self.command(directory, options, command))
    }

    fn command(&self, directory: &str, options: &[&str], command: &[&str]) -> Command {
        let modules = assets().modules();
        let modules = ["--modules", modules.to_str().unwrap()];
        self.command_of(
            &assets().bzimage(),
            directory,
            &[&modules[..], options].concat(),
            command,
        )
    }

    /// The same for another kernel.
    fn command_of(
        &self,
        kernel: &Path,
        directory: &str,
        options: &[&str],
        command: &[&str],
    ) -> Command {
        let mut minivmm = self.runtime.minivmm(&["run", "--kernel"]);
        minivmm.current_dir(directory);
        minivmm.arg(kernel).args(options);
        minivmm.arg("--").args(command);
        minivmm
    }

    /// The same, started in a directory below another file system, of which it has a file. 99 is the status when
    /// the guest has changed that.
    fn run_on_mount(&self, directory: &str, options: &[&str], command: &[&str]) -> Running {
        let run = self.command_of(&assets().bzimage(), "/", options, command);
        let script = format!(
            "mount -t tmpfs test /srv && mkdir {directory} && cd {directory} && echo host > of-the-host || exit 98; \
             \"$@\"; status=$?; grep -qx host of-the-host && ! test -e /srv/new || exit 99; exit $status"
        );
        let mut command = self.runtime.command("sh");
        command.args(["-c", &script, "sh"]).arg(run.get_program());
        command.args(run.get_args());
        Running::start(command)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The directories of VMs.
    fn vms(&self) -> Vec<String> {
        let vms = fs::read_dir(self.runtime.directory.path().join("vms"));
        let vms = vms.into_iter().flatten();
        let names = vms.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !name.starts_with('.')).collect()
    }

    /// Waits until the VM has its boot socket, so that its process handles what comes.
    fn await_vm(&self, name: &str) {
        let socket = self.runtime.directory.path().join("vms").join(name);
        let socket = socket.join("vsock_28023");
        assert!(eventually(|| socket.exists()), "{:?}", self.vms());
    }

    /// Runs another command of minivmm's to its end.
    fn minivmm(&self, args: &[&str]) -> Ended {
        Running::start(self.runtime.minivmm(args)).wait()
    }
}

/// A program and its streams.
struct Running {
    child: Killed,
    stdout: JoinHandle<Vec<u8>>,
    stderr: JoinHandle<Vec<u8>>,
}

/// What came of it.
#[derive(Debug)]
struct Ended {
    status: Option<i32>,
    stdout: Vec<u8>,
    stderr: String,
}

fn read_all(mut stream: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

impl Running {
    fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = Killed(command.spawn().unwrap());
        Self {
            stdout: read_all(child.stdout.take().unwrap()),
            stderr: read_all(child.stderr.take().unwrap()),
            child,
        }
    }

    fn wait(mut self) -> Ended {
        let ended = eventually(|| self.child.try_wait().unwrap().is_some());
        if !ended {
            self.child.kill().unwrap();
        }
        let status = self.child.wait().unwrap().code();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let stderr = text(self.stderr.join().unwrap());
        assert!(ended, "it has not ended within {PATIENCE:?}: {stderr}");
        Ended {
            status,
            stdout: self.stdout.join().unwrap(),
            stderr,
        }
    }
}

/// An OCI layout with one image of these layers.
fn layout(at: &Path, layers: &[Vec<u8>], config: &Value) {
    let blobs = at.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let blob = |bytes: &[u8]| {
        let hex: String = Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        fs::write(blobs.join(&hex), bytes).unwrap();
        json!({ "digest": format!("sha256:{hex}"), "size": bytes.len() })
    };
    let config = json!({ "os": "linux", "architecture": "amd64", "config": config });
    let layers: Vec<_> = layers.iter().map(|layer| blob(layer)).collect();
    let config = blob(config.to_string().as_bytes());
    let manifest = blob(
        json!({ "config": config, "layers": layers })
            .to_string()
            .as_bytes(),
    );
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write(at.join("index.json"), index.to_string()).unwrap();
}

/// A layer of files, directories whose names end with a slash, and hard links.
fn layer(files: &[(&str, &[u8])], links: &[(&str, &str)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let header = |kind, size: usize| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_size(size as u64);
        header
    };
    for (name, contents) in files {
        let kind = match name.ends_with('/') {
            true => tar::EntryType::Directory,
            false => tar::EntryType::Regular,
        };
        let mut header = header(kind, contents.len());
        archive.append_data(&mut header, name, *contents).unwrap();
    }
    for (name, target) in links {
        let mut header = header(tar::EntryType::Link, 0);
        archive.append_link(&mut header, name, target).unwrap();
    }
    archive.into_inner().unwrap()
}

#[test]
fn image_of_a_layout_is_the_root_and_says_what_runs() {
    on_host(|host| {
        let busybox = fs::read(find("busybox", "busybox-static")).unwrap();
        let passwd = b"root:x:0:0::/:/bin/sh\nme:x:1000:1000::/srv:/bin/sh\n";
        let lower = layer(
            &[
                ("bin/busybox", &busybox),
                ("etc/old", b"x"),
                ("etc/passwd", passwd),
            ],
            &[("bin/sh", "bin/busybox")],
        );
        let upper = layer(
            &[("etc/.wh.old", b""), ("srv/", b""), ("srv/new", b"new")],
            &[],
        );
        let config = json!({
            "Env": ["A=image", "B=image"],
            "Entrypoint": ["/bin/sh", "-c"],
            "Cmd": ["busybox id -u; pwd; echo $A $B; busybox ls /etc; busybox cat new; exit 3"],
            "WorkingDir": "/srv",
            "User": "me",
        });
        let images = host.path("images");
        layout(&images, &[lower, upper], &config);
        let root = format!("oci:{}", images.display());
        let options = ["--root", &root, "--env", "B=mine"];
        let ended = host.run(&options, &[]).wait();
        let stdout = String::from_utf8(ended.stdout).unwrap();
        assert_eq!(ended.status, Some(3), "{}", ended.stderr);
        // The guest's own files of names and addresses are there, too.
        let (before, listed) = stdout.split_once("\nimage mine\n").unwrap();
        assert_eq!(before, "1000\n/srv");
        let listed: Vec<_> = listed.lines().collect();
        assert!(
            listed.contains(&"passwd") && !listed.contains(&"old"),
            "{stdout}"
        );
        assert_eq!(listed.last(), Some(&"new"));

        let missing = ["--root", &format!("{root}:no-such-tag")];
        let ended = host.run(&missing, &["true"]).wait();
        assert_eq!(ended.status, Some(125));
        assert!(
            ended.stderr.contains("no image \"no-such-tag\""),
            "{}",
            ended.stderr
        );
        assert_eq!(host.vms(), [""; 0]);
    });
}

fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

#[test]
fn command_has_its_streams_the_hosts_root_and_its_status() {
    on_host(|host| {
        let result = host.path("result.json");
        let shared = host.path("shared");
        fs::create_dir(&shared).unwrap();
        let marker = "/minivmm-test-of-the-overlay";
        let here = "/srv/project";
        let share = format!("{}:/mnt/shared", shared.display());
        let cores = host.path("cores");
        fs::create_dir(&cores).unwrap();
        let out = host.path("out");
        fs::create_dir(&out).unwrap();
        let copies = ["minivmm-tree", marker, "/no/such"];
        let copies = copies.map(|guest| format!("{guest}:{}", out.display()));
        let script = format!(
            "cat && echo error >&2 && echo \"$A $(pwd) $(uname -r)\" > /mnt/shared/file \
             && grep -qx host of-the-host && echo guest > of-the-host && mkdir /srv/new \
             && echo kept > {marker} && test -e {marker} \
             && mkdir -p minivmm-tree/sub && ln -s / minivmm-tree/link \
             && sh -c 'kill -SEGV $$'; exit 37"
        );
        let mut options = vec!["--name", "first", "--share", &share, "--env", "A=b c"];
        options.extend(["--result", result.to_str().unwrap()]);
        options.extend(["--coredumps", cores.to_str().unwrap()]);
        options.extend(copies.iter().flat_map(|copy| ["--copy-out", copy]));
        let packed = host.path("packed");
        fs::create_dir(&packed).unwrap();
        kernels::packed(&packed);
        options.extend(["--modules", packed.to_str().unwrap()]);
        let mut run = host.run_on_mount(here, &options, &["sh", "-c", &script]);
        // Every byte there is, and more than any buffer on the way holds.
        let bytes: Vec<u8> = (0..=255).cycle().take(3 << 20).collect();
        let mut stdin = run.child.stdin.take().unwrap();
        let sent = bytes.clone();
        let writer = thread::spawn(move || stdin.write_all(&sent));
        let ended = run.wait();
        assert_eq!(ended.status, Some(37), "{}", ended.stderr);
        writer.join().unwrap().unwrap();
        assert!(ended.stdout == bytes, "{} bytes", ended.stdout.len());
        let lines: Vec<_> = ended.stderr.lines().collect();
        assert!(lines.contains(&"error"), "{lines:?}");
        assert!(!PathBuf::from(marker).exists());
        let kept = out.join(marker.trim_start_matches('/'));
        assert_eq!(fs::read_to_string(kept).unwrap(), "kept\n");
        let tree = out.join("minivmm-tree");
        assert!(tree.join("sub").is_dir());
        assert_eq!(fs::read_link(tree.join("link")).unwrap(), Path::new("/"));
        let lost = "\"/no/such\" of the guest is not copied out: cannot read";
        assert!(ended.stderr.contains(lost), "{}", ended.stderr);
        let [core] = &fs::read_dir(cores).unwrap().collect::<Vec<_>>()[..] else {
            panic!("{}", ended.stderr)
        };
        let core = core.as_ref().unwrap();
        assert!(core.file_name().to_str().unwrap().starts_with("core.sh."));
        assert!(fs::read(core.path()).unwrap().starts_with(b"\x7fELF"));
        let report: Value = serde_json::from_slice(&fs::read(result).unwrap()).unwrap();
        let kernel = report["kernel"].as_str().unwrap();
        assert_eq!(
            fs::read_to_string(shared.join("file")).unwrap(),
            format!("b c {here} {kernel}\n")
        );
        assert_eq!(report["status"], 37);
        assert_eq!(report["reason"], "exited");
        assert_eq!(report["name"], "first");
        assert_eq!(report["oom-kills"], 0);
        assert!(report["peak-memory"].as_u64() > Some(1 << 20), "{report}");
        let stages = report["stages"].as_array().unwrap();
        let names: Vec<_> = stages.iter().map(|stage| &stage["name"]).collect();
        let expected = ["planned", "started", "running", "init", "ready", "command"];
        assert_eq!(names[..6], expected);
        let times = stages.iter().map(|stage| stage["at"].as_f64().unwrap());
        assert!(times.is_sorted(), "{report}");
        assert_eq!(host.vms(), [""; 0]);
    });
}

#[test]
fn detached_vm_runs_other_commands_until_it_is_stopped() {
    on_host(|host| {
        let kernel = kernels::tree(&host.path("linux"));
        let started = host.command_of(&kernel, "/", &["-d", "--name", "box"], &[]);
        let started = Running::start(started).wait();
        assert_eq!(started.status, Some(0), "{}", started.stderr);
        assert_eq!(started.stdout, b"box\n");
        for (command, status) in [
            (&["true"][..], 0),
            (&["sh", "-c", "kill -TERM $$"], 143),
            (&["/nonexistent"], 127),
            (&["/etc/passwd"], 126),
        ] {
            let args = [&["exec", "box", "--"], command].concat();
            let ended = host.minivmm(&args);
            assert_eq!(ended.status, Some(status), "{command:?}: {}", ended.stderr);
        }
        let stopped = host.minivmm(&["stop", "box", "--timeout", "60"]);
        assert_eq!(stopped.status, Some(0), "{}", stopped.stderr);
        // It is remembered, and nothing of it but its record and log is left.
        let listed = host.minivmm(&["ps", "-a", "--json"]);
        let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
        assert_eq!(listed[0]["name"], "box", "{listed}");
        assert_eq!(listed[0]["state"], "ended", "{listed}");
        let waited = host.minivmm(&["wait", "box", "--for", "exit"]);
        assert_eq!(waited.status, Some(0), "{}", waited.stderr);
        let left = fs::read_dir(host.runtime.directory.path().join("vms/box")).unwrap();
        let mut left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["log", "vm.json"]);
    });
}

#[test]
fn command_that_takes_too_long_is_ended_with_the_status_of_timeout() {
    on_host(|host| {
        // By a link, which the guest follows.
        let script = "trap 'echo terminated; exit 3' TERM; echo partial > /run/a; \
                      ln -s a /run/b; sleep 1000 & wait";
        // A guest has its own /run, and so no such directory.
        let here = TempDir::new_in("/run").unwrap();
        let file = here.path().join("minivmm.toml");
        let text = format!(
            "[defaults]\nkernel = {:?}\nmodules = {:?}\n[target.late]\ntimeout = '1s'\n\
             copy-out = '/run/b:out'\nresult = 'result.json'\ncommand = \"\"\"{script}\"\"\"\n\
             [target.none]\nkernel = '/no/such'\ncommand = 'true'\n",
            assets().bzimage(),
            assets().modules()
        );
        fs::write(&file, text).unwrap();
        let ended = host.minivmm(&["run", "--file", file.to_str().unwrap()]);
        assert_eq!(ended.status, Some(124), "{}", ended.stderr);
        let warning = format!("the guest has no directory {:?}", here.path());
        assert!(ended.stderr.contains(&warning), "{}", ended.stderr);
        let report = fs::read(here.path().join("result.json")).unwrap();
        let report: Value = serde_json::from_slice(&report).unwrap();
        let warned = report["warnings"][0].as_str().unwrap();
        assert!(warned.starts_with(&warning), "{report}");
        assert_eq!(ended.stdout, b"terminated\n", "{}", ended.stderr);
        assert!(ended.stderr.contains("more than 1 s"), "{}", ended.stderr);
        let out = fs::read_to_string(here.path().join("out")).unwrap();
        assert_eq!(out, "partial\n");
        let last: Vec<_> = ended.stderr.lines().rev().take(2).collect();
        assert_eq!(last[0], "2 targets: 0 ok, 2 failed (late, none)");
        assert!(last[1].starts_with("none: status 125, "), "{last:?}");
        assert!(ended.stderr.contains("\nlate: status 124, "), "{last:?}");
        assert_eq!(host.vms(), [""; 0]);
    });
}

#[test]
fn signal_reaches_the_command_and_a_panic_of_the_guest_is_explained() {
    on_host(|host| {
        let result = host.path("result.json");
        let share = format!("{}:/mnt", host.directory.path().display());
        let options = ["--share", &share, "--result", result.to_str().unwrap()];
        let script = "trap 'echo c > /proc/sysrq-trigger' INT; : > /mnt/ready; \
                      while :; do sleep 0.1; done";
        let run = host.run(&options, &["sh", "-c", script]);
        let ready = host.path("ready");
        assert!(eventually(|| ready.exists()));
        signal(run.child.id(), Signal::INT);
        let ended = run.wait();
        assert_eq!(ended.status, Some(125), "{}", ended.stderr);
        let report: Value = serde_json::from_slice(&fs::read(result).unwrap()).unwrap();
        assert_eq!(report["reason"], "panic", "{report}");
        for text in [
            "the guest's kernel panicked: sysrq triggered crash",
            "The guest's console said last:",
            "Kernel panic - not syncing",
        ] {
            assert!(ended.stderr.contains(text), "{text}: {}", ended.stderr);
        }
        assert_eq!(host.vms(), [""; 0]);
    });
}

#[test]
fn nothing_is_left_whichever_process_is_killed() {
    on_host(|host| {
        let run = host.run(&["--name", "killed"], &["true"]);
        host.await_vm("killed");
        let pid = run.child.id();
        let [vm] = all_children(pid)[..] else {
            panic!("{:?}", all_children(pid))
        };
        let below = all_children(vm);
        signal(pid, Signal::KILL);
        let is_gone = || !is_running(vm) && host.vms().is_empty();
        assert!(eventually(is_gone), "{:?}", host.vms());
        for pid in below {
            assert!(eventually(|| !is_running(pid)), "{pid}");
        }
        drop(run);

        let run = host.run(&["--name", "shot"], &["true"]);
        host.await_vm("shot");
        signal(all_children(run.child.id())[0], Signal::KILL);
        let ended = run.wait();
        assert_eq!(ended.status, Some(125), "{}", ended.stderr);
        assert!(
            ended.stderr.contains("process was killed"),
            "{}",
            ended.stderr
        );
        assert_eq!(host.vms(), [""; 0]);

        // What fails before there is a VM is explained too.
        for (options, why) in [
            (["--root", "/nonexistent"], "cannot use the root"),
            (["--share", "/nonexistent:/x"], "cannot share the directory"),
            (
                ["--copy-out", "/a:/nonexistent/a"],
                "cannot copy anything to",
            ),
            (["--macvtap", "nonexistent0"], "nonexistent0"),
        ] {
            let ended = host.run(&options, &["true"]).wait();
            assert_eq!(ended.status, Some(125), "{}", ended.stderr);
            assert!(ended.stderr.contains(why), "{why}: {}", ended.stderr);
        }
        assert_eq!(host.vms(), [""; 0]);
    });
}

#[test]
fn targets_of_a_file_are_chosen_run_and_shown() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("minivmm.toml");
    let text = "[defaults]\nkernel = './missing'\n[target.b]\nresult = 'b.json'\n\
                command = 'exit 1'\n[target.a]\ncommand = ['true']\n";
    fs::write(&file, text).unwrap();
    let run = |words: &[&str]| {
        let mut minivmm = Command::new(vm::binary());
        minivmm.env_remove("RUST_LOG").args(["run", "--file"]);
        minivmm.arg(&file).args(words);
        Running::start(minivmm).wait()
    };
    let ended = run(&[]);
    assert_eq!(ended.status, Some(125), "{}", ended.stderr);
    let names = [
        "\nb: status 125, ",
        "\na: status 125, ",
        "\n2 targets: 0 ok, 2 failed (b, a)\n",
    ];
    let places = names.map(|name| ended.stderr.find(name));
    assert!(
        places.iter().all(Option::is_some) && places.is_sorted(),
        "{}",
        ended.stderr
    );
    let report = fs::read(directory.path().join("b.json")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    assert_eq!(report["reason"], "setup");

    let shown = run(&["--dry-run", "a", "b"]);
    assert_eq!(shown.status, Some(0), "{}", shown.stderr);
    let expected = "# a\nminivmm run --kernel=./missing -- true\n\
                    # b\nminivmm run --kernel=./missing --result=b.json -- sh -c 'exit 1'\n";
    assert_eq!(String::from_utf8(shown.stdout).unwrap(), expected);

    let missing = run(&["c"]);
    assert_eq!(missing.status, Some(125));
    assert!(
        missing.stderr.contains("no target \"c\", but b, a"),
        "{}",
        missing.stderr
    );
    fs::write(&file, format!("{text}kernell = 'x'\n")).unwrap();
    let wrong = run(&[]);
    assert_eq!(wrong.status, Some(125));
    assert!(
        wrong.stderr.contains("minivmm.toml:8: unknown key"),
        "{}",
        wrong.stderr
    );
    assert!(!wrong.stderr.contains("status"), "{}", wrong.stderr);
}

#[test]
fn test_programs_of_cargo_run_in_a_guest_of_their_own() {
    on_host(|host| {
        let package = host.path("package");
        fs::create_dir_all(package.join("src")).unwrap();
        let manifest = "[package]\nname = \"tested\"\nedition = \"2024\"\n[workspace]\n";
        fs::write(package.join("Cargo.toml"), manifest).unwrap();
        let library = "#[test]\nfn is_in_a_guest() {\n\
                       let name = std::fs::read_to_string(\"/proc/sys/kernel/hostname\");\n\
                       assert_eq!(name.unwrap().trim(), \"cargo\");\n}\n\
                       #[test]\nfn fails() {\npanic!();\n}\n";
        fs::write(package.join("src/lib.rs"), library).unwrap();
        let path = package.to_str().unwrap();
        let kernel = format!(
            "--kernel {} --modules {}",
            assets().bzimage().display(),
            assets().modules().display()
        );
        let runner = format!(
            "{} run {kernel} --name cargo --share {path}:{path} --",
            vm::binary().display()
        );
        let mut cargo = host.runtime.command(env!("CARGO"));
        cargo.current_dir(&package);
        cargo.args(["test", "--offline", "--lib"]);
        cargo.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER", runner);
        for variable in ["CARGO_TARGET_DIR", "CARGO_BUILD_TARGET_DIR", "RUSTFLAGS"] {
            cargo.env_remove(variable);
        }
        let ended = Running::start(cargo).wait();
        // Of a test program that has failed.
        assert_eq!(ended.status, Some(101), "{}", ended.stderr);
        let stdout = String::from_utf8(ended.stdout).unwrap();
        for line in ["is_in_a_guest ... ok", "fails ... FAILED"] {
            assert!(stdout.contains(line), "{stdout}: {}", ended.stderr);
        }
        assert_eq!(host.vms(), [""; 0]);
    });
}
