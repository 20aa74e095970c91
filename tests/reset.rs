//! `--reboot restart`: a guest that is reset begins again in the same process.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;
#[path = "harness/tiny.rs"]
mod tiny;

use std::arch::global_asm;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use harness::elf::elf;
use harness::guest::{ECHO, Net, addresses};
use harness::images::{Images, assert_journal};
use harness::memory::own_memory;
use harness::vm::{Vm, binary};
use harness::{AT_ONCE, PATIENCE, eventually};
use harness::{kvm_test, transports_test};
use rustix::process::Signal;
use tempfile::TempDir;
use vmm::config::{Config, ConsoleTarget, Reboot};
use vmm::{Exit, Guest, RunState};

// For two CPUs. Writes `new` if nothing is left of an earlier run, else `old`, then leaves its traces
// everywhere: in memory (also by the second CPU, which never stops doing so), MSRs, debug and control
// registers, local and I/O APIC, the PCI bus and the serial port. Then it does what it reads: Q powers
// off, R resets by ACPI, K by the keyboard controller, S by a string instruction, P after the mark of
// a panic, T by a triple fault; all else it writes back.
global_asm!(
    r#"
    .pushsection .rodata.reset_guest, "a", @progbits
fresh_begin:
    movzx ebx, word ptr [0x472]
    or rbx, [0x6000]
    or rbx, [0x500000]
    or rbx, [0x7fffff8]
    // From here on what was written there by the code below.
    mov ecx, 0xc0000102
    rdmsr
    cmp eax, 1
    je 1f
    mov rax, cr8
    cmp eax, 3
    je 1f
    mov rax, dr0
    cmp rax, -1
    je 1f
    mov eax, 0xfee000f0
    cmp dword ptr [rax], 0x1ff
    je 1f
    mov edi, 0xfec00000
    mov dword ptr [rdi], 0x18
    cmp dword ptr [rdi + 0x10], 0x41
    je 1f
    mov edx, 0xcf8
    in eax, dx
    cmp eax, 0x80000800
    je 1f
    mov edx, 0x3ff
    in al, dx
    cmp al, 0x55
    je 1f
    jmp 16f
1:  inc ebx
16:
    lea rsi, [rip + 8f]
    test rbx, rbx
    jz 2f
    lea rsi, [rip + 9f]
2:  mov edx, 0x3f8
    mov ecx, 4
    rep outsb

    mov rax, -1
    mov [0x500000], rax
    mov [0x7fffff8], rax
    mov dr0, rax
    mov ecx, 0xc0000102
    mov eax, 1
    xor edx, edx
    wrmsr
    mov eax, 3
    mov cr8, rax
    mov edi, 0xfec00000
    mov dword ptr [rdi], 0x18
    mov dword ptr [rdi + 0x10], 0x41
    mov edx, 0xcf8
    mov eax, 0x80000800
    out dx, eax
    mov edx, 0x3ff
    mov al, 0x55
    out dx, al
    // At 0x5000: mov byte [0x6000], 1; jmp back to it.
    mov rax, 0xf9eb01600006c6
    mov [0x5000], rax
    mov edi, 0xfee00300
    mov dword ptr [rdi - 0x210], 0x1ff
    mov dword ptr [rdi + 0x10], 0x01000000
3:  mov dword ptr [rdi], 0x4500
    mov ecx, 5000
4:  dec ecx
    jnz 4b
    mov dword ptr [rdi], 0x4605
    mov ecx, 5000
5:  dec ecx
    jnz 5b
    cmp byte ptr [0x6000], 1
    jne 3b

6:  mov edx, 0x3fd
    in al, dx
    test al, 1
    jz 6b
    mov edx, 0x3f8
    in al, dx
    cmp al, 'Q'
    je 10f
    cmp al, 'R'
    je 11f
    cmp al, 'K'
    je 12f
    cmp al, 'S'
    je 13f
    cmp al, 'P'
    je 14f
    cmp al, 'T'
    je 15f
    out dx, al
    jmp 6b
10: mov edx, 0x600
    mov al, 0x34
    out dx, al
    jmp 7f
14: mov word ptr [0x472], 0x1234
11: mov edx, 0x602
    mov al, 1
    out dx, al
    jmp 7f
12: mov edx, 0x64
    mov al, 0xfe
    out dx, al
    jmp 7f
13: mov edi, 0x700000
    mov al, 1
    mov ecx, 100000
    rep stosb
    mov edx, 0x602
    mov esi, 0x700000
    mov ecx, 100000
    rep outsb
    // What follows a reset must not be seen.
7:  mov edx, 0x3f8
    mov al, '!'
    out dx, al
    jmp 7b
15: mov rax, 0x7ffffffff000
    mov al, [rax]
8:  .ascii "new\n"
9:  .ascii "old\n"
fresh_end:

// Writes a line and resets.
loop_begin:
    mov edx, 0x3f8
    mov al, 'r'
    out dx, al
    mov al, '\n'
    out dx, al
    mov edx, 0x602
    mov al, 1
    out dx, al
2:  jmp 2b
loop_end:
    .popsection
    "#
);

