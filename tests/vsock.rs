//! Sockets between guest and host, by the freestanding guest: streams in both directions, half-close,
//! many connections, peers that do not read, and what the host's sockets are.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::thread;

use harness::elf::elf;
use harness::guest::Transport::{self, Mmio, Pci};
use harness::guest::{power_off, stream_bytes, succeed};
use harness::memory::held_memory;
use harness::vm::{Vm, binary};
use harness::{eventually, images, kvm_test};
use rustix::process::{Resource, Signal, getrlimit, setrlimit};
use tempfile::TempDir;
use vmm::config::{Config, ConsoleTarget};
use vmm::stats::{Stats, VsockCounters};
use vmm::{Exit, Guest};

/// The guest's services (`tests/guest/src/vsock/mod.rs`).
const QUIT: u32 = 1;
const RESET: u32 = 2;
const ECHO: u32 = 7;
const SINK: u32 = 9;
const SILENT: u32 = 13;
const SOURCE: u32 = 19;

/// The host's side.
struct Host(TempDir);

impl Host {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("vm.vsock")
    }

    /// What starts a guest with these options.
    fn command(&self, transport: Transport, options: &str) -> Command {
        let options = format!("{options} interrupts=on");
        let mut command = images::command(transport, &[], &options);
        command.arg("--vsock").arg(self.path());
        command
    }

    fn start(&self, transport: Transport, options: &str) -> Vm {
        Vm::spawn(self.command(transport, options))
    }

    /// Starts one that serves.
    fn serve(&self, transport: Transport, options: &str) -> Vm {
        let mut vm = self.start(transport, &format!("mode=vsock {options}"));
        vm.wait_for("READY vsock cid=3\n");
        vm
    }

    /// Connects to a port of the guest.
    fn connect(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        let mut line = Vec::new();
        let mut byte = [0];
        while line.last() != Some(&b'\n') && stream.read(&mut byte).unwrap() == 1 {
            line.push(byte[0]);
        }
        let line = String::from_utf8(line).unwrap();
        assert!(line.starts_with("OK "), "port {port}: {line:?}");
        stream
    }

    /// Connects in vain.
    fn is_refused(&self, port: u32) -> bool {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        // It may be closed already.
        let _ = writeln!(stream, "CONNECT {port}");
        stream
            .read(&mut [0])
            .ok()
            .filter(|count| *count > 0)
            .is_none()
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.0.path().join(format!("vm.vsock_{port}"))).unwrap()
    }

    /// Ends a guest that serves; returns its console.
    fn quit(&self, vm: Vm) -> String {
        assert!(self.is_refused(QUIT));
        succeed(vm)
    }
}

/// Writes so many bytes of the stream, and closes that half.
fn fill(mut stream: &UnixStream, bytes: usize) {
    let mut position = 0;
    while position < bytes {
        let block = stream_bytes(position, (bytes - position).min(1 << 18));
        stream.write_all(&block).unwrap();
        position += block.len();
    }
    stream.shutdown(Shutdown::Write).unwrap();
}

/// Reads the stream to its end; returns how long it was.
fn drain(mut stream: &UnixStream) -> usize {
    let mut block = vec![0; 1 << 18];
    let mut position = 0;
    loop {
        match stream.read(&mut block).unwrap() {
            0 => return position,
            count => {
                let expected = stream_bytes(position, count);
                assert!(block[..count] == expected, "wrong bytes after {position}");
                position += count;
            }
        }
    }
}

/// Sends the stream to a connection that echoes it.
fn echo(stream: &UnixStream, bytes: usize) {
    thread::scope(|scope| {
        scope.spawn(|| fill(stream, bytes));
        assert_eq!(drain(stream), bytes);
    });
}

kvm_test!(streams_pass_in_both_directions_and_each_half_closes, || {
    for (transport, bytes) in [(Mmio, 64 << 20), (Pci, 1 << 30)] {
        let host = Host::new();
        let vm = host.serve(transport, &format!("bytes={bytes}"));
        // Each side checks every byte that it gets.
        let sink = host.connect(SINK);
        fill(&sink, bytes);
        let mut answer = String::new();
        (&sink).read_to_string(&mut answer).unwrap();
        assert_eq!(answer, format!("OK {bytes}\n"));
        assert_eq!(drain(&host.connect(SOURCE)), bytes);
        echo(&host.connect(ECHO), bytes / 4);
        assert!(host.is_refused(8));
        let console = host.quit(vm);
        assert!(console.contains("OK vsock served=3 "), "{console}");
        assert!(!host.path().exists());
    }
});

