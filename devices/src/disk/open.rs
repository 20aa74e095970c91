//! Opening images: what is no image is refused with a reason, and what others write is not touched.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::ephemeral::Ephemeral;
use super::lock::{self, Access, Refused};
use super::qcow2::{self, HeaderError};
use super::{Format, ImageSpec, RawFile, SECTOR, Storage};

/// Why an image is not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The host refuses to open it.
    #[error("cannot open the disk image {0:?}")]
    Open(PathBuf, #[source] io::Error),
    /// It can be read and not written.
    #[error("cannot open the disk image {0:?} for writing")]
    Write(PathBuf, #[source] io::Error),
    /// Neither a regular file nor a block device.
    #[error("{0:?} is {1} and no disk image")]
    Kind(PathBuf, &'static str),
    /// O_DIRECT is refused.
    #[error("cannot circumvent the page cache for the disk image {0:?}")]
    Direct(PathBuf, #[source] io::Error),
    /// It has no bytes.
    #[error("the disk image {0:?} is empty")]
    Empty(PathBuf),
    /// Not whole sectors.
    #[error("the raw disk image {0:?} has {1} bytes, which is no multiple of 512")]
    Size(PathBuf, u64),
    /// Others use it.
    #[error("the disk image {path:?} is in use{}", by(.users))]
    InUse {
        /// Of the image.
        path: PathBuf,
        /// Who: names with process IDs, as far as they could be found.
        users: Vec<String>,
    },
    /// The file system has no locks.
    #[error("cannot lock the disk image {0:?}")]
    Lock(PathBuf, #[source] io::Error),
    /// What a qcow2 image says of itself is refused.
    #[error("cannot use the qcow2 image {0:?}")]
    Header(PathBuf, #[source] HeaderError),
    /// A qcow2 image is damaged.
    #[error("cannot read the tables of the qcow2 image {0:?}")]
    Tables(PathBuf, #[source] io::Error),
    /// The file below an image is refused: the image, the name in it, why.
    #[error("cannot use the backing file {1:?} of the disk image {0:?}")]
    Backing(PathBuf, PathBuf, #[source] Box<OpenError>),
    /// An image does not say in which format its backing file is.
    #[error("its format is not named in {0:?}")]
    BackingFormatMissing(PathBuf, PathBuf),
    /// An image says that its backing file is in another format.
    #[error("its format is {0:?}, not raw or qcow2")]
    BackingFormat(String),
    /// A file that is below itself.
    #[error("the file is part of the image already: they are in a loop")]
    BackingLoop,
    /// Too many files, one below the other.
    #[error("the image has more than {0} files")]
    BackingDepth(usize),
    /// A file that the image must not make minivmm open.
    #[error("{0:?} does not lie in a directory of the image's ({1:?})")]
    BackingOutside(PathBuf, PathBuf),
    /// There is no file for what an ephemeral disk has written to it.
    #[error("cannot make a file in {0:?} for what is written to an ephemeral disk")]
    Ephemeral(PathBuf, #[source] io::Error),
}

fn by(users: &[String]) -> String {
    match users {
        [] => String::new(),
        users => format!(" by {}", users.join(", ")),
    }
}

impl OpenError {
    /// What the user can do.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Open(path, error) if error.kind() == io::ErrorKind::NotFound => Some(format!(
                "qemu-img create -f raw {} 10G makes one",
                path.display()
            )),
            Self::Write(..) => Some("readonly=on or ephemeral=on leaves the image as it is".into()),
            Self::Direct(..) => Some("leave out direct=on".into()),
            Self::Size(path, _) => Some(format!(
                "truncate --size=%512 {} fills up the last sector",
                path.display()
            )),
            Self::Empty(path) => Some(format!(
                "truncate --size=10G {} makes it a disk",
                path.display()
            )),
            Self::InUse { .. } => Some(
                "one guest can write an image, or several can read it with readonly=on or \
                 ephemeral=on"
                    .into(),
            ),
            Self::Header(path, error) => {
                let remedy = error.remedy()?;
                Some(remedy.replace("IMAGE", &path.display().to_string()))
            }
            Self::Tables(path, _) => Some(format!("qemu-img check {} says more", path.display())),
            Self::Backing(image, _, source) => match source.as_ref() {
                Self::Open(..) => Some(format!(
                    "qemu-img rebase -u -F FORMAT -b FILE {} names another",
                    image.display()
                )),
                source => source.remedy(),
            },
            Self::BackingFormatMissing(image, backing) => Some(format!(
                "qemu-img rebase -u -F raw -b {} {} names it (or -F qcow2, if it is that)",
                backing.display(),
                image.display()
            )),
            Self::BackingFormat(_) | Self::BackingDepth(_) => {
                Some("qemu-img convert -O qcow2 makes one image of them all".into())
            }
            Self::BackingOutside(path, _) => Some(format!("backing={} allows it", path.display())),
            Self::Ephemeral(..) => Some("TMPDIR=DIRECTORY names another place".into()),
            Self::Open(..) | Self::Kind(..) | Self::Lock(..) | Self::BackingLoop => None,
        }
    }
}

/// Opens an image, and locks it as long as it is open: against everybody if it is written, against
/// those who write it otherwise.
///
/// # Errors
///
/// [`OpenError`]: nothing has been changed then.
pub fn open(spec: &ImageSpec) -> Result<Storage, OpenError> {
    let access = match spec.readonly || spec.ephemeral {
        true => Access::Read,
        false => Access::Write,
    };
    let found = Found::at(&spec.path)?;
    let file = found.open(access)?;
    let storage = match spec.format {
        Format::Raw => Storage::Raw(Arc::new(raw(spec, file)?)),
        Format::Qcow2 => Storage::Image(Arc::new(qcow2::open(spec, &found, file, access)?)),
    };
    match spec.ephemeral {
        true => Ok(Storage::Image(Arc::new(Ephemeral::new(storage)?))),
        false => Ok(storage),
    }
}

/// The raw image in a file.
fn raw(spec: &ImageSpec, file: File) -> Result<RawFile, OpenError> {
    let path = || spec.path.clone();
    let refused = |error| OpenError::Open(path(), error);
    match length(&file).map_err(refused)? {
        0 => return Err(OpenError::Empty(path())),
        size if !size.is_multiple_of(SECTOR) => return Err(OpenError::Size(path(), size)),
        _ => {}
    }
    let mut start = [0; 4];
    if file.read_exact_at(&mut start, 0).is_ok() && u32::from_be_bytes(start) == qcow2::MAGIC {
        log::warn!(
            "{:?} begins as a qcow2 image does, and is used as raw. If it was made as one, give \
             format=qcow2; a guest that had it as raw can have written that too",
            spec.path
        );
    }
    if spec.direct {
        make_direct(&file).map_err(|error| OpenError::Direct(path(), error))?;
    }
    RawFile::new(file).map_err(refused)
}

/// A file that is there and may hold an image. It is not open yet: to open a device can have effects.
#[derive(Debug)]
pub(super) struct Found {
    path: PathBuf,
    handle: File,
    /// Device and inode.
    pub id: (u64, u64),
    /// Whether it is a block device.
    pub is_device: bool,
}

impl Found {
    /// Looks what is at `path`.
    pub fn at(path: &Path) -> Result<Self, OpenError> {
        let refused = |error| OpenError::Open(path.into(), error);
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_PATH);
        let handle = options.open(path).map_err(refused)?;
        let metadata = handle.metadata().map_err(refused)?;
        let kind = metadata.file_type();
        let wrong = match () {
            () if kind.is_file() || kind.is_block_device() => None,
            () if kind.is_dir() => Some("a directory"),
            () if kind.is_fifo() => Some("a FIFO"),
            () if kind.is_socket() => Some("a socket"),
            () if kind.is_char_device() => Some("a character device"),
            () => Some("something else"),
        };
        match wrong {
            Some(wrong) => Err(OpenError::Kind(path.into(), wrong)),
            None => Ok(Self {
                path: path.into(),
                handle,
                id: (metadata.dev(), metadata.ino()),
                is_device: kind.is_block_device(),
            }),
        }
    }

    /// Opens what was found, and not what may be at the path by now; and locks it.
    pub fn open(&self, access: Access) -> Result<File, OpenError> {
        let path = || self.path.clone();
        let write = access == Access::Write;
        let file =
            self.reopen(write)
                .map_err(|error| match write && self.reopen(false).is_ok() {
                    true => OpenError::Write(path(), error),
                    false => OpenError::Open(path(), error),
                })?;
        lock::take(&file, access).map_err(|refused| match refused {
            Refused::Used(users) => OpenError::InUse {
                path: path(),
                users,
            },
            Refused::Failed(error) => OpenError::Lock(path(), error),
        })?;
        Ok(file)
    }

    fn reopen(&self, write: bool) -> io::Result<File> {
        let mut options = OpenOptions::new();
        // A removable device may wait for its medium.
        let options = options
            .read(true)
            .write(write)
            .custom_flags(libc::O_NONBLOCK);
        options.open(self.link())
    }

    /// The path at which it was looked for.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where it is, without symbolic links.
    pub fn location(&self) -> io::Result<PathBuf> {
        std::fs::read_link(self.link())
    }

    fn link(&self) -> String {
        format!("/proc/self/fd/{}", self.handle.as_raw_fd())
    }
}

/// Bytes of a file or a block device.
pub(super) fn length(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// Has a file circumvent the page cache.
pub(super) fn make_direct(file: &File) -> io::Result<()> {
    // SAFETY: F_GETFL takes an open descriptor, which `file` owns, and no argument.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    // SAFETY: F_SETFL takes an open descriptor, which `file` owns, and a number.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_DIRECT) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests;