// SAFETY: the assembler defines these above; only their addresses are taken.
unsafe extern "C" {
    static fresh_begin: u8;
    static fresh_end: u8;
    static loop_begin: u8;
    static loop_end: u8;
}

/// A guest of ours, as a kernel in a directory.
struct Kernel(TempDir);

impl Kernel {
    /// Says whether it is new, and does what it reads.
    fn fresh() -> Self {
        Self::of(&raw const fresh_begin, &raw const fresh_end)
    }

    /// Resets all the time.
    fn looping() -> Self {
        Self::of(&raw const loop_begin, &raw const loop_end)
    }

    fn of(begin: *const u8, end: *const u8) -> Self {
        let size = end.addr() - begin.addr();
        // SAFETY: the bytes between the labels are one read-only section of this program.
        let code = unsafe { &*ptr::slice_from_raw_parts(begin, size) };
        let directory = TempDir::new().unwrap();
        fs::write(directory.path().join("kernel"), tiny::elf(code, 0)).unwrap();
        Self(directory)
    }

    fn start(&self, args: &[&str]) -> Vm {
        let mut command = Command::new(binary());
        command.arg("--kernel").arg(self.0.path().join("kernel"));
        command.args(["--cpus", "2", "--memory", "128M", "--reboot", "restart"]);
        command.args(args).env_remove("RUST_LOG");
        command.stdin(Stdio::piped());
        Vm::spawn(command)
    }

    /// The same by the library; the console is a file beside the kernel.
    fn guest(&self, reboot: Reboot) -> Guest {
        Guest::start(self.config(reboot)).unwrap()
    }

    fn config(&self, reboot: Reboot) -> Config {
        let mut config = Config::new(self.0.path().join("kernel"));
        config.memory = "128M".parse().unwrap();
        config.cpus = "2".parse().unwrap();
        config.console = ConsoleTarget::File(self.0.path().join("console"));
        config.reboot = reboot;
        config
    }

    fn console(&self) -> String {
        fs::read_to_string(self.0.path().join("console")).unwrap_or_default()
    }
}

kvm_test!(
    guest_begins_anew_as_often_as_it_resets_by_whatever_way,
    || {
        for transport in ["pci", "mmio"] {
            let kernel = Kernel::fresh();
            let mut vm = kernel.start(&["--transport", transport, "-v"]);
            for way in ["R", "K", "S", "R", "S", "K"] {
                vm.wait_for("new\n");
                vm.send("x");
                vm.wait_for("x");
                vm.send(way);
            }
            vm.wait_for("new\n");
            vm.send("Q");
            assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
            let console = vm.console();
            assert!(!console.contains(['!']), "{console}");
            assert!(!console.contains("old"), "{console}");
            let log = vm.log();
            assert!(log.contains("the guest restarts (guest-reset)"), "{log}");
            assert!(log.contains("vcpu0 left the guest for"), "{log}");
        }
    }
);

