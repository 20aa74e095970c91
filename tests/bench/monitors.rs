//! Who is compared, and how each is started with the freestanding guest.

use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};

use crate::harness::elf::elf;
use crate::harness::vm::{self, Vm};

use super::wire::{Tap, text};

/// How QEMU reads and writes a file; minivmm chooses by itself.
#[derive(Clone, Copy, Debug)]
pub enum Aio {
    /// By io_uring.
    IoUring,
    /// By a pool of threads.
    Threads,
}

/// A monitor with what belongs to it.
#[derive(Clone, Debug)]
pub struct Monitor {
    /// As it stands in tables. QEMU's begin with its name.
    pub name: String,
    kind: Kind,
    /// The kernel moves the frames.
    vhost: bool,
}

#[derive(Clone, Debug)]
enum Kind {
    MiniVmm {
        binary: PathBuf,
        transport: &'static str,
    },
    Microvm,
    Q35,
}

/// Those of this machine; the first few of them where it is to be quick.
pub fn all(quick: bool) -> Vec<Monitor> {
    let has_vhost = Path::new("/dev/vhost-net").exists();
    let minivmm = |name: &str, binary: PathBuf, transport, vhost| Monitor {
        name: name.to_owned(),
        kind: Kind::MiniVmm { binary, transport },
        vhost,
    };
    let mut all = vec![minivmm("minivmm", vm::binary(), "pci", false)];
    if let Some(before) = std::env::var_os("BENCH_BASE").filter(|path| !path.is_empty()) {
        all.push(minivmm("minivmm, base", before.into(), "pci", false));
    }
    if !quick {
        all.push(minivmm("minivmm mmio", vm::binary(), "mmio", false));
    }
    if has_vhost {
        all.push(minivmm("minivmm vhost", vm::binary(), "pci", true));
    }
    if has_qemu() {
        all.push(qemu("QEMU microvm", Kind::Microvm, false));
        if !quick {
            all.push(qemu("QEMU q35", Kind::Q35, false));
        }
        if has_vhost {
            all.push(qemu("QEMU q35 vhost", Kind::Q35, true));
        }
    }
    all
}

/// Those of ours whose threads move the frames of a NIC.
pub fn ours() -> impl Iterator<Item = Monitor> {
    let all = all(true).into_iter();
    all.filter(|monitor| monitor.is_ours() && !monitor.vhost)
}

/// Those that have a disk.
pub fn with_disks() -> Vec<(Monitor, Aio)> {
    let mut all: Vec<_> = ours().map(|monitor| (monitor, Aio::IoUring)).collect();
    if has_qemu() {
        let kinds = [
            ("QEMU io_uring", Aio::IoUring),
            ("QEMU threads", Aio::Threads),
        ];
        all.extend(kinds.map(|(name, aio)| (qemu(name, Kind::Microvm, false), aio)));
    }
    all
}

/// QEMU's microvm, where there is a QEMU.
pub fn microvm() -> Option<Monitor> {
    has_qemu().then(|| qemu("QEMU microvm", Kind::Microvm, false))
}

/// QEMU's q35, where there is a QEMU.
pub fn q35() -> Option<Monitor> {
    has_qemu().then(|| qemu("QEMU q35", Kind::Q35, false))
}

/// QEMU's arguments for memory that other processes share.
pub fn shared_memory() -> Vec<OsString> {
    [
        "-object",
        "memory-backend-memfd,id=memory,size=128M,share=on",
        "-machine",
        "memory-backend=memory",
    ]
    .map(OsString::from)
    .into()
}

fn qemu(name: &str, kind: Kind, vhost: bool) -> Monitor {
    Monitor {
        name: name.to_owned(),
        kind,
        vhost,
    }
}

fn has_qemu() -> bool {
    let mut version = Command::new("qemu-system-x86_64");
    version.arg("--version").stdout(Stdio::null());
    version.status().is_ok_and(|status| status.success())
}

impl Monitor {
    /// Starts the freestanding guest with these options (without their `guest.`), on a macvtap if it
    /// is to have a NIC.
    pub fn start(&self, tap: Option<&Tap>, options: &str) -> Vm {
        Vm::spawn(self.command(tap, options))
    }

    /// The same with a disk instead of a NIC; `direct` circumvents the page cache.
    pub fn start_with_disk(&self, image: &Path, aio: Aio, direct: bool, options: &str) -> Vm {
        Vm::spawn(self.command_with(self.disk(image, aio, direct), options))
    }

    /// The command that starts the guest with a NIC, if it is to have one.
    pub fn command(&self, tap: Option<&Tap>, options: &str) -> Command {
        self.command_with(tap.map(|tap| self.nic(tap)).unwrap_or_default(), options)
    }

