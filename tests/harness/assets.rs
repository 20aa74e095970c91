//! Debian's stock kernel, downloaded once and kept outside the tree; never installed.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread;

use rustix::fs::{FlockOperation, flock};

/// The modules that the guest or the lab loads, found by file name in the kernel's package.
const MODULES: &[&str] = &[
    "8021q",
    "bonding",
    "bridge",
    "button",
    "crc16",
    "crc32c_generic",
    "dm-mod",
    "dummy",
    "evdev",
    "ext4",
    "failover",
    "fuse",
    "garp",
    "irqbypass",
    "jbd2",
    "kvm",
    "kvm-amd",
    "llc",
    "loop",
    "macvlan",
    "macvtap",
    "mbcache",
    "mrp",
    "net_failover",
    "overlay",
    "stp",
    "tap",
    "tls",
    "tun",
    "veth",
    "vhost",
    "vhost_iotlb",
    "vhost_net",
    "virtio",
    "virtio-rng",
    "virtio_balloon",
    "virtio_blk",
    "virtio_mmio",
    "virtio_net",
    "virtio_pci",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_ring",
    "virtiofs",
    "vmw_vsock_virtio_transport",
    "vmw_vsock_virtio_transport_common",
    "vrf",
    "vsock",
    "vsock_loopback",
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
    one_of(name, 1).1
}

/// Takes one of `count` locks, so that so many processes of the same user go on at once. Returns its number too.
pub fn one_of(name: &str, count: usize) -> (usize, fs::File) {
    fs::create_dir_all(cache_dir())
        .unwrap_or_else(|e| panic!("cannot make {}: {e}", cache_dir().display()));
    let path = |n: usize| cache_dir().join(format!("{name}.{n}"));
    let take = |n: usize, operation| {
        let file = fs::File::create(path(n))?;
        flock(&file, operation)?;
        Ok::<_, std::io::Error>((n, file))
    };
    let free = (0..count).find_map(|n| take(n, FlockOperation::NonBlockingLockExclusive).ok());
    // All are taken: any may be given back first, and who waits for the same one is spread.
    let n = std::process::id() as usize % count;
    free.map_or_else(|| take(n, FlockOperation::LockExclusive), Ok)
        .unwrap_or_else(|e| panic!("cannot lock {}: {e}", path(n).display()))
}

/// The cloud kernel, fetched when the cache has none. Panics with the remedy when it cannot be had.
pub fn assets() -> &'static Assets {
    static ASSETS: OnceLock<Assets> = OnceLock::new();
    ASSETS.get_or_init(|| cached("linux", "linux-image-cloud-amd64"))
}

/// Debian's kernel for all machines, whose configuration is another, likewise.
pub fn generic() -> &'static Assets {
    static ASSETS: OnceLock<Assets> = OnceLock::new();
    ASSETS.get_or_init(|| cached("linux-generic", "linux-image-amd64"))
}

/// A kernel of the cache, which comes from the package that this metapackage depends on.
fn cached(name: &str, meta: &str) -> Assets {
    let dir = cache_dir().join(name);
    // What is wanted today may be more than when the cache was filled.
    if !missing(&dir).is_empty() {
        let _lock = lock(&format!("{name}.lock"));
        if !missing(&dir).is_empty() {
            let complete = fetch(&dir, meta).and_then(|()| match &missing(&dir)[..] {
                [] => Ok(()),
                files => Err(format!("its package has no {}", files.join(", no "))),
            });
            complete.unwrap_or_else(|why| {
                panic!(
                    "no test kernel: {why}\nIt comes from Debian's {meta} by apt-get and dpkg-deb. On another system put \
                     bzImage, vmlinux and modules/*.ko of such a kernel into {}, and the names of modules that it has \
                     built in into modules/{BUILT_IN}",
                    dir.display()
                )
            });
        }
    }
    Assets { dir }
}

/// The file among the modules that names those that the kernel has built in, one a line.
const BUILT_IN: &str = "built-in";

/// What the cache lacks.
pub fn missing(dir: &Path) -> Vec<String> {
    let modules = dir.join("modules");
    let images = ["bzImage", "vmlinux"].map(str::to_owned);
    let images = images.into_iter().filter(|name| !dir.join(name).exists());
    let absent =
        |name: &&&str| !modules.join(format!("{name}.ko")).exists() && !is_built_in(&modules, name);
    let absent = MODULES.iter().filter(absent);
    images
        .chain(absent.map(|name| format!("{name}.ko")))
        .collect()
}

/// Whether the kernel of these modules has this one built in.
pub fn is_built_in(modules: &Path, name: &str) -> bool {
    let names = fs::read_to_string(modules.join(BUILT_IN)).unwrap_or_default();
    names.lines().any(|line| line == name)
}