kvm_test!(panic_and_crash_end_a_guest_that_reboots_restart, || {
    for (key, status) in [("P", 4), ("T", 3)] {
        let kernel = Kernel::fresh();
        let mut vm = kernel.start(&[]);
        vm.wait_for("new\n");
        vm.send("R");
        vm.wait_for("new\n");
        vm.send(key);
        assert_eq!(vm.wait_exit().code(), Some(status), "{}", vm.transcript());
    }
});

kvm_test!(signal_ends_a_guest_that_resets_all_the_time, || {
    let kernel = Kernel::looping();
    let mut vm = kernel.start(&[]);
    vm.wait_for("r\nr\nr\n");
    vm.signal(Signal::TERM);
    // Its next reset is its end, long before its time to power off is over.
    let status = vm.wait_exit_within(AT_ONCE);
    assert_eq!(status.code(), Some(0), "{}", vm.transcript());
    let lines = vm.log().matches("the guest restarts").count();
    assert!(lines < 20, "{}", vm.transcript());
});

kvm_test!(two_hundred_resets_leave_no_trace_in_the_monitor, || {
    let kernel = Kernel::looping();
    let mut vm = kernel.start(&["--balloon"]);
    let mut resets = |count: usize| {
        for _ in 0..count {
            vm.wait_for("r\n");
        }
        let pid = vm.pid();
        let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
        (count("fd"), own_memory(pid))
    };
    let (fds, memory) = resets(50);
    let (fds_later, memory_later) = resets(200);
    assert!(fds_later <= fds + 1, "{fds} descriptors, then {fds_later}");
    assert!(
        memory_later <= memory + 4096,
        "{memory} kB, then {memory_later} kB"
    );
    vm.signal(Signal::TERM);
    vm.wait_exit();
});

kvm_test!(kernel_that_is_gone_is_a_failure, || {
    let kernel = Kernel::fresh();
    let mut vm = kernel.start(&[]);
    vm.wait_for("new\n");
    // The file that is open is the same.
    fs::write(kernel.0.path().join("kernel"), "no kernel").unwrap();
    vm.send("R");
    assert_eq!(vm.wait_exit().code(), Some(1), "{}", vm.transcript());
    let log = vm.log();
    assert!(
        log.contains("cannot restart the guest: cannot load the kernel"),
        "{log}"
    );
});

/// The memory of the only guest in this process that shares it.
fn shared_memory() -> File {
    let mut descriptors = fs::read_dir("/proc/self/fd").unwrap().map(|fd| fd.unwrap());
    let is_memory = |fd: &fs::DirEntry| {
        let place = fs::read_link(fd.path()).unwrap_or_default();
        place.to_string_lossy().starts_with("/memfd:guest-memory")
    };
    let memory = descriptors.find(is_memory).unwrap();
    File::open(memory.path()).unwrap()
}

kvm_test!(
    memory_that_is_shared_is_a_file_and_a_reset_empties_it,
    || {
        let kernel = Kernel::fresh();
        let mut config = kernel.config(Reboot::Restart);
        config.shared_memory = true;
        let guest = Guest::start(config).unwrap();
        let memory = shared_memory();
        assert_eq!(memory.metadata().unwrap().len(), 128 << 20);
        let has_run = || {
            let mut bytes = [0; 8];
            memory.read_exact_at(&mut bytes, 0x7ff_fff8).unwrap();
            bytes == [0xff; 8]
        };
        for runs in 1..=3 {
            let begins = || kernel.console().matches("new").count() == runs;
            assert!(eventually(begins), "{}", kernel.console());
            assert!(eventually(has_run));
            guest.reset();
        }
        guest.end();
        guest.wait().unwrap();
        let console = kernel.console();
        assert!(!console.contains("old"), "{console}");
    }
);

