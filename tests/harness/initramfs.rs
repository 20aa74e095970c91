//! Initial ramdisks: for the Linux guest, and the archive writer that the lab's uses as well.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::assets::is_built_in;

/// What the guest's init loads, dependencies first: `virtio_ring` has to precede `virtio`.
const GUEST_MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "button",
    "evdev",
];

/// The guest's ramdisk: busybox, the modules for its devices and our init, `resources/guest-init`.
///
/// `tools` adds [`GUEST_TOOLS`] with their libraries (9 MB) and VLANs; without them it is small enough for a guest of 64
/// MiB.
pub fn guest(modules: &Path, tools: bool) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.base(include_bytes!("../../resources/guest-init"));
    let more: &[&str] = match tools {
        true => &["8021q", "virtio-rng", "virtio_balloon"],
        false => &[],
    };
    archive.modules(modules, &[GUEST_MODULES, more].concat());
    archive.guest_programs(if tools { GUEST_TOOLS } else { &[] });
    archive.finish()
}

/// What the agent's guests load at once, and what they load when they need it, as minivmm's own initramfs has them.
/// With vsock_loopback, by which the guest's own programs could reach the agent.
const AGENT_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "vmw_vsock_virtio_transport",
    "vsock_loopback",
];
const LATER_MODULES: &[&str] = &["virtiofs", "overlay", "ext4"];

/// The ramdisk whose init is the agent.
pub fn of_agent(agent: &Path, modules: &Path) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.file(agent, "/init");
    let (mut all, mut list) = (BTreeSet::new(), String::new());
    for name in [AGENT_MODULES, LATER_MODULES].concat() {
        let mut order = Vec::new();
        // Which ext4 asks for by the name of an algorithm.
        if name == "ext4" {
            resolve(modules, "crc32c_generic", &mut order);
        }
        resolve(modules, name, &mut order);
        // The kernel has some built in.
        if let Some((last, needs)) = order.split_last().filter(|(last, _)| *last == name) {
            list += &format!("{last} {}\n", needs.join(" "));
        }
        all.extend(order);
    }
    for name in &all {
        archive.file(
            &modules.join(format!("{name}.ko")),
            &format!("/modules/{name}.ko"),
        );
    }
    let load = AGENT_MODULES.join("\n");
    archive.bytes("/modules/list", list.as_bytes(), 0o644);
    archive.bytes("/modules/load", load.as_bytes(), 0o644);
    archive.finish()
}

/// The guest's ramdisk with the drivers of what is served outside its monitor.
pub fn guest_of_services(modules: &Path) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.base(include_bytes!("../../resources/guest-init"));
    let services = ["virtiofs", "vmw_vsock_virtio_transport"];
    archive.modules(modules, &[GUEST_MODULES, &services].concat());
    archive.finish()
}

/// The guest's ramdisk with shared directories, and what works in them: [`SHARE_TOOLS`] and fsx.
pub fn guest_with_shares(modules: &Path, fsx: &Path) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.base(include_bytes!("../../resources/guest-init"));
    archive.modules(modules, &[GUEST_MODULES, &["virtiofs"]].concat());
    archive.guest_programs(SHARE_TOOLS);
    archive.program(fsx, "/usr/bin/fsx");
    archive.finish()
}

/// The guest's ramdisk with these programs.
pub fn guest_with(modules: &Path, programs: &[(&str, &str)]) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.base(include_bytes!("../../resources/guest-init"));
    archive.modules(modules, GUEST_MODULES);
    archive.guest_programs(programs);
    archive.finish()
}

/// The guest's ramdisk with another kernel in it, `/kexec/bzImage`, whose own ramdisk is
/// `/kexec/initrd`, and what starts that.
pub fn guest_with_kexec(modules: &Path, bzimage: &Path, initrd: &Path) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.base(include_bytes!("../../resources/guest-init"));
    archive.modules(modules, GUEST_MODULES);
    archive.program(&find("kexec", "kexec-tools"), "/usr/bin/kexec");
    archive.file(bzimage, "/kexec/bzImage");
    archive.file(initrd, "/kexec/initrd");
    archive.finish()
}

/// Programs that tests run in the guest, and their packages.
pub const GUEST_TOOLS: &[(&str, &str)] = &[
    ("iperf3", "iperf3"),
    ("ethtool", "ethtool"),
    ("lspci", "pciutils"),
];

/// Programs that tests run in shared directories, and their packages. TCC is a compiler of 300 KB.
pub const SHARE_TOOLS: &[(&str, &str)] = &[
    ("git", "git"),
    ("make", "make"),
    ("tcc", "tcc"),
    ("flock", "util-linux"),
];

/// The path of an installed program; panics with the package to install.
pub fn find(program: &str, package: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(sbin)
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
        .unwrap_or_else(|| {
            panic!("no {program} here: apt-get install --no-install-recommends {package}")
        })
}

