//! The monitors, and how each is made to run the same guest: one CPU, 128 MiB, a serial console, and
//! a macvtap as its NIC.

use std::path::{Path, PathBuf};

use crate::harness::vm;
use crate::lab::machine::peer;

/// A monitor's program.
#[derive(Debug)]
pub struct Program {
    /// Its file's name.
    pub name: &'static str,
    /// Its arguments, split at spaces before the guest's values are filled in.
    args: &'static str,
    /// The kernel's command line, where the program gives it none of its own.
    pub line: &'static str,
    /// The kernels that it takes.
    pub images: &'static [Image],
}

/// A program with one of its machines and one of its ways to move frames.
#[derive(Debug)]
pub struct Monitor {
    /// As the tables name it.
    pub name: &'static str,
    /// What runs it.
    pub program: &'static Program,
    /// More arguments.
    machine: &'static str,
    /// More for the NIC, a macvtap's queue as descriptor 3; `None` for one that takes none.
    net: Option<&'static str>,
    /// Whether vhost-net moves its frames.
    pub has_vhost: bool,
}

/// A kernel as the distribution packs it, or unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Image {
    BzImage,
    Vmlinux,
}
use Image::{BzImage, Vmlinux};

impl Image {
    /// As the tables name it.
    pub fn name(self) -> &'static str {
        match self {
            BzImage => "bzImage",
            Vmlinux => "vmlinux",
        }
    }
}

/// The address of every guest's NIC.
pub const MAC: &str = "52:54:00:77:00:0b";

static MINIVMM: Program = Program {
    name: "minivmm",
    args: "{machine} --memory {memory} --kernel {kernel} --initrd {initrd} --cmdline {line}",
    line: "",
    images: &[BzImage, Vmlinux],
};

const QEMU: Program = Program {
    name: "qemu-system-x86_64",
    args: "-nodefaults -no-user-config -no-reboot -display none -accel kvm -cpu host -smp 1 -m {memory} \
           -kernel {kernel} -initrd {initrd} -append {line} -serial stdio {machine} {net}",
    line: "console=ttyS0",
    images: &[BzImage, Vmlinux],
};

/// Given a vmlinux, microvm gets nowhere on Debian's QEMU 7.2.
static MICROVM: Program = Program {
    images: &[BzImage],
    ..QEMU
};

static CLOUD_HYPERVISOR: Program = Program {
    name: "cloud-hypervisor",
    args: "--cpus boot=1 --memory size=128M --kernel {kernel} --initramfs {initrd} --cmdline {line} \
           --serial tty --console off {net}",
    line: "console=ttyS0",
    images: &[BzImage, Vmlinux],
};

static FIRECRACKER: Program = Program {
    name: "firecracker",
    args: "--no-api --config-file {config}",
    line: "console=ttyS0 reboot=k panic=1 pci=off",
    images: &[Vmlinux],
};

static CROSVM: Program = Program {
    name: "crosvm",
    args: "run --disable-sandbox --cpus 1 --mem 128 --initrd {initrd} --params {line} \
           --serial type=stdout,hardware=serial,num=1,console=true,stdin=true {net} {kernel}",
    line: "",
    images: &[BzImage, Vmlinux],
};

static KVMTOOL: Program = Program {
    name: "lkvm",
    args: "run --name bench -c 1 -m 128 -k {kernel} -i {initrd} -p {line} --console serial {net}",
    line: "",
    images: &[BzImage],
};

/// Ours first: the others get its guest's command line.
pub const MONITORS: &[Monitor] = &[
    ours("minivmm pci", "--transport pci --macvtap wire,backend=user"),
    with_vhost(ours(
        "minivmm pci, vhost",
        "--transport pci --macvtap wire,backend=vhost",
    )),
    ours(
        "minivmm mmio",
        "--transport mmio --macvtap wire,backend=user",
    ),
    with_vhost(ours(
        "minivmm mmio, vhost",
        "--transport mmio --macvtap wire,backend=vhost",
    )),
    other(
        "QEMU q35",
        &QEMU,
        "-M q35",
        Some("-netdev tap,id=n,fd=3,vhost=off -device virtio-net-pci,netdev=n,mac={mac},romfile="),
    ),
    with_vhost(other(
        "QEMU q35, vhost",
        &QEMU,
        "-M q35",
        Some("-netdev tap,id=n,fd=3,vhost=on -device virtio-net-pci,netdev=n,mac={mac},romfile="),
    )),
    other(
        "QEMU microvm",
        &MICROVM,
        "-M microvm",
        Some("-netdev tap,id=n,fd=3,vhost=off -device virtio-net-device,netdev=n,mac={mac}"),
    ),
    other(
        "Cloud Hypervisor",
        &CLOUD_HYPERVISOR,
        "",
        Some("--net fd=3,mac={mac}"),
    ),
    other("Firecracker", &FIRECRACKER, "", None),
    other("crosvm", &CROSVM, "", Some("--net tap-fd=3,mac={mac}")),
    other(
        "kvmtool",
        &KVMTOOL,
        "",
        Some("-n mode=tap,fd=3,guest_mac={mac},vhost=0"),
    ),
    with_vhost(other(
        "kvmtool, vhost",
        &KVMTOOL,
        "",
        Some("-n mode=tap,fd=3,guest_mac={mac},vhost=1"),
    )),
];