kvm_test!(reset_button_ends_a_guest_or_restarts_it, || {
    let kernel = Kernel::fresh();
    let guest = kernel.guest(Reboot::Exit);
    guest.reset();
    assert_eq!(guest.wait().unwrap(), Exit::Reboot);

    let guest = kernel.guest(Reboot::Restart);
    let starts = || kernel.console().matches("new\n").count();
    for count in 1..5 {
        assert!(eventually(|| starts() == count), "{}", kernel.console());
        guest.reset();
    }
    assert_eq!(guest.state(), RunState::Running);
    let exits = guest.stats().unwrap().vcpus;
    assert!(exits.len() == 2 && exits[0].io_out >= 4, "{exits:?}");
    guest.end();
    assert_eq!(guest.wait().unwrap(), Exit::Quit);
    assert!(!kernel.console().contains("old"), "{}", kernel.console());
});

kvm_test!(
    system_reset_of_qmp_restarts_a_guest_and_clients_see_it,
    || {
        let kernel = Kernel::fresh();
        let socket = kernel.0.path().join("qmp");
        let mut vm = kernel.start(&["--qmp", socket.to_str().unwrap()]);
        vm.wait_for("new\n");
        let client = UnixStream::connect(&socket).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let commands = r#"{"execute": "qmp_capabilities"} {"execute": "system_reset"}"#;
        (&client).write_all(commands.as_bytes()).unwrap();
        vm.wait_for("new\n");
        vm.send("R");
        vm.wait_for("new\n");
        vm.send("Q");
        assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
        let mut said = String::new();
        (&client).read_to_string(&mut said).unwrap();
        let reasons = said.lines().filter(|line| line.contains(r#""RESET""#));
        let by_guest: Vec<_> = reasons
            .map(|line| line.contains(r#""guest-reset""#))
            .collect();
        assert_eq!(by_guest, [false, true], "{said}");
        assert_eq!(said.matches("host-qmp-system-reset").count(), 1, "{said}");
    }
);

kvm_test!(reset_of_a_paused_guest_leaves_it_paused, || {
    let kernel = Kernel::fresh();
    let guest = kernel.guest(Reboot::Restart);
    assert!(eventually(|| kernel.console() == "new\n"));
    guest.pause().unwrap();
    for _ in 0..3 {
        guest.reset();
        guest.pause().unwrap();
        assert_eq!(guest.state(), RunState::Paused);
    }
    assert_eq!(kernel.console(), "new\n");
    guest.resume().unwrap();
    assert!(eventually(|| kernel.console() == "new\nnew\n"));
    assert_eq!(guest.state(), RunState::Running);
});

// Whatever the others do meanwhile: it neither hangs nor runs on from where it was.
kvm_test!(
    resets_pauses_and_buttons_at_the_same_time_do_no_harm,
    || {
        for kernel in [Kernel::looping(), Kernel::fresh()] {
            let guest = kernel.guest(Reboot::Restart);
            thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| (0..50).for_each(|_| guest.reset()));
                    scope.spawn(|| {
                        for _ in 0..50 {
                            // Another thread may resume it before it is paused.
                            let _ = guest.pause();
                            let _ = guest.save();
                            guest.resume().unwrap();
                        }
                    });
                    scope.spawn(|| (0..50).for_each(|_| guest.press_power_button()));
                }
            });
            guest.resume().unwrap();
            let before = kernel.console().len();
            guest.reset();
            assert!(eventually(|| kernel.console().len() > before));
            guest.reset();
            guest.end();
            assert_eq!(guest.wait().unwrap(), Exit::Quit);
            assert!(
                !kernel.console().contains(['o', '!']),
                "{}",
                kernel.console()
            );
        }
    }
);

/// Starts the freestanding test guest, which begins again after a reset; its console is this file.
fn freestanding(options: &str, console: &Path, change: impl FnOnce(&mut Config)) -> Guest {
    let mut config = Config::new(elf());
    config.memory = "128M".parse().unwrap();
    config.console = ConsoleTarget::File(console.to_owned());
    config.reboot = Reboot::Restart;
    config.cmdline = options.into();
    change(&mut config);
    Guest::start(config).unwrap()
}

