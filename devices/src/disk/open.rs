//! Opening images: what is no image is refused with a reason, and what others write is not touched.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::lock::{self, Access, Refused};
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
    /// Not written yet.
    #[error("{0:?}: qcow2 images and ephemeral disks cannot be opened yet")]
    NotYet(PathBuf),
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
            Self::InUse { .. } => Some(
                "one guest can write an image, or several can read it with readonly=on or \
                 ephemeral=on"
                    .into(),
            ),
            Self::Empty(path) => Some(format!(
                "truncate --size=10G {} makes it a disk",
                path.display()
            )),
            Self::Open(..) | Self::Kind(..) | Self::Lock(..) | Self::NotYet(..) => None,
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
    let file = Found::at(&spec.path)?.open(access)?;
    match spec.format {
        Format::Raw if !spec.ephemeral => Ok(Storage::Raw(Arc::new(raw(spec, file)?))),
        Format::Raw | Format::Qcow2 => Err(OpenError::NotYet(spec.path.clone())),
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

    /// Where it is, without symbolic links.
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