kvm_test!(guest_reaches_the_hosts_ports_and_no_others, || {
    for transport in [Mmio, Pci] {
        let host = Host::new();
        let listener = host.listen(5000);
        let options = "mode=vsock-connect port=5000 count=3 bytes=1000000";
        let vm = host.start(transport, options);
        for _ in 0..3 {
            let (mut stream, _) = listener.accept().unwrap();
            thread::spawn(move || {
                let mut copy = stream.try_clone().unwrap();
                std::io::copy(&mut stream, &mut copy).unwrap();
                copy.shutdown(Shutdown::Write).unwrap();
            });
        }
        let console = succeed(vm);
        assert!(console.contains("served=3 failed=0"), "{console}");
        // No program listens there.
        let console = power_off(host.start(transport, "mode=vsock-connect port=5001 count=2"));
        assert!(console.contains("served=0 failed=2"), "{console}");
    }
});

kvm_test!(
    reset_of_the_guest_ends_its_connections_and_new_ones_reach_it,
    || {
        for transport in [Mmio, Pci] {
            let host = Host::new();
            let mut command = host.command(transport, "mode=vsock");
            command.args(["--reboot", "restart"]);
            let mut vm = Vm::spawn(command);
            vm.wait_for("READY vsock cid=3\n");
            let idle = host.connect(ECHO);
            let busy = host.connect(SILENT);
            busy.set_nonblocking(true).unwrap();
            while (&busy).write(&[0; 1 << 16]).is_ok() {}
            busy.set_nonblocking(false).unwrap();
            assert!(host.is_refused(RESET));
            for mut stream in [idle, busy] {
                // What the device had not read is lost with it, and the program hears of that.
                let end = stream.read(&mut [0]).or_else(|error| match error.kind() {
                    ErrorKind::ConnectionReset => Ok(0),
                    _ => Err(error),
                });
                assert_eq!(end.unwrap(), 0);
            }
            let begins = || vm.console().matches("READY vsock").count() == 2;
            assert!(eventually(begins), "{}", vm.transcript());
            echo(&host.connect(ECHO), 100_000);
            let console = host.quit(vm);
            assert!(console.contains("OK vsock served=1 "), "{console}");
        }
    }
);

kvm_test!(stats_count_connections_and_bytes, || {
    let host = Host::new();
    let qmp = host.0.path().join("qmp");
    let mut command = host.command(Pci, "mode=vsock");
    command.arg("--qmp").arg(&qmp);
    let mut vm = Vm::spawn(command);
    vm.wait_for("READY vsock cid=3\n");
    let stats = |options: &[&str]| {
        let mut command = Command::new(binary());
        command.arg("stats").arg(&qmp).args(options);
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    let _open = host.connect(SILENT);
    echo(&host.connect(ECHO), 1000);
    assert!(host.is_refused(8));
    let expected = VsockCounters {
        open: 1,
        from_host: 3,
        from_guest: 0,
        refused: 1,
        rx_bytes: 1000,
        tx_bytes: 1000,
    };
    let counts = || {
        serde_json::from_str::<Stats>(&stats(&["--json"]))
            .unwrap()
            .vsock
    };
    assert!(eventually(|| counts() == Some(expected)), "{:?}", counts());
    let table = stats(&[]);
    let row = table
        .lines()
        .find(|line| line.starts_with("vsock "))
        .unwrap();
    let columns: Vec<_> = row.split_whitespace().skip(1).collect();
    assert_eq!(columns, ["1", "3", "0", "1", "1.0K", "1.0K"], "{table}");
    vm_ends(vm);
});

kvm_test!(thousand_connections_are_open_at_once, || {
    const COUNT: usize = 1000;
    raise_limit();
    let host = Host::new();
    let vm = host.serve(Pci, "");
    let streams: Vec<_> = (0..COUNT).map(|_| host.connect(ECHO)).collect();
    for stream in &streams {
        fill(stream, 3000);
    }
    for stream in &streams {
        assert_eq!(drain(stream), 3000);
    }
    drop(streams);
    let console = host.quit(vm);
    assert!(console.contains("served=1000 "), "{console}");
});

/// Lets this process have more files than the usual 1,024.
fn raise_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}

kvm_test!(limit_of_connections_is_reached_and_refused, || {
    raise_limit();
    let host = Host::new();
    let vm = host.serve(Pci, "");
    let mut streams: Vec<_> = (0..1024).map(|_| host.connect(ECHO)).collect();
    assert!(host.is_refused(ECHO));
    vm.wait_for_log("refused a connection: there are 1024 already");
    streams.truncate(1000);
    // Once the device has heard of it.
    assert!(eventually(|| !host.is_refused(SOURCE)));
    drop(streams);
    assert!(eventually(|| !host.is_refused(SOURCE)));
    vm_ends(vm);
});