/// Waits until a console has shown a text so often.
fn wait_for(console: &Path, text: &str, times: usize) {
    let shown = || fs::read_to_string(console).unwrap_or_default();
    let is_there = || shown().matches(text).count() >= times;
    assert!(
        eventually(is_there),
        "{times} times {text:?} in {}",
        shown()
    );
}

/// Sets a flag when dropped, also by a failed test.
struct Until<'a>(&'a AtomicBool);

impl Drop for Until<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

transports_test!(
    nic_works_after_resets_in_full_traffic_on_its_mac,
    |net: Net| {
        const MAC: &str = "02:00:00:00:77:05";
        let directory = TempDir::new().unwrap();
        let console = directory.path().join("console");
        let [ip, _] = addresses(2);
        let transport = net.transport.unwrap().name();
        let options = format!("guest.mode=echo guest.nic=own guest.ip={ip}/24");
        let guest = net.host.enter(|| {
            freestanding(&options, &console, |config| {
                config.nics = vec![format!("lower,mac={MAC},backend=user").parse().unwrap()];
                config.transport = transport.parse().unwrap();
            })
        });
        wait_for(&console, "READY echo", 1);
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            let flood = || {
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                socket.connect((&*ip, ECHO)).unwrap();
                while !is_over.load(Ordering::Relaxed) {
                    // While the guest is away there may be no neighbour.
                    let _ = socket.send(&[7; 1400]);
                }
            };
            let far = &net.far;
            scope.spawn(move || far.enter(flood));
            let _running = Until(&is_over);
            for resets in 1..=10 {
                assert_eq!(net.datagram(&ip, b"hello"), b"hello");
                guest.reset();
                wait_for(&console, "READY echo", resets + 1);
            }
        });
        assert_eq!(net.datagram(&ip, b"hello"), b"hello");
        let neighbours = net.far.ip("neigh show dev wire");
        assert!(neighbours.contains(MAC), "{neighbours}");
        assert_eq!(net.datagram(&ip, b"quit"), b"quit");
        assert_eq!(guest.wait().unwrap(), Exit::PowerOff);
        let shown = fs::read_to_string(&console).unwrap();
        assert!(shown.contains("END failures=0"), "{shown}");
    }
);

kvm_test!(disk_is_whole_after_resets_in_the_middle_of_writes, || {
    let images = Images::in_memory();
    let open = |path: &PathBuf| File::open(path).unwrap();
    for io in ["uring", "threads", "qcow2"] {
        let is_qcow2 = io == "qcow2";
        let path = match is_qcow2 {
            true => images.qcow2("disk.qcow2", None),
            false => images.raw("disk.img"),
        };
        let keys = if is_qcow2 { "" } else { &format!(",io={io}") };
        let disk = format!("{}{keys}", path.display());
        let console = images.path("console");
        let options = "guest.mode=disk-journal guest.count=1000000";
        let guest = freestanding(options, &console, |config| {
            config.disks = vec![disk.parse().unwrap()];
        });
        for boots in 1..=8 {
            // It goes on with the next batch meanwhile.
            wait_for(&console, "FLUSHED 32\n", boots);
            guest.reset();
        }
        let shown = || fs::read_to_string(&console).unwrap();
        let last = || shown().split("FLUSHED 32\n").nth(9).map(str::to_owned);
        let goes_on = || last().is_some_and(|shown| shown.contains("FLUSHED 64\n"));
        assert!(eventually(goes_on), "{}", shown());
        guest.end();
        assert_eq!(guest.wait().unwrap(), Exit::Quit);
        let image = if is_qcow2 {
            images.unpack_killed(&path)
        } else {
            open(&path)
        };
        assert_journal(&image, 64);
        fs::remove_file(console).unwrap();
    }
});