fn fetch(dir: &Path, meta: &str) -> Result<(), String> {
    let temp = tempfile::tempdir_in(cache_dir())
        .map_err(|e| format!("cannot make a directory in the cache: {e}"))?;
    let root = temp.path().join("root");
    let package = download(temp.path(), meta)?;
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
        } else if name == "modules.builtin" {
            let list = String::from_utf8_lossy(&read(&file)?).into_owned();
            write(
                &out.join("modules").join(BUILT_IN),
                built_in(&list).as_bytes(),
            )?;
        } else if let Some((module, suffix)) = name.split_once(".ko")
            && MODULES.contains(&module)
        {
            let bytes = match suffix {
                "" => read(&file)?,
                ".xz" => run(Command::new("xz").arg("-dc").arg(&file))?,
                ".zst" => run(Command::new("zstd").arg("-dc").arg(&file))?,
                other => return Err(format!("{name} is compressed in an unknown way, {other}")),
            };
            write(&out.join(format!("modules/{module}.ko")), &bytes)?;
        }
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

/// The names in a `modules.builtin`, whose lines are paths such as `kernel/net/llc/llc.ko`.
pub fn built_in(list: &str) -> String {
    let names = list
        .lines()
        .filter_map(|path| path.rsplit('/').next()?.strip_suffix(".ko"));
    names.map(|name| format!("{name}\n")).collect()
}

/// Downloads the package that the metapackage depends on into `dir`; returns its path.
fn download(dir: &Path, meta: &str) -> Result<PathBuf, String> {
    // Root's apt downloads as the user _apt, who has to reach the directory.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))
        .map_err(|e| format!("{}: {e}", dir.display()))?;
    let name = match package_name(meta)? {
        Some(name) => name,
        None => {
            run(Command::new("apt-get").args(["-q", "update"]))?;
            package_name(meta)?.ok_or(format!("apt knows no {meta}"))?
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

fn package_name(meta: &str) -> Result<Option<String>, String> {
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

/// How a kernel's payload begins, what unpacks it, and the package of that.
const PACKERS: &[(&[u8], &[&str], &str)] = &[
    (b"\x1f\x8b", &["gzip", "-dc"], "gzip"),
    (b"\xfd7zXZ\0", &["xz", "-dc", "--single-stream"], "xz-utils"),
    (b"\x5d\0\0", &["xz", "-dc", "--format=lzma"], "xz-utils"),
    (b"\x28\xb5\x2f\xfd", &["zstd", "-dc"], "zstd"),
    (b"BZh", &["bzip2", "-dc"], "bzip2"),
];

/// The ELF file inside a bzImage.
///
/// Source: Documentation/arch/x86/boot.rst, payload_offset and payload_length.
pub fn vmlinux(bzimage: &[u8]) -> Result<Vec<u8>, String> {
    let payload = || {
        let setup_sectors = usize::from(*bzimage.get(0x1f1)?);
        let start = (setup_sectors + 1) * 512 + word(bzimage, 0x248)? as usize;
        let payload = bzimage.get(start..start + word(bzimage, 0x24c)? as usize)?;
        // The last four bytes are the unpacked size. The kernel's build adds it, but to gzip, which ends with it anyway.
        let added = if payload.starts_with(b"\x1f\x8b") {
            0
        } else {
            4
        };
        payload.get(..payload.len().checked_sub(added)?)
    };
    let payload = payload().ok_or("the bzImage is truncated")?;
    if let Some(blocks) = payload.strip_prefix(&LZ4_LEGACY) {
        return unpack_lz4(blocks);
    }
    let packer = PACKERS
        .iter()
        .find(|(magic, ..)| payload.starts_with(magic));
    let (_, command, package) = packer.ok_or_else(|| {
        let magic = &payload[..payload.len().min(8)];
        format!("the bzImage is compressed in an unknown way: its payload begins with {magic:02x?}")
    })?;
    filter(command, payload).map_err(|e| {
        format!("cannot unpack the bzImage: {e} (is the package {package} installed?)")
    })
}

/// The frame that the kernel's build uses for LZ4.
const LZ4_LEGACY: [u8; 4] = 0x184c_2102_u32.to_le_bytes();

fn unpack_lz4(mut blocks: &[u8]) -> Result<Vec<u8>, String> {
    const BLOCK_SIZE: usize = 8 << 20;
    let mut elf = Vec::new();
    while let Some(size) = word(blocks, 0) {
        let block = blocks
            .get(4..4 + size as usize)
            .ok_or("the bzImage's payload is truncated")?;
        elf.extend(
            lz4_flex::block::decompress(block, BLOCK_SIZE).map_err(|e| format!("bzImage: {e}"))?,
        );
        blocks = &blocks[4 + size as usize..];
    }
    Ok(elf)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// What a program makes of `input`.
fn filter(command: &[&str], input: &[u8]) -> Result<Vec<u8>, String> {
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("cannot run {}: {e}", command[0]))?;
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let output = thread::scope(|scope| {
        // A program that gives up early says why.
        scope.spawn(move || drop(stdin.write_all(input)));
        child.wait_with_output()
    });
    let output = output.map_err(|e| format!("{}: {e}", command[0]))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        let why = String::from_utf8_lossy(&output.stderr);
        Err(format!("{}: {}", command[0], why.trim()))
    }
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
