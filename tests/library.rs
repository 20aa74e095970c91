//! minivmm as a library: a guest that is paused and resumed, and whose state goes into another one.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;
mod lab;
#[path = "library/shares.rs"]
mod shares;
#[path = "harness/tiny.rs"]
mod tiny;

use std::arch::global_asm;
use std::collections::BTreeSet;
use std::fs;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use harness::elf::elf;
use harness::guest::{ECHO, Net, Transport, addresses};
use harness::{PATIENCE, eventually};
use harness::{kvm_test, lab_test, transports_test};
use tempfile::TempDir;
use vmm::config::{Config, ConsoleTarget};
use vmm::stats::PairCounters;
use vmm::{Exit, Guest, GuestError, RunState};

// Computes for ever, in registers alone, from the last byte of its command line: in EBX the last of
// EBP steps, and in the MSR KERNEL_GS_BASE and in CR8 (the local APIC's task priority) what it
// began with. It looks for the power button (IRQ 5) in the PIC's request register (Intel 8259A,
// OCW3), and then writes EBP, EBX, the MSR and CR8 to COM1 and powers off.
global_asm!(
    r#"
    .pushsection .rodata.computing_guest, "a", @progbits
computing_begin:
    mov eax, [rsi + 0x228]
2:  inc eax
    cmp byte ptr [rax], 0
    jne 2b
    movzx ebx, byte ptr [rax - 1]
    mov ecx, 0xc0000102
    mov eax, ebx
    xor edx, edx
    wrmsr
    mov eax, ebx
    and eax, 15
    mov cr8, rax
    xor ebp, ebp
    mov al, 0x0a
    out 0x20, al
3:  imul ebx, ebx, 1664525
    add ebx, 1013904223
    inc ebp
    in al, 0x20
    test al, 0x20
    jz 3b
    rdmsr
    mov esi, eax
    mov edx, 0x3f8
    mov eax, ebp
    mov ecx, 4
4:  out dx, al
    shr eax, 8
    loop 4b
    mov eax, ebx
    mov ecx, 4
5:  out dx, al
    shr eax, 8
    loop 5b
    mov eax, esi
    out dx, al
    mov rax, cr8
    out dx, al
    mov edx, 0x600
    mov al, 0x34
    out dx, al
6:  hlt
    jmp 6b
computing_end:
    .popsection
    "#
);

// SAFETY: the assembler defines these above; only their addresses are taken.
unsafe extern "C" {
    static computing_begin: u8;
    static computing_end: u8;
}

/// The computing guest and where it writes.
struct Computing {
    directory: TempDir,
    seed: u8,
}

impl Computing {
    fn new(seed: u8) -> Self {
        let begin = &raw const computing_begin;
        let size = (&raw const computing_end).addr() - begin.addr();
        // SAFETY: the bytes between the labels are one read-only section of this program.
        let code = unsafe { &*ptr::slice_from_raw_parts(begin, size) };
        let directory = TempDir::new().unwrap();
        fs::write(directory.path().join("kernel"), tiny::elf(code, 0)).unwrap();
        Self { directory, seed }
    }