    /// The command that starts the guest with what these arguments of the monitor make.
    pub fn command_with(&self, device: Vec<OsString>, options: &str) -> Command {
        // It halts at its end: until it is killed, what the monitor has used can be read.
        let words = options.split_whitespace().chain(["end=halt"]);
        let line: String = words.map(|option| format!("guest.{option} ")).collect();
        let mut command = match &self.kind {
            Kind::MiniVmm { binary, transport } => {
                let mut command = Command::new(binary);
                command.args(["--transport", transport]);
                command
            }
            Kind::Microvm => qemu_command("microvm,accel=kvm,ioapic2=off,pit=off,pic=off,rtc=off"),
            Kind::Q35 => qemu_command("q35,accel=kvm"),
        };
        command.args(device);
        let [memory, text, kernel] = match self.kind {
            Kind::MiniVmm { .. } => ["--memory", "--cmdline", "--kernel"],
            Kind::Microvm | Kind::Q35 => ["-m", "-append", "-kernel"],
        };
        command.args([memory, "128M", text, &line]);
        command.arg(kernel).arg(elf()).stdin(Stdio::null());
        command
    }

    /// The command that has `minivmm qemu` start QEMU with what these options of its own make.
    pub fn command_by_minivmm(&self, own: &[OsString], options: &str) -> Command {
        let qemu = self.command_with(shared_memory(), options);
        let mut command = Command::new(vm::binary());
        command
            .arg("qemu")
            .args(own)
            .arg("--")
            .args(qemu.get_args());
        // The guest knows modern devices alone, and needs no ROM.
        for property in ["disable-legacy=on", "romfile="] {
            command.args(["-global", &format!("virtio-net-pci.{property}")]);
        }
        command.stdin(Stdio::null());
        command
    }

    /// Whether it is a minivmm.
    pub fn is_ours(&self) -> bool {
        matches!(self.kind, Kind::MiniVmm { .. })
    }

    /// Whether a PC's firmware comes before the guest.
    pub fn has_firmware(&self) -> bool {
        matches!(self.kind, Kind::Q35)
    }

    /// Whether its NIC is on the PCI bus, and interrupts by messages.
    pub fn has_messages(&self) -> bool {
        match self.kind {
            Kind::MiniVmm { transport, .. } => transport == "pci",
            Kind::Microvm => false,
            Kind::Q35 => true,
        }
    }

    /// The arguments for a disk. QEMU's has a thread of its own, as ours.
    fn disk(&self, image: &Path, aio: Aio, direct: bool) -> Vec<OsString> {
        let image = image.display();
        let device = match self.kind {
            Kind::MiniVmm { .. } => {
                let direct = if direct { "on" } else { "off" };
                return ["--disk".into(), format!("{image},direct={direct}").into()].into();
            }
            Kind::Microvm => "virtio-blk-device",
            Kind::Q35 => "virtio-blk-pci,disable-legacy=on",
        };
        let cache = if direct { "none" } else { "writeback" };
        let aio = match aio {
            Aio::IoUring => "io_uring",
            Aio::Threads => "threads",
        };
        // It does not wait for the lock of a guest that was just killed, whose io_uring may still have it.
        let file = format!("file={image},file.locking=off");
        [
            "-object".to_owned(),
            "iothread,id=io0".to_owned(),
            "-drive".to_owned(),
            format!("{file},if=none,id=disk0,format=raw,cache={cache},aio={aio}"),
            "-device".to_owned(),
            format!("{device},drive=disk0,iothread=io0"),
        ]
        .map(OsString::from)
        .into()
    }

    /// The arguments for a NIC on a macvtap, whose queues the monitor inherits.
    fn nic(&self, tap: &Tap) -> Vec<OsString> {
        let fds = tap.queues().iter().map(|queue| {
            fcntl_setfd(queue, FdFlags::empty()).expect("the queue is open");
            queue.as_raw_fd().to_string()
        });
        let fds = fds.collect::<Vec<_>>().join(":");
        let is_single = tap.queues().len() == 1;
        let device = match self.kind {
            Kind::MiniVmm { .. } => {
                let backend = if self.vhost { "vhost" } else { "user" };
                return [
                    "--macvtap".into(),
                    format!("fd={fds},backend={backend}").into(),
                ]
                .into();
            }
            Kind::Microvm if is_single => "virtio-net-device",
            Kind::Microvm => "virtio-net-device,mq=on",
            Kind::Q35 if is_single => "virtio-net-pci,disable-legacy=on,romfile=",
            Kind::Q35 => "virtio-net-pci,disable-legacy=on,romfile=,mq=on,vectors=6",
        };
        let key = if is_single { "fd" } else { "fds" };
        let vhost = if self.vhost { "on" } else { "off" };
        let mac = text(tap.mac);
        [
            "-netdev".to_owned(),
            format!("tap,id=net0,{key}={fds},vhost={vhost}"),
            "-device".to_owned(),
            format!("{device},netdev=net0,mac={mac}"),
        ]
        .map(OsString::from)
        .into()
    }
}

fn qemu_command(machine: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-M",
        machine,
        "-cpu",
        "qemu64",
        "-nodefaults",
        "-no-user-config",
    ]);
    command.args(["-display", "none", "-serial", "stdio", "-no-reboot"]);
    command.args(["-name", "bench,debug-threads=on"]);
    if machine.starts_with("microvm") {
        command.args(["-global", "virtio-mmio.force-legacy=false"]);
    }
    command
}
