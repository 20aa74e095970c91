//! The archive that a guest's kernel unpacks and starts: our init, and the modules that it loads.
//!
//! | path | what it is |
//! | --- | --- |
//! | `/init` | the agent (`vmm/agent`) |
//! | `/modules/NAME.ko` | a module, unpacked, with its signature |
//! | `/modules/list` | a line for each module: its name, then what has to be loaded before, in that order |
//! | `/modules/load` | the names of those that the guest needs at once, in the order to load them |
//! | `/dev/console` | what the kernel opens for init, before there is a devtmpfs |
//!
//! The same input makes the same bytes: the entries have fixed owners, times and numbers.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use cpio::newc::{self, Builder, ModeFileType};

use super::kernel::{Kernel, KernelError, Places};
use super::modules::{Loadable, Modules, ModulesError, Wanted};
use crate::plan::Transport;

/// The static program that is init and agent of guests.
pub const AGENT: &[u8] = include_bytes!(env!("MINIVMM_AGENT"));

/// File systems of disks, which init loads when a disk has one, and what they use without depending on it: by
/// the names of algorithms, which only modprobe would load.
const FILE_SYSTEMS: [(&str, &[&str]); 6] = [
    ("ext4", &["crc32c_generic"]),
    ("xfs", &["crc32c_generic"]),
    (
        "btrfs",
        &["crc32c_generic", "xxhash_generic", "blake2b_generic"],
    ),
    ("f2fs", &["crc32_generic"]),
    ("squashfs", &[]),
    ("erofs", &[]),
];

/// What a guest has, as far as it takes modules. Each has sockets to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// How it reaches its devices.
    pub transport: Transport,
    /// It mounts directories of the host's.
    pub shares: bool,
    /// It keeps what is written to its root in memory.
    pub overlay: bool,
    /// Its root, or another file system that it mounts, is on a disk.
    pub disks: bool,
    /// It has NICs.
    pub nics: bool,
}

impl Needs {
    /// What init loads at once. Measured: each costs about 2 million instructions, and a page fault for each page of it.
    fn at_once(&self) -> Vec<Wanted> {
        let transport = match self.transport {
            Transport::Pci => "virtio_pci",
            Transport::Mmio => "virtio_mmio",
        };
        let needed: [(bool, &[&str]); 5] = [
            (true, &[transport]),
            (self.shares, &["virtiofs"]),
            (self.overlay, &["overlay"]),
            (self.disks, &["virtio_blk"]),
            (true, &["vmw_vsock_virtio_transport"]),
        ];
        let needed = needed.into_iter().filter(|(needed, _)| *needed);
        let mut all: Vec<_> = needed.flat_map(|(_, names)| names).copied().collect();
        let mut optional = Vec::new();
        if self.nics {
            all.push("virtio_net");
            // Families of sockets, which nearly all kernels have built in.
            optional.extend(["af_packet", "ipv6"]);
        }
        let wanted = |is_optional| move |name| Wanted { name, is_optional };
        let needed = all.into_iter().map(wanted(false));
        needed
            .chain(optional.into_iter().map(wanted(true)))
            .collect()
    }

    /// What init may load later.
    fn later(&self) -> Vec<Wanted> {
        let systems = FILE_SYSTEMS.iter().filter(|_| self.disks);
        let names = systems.flat_map(|(name, uses)| uses.iter().copied().chain([*name]));
        names
            .map(|name| Wanted {
                name,
                is_optional: true,
            })
            .collect()
    }
}

/// Why there is no archive.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// There is no kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// It has no modules, or not all that it needs.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// A file has more than 4 GiB, or the archive cannot be written.
    #[error("cannot make the initramfs")]
    Archive(#[source] io::Error),
}

impl InitramfsError {
    /// What to do about it.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Kernel(error) => error.remedy(),
            Self::Modules(error) => error.remedy(),
            Self::Archive(_) => None,
        }
    }
}

