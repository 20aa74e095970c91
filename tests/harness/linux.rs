//! A minivmm with Debian's kernel and our init in it.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use super::assets::{assets, cache_dir, generic};
use super::initramfs;
use super::netns::Netns;
use super::retry::{Layer, retry};
use super::vm::{Vm, binary, in_lab};

/// The longest time from start to the prompt of our init; 4 to 8 s are usual in the lab.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// A guest in the lab that writes nothing for this long while its kernel boots has met the emulator's bug (`retry.rs`).
const SILENCE: Duration = Duration::from_secs(20);

/// Boots a guest in a namespace and waits until it takes commands. `--kernel` and `--initrd` are added unless given.
pub fn boot(netns: Option<&Netns>, args: &[&str]) -> Vm {
    let mut vm = boot_command(|| command(netns, args), Vm::console);
    vm.wait_for("GUEST ready\n", BOOT_LIMIT);
    vm
}

/// Boots a guest by a command until our init's first line is in the text that `console` reads.
pub fn boot_command(make: impl Fn() -> Command, console: impl Fn(&Vm) -> String) -> Vm {
    timed_boot(make, console).0
}

/// The same, with the time that it took. In the lab a guest that falls silent or ends before that line is started again.
pub fn timed_boot(make: impl Fn() -> Command, console: impl Fn(&Vm) -> String) -> (Vm, Duration) {
    let in_lab = in_lab();
    let boot = || {
        let start = Instant::now();
        let vm = Vm::spawn(make());
        kernel_boots(&vm, &console, in_lab).map(|()| (vm, start.elapsed()))
    };
    retry(Layer::Boot, |text: &String| Some(text.clone()), boot)
        .unwrap_or_else(|text| panic!("the guest falls silent or ends in each boot:\n{text}"))
}

/// The command line of a guest: minivmm in the namespace, with its stdin open.
pub fn command(netns: Option<&Netns>, args: &[&str]) -> Command {
    let mut command = netns.map_or_else(|| Command::new(binary()), |netns| netns.command(binary()));
    if !args.contains(&"--kernel") {
        command.arg("--kernel").arg(assets().bzimage());
    }
    if !args.contains(&"--initrd") {
        command.arg("--initrd").arg(initrd());
    }
    command.arg("-v").args(args).stdin(Stdio::piped());
    command
}

/// The guest's ramdisk with iperf3.
pub fn initrd() -> PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| write("guest-tools.cpio", &guest(true)))
        .clone()
}

/// The guest's ramdisk without iperf3, for guests with little memory.
pub fn small_initrd() -> PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| write("guest.cpio", &guest(false)))
        .clone()
}

fn guest(tools: bool) -> Vec<u8> {
    initramfs::guest(&assets().modules(), tools)
}

/// The same as [`initrd`] for Debian's kernel for all machines.
pub fn generic_initrd() -> PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        write(
            "guest-generic.cpio",
            &initramfs::guest(&generic().modules(), true),
        )
    };
    PATH.get_or_init(make).clone()
}

/// The guest's ramdisk with a second kernel to go on with.
pub fn kexec_initrd() -> PathBuf {
    let assets = assets();
    let (bzimage, small) = (assets.bzimage(), small_initrd());
    let archive = initramfs::guest_with_kexec(&assets.modules(), &bzimage, &small);
    write("guest-kexec.cpio", &archive)
}

fn write(name: &str, archive: &[u8]) -> PathBuf {
    let path = cache_dir().join(name);
    // Another test process may be booting from the old one: it is replaced, not overwritten.
    let temp = cache_dir().join(format!("{name}.{}", std::process::id()));
    fs::write(&temp, archive)
        .and_then(|()| fs::rename(&temp, &path))
        .unwrap_or_else(|e| panic!("cannot write {}: {e}", path.display()));
    path
}

/// Waits for our init's first line. A guest in the lab that falls silent or ends before is an error, with what it wrote.
fn kernel_boots(vm: &Vm, console: impl Fn(&Vm) -> String, in_lab: bool) -> Result<(), String> {
    let start = Instant::now();
    let mut last = (0, start);
    loop {
        let text = console(vm);
        if text.contains("GUEST init") {
            return Ok(());
        }
        if in_lab && vm.has_ended() {
            return Err(text);
        }
        if vm.has_ended() {
            panic!("minivmm ended while the guest booted\n{}", vm.transcript());
        }
        if start.elapsed() > BOOT_LIMIT {
            panic!(
                "the guest did not boot within {BOOT_LIMIT:?}\n{}",
                vm.transcript()
            );
        }
        if text.len() != last.0 {
            last = (text.len(), Instant::now());
        } else if in_lab && last.1.elapsed() > SILENCE {
            return Err(text);
        }
        thread::sleep(Duration::from_millis(5));
    }
}