/// Those whose disks are measured: with `{disk}`, a raw image.
pub const WITH_DISKS: &[Monitor] = &[
    ours("minivmm pci", "--transport pci --disk {disk}"),
    ours(
        "minivmm pci, io_uring",
        "--transport pci --disk {disk},io=uring",
    ),
    ours("minivmm mmio", "--transport mmio --disk {disk}"),
    other(
        "QEMU q35, threads",
        &QEMU,
        "-M q35 -drive file={disk},format=raw,if=none,id=d,aio=threads -device virtio-blk-pci,drive=d",
        None,
    ),
    other(
        "QEMU q35, io_uring",
        &QEMU,
        "-M q35 -drive file={disk},format=raw,if=none,id=d,aio=io_uring -device virtio-blk-pci,drive=d",
        None,
    ),
    other(
        "QEMU microvm, threads",
        &MICROVM,
        "-M microvm -drive file={disk},format=raw,if=none,id=d,aio=threads -device virtio-blk-device,drive=d",
        None,
    ),
];

/// Makes its macvtap itself.
const fn ours(name: &'static str, machine: &'static str) -> Monitor {
    Monitor {
        name,
        program: &MINIVMM,
        machine,
        net: None,
        has_vhost: false,
    }
}

const fn other(
    name: &'static str,
    program: &'static Program,
    machine: &'static str,
    net: Option<&'static str>,
) -> Monitor {
    Monitor {
        name,
        program,
        machine,
        net,
        has_vhost: false,
    }
}

const fn with_vhost(monitor: Monitor) -> Monitor {
    Monitor {
        has_vhost: true,
        ..monitor
    }
}

/// What a guest boots with.
#[derive(Debug)]
pub struct Boot<'a> {
    pub kernel: &'a Path,
    pub initrd: &'a Path,
    pub line: &'a str,
    /// Its memory, where the monitor's arguments do not say it.
    pub memory: &'a str,
    /// Its disk, if it has one.
    pub disk: &'a Path,
    /// Where a monitor that is configured by a file finds it.
    pub config: &'a Path,
}

impl Monitor {
    /// Whether it is the one under test.
    pub fn is_ours(&self) -> bool {
        self.program.name == MINIVMM.name
    }

    /// Whether it gets a macvtap's queue as descriptor 3.
    pub fn takes_queue(&self) -> bool {
        self.net.is_some()
    }

    /// Whether its guest has a NIC.
    pub fn has_nic(&self) -> bool {
        self.is_ours() || self.takes_queue()
    }

    /// Its program, if it is here.
    pub fn path(&self) -> Option<PathBuf> {
        if self.is_ours() {
            return Some(vm::binary());
        }
        peer(self.program.name)
    }

    /// Its arguments.
    pub fn args(&self, boot: &Boot) -> Vec<String> {
        let values = [
            ("{kernel}", boot.kernel.display().to_string()),
            ("{initrd}", boot.initrd.display().to_string()),
            ("{config}", boot.config.display().to_string()),
            ("{line}", boot.line.to_owned()),
            ("{memory}", boot.memory.to_owned()),
            ("{disk}", boot.disk.display().to_string()),
            ("{mac}", MAC.to_owned()),
        ];
        let args = self.program.args.replace("{machine}", self.machine);
        let args = args.replace("{net}", self.net.unwrap_or_default());
        let fill = |word: &str| {
            let filled = values.iter();
            filled.fold(word.to_owned(), |word, (name, value)| {
                word.replace(name, value)
            })
        };
        args.split_whitespace().map(fill).collect()
    }

    /// Its arguments for a guest without a NIC.
    pub fn args_without_nic(&self, boot: &Boot) -> Vec<String> {
        let machine = self.machine.split("--macvtap").next().unwrap_or_default();
        let without = Self {
            machine,
            net: None,
            ..*self
        };
        without.args(boot)
    }

    /// What Firecracker reads.
    pub fn config(&self, boot: &Boot) -> serde_json::Value {
        serde_json::json!({
            "boot-source": {
                "kernel_image_path": boot.kernel,
                "initrd_path": boot.initrd,
                "boot_args": boot.line,
            },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
            "drives": [],
        })
    }
}
