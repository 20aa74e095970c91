//! A minivmm with Debian's kernel and our init in it.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use super::assets::{assets, cache_dir, generic};
use super::fsx::fsx;
use super::initramfs;
use super::netns::Netns;
use super::vm::{Vm, binary};

/// Boots a guest in a namespace and waits until it takes commands. `--kernel` and `--initrd` are added unless given.
pub fn boot(netns: Option<&Netns>, args: &[&str]) -> Vm {
    boot_command(command(netns, args))
}

/// Boots a guest by a command, whose console is its stdout, and waits until it takes commands.
pub fn boot_command(command: Command) -> Vm {
    let mut vm = Vm::spawn(command);
    vm.wait_for("GUEST ready\n");
    vm
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

/// The guest's ramdisk with the drivers of what is served outside its monitor.
pub fn services_initrd() -> PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let archive = initramfs::guest_of_services(&assets().modules());
        write("guest-services.cpio", &archive)
    };
    PATH.get_or_init(make).clone()
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

/// The guest's ramdisk with shared directories.
pub fn share_initrd() -> PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let archive = initramfs::guest_with_shares(&assets().modules(), &fsx());
        write("guest-shares.cpio", &archive)
    };
    PATH.get_or_init(make).clone()
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