kvm_test!(peers_that_do_not_read_stop_only_themselves, || {
    let host = Host::new();
    let vm = host.serve(Pci, "bytes=100000000");
    let before = held_memory(vm.pid());
    // The guest does not read what these send, and these not what the guest sends.
    let deaf: Vec<_> = (0..20)
        .map(|_| {
            let mut stream = host.connect(SILENT);
            stream.set_nonblocking(true).unwrap();
            while stream.write(&[0; 1 << 16]).is_ok() {}
            stream
        })
        .collect();
    let mute: Vec<_> = (0..20).map(|_| host.connect(SOURCE)).collect();
    for _ in 0..3 {
        echo(&host.connect(ECHO), 1 << 20);
    }
    // A buffer for each that does not read, and no more.
    let grown = held_memory(vm.pid()).saturating_sub(before);
    assert!(grown < 20 * 256 + 2048, "{grown} kB");
    assert_eq!(drain(&mute[7]), 100_000_000);
    drop((deaf, mute));
    vm_ends(vm);
});

/// Ends a guest, whatever it thinks of its connections.
fn vm_ends(mut vm: Vm) {
    vm.signal(Signal::KILL);
    vm.wait_exit();
}

kvm_test!(
    socket_is_its_users_alone_and_replaced_only_when_stale,
    || {
        let host = Host::new();
        let vm = host.serve(Pci, "");
        let mode = fs::metadata(host.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut second = host.start(Pci, "mode=vsock");
        assert_eq!(second.wait_exit().code(), Some(1));
        assert!(second.log().contains("served already"), "{}", second.log());
        // The first one's is as it was.
        echo(&host.connect(ECHO), 1000);
        vm_ends(vm);
        assert!(host.path().exists());
        let vm = host.serve(Pci, "");
        host.quit(vm);
        assert!(!host.path().exists());
        fs::write(host.path(), "mine").unwrap();
        let mut third = host.start(Pci, "mode=vsock");
        assert_eq!(third.wait_exit().code(), Some(1));
        assert!(third.log().contains("is no socket"), "{}", third.log());
        assert_eq!(fs::read(host.path()).unwrap(), b"mine");
    }
);

kvm_test!(path_without_room_for_a_port_is_refused, || {
    let directory = TempDir::new().unwrap();
    let room = 107 - directory.path().as_os_str().len() - 1;
    for (length, texts) in [
        (room - 11, None),
        (room - 10, Some("it may have 96 bytes")),
        (room + 1, Some("it may have 96 bytes")),
    ] {
        let path = directory.path().join("x".repeat(length));
        let mut command = images::command(Pci, &[], "mode=hello");
        command.arg("--vsock").arg(&path);
        let mut vm = Vm::spawn(command);
        let status = vm.wait_exit().code();
        match texts {
            None => assert_eq!(status, Some(0), "{}", vm.log()),
            Some(text) => {
                assert_eq!(status, Some(1));
                assert!(vm.log().contains(text), "{}", vm.log());
            }
        }
    }
});

kvm_test!(same_cid_serves_two_guests_of_one_host, || {
    let hosts = [Host::new(), Host::new()];
    let vms = hosts.each_ref().map(|host| host.serve(Pci, ""));
    for host in &hosts {
        echo(&host.connect(ECHO), 100_000);
    }
    for (host, vm) in hosts.iter().zip(vms) {
        host.quit(vm);
    }
});

kvm_test!(
    pause_keeps_connections_and_restored_guest_hears_of_their_end,
    || {
        let host = Host::new();
        let console = host.0.path().join("console");
        let mut config = Config::new(elf());
        config.memory = "64M".parse().unwrap();
        config.cmdline = "guest.mode=vsock guest.interrupts=on".into();
        config.console = ConsoleTarget::File(console.clone());
        config.vsock = Some(host.path().to_str().unwrap().parse().unwrap());
        let guest = Guest::start(config).unwrap();
        let has_said = |text: &str| fs::read_to_string(&console).unwrap().contains(text);
        assert!(eventually(|| has_said("READY vsock")));
        let mut stream = host.connect(ECHO);
        guest.pause().unwrap();
        stream.write_all(b"paused\n").unwrap();
        // It waits, too.
        let mut early = UnixStream::connect(host.path()).unwrap();
        writeln!(early, "CONNECT {ECHO}").unwrap();
        let state = guest.save().unwrap();
        guest.resume().unwrap();
        let mut reader = BufReader::new(&stream);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, "paused\n");
        let mut answer = String::new();
        BufReader::new(&early).read_line(&mut answer).unwrap();
        assert!(answer.starts_with("OK "), "{answer}");

        // Restored, the guest has none of them.
        guest.pause().unwrap();
        drop(state);
        let state = guest.save().unwrap();
        guest.restore(state).unwrap();
        guest.resume().unwrap();
        assert!(eventually(|| has_said("RESET vsock connections=2")));
        line.clear();
        assert_eq!(reader.read_line(&mut line).unwrap(), 0);
        echo(&host.connect(ECHO), 1000);
        assert!(host.is_refused(QUIT));
        assert_eq!(guest.wait().unwrap(), Exit::PowerOff);
        assert!(!host.path().exists());
    }
);