/// A cpio archive in the "newc" format.
///
/// Source: Documentation/driver-api/early-userspace/buffer-format.rst.
#[derive(Debug)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: BTreeSet<PathBuf>,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self {
            bytes: Vec::new(),
            entries: BTreeSet::new(),
        }
    }

    /// The directories, busybox and `init` that every ramdisk has.
    pub fn base(&mut self, init: &[u8]) {
        for dir in ["/dev", "/proc", "/sys", "/run", "/tmp", "/root", "/etc"] {
            self.dir(Path::new(dir));
        }
        let busybox = find("busybox", "busybox-static");
        self.program(&busybox, "/bin/busybox");
        self.symlink("/bin/sh", "busybox");
        self.bytes("/init", init, 0o755);
    }

    /// Modules with all that they depend on, and `/modules/order`, their names in the order to load
    /// them.
    pub fn modules(&mut self, dir: &Path, names: &[&str]) {
        let mut order = Vec::new();
        for name in names {
            resolve(dir, name, &mut order);
        }
        for name in &order {
            self.file(
                &dir.join(format!("{name}.ko")),
                &format!("/modules/{name}.ko"),
            );
        }
        self.bytes(
            "/modules/order",
            (order.join("\n") + "\n").as_bytes(),
            0o644,
        );
    }

    /// Programs by their names and packages, in /usr/bin.
    fn guest_programs(&mut self, programs: &[(&str, &str)]) {
        for (program, package) in programs {
            self.program(&find(program, package), &format!("/usr/bin/{program}"));
        }
    }

    /// An executable with its shared libraries.
    pub fn program(&mut self, from: &Path, to: &str) {
        self.file(from, to);
        // What ldd does, which the lab has not: the loader lists the libraries and does not run the
        // program.
        let listing = Command::new(from)
            .env("LD_TRACE_LOADED_OBJECTS", "1")
            .output();
        let listing = listing.unwrap_or_else(|e| panic!("cannot run {}: {e}", from.display()));
        let text = String::from_utf8_lossy(&listing.stdout).into_owned();
        // "libc.so.6 => /lib/libc.so.6 (0x...)"; a static program runs instead, and says something
        // else.
        let libraries = text.lines().filter(|line| line.contains(" (0x"));
        for library in libraries
            .flat_map(str::split_whitespace)
            .filter(|word| word.starts_with('/'))
        {
            if !self.entries.contains(Path::new(library)) {
                self.file(Path::new(library), library);
            }
        }
    }

    /// A copy of a file, executable when the original is.
    pub fn file(&mut self, from: &Path, to: &str) {
        use std::os::unix::fs::PermissionsExt;
        let read =
            || Ok::<_, std::io::Error>((fs::read(from)?, fs::metadata(from)?.permissions().mode()));
        let (bytes, mode) =
            read().unwrap_or_else(|e| panic!("cannot read {}: {e}", from.display()));
        self.bytes(to, &bytes, mode & 0o755);
    }

    /// A file with these bytes.
    pub fn bytes(&mut self, to: &str, bytes: &[u8], mode: u32) {
        self.parents(Path::new(to));
        self.entry(Path::new(to), 0o100_000 | mode, bytes);
    }

    /// A symbolic link.
    pub fn symlink(&mut self, at: &str, target: &str) {
        self.parents(Path::new(at));
        self.entry(Path::new(at), 0o120_777, target.as_bytes());
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry(Path::new("/TRAILER!!!"), 0, &[]);
        self.bytes
    }

    fn parents(&mut self, path: &Path) {
        if let Some(dir) = path.parent().filter(|dir| *dir != Path::new("/")) {
            self.dir(dir);
        }
    }

    fn dir(&mut self, path: &Path) {
        if !self.entries.contains(path) {
            self.parents(path);
            self.entry(path, 0o040_755, &[]);
        }
    }

    fn entry(&mut self, path: &Path, mode: u32, data: &[u8]) {
        let name = path
            .to_str()
            .expect("names are UTF-8")
            .trim_start_matches('/');
        let inode = self.entries.len() + 1;
        let links = 1;
        // magic, ino, mode, uid, gid, nlink, mtime, filesize, device (2), device of a node (2),
        // namesize, check.
        let header = format!(
            "070701{inode:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{:08x}{:032x}{:08x}{:08x}{name}\0",
            0,
            0,
            0,
            data.len(),
            0,
            name.len() + 1,
            0,
        );
        self.bytes.extend(header.as_bytes());
        self.pad();
        self.bytes.extend(data);
        self.pad();
        self.entries.insert(path.to_owned());
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// Appends `name` to `order` after what it depends on, by the `depends=` of the module's own
/// `.modinfo`.
fn resolve(dir: &Path, name: &str, order: &mut Vec<String>) {
    if order.iter().any(|known| known == name) || is_built_in(dir, name) {
        return;
    }
    let path = dir.join(format!("{name}.ko"));
    let module = fs::read(&path)
        .unwrap_or_else(|e| panic!("cannot read the module {}: {e}", path.display()));
    let depends = module
        .split(|byte| *byte == 0)
        .find_map(|text| text.strip_prefix(b"depends="));
    for dependency in String::from_utf8_lossy(depends.unwrap_or_default())
        .split(',')
        .filter(|name| !name.is_empty())
    {
        resolve(dir, dependency, order);
    }
    order.push(name.to_owned());
}
