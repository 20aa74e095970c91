//! Which kernel a guest gets, and its release.

use std::cmp::Ordering;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Where a kernel tree has its bzImage (x86_64 is a link to x86).
const IN_TREE: &str = "arch/x86/boot/bzImage";
/// The setup header's magic number and, behind the protocol's version, the offset of its text
/// (Documentation/arch/x86/boot.rst, "kernel_version").
const MAGIC_AT: u64 = 0x202;
const VERSION_AT: u64 = 0x20e;
/// What that offset counts from.
const VERSION_BASE: u64 = 0x200;
/// The most bytes of a release: UTS_RELEASE has 64 with its end.
const LONGEST_RELEASE: usize = 64;
/// What the kernel prints first, which a vmlinux has in its data.
const BANNER: &[u8] = b"Linux version ";
/// How much of a vmlinux is looked at in one step.
const STEP: usize = 1 << 20;

/// A kernel, by its image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The bzImage or vmlinux.
    pub image: PathBuf,
    /// As uname(2) will say in the guest.
    pub release: String,
    /// The kernel tree that it was built in and still is in.
    pub tree: Option<PathBuf>,
}

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The host has none.
    #[error("this host has no kernel for a guest: looked for {}", list(.tried))]
    None {
        /// The files.
        tried: Vec<PathBuf>,
    },
    /// What was asked for is neither a path nor a version.
    #[error("there is no kernel {choice:?}: looked for {}", list(.tried))]
    NotFound {
        /// What was asked for.
        choice: PathBuf,
        /// The files.
        tried: Vec<PathBuf>,
    },
    /// A kernel tree without a kernel.
    #[error("the directory {tree:?} has no {IN_TREE}")]
    NotBuilt {
        /// The directory.
        tree: PathBuf,
    },
    /// The image cannot be read.
    #[error("cannot read the kernel {image:?}")]
    Read {
        /// The file.
        image: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Neither the header of a bzImage nor the banner of a vmlinux is in it.
    #[error("the file {image:?} does not say which release of Linux it is")]
    NoRelease {
        /// The file.
        image: PathBuf,
    },
}

pub(super) fn list(paths: &[PathBuf]) -> String {
    let paths: Vec<_> = paths.iter().map(|path| format!("{path:?}")).collect();
    paths.join(", ")
}

impl KernelError {
    /// What to do about it.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::None { .. } => Some(
                "install one (Debian and Ubuntu: linux-image-amd64 or linux-image-generic, Fedora: \
                 kernel-core), or name one by --kernel"
                    .into(),
            ),
            Self::NotFound { .. } => Some(
                "give --kernel the path of a bzImage or vmlinux, a kernel tree, or a version as in \
                 /boot/vmlinuz-VERSION; or install it (Debian: linux-image-VERSION, Fedora: \
                 kernel-core-VERSION)"
                    .into(),
            ),
            Self::NotBuilt { .. } => Some("build it there with `make bzImage modules`".into()),
            Self::Read { image, source } if source.kind() == io::ErrorKind::PermissionDenied => {
                Some(format!(
                    "let this user read it, as in `sudo chmod +r {}`, or run as root",
                    image.display()
                ))
            }
            Self::Read { .. } => None,
            Self::NoRelease { .. } => {
                Some("give --kernel an x86-64 bzImage or an uncompressed vmlinux".into())
            }
        }
    }
}

/// Where a host has its kernels.
#[derive(Clone, Debug)]
pub struct Places {
    /// Its root directory.
    pub root: PathBuf,
    /// The release of the kernel that it runs.
    pub release: String,
}

impl Places {
    /// This host's.
    pub fn host() -> Self {
        Self {
            root: "/".into(),
            release: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
        }
    }

    /// The files that may be the kernel of this release.
    fn images(&self, release: &str) -> Vec<PathBuf> {
        let boot = self.root.join("boot").join(format!("vmlinuz-{release}"));
        let with_modules = self.modules(release).map(|dir| dir.join("vmlinuz"));
        [boot].into_iter().chain(with_modules).collect()
    }