    fn start(&self) -> Guest {
        let mut config = config(self.path("kernel"), self.path("console"));
        config.cmdline = char::from(self.seed).into();
        config.transport = "mmio".parse().unwrap();
        Guest::start(config).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Ends the guest by its power button; returns how many steps it took.
    fn finish(&self, guest: Guest, seed: u8) -> u32 {
        guest.press_power_button();
        self.powers_off(guest, seed)
    }

    /// Waits until the guest powers off; returns how many steps it took. All else must be as after
    /// those, from `seed`.
    fn powers_off(&self, guest: Guest, seed: u8) -> u32 {
        assert_eq!(guest.wait().unwrap(), Exit::PowerOff);
        let output = fs::read(self.path("console")).unwrap();
        let [a, b, c, d, e, f, g, h, msr, cr8] = output[..] else {
            panic!("{output:?}")
        };
        let steps = u32::from_le_bytes([a, b, c, d]);
        let next = |x: u32, _| x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let result = (0..steps).fold(seed.into(), next);
        assert_eq!(
            u32::from_le_bytes([e, f, g, h]),
            result,
            "after {steps} steps"
        );
        assert_eq!((msr, cr8), (seed, seed & 15));
        steps
    }
}

fn config(kernel: PathBuf, console: PathBuf) -> Config {
    let mut config = Config::new(kernel);
    config.memory = "128M".parse().unwrap();
    config.console = ConsoleTarget::File(console);
    config
}

/// The state of a paused guest as text.
fn saved(guest: &Guest) -> String {
    serde_json::to_string(&guest.save().unwrap()).unwrap()
}

/// What the devices have in it.
fn devices(state: &str) -> serde_json::Value {
    let mut state: serde_json::Value = serde_json::from_str(state).unwrap();
    let devices = state["devices"].take();
    assert!(!devices.is_null());
    devices
}

/// The general registers in it.
fn registers(state: &str) -> String {
    let state: serde_json::Value = serde_json::from_str(state).unwrap();
    let registers = &state["kvm"]["vcpus"][0]["regs"];
    assert!(!registers.is_null());
    registers.to_string()
}

kvm_test!(paused_guest_stands_still_and_goes_on_where_it_was, || {
    let computing = Computing::new(b'1');
    let guest = computing.start();
    for _ in 0..20 {
        thread::sleep(Duration::from_millis(20));
        assert!(matches!(guest.save(), Err(GuestError::NotPaused)));
        guest.pause().unwrap();
        assert_eq!(guest.state(), RunState::Paused);
        let stopped = registers(&saved(&guest));
        thread::sleep(Duration::from_millis(10));
        guest.pause().unwrap();
        assert_eq!(registers(&saved(&guest)), stopped);
        guest.resume().unwrap();
        assert_eq!(guest.state(), RunState::Running);
    }
    computing.finish(guest, b'1');
});

kvm_test!(state_of_a_guest_goes_on_in_another_one, || {
    let (first, second) = (Computing::new(b'1'), Computing::new(b'2'));
    let (from, to) = (first.start(), second.start());
    thread::sleep(Duration::from_millis(300));
    from.pause().unwrap();
    to.pause().unwrap();
    let state = saved(&from);
    to.restore(serde_json::from_str(&state).unwrap()).unwrap();
    assert_eq!(registers(&saved(&to)), registers(&state));
    // The first one goes back and runs that way too.
    from.resume().unwrap();
    thread::sleep(Duration::from_millis(100));
    from.pause().unwrap();
    from.restore(serde_json::from_str(&state).unwrap()).unwrap();
    for guest in [&from, &to] {
        guest.resume().unwrap();
    }
    thread::sleep(Duration::from_millis(100));
    second.finish(to, b'1');
    first.finish(from, b'1');
});

kvm_test!(guest_that_refuses_a_state_stays_as_it_was, || {
    let (first, second) = (Computing::new(b'1'), Computing::new(b'2'));
    let (from, to) = (first.start(), second.start());
    from.pause().unwrap();
    to.pause().unwrap();
    let mut state: serde_json::Value = serde_json::from_str(&saved(&from)).unwrap();
    // The last device of those in memory.
    let devices = state["devices"]["mmio"].as_object_mut().unwrap();
    devices.values_mut().last().unwrap()["device_id"] = 1000.into();
    let before = registers(&saved(&to));
    let refused = to.restore(serde_json::from_value(state).unwrap());
    assert!(
        matches!(refused, Err(GuestError::Devices(_))),
        "{refused:?}"
    );
    assert_eq!(registers(&saved(&to)), before);
    to.resume().unwrap();
    second.finish(to, b'2');
});

kvm_test!(guest_with_a_name_is_the_only_one_of_that_name, || {
    if !harness::netns::is_root() {
        return;
    }
    let computing = Computing::new(b'1');
    let start = || {
        let mut config = config(computing.path("kernel"), computing.path("console"));
        config.name = Some(format!("library-{}", std::process::id()).parse().unwrap());
        Guest::start(config)
    };
    let guest = start().unwrap();
    let error = start().unwrap_err().to_string();
    assert!(error.contains("is in use by the VM of pid"), "{error}");
    drop(guest);
    drop(start().unwrap());
});

kvm_test!(guest_that_is_paused_can_be_ended, || {
    let computing = Computing::new(b'1');
    for _ in 0..3 {
        let guest = computing.start();
        guest.pause().unwrap();
        guest.press_power_button();
        thread::sleep(Duration::from_millis(50));
        assert_eq!(guest.state(), RunState::Paused);
        guest.end();
        assert_eq!(guest.state(), RunState::Ended);
        assert!(matches!(guest.pause(), Err(GuestError::Ended)));
        assert_eq!(guest.wait().unwrap(), Exit::Quit);
    }
    // Dropped, paused or not.
    computing.start().pause().unwrap();
    drop(computing.start());
});

kvm_test!(
    power_button_of_a_paused_guest_waits_until_it_is_resumed,
    || {
        let computing = Computing::new(b'1');
        let guest = computing.start();
        guest.pause().unwrap();
        let stopped = registers(&saved(&guest));
        guest.press_power_button();
        guest.press_power_button();
        assert_eq!(registers(&saved(&guest)), stopped);
        assert_eq!(guest.state(), RunState::Paused);
        guest.resume().unwrap();
        computing.powers_off(guest, b'1');
    }
);

transports_test!(guest_with_a_nic_ends_while_it_is_paused, |net| {
    for is_dropped in [false, true] {
        let (guest, _directory) = start_echo(&net, "user");
        guest.pause().unwrap();
        if is_dropped {
            drop(guest);
        } else {
            guest.end();
            assert_eq!(guest.wait().unwrap(), Exit::Quit);
        }
    }
});

#[test]
fn guest_that_cannot_be_started_says_why() {
    let mut config = Config::new("/no/such/kernel");
    config.console = ConsoleTarget::None;
    let error = Guest::start(config).unwrap_err().to_string();
    assert!(error.contains("/no/such/kernel"), "{error}");
}

transports_test!(pauses_lose_no_frame_and_double_none, |net| {
    quit(&net, pauses_lose_none(&net, "user", restore_own_state));
});

// Where the kernel moves the frames, it has to give the queues' positions back and take them again.
lab_test!(pauses_of_vhost_net_lose_no_frame_and_double_none, || {
    for transport in [Transport::Mmio, Transport::Pci] {
        let net = Net::with(transport);
        quit(&net, pauses_lose_none(&net, "vhost", |_| {}));
    }
});

lab_test!(restores_under_vhost_net_lose_no_frame, || {
    for transport in [Transport::Mmio, Transport::Pci] {
        let net = Net::with(transport);
        // In the lab the guest, at level 3, cannot power off by its port once its task register was
        // set: QEMU's `helper_check_io` refuses a busy TSS, which it is on a processor.
        let (guest, _directory) = pauses_lose_none(&net, "vhost", restore_own_state);
        guest.end();
        assert_eq!(guest.wait().unwrap(), Exit::Quit);
    }
});

fn restore_own_state(guest: &Guest) {
    // Memory is as it was, with buffers in the rings, and frames wait in the tap.
    let state = saved(guest);
    let own = serde_json::from_str(&state).unwrap();
    guest.restore(own).unwrap();
    assert_eq!(devices(&saved(guest)), devices(&state));
}

/// Has an echo guest end itself.
fn quit(net: &Net, (guest, _directory): (Guest, TempDir)) {
    let [ip, _] = addresses(2);
    assert_eq!(net.datagram(&ip, b"quit"), b"quit");
    assert_eq!(guest.wait().unwrap(), Exit::PowerOff);
}

/// Pauses a guest again and again while frames go to and fro, and returns it.
fn pauses_lose_none(net: &Net, backend: &str, while_paused: impl Fn(&Guest)) -> (Guest, TempDir) {
    let transport = net.transport.unwrap().name();
    let [ip, _] = addresses(2);
    let (guest, directory) = start_echo(net, backend);
    // Both sides know each other's Ethernet address from here on.
    assert_eq!(net.datagram(&ip, b"hello"), b"hello");

    let traffic = Traffic::default();
    thread::scope(|scope| {
        let exchange = scope.spawn(|| net.far.enter(|| traffic.exchange(&ip)));
        let running = Until(&traffic.is_over);
        for _ in 0..10 {
            thread::sleep(Duration::from_millis(100));
            guest.pause().unwrap();
            // What is on the wire arrives, and then no more.
            let stands_still = || {
                let before = traffic.received.load(Ordering::Relaxed);
                thread::sleep(Duration::from_millis(50));
                traffic.received.load(Ordering::Relaxed) == before
            };
            assert!((0..100).any(|_| stands_still()));
            while_paused(&guest);
            guest.resume().unwrap();
        }
        drop(running);
        let frames = exchange.join().unwrap();
        println!("{transport}, {backend}: {frames} frames went and came back, each once");
        let are_counted = || {
            let stats = guest.stats().unwrap();
            let [nic] = &stats.nics[..] else {
                panic!("{stats:?}")
            };
            let PairCounters { rx, tx, .. } = nic.queues[0];
            assert_eq!((nic.vhost, nic.link), (backend == "vhost", true));
            nic.vhost || rx.frames.min(tx.frames) >= u64::from(frames)
        };
        assert!(eventually(are_counted));
    });
    (guest, directory)
}

/// Starts a guest that sends back what it gets, with the directory of its console.
fn start_echo(net: &Net, backend: &str) -> (Guest, TempDir) {
    let directory = TempDir::new().unwrap();
    let console = directory.path().join("console");
    let mut config = config(elf().to_owned(), console.clone());
    config.transport = net.transport.unwrap().name().parse().unwrap();
    config.nics = vec![format!("lower,backend={backend}").parse().unwrap()];
    let [ip, _] = addresses(2);
    config.cmdline = format!("guest.mode=echo guest.ip={ip}/24");
    let guest = net.host.enter(|| Guest::start(config).unwrap());
    wait_for(&console, "READY echo");
    (guest, directory)
}

/// Waits for `text` in a console's file.
fn wait_for(console: &Path, text: &str) {
    let is_shown = || fs::read_to_string(console).is_ok_and(|found| found.contains(text));
    assert!(eventually(is_shown), "no {text:?} on the console");
}

/// Sets a flag when dropped, also by a failed test.
struct Until<'a>(&'a AtomicBool);

