//! Debian's stock kernel, downloaded once and kept outside the tree; never installed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use rustix::fs::{FlockOperation, flock};

/// The modules that the guest or the lab loads, found by file name in the kernel's package.
const MODULES: &[&str] = &[
    "8021q",
    "bonding",
    "bridge",
    "button",
    "dummy",
    "evdev",
    "failover",
    "garp",
    "irqbypass",
    "kvm",
    "kvm-amd",
    "llc",
    "macvlan",
    "macvtap",
    "mrp",
    "net_failover",
    "stp",
    "tap",
    "tls",
    "tun",
    "veth",
    "vhost",
    "vhost_iotlb",
    "vhost_net",
    "virtio",
    "virtio_mmio",
    "virtio_net",
    "virtio_pci",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_ring",
];

/// The kernel's files in the cache.
#[derive(Clone, Debug)]
pub struct Assets {
    dir: PathBuf,
}

impl Assets {
    /// The compressed kernel, as the distribution ships it.
    pub fn bzimage(&self) -> PathBuf {
        self.dir.join("bzImage")
    }

    /// The same kernel unpacked, an ELF file with a PVH entry.
    pub fn vmlinux(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// The directory of the modules, uncompressed, without subdirectories.
    pub fn modules(&self) -> PathBuf {
        self.dir.join("modules")
    }

    /// The directory itself: what the lab takes along.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// Where downloads are kept: `$MINIVMM_CACHE`, `$XDG_CACHE_HOME/minivmm` or `~/.cache/minivmm`.
pub fn cache_dir() -> PathBuf {
    let var = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    var("MINIVMM_CACHE")
        .or_else(|| Some(var("XDG_CACHE_HOME")?.join("minivmm")))
        .or_else(|| Some(var("HOME")?.join(".cache/minivmm")))
        .expect("one of MINIVMM_CACHE, XDG_CACHE_HOME and HOME is set")
}

/// Takes a lock that other processes of the same user wait for, until the file is dropped.
pub fn lock(name: &str) -> fs::File {
    let path = cache_dir().join(name);
    fs::create_dir_all(cache_dir())
        .unwrap_or_else(|e| panic!("cannot make {}: {e}", cache_dir().display()));
    let file =
        fs::File::create(&path).unwrap_or_else(|e| panic!("cannot create {}: {e}", path.display()));
    flock(&file, FlockOperation::LockExclusive)
        .unwrap_or_else(|e| panic!("cannot lock {}: {e}", path.display()));
    file
}

/// The kernel, fetched when the cache has none. Panics with the remedy when it cannot be had.
pub fn assets() -> &'static Assets {
    static ASSETS: OnceLock<Assets> = OnceLock::new();
    ASSETS.get_or_init(|| {
        let dir = cache_dir().join("linux");
        if !is_complete(&dir) {
            let _lock = lock("linux.lock");
            if !is_complete(&dir) {
                fetch(&dir).unwrap_or_else(|why| {
                    panic!(
                        "no test kernel: {why}\nIt comes from Debian's linux-image-cloud-amd64 by apt-get and dpkg-deb. \
                         On another system put bzImage, vmlinux and modules/*.ko of such a kernel into {}",
                        dir.display()
                    )
                });
            }
        }
        Assets { dir }
    })
}

/// Whether the cache has all that is wanted today, which may be more than when it was filled.
fn is_complete(dir: &Path) -> bool {
    let has = |module| dir.join(format!("modules/{module}.ko")).exists();
    MODULES.iter().all(has)
}

fn fetch(dir: &Path) -> Result<(), String> {
    let temp = tempfile::tempdir_in(cache_dir())
        .map_err(|e| format!("cannot make a directory in the cache: {e}"))?;
    let root = temp.path().join("root");
    let package = download(temp.path())?;
    run(Command::new("dpkg-deb").arg("-x").arg(package).arg(&root))?;

    let out = temp.path().join("linux");
    fs::create_dir_all(out.join("modules"))
        .map_err(|e| format!("cannot make {}: {e}", out.display()))?;
    for file in files_below(&root) {
        let name = file
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.starts_with("vmlinuz-") {
            let bzimage = read(&file)?;
            write(&out.join("vmlinux"), &vmlinux(&bzimage)?)?;
            write(&out.join("bzImage"), &bzimage)?;
        } else if let Some((module, suffix)) = name.split_once(".ko")
            && MODULES.contains(&module)
        {
            let bytes = match suffix {
                "" => read(&file)?,
                ".xz" => run(Command::new("xz").arg("-dc").arg(&file))?,
                other => return Err(format!("{name} is compressed in an unknown way, {other}")),
            };
            write(&out.join(format!("modules/{module}.ko")), &bytes)?;
        }
    }
    if !out.join("vmlinux").exists() {
        return Err("the package has no vmlinuz".into());
    }
    if dir.exists() {
        // It goes with the temporary directory.
        fs::rename(dir, temp.path().join("old"))
            .map_err(|e| format!("cannot put {} aside: {e}", dir.display()))?;
    }
    // Whoever sees the directory sees all of it.
    fs::rename(&out, dir)
        .map_err(|e| format!("cannot rename {} to {}: {e}", out.display(), dir.display()))
}

/// Downloads the package that the metapackage depends on into `dir`; returns its path.
fn download(dir: &Path) -> Result<PathBuf, String> {
    // Root's apt downloads as the user _apt, who has to reach the directory.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))
        .map_err(|e| format!("{}: {e}", dir.display()))?;
    let name = match package_name()? {
        Some(name) => name,
        None => {
            run(Command::new("apt-get").args(["-q", "update"]))?;
            package_name()?.ok_or("apt knows no linux-image-cloud-amd64")?
        }
    };
    run(Command::new("apt-get")
        .args(["-q", "download", &name])
        .current_dir(dir))?;
    files_below(dir)
        .into_iter()
        .find(|file| file.extension().is_some_and(|extension| extension == "deb"))
        .ok_or(format!(
            "apt-get download {name} left no package in {}",
            dir.display()
        ))
}

fn package_name() -> Result<Option<String>, String> {
    let meta = "linux-image-cloud-amd64";
    // Without package lists this ends with an error, which is an answer, too.
    let output = Command::new("apt-cache").args(["depends", meta]).output();
    let output = output.map_err(|e| format!("cannot run apt-cache: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut depends = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
    Ok(depends
        .next()
        .map(|version| format!("linux-image-{version}")))
}

/// The ELF file inside a bzImage whose payload is LZ4 (the "legacy" frame that the kernel's build uses).
///
/// Source: Documentation/arch/x86/boot.rst, payload_offset and payload_length.
fn vmlinux(bzimage: &[u8]) -> Result<Vec<u8>, String> {
    const LEGACY_MAGIC: u32 = 0x184c_2102;
    const BLOCK_SIZE: usize = 8 << 20;
    let word = |bytes: &[u8], at: usize| -> Option<u32> {
        Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
    };
    let payload = || {
        let setup_sectors = usize::from(*bzimage.get(0x1f1)?);
        let start = (setup_sectors + 1) * 512 + word(bzimage, 0x248)? as usize;
        // The last four bytes are the unpacked size, written by the kernel's build.
        bzimage.get(start..start + word(bzimage, 0x24c)? as usize - 4)
    };
    let payload = payload().ok_or("the bzImage is truncated")?;
    if word(payload, 0) != Some(LEGACY_MAGIC) {
        return Err("the bzImage's payload is not LZ4".into());
    }
    let mut elf = Vec::new();
    let mut rest = &payload[4..];
    while let Some(size) = word(rest, 0) {
        let block = rest
            .get(4..4 + size as usize)
            .ok_or("the bzImage's payload is truncated")?;
        elf.extend(
            lz4_flex::block::decompress(block, BLOCK_SIZE).map_err(|e| format!("bzImage: {e}"))?,
        );
        rest = &rest[4 + size as usize..];
    }
    Ok(elf)
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => files_below(&entry.path()),
            _ => vec![entry.path()],
        })
        .collect()
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    fs::write(path, bytes).map_err(|e| format!("cannot write {}: {e}", path.display()))
}

/// Runs a command without input to a successful end; returns what it wrote.
fn run(command: &mut Command) -> Result<Vec<u8>, String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("cannot run {command:?}: {e}"))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(format!(
            "{command:?} failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ))
    }
}