    /// The directories that may have the modules of this release.
    pub fn modules(&self, release: &str) -> [PathBuf; 2] {
        ["lib/modules", "usr/lib/modules"].map(|dir| self.root.join(dir).join(release))
    }

    /// The releases of which there are an image in /boot, or beside its modules, and modules.
    fn releases(&self) -> Vec<String> {
        let boot = entries(&self.root.join("boot"));
        let boot = boot.iter().filter_map(|name| name.strip_prefix("vmlinuz-"));
        let mut all: Vec<String> = boot.map(str::to_owned).collect();
        all.extend(self.modules("").iter().flat_map(|dir| entries(dir)));
        all.retain(|release| self.modules(release).iter().any(|dir| dir.is_dir()));
        all.sort_by(|a, b| newer(b, a));
        all.dedup();
        all
    }
}

/// The names in a directory, which may not be there.
fn entries(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().into_string());
    names.filter_map(Result::ok).collect()
}

/// Compares versions: numbers by their value, all else as text.
fn newer(a: &str, b: &str) -> Ordering {
    let parts = |text: &str| -> Vec<(u64, String)> {
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let end = |digit: bool, text: &str| {
                let end = text.find(|c: char| c.is_ascii_digit() != digit);
                end.unwrap_or(text.len())
            };
            let (word, tail) = rest.split_at(end(false, rest));
            let (number, tail) = tail.split_at(end(true, tail));
            parts.push((number.parse().unwrap_or(u64::MAX), word.to_owned()));
            rest = tail;
        }
        parts
    };
    let (a, b) = (parts(a), parts(b));
    let key = |(number, word): &(u64, String)| (word.clone(), *number);
    a.iter().map(key).cmp(b.iter().map(key))
}

impl Kernel {
    /// The kernel that was asked for: a bzImage, a vmlinux, a kernel tree, or the version of one that is installed. By default
    /// that of the host, else the newest that has modules.
    ///
    /// # Errors
    ///
    /// See [`KernelError`].
    pub fn find(choice: Option<&Path>, places: &Places) -> Result<Self, KernelError> {
        let Some(choice) = choice else {
            return Self::of_host(places);
        };
        if choice.is_dir() {
            let image = choice.join(IN_TREE);
            if !image.exists() {
                let tree = choice.to_owned();
                return Err(KernelError::NotBuilt { tree });
            }
            return Self::from_image(image);
        }
        if choice.exists() {
            return Self::from_image(choice.to_owned());
        }
        let mut tried = vec![choice.to_owned()];
        // A path has a slash, and a version has none.
        if choice.components().count() == 1 {
            tried.extend(places.images(&choice.to_string_lossy()));
        }
        match tried.iter().find(|path| path.exists()) {
            Some(image) => Self::from_image(image.clone()),
            None => Err(KernelError::NotFound {
                choice: choice.to_owned(),
                tried,
            }),
        }
    }

    fn of_host(places: &Places) -> Result<Self, KernelError> {
        let mut tried = places.images(&places.release);
        let others = places.releases();
        let others = others.iter().flat_map(|release| places.images(release));
        match tried.iter().cloned().chain(others).find(|p| p.exists()) {
            Some(image) => Self::from_image(image),
            None => {
                tried.push(places.root.join("boot/vmlinuz-*"));
                Err(KernelError::None { tried })
            }
        }
    }

    fn from_image(image: PathBuf) -> Result<Self, KernelError> {
        let release = match release(&image) {
            Ok(Some(release)) => release,
            Ok(None) => return Err(KernelError::NoRelease { image }),
            Err(source) => return Err(KernelError::Read { image, source }),
        };
        let tree = tree(&image);
        Ok(Self {
            image,
            release,
            tree,
        })
    }
}

/// The kernel tree that this is the image of: in which a build has left its release.
fn tree(image: &Path) -> Option<PathBuf> {
    let image = image.canonicalize().ok()?;
    let dir = image.parent()?;
    let tree = if image.ends_with(IN_TREE) {
        dir.ancestors().nth(3)?
    } else {
        dir
    };
    let is_tree = tree.join("include/config/kernel.release").exists();
    is_tree.then(|| tree.to_owned())
}