impl Drop for Until<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Numbered frames to a guest that sends each of them back.
#[derive(Default)]
struct Traffic {
    is_over: AtomicBool,
    received: AtomicU32,
}

impl Traffic {
    /// Frames on their way at a time: fewer than any queue holds, so that none is lost for want of
    /// room.
    const WINDOW: u32 = 16;

    /// Sends as fast as the guest answers until it is over; returns how many.
    fn exchange(&self, ip: &str) -> u32 {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect((ip, ECHO)).unwrap();
        let (mut sent, mut missing) = (0, BTreeSet::new());
        let mut frame = [0; 1400];
        let mut patience = PATIENCE;
        loop {
            while !self.is_over.load(Ordering::Relaxed) && missing.len() < Self::WINDOW as usize {
                frame[..4].copy_from_slice(&u32::to_le_bytes(sent));
                socket.send(&frame).unwrap();
                missing.insert(sent);
                sent += 1;
            }
            if missing.is_empty() {
                // A frame that comes twice may come late.
                patience = Duration::from_millis(200);
            }
            socket.set_read_timeout(Some(patience)).unwrap();
            match socket.recv(&mut frame) {
                Ok(length) => {
                    assert_eq!(length, frame.len());
                    let number = u32::from_le_bytes(frame[..4].try_into().unwrap());
                    assert!(missing.remove(&number), "frame {number} came twice");
                    self.received.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    assert!(
                        missing.is_empty(),
                        "{missing:?} of {sent} are lost: {error}"
                    );
                    return sent;
                }
            }
        }
    }
}