/// Makes the archive for a guest of this kernel, with its modules from `modules`, or from where the host has them.
///
/// # Errors
///
/// See [`InitramfsError`].
pub fn make(
    kernel: &Kernel,
    modules: Option<&Path>,
    needs: &Needs,
) -> Result<Vec<u8>, InitramfsError> {
    let modules = Modules::find(kernel, modules, &Places::host())?;
    let at_once = needs.at_once();
    let wanted = [at_once.clone(), needs.later()].concat();
    archive(&at_once, modules.read(&wanted)?).map_err(InitramfsError::Archive)
}

/// Lays the archive out. Of `modules`, which are in the order to load them, the first are those `at_once`.
fn archive(at_once: &[Wanted], mut modules: Vec<Loadable>) -> io::Result<Vec<u8>> {
    add_uses(&mut modules);
    let load = to_load(at_once, &modules);
    let line = |module: &Loadable| format!("{} {}", module.name, module.needs.join(" "));
    let list = modules.iter().map(line).collect::<Vec<_>>();
    let list = list.iter().map(|line| format!("{}\n", line.trim_end()));
    let list: String = list.collect();
    let load: String = load.iter().map(|name| format!("{name}\n")).collect();
    let mut files = BTreeMap::from([
        ("init".to_owned(), (0o755, AGENT)),
        ("modules/list".to_owned(), (0o644, list.as_bytes())),
        ("modules/load".to_owned(), (0o644, load.as_bytes())),
    ]);
    for module in &modules {
        files.insert(
            format!("modules/{}.ko", module.name),
            (0o644, &module.bytes),
        );
    }
    let size: usize = files.values().map(|(_, bytes)| bytes.len() + 256).sum();
    let mut archive = Archive {
        bytes: Vec::with_capacity(size + 4096),
        entries: 0,
    };
    archive.directory("dev")?;
    archive.console()?;
    archive.directory("modules")?;
    for (name, (mode, bytes)) in files {
        archive.file(&name, mode, bytes)?;
    }
    newc::trailer(archive.bytes)
}

/// Makes what file systems use a part of what has to be loaded before.
fn add_uses(modules: &mut [Loadable]) {
    for (system, uses) in FILE_SYSTEMS {
        let used = modules
            .iter()
            .filter(|module| uses.contains(&&*module.name))
            .flat_map(|module| module.needs.iter().chain([&module.name]));
        let mut before: Vec<String> = used.cloned().collect();
        if let Some(module) = modules.iter_mut().find(|module| module.name == system) {
            before.append(&mut module.needs);
            for name in before {
                if !module.needs.contains(&name) {
                    module.needs.push(name);
                }
            }
        }
    }
}

/// The modules that are needed at once, with what they depend on, in the order to load them.
fn to_load<'a>(at_once: &[Wanted], modules: &'a [Loadable]) -> Vec<&'a str> {
    let wanted = |module: &&Loadable| at_once.iter().any(|wanted| wanted.name == module.name);
    let mut load: Vec<&str> = Vec::new();
    for module in modules.iter().filter(wanted) {
        for name in module.needs.iter().chain([&module.name]) {
            if !load.contains(&&**name) {
                load.push(name);
            }
        }
    }
    load
}

/// A cpio archive in the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Debug)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, kind: ModeFileType, mode: u32) -> Builder {
        self.entries += 1;
        let entry = Builder::new(name).ino(self.entries).mode(mode);
        entry.set_mode_file_type(kind)
    }

    fn directory(&mut self, name: &str) -> io::Result<()> {
        let entry = self.entry(name, ModeFileType::Directory, 0o755).nlink(2);
        self.finish(entry, &[])
    }

    fn console(&mut self) -> io::Result<()> {
        let entry = self.entry("dev/console", ModeFileType::Char, 0o600);
        self.finish(entry.rdev_major(5).rdev_minor(1), &[])
    }

    fn file(&mut self, name: &str, mode: u32, contents: &[u8]) -> io::Result<()> {
        let entry = self.entry(name, ModeFileType::Regular, mode);
        self.finish(entry, contents)
    }

    fn finish(&mut self, entry: Builder, contents: &[u8]) -> io::Result<()> {
        let size = u32::try_from(contents.len()).map_err(io::Error::other)?;
        let mut writer = entry.write(&mut self.bytes, size);
        writer.write_all(contents)?;
        writer.finish().map(drop)
    }
}

#[cfg(test)]
mod tests;