/// The release of Linux that an image is.
fn release(image: &Path) -> io::Result<Option<String>> {
    // Opening a FIFO would wait.
    if !fs::metadata(image)?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let file = File::open(image)?;
    let mut start = [0; 4];
    let mut magic = [0; 4];
    let read = file
        .read_exact_at(&mut start, 0)
        .and_then(|()| file.read_exact_at(&mut magic, MAGIC_AT));
    match read {
        Ok(()) if &magic == b"HdrS" => of_bzimage(&file),
        Ok(()) if &start == b"\x7fELF" => of_vmlinux(&file),
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error),
        _ => Ok(None),
    }
}

fn of_bzimage(file: &File) -> io::Result<Option<String>> {
    let mut at = [0; 2];
    file.read_exact_at(&mut at, VERSION_AT)?;
    let mut text = [0; LONGEST_RELEASE];
    let at = VERSION_BASE + u64::from(u16::from_le_bytes(at));
    let length = file.read_at(&mut text, at)?;
    Ok(word(&text[..length]))
}

fn of_vmlinux(file: &File) -> io::Result<Option<String>> {
    let tail = BANNER.len() + LONGEST_RELEASE;
    let mut bytes = Vec::with_capacity(STEP + tail);
    loop {
        let kept = bytes.len();
        let read = file.take(STEP as u64).read_to_end(&mut bytes)?;
        let places = bytes.windows(BANNER.len()).enumerate();
        for (at, _) in places.filter(|(_, window)| *window == BANNER) {
            let text = &bytes[at + BANNER.len()..];
            // The text's end is still to be read, or it is the format of another message.
            let found = (text.len() >= LONGEST_RELEASE || read == 0).then(|| word(text));
            if let Some(Some(release)) = found {
                return Ok(Some(release));
            }
        }
        if read == 0 {
            return Ok(None);
        }
        let keep = (kept + read).min(tail);
        bytes.drain(..bytes.len() - keep);
    }
}

/// The first word, if it can be a release.
fn word(text: &[u8]) -> Option<String> {
    let text = &text[..text.len().min(LONGEST_RELEASE)];
    let end = text.iter().position(|byte| !byte.is_ascii_graphic())?;
    let word = std::str::from_utf8(&text[..end]).ok()?;
    let is_release = word.starts_with(|c: char| c.is_ascii_digit()) && !word.contains('/');
    is_release.then(|| word.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What of a bzImage is looked at.
    fn bzimage(version: &str) -> Vec<u8> {
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x180u16.to_le_bytes());
        image[0x380..0x380 + version.len()].copy_from_slice(version.as_bytes());
        image
    }

    fn vmlinux(before: usize, version: &str) -> Vec<u8> {
        let mut image = b"\x7fELF".to_vec();
        image.resize(0x1000, 0);
        image.extend(b"Linux version %s (%s)\0");
        image.resize(before, 1);
        image.extend(format!("Linux version {version} (me@here)").bytes());
        image.resize(image.len() + 100, 0);
        image
    }

    #[derive(Debug)]
    struct Host(tempfile::TempDir);

    impl Host {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn file(&self, path: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, bytes).unwrap();
            path
        }

        fn find(&self, choice: Option<&str>) -> Result<Kernel, KernelError> {
            let places = Places {
                root: self.0.path().into(),
                release: "6.1.0-9".into(),
            };
            Kernel::find(choice.map(Path::new), &places)
        }
    }

    #[test]
    fn release_of_an_image_is_read_from_it() {
        let host = Host::new();
        for (image, release) in [
            (
                bzimage("6.1.0-49-cloud-amd64 (a@b) #1 SMP"),
                Some("6.1.0-49-cloud-amd64"),
            ),
            (bzimage("6.18.0\0"), Some("6.18.0")),
            (bzimage("nothing"), None),
            (bzimage(&"1".repeat(65)), None),
            (bzimage("6.1/../../etc x"), None),
            (bzimage("6.1")[..0x300].to_vec(), None),
            (vmlinux(0x2000, "5.10.0+"), Some("5.10.0+")),
            (vmlinux(STEP - 3, "6.2.0"), Some("6.2.0")),
            (vmlinux(STEP - 20, "6.2.0-rc1"), Some("6.2.0-rc1")),
            (vmlinux(3 * STEP - 1, "6.3.0"), Some("6.3.0")),
            (b"\x7fELF".to_vec(), None),
            (vec![], None),
            (b"MZ".repeat(0x1000), None),
        ] {
            let path = host.file("image", image);
            match (host.find(path.to_str()), release) {
                (Ok(kernel), Some(release)) => assert_eq!(kernel.release, release),
                (Err(KernelError::NoRelease { image }), None) => assert_eq!(image, path),
                (found, release) => panic!("{release:?}: {found:?}"),
            }
        }
    }

    #[test]
    fn kernel_by_default_is_the_hosts_or_the_newest_with_modules() {
        let host = Host::new();
        let nothing = host.find(None).unwrap_err();
        assert!(nothing.remedy().unwrap().contains("kernel-core"));
        let text = nothing.to_string();
        for tried in [
            "boot/vmlinuz-6.1.0-9\"",
            "lib/modules/6.1.0-9/vmlinuz\"",
            "boot/vmlinuz-*",
        ] {
            assert!(text.contains(tried), "{text}");
        }
        host.file("boot/vmlinuz-7.0", bzimage("7.0 "));
        assert!(matches!(host.find(None), Err(KernelError::None { .. })));
        for release in ["6.9.0-2", "6.10.0-1", "5.2"] {
            host.file(&format!("boot/vmlinuz-{release}"), bzimage("6.0 "));
            host.file(&format!("lib/modules/{release}/modules.dep"), "");
        }
        let newest = host.find(None).unwrap().image;
        assert!(newest.ends_with("boot/vmlinuz-6.10.0-1"), "{newest:?}");
        host.file("usr/lib/modules/6.11/vmlinuz", bzimage("6.11 "));
        assert_eq!(host.find(None).unwrap().release, "6.11");
        host.file("lib/modules/6.1.0-9/vmlinuz", bzimage("6.1.0-9 "));
        assert_eq!(host.find(None).unwrap().release, "6.1.0-9");
    }

    #[test]
    fn kernel_is_asked_for_by_path_tree_or_version() {
        let host = Host::new();
        let path = host.file("somewhere/bzImage", bzimage("6.5 "));
        assert_eq!(host.find(path.to_str()).unwrap().image, path);
        host.file("boot/vmlinuz-6.6", bzimage("6.6 "));
        assert_eq!(host.find(Some("6.6")).unwrap().release, "6.6");

        let tree = host.0.path().join("linux");
        fs::create_dir(&tree).unwrap();
        let error = host.find(tree.to_str()).unwrap_err();
        assert!(
            error.to_string().contains("arch/x86/boot/bzImage"),
            "{error}"
        );
        let image = host.file("linux/arch/x86/boot/bzImage", bzimage("6.7+ "));
        assert_eq!(host.find(tree.to_str()).unwrap().tree, None);
        host.file("linux/include/config/kernel.release", "6.7+\n");
        let real = Some(tree.canonicalize().unwrap());
        assert_eq!(host.find(tree.to_str()).unwrap().tree, real);
        assert_eq!(host.find(image.to_str()).unwrap().tree, real);
        let vmlinux = host.file("linux/vmlinux", vmlinux(0x3000, "6.7+"));
        assert_eq!(host.find(vmlinux.to_str()).unwrap().tree, real);
    }

    #[test]
    fn kernel_that_is_not_there_is_an_error_with_all_that_was_looked_for() {
        let host = Host::new();
        let text = host.find(Some("9.9")).unwrap_err().to_string();
        for tried in ["\"9.9\"", "boot/vmlinuz-9.9", "usr/lib/modules/9.9/vmlinuz"] {
            assert!(text.contains(tried), "{text}");
        }
        let error = host.find(Some("./missing/bzImage")).unwrap_err();
        assert!(!error.to_string().contains("boot/vmlinuz"), "{error}");
        let error = host.find(Some("/dev/null")).unwrap_err();
        assert!(matches!(error, KernelError::Read { .. }), "{error}");
    }
}
