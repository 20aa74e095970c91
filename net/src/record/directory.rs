//! Where records are: root's in `/run/minivmm`, a user's in `/run/minivmm/UID`, which only root can make, or in
//! `XDG_RUNTIME_DIR`. What stands in a user's directory is that user's word.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

/// Root's.
const SYSTEM: &str = "/run/minivmm";

/// An open directory of records.
#[derive(Debug)]
pub struct RecordDirectory {
    fd: OwnedFd,
    path: PathBuf,
    user: u32,
    is_certain: bool,
}

impl RecordDirectory {
    /// Where this process may lock, the best place first. They need not exist.
    pub fn own() -> Vec<PathBuf> {
        let user = rustix::process::geteuid().as_raw();
        // Another's, as `sudo -E` leaves it, could be changed by that user meanwhile.
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let is_own = |dir: &PathBuf| fs::metadata(dir).is_ok_and(|found| found.uid() == user);
        let runtime = runtime.filter(is_own).map(|dir| dir.join("minivmm"));
        let system = PathBuf::from(SYSTEM);
        let of_user = system.join(user.to_string());
        [Some(system), Some(of_user), runtime]
            .into_iter()
            .flatten()
            .collect()
    }

    /// Makes one of [`Self::own`], unless it is there already.
    ///
    /// # Errors
    ///
    /// When this process may not, and when the directory above it is missing.
    pub fn make(path: &Path) -> io::Result<()> {
        make_readable(path)
    }

    /// Those of all users, the system's first.
    pub fn all() -> Vec<Self> {
        let mut all = Self::readable_own();
        for (above, below) in [(SYSTEM, ""), ("/run/user", "minivmm")] {
            let entries = fs::read_dir(above).into_iter().flatten().flatten();
            all.extend(entries.filter_map(|entry| {
                // Root has made it: whose it is stands in its name.
                let user = entry.file_name().to_str()?.parse().ok()?;
                Self::open(entry.path().join(below), Some(user)).ok()
            }));
        }
        // The same one by two ways.
        let mut seen = Vec::new();
        all.retain(|directory| {
            let id = rustix::fs::fstat(&directory.fd).map(|stat| (stat.st_dev, stat.st_ino));
            let is_new = !seen.contains(&id);
            seen.push(id);
            is_new
        });
        all
    }

    /// Those that can be relied on, the system's first.
    pub fn readable_own() -> Vec<Self> {
        let paths = Self::own().into_iter();
        paths
            .filter_map(|path| Self::open(path, None).ok())
            .collect()
    }

    /// The directory `path`, unless that is a symbolic link, as the word of `user`; as a certain one without that.
    ///
    /// # Errors
    ///
    /// When it is no directory, or may not be read.
    pub fn open(path: PathBuf, user: Option<u32>) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&path, flags, Mode::empty())?;
        let owner = rustix::fs::fstat(&fd)?.st_uid;
        Ok(Self {
            fd,
            path,
            user: user.unwrap_or(owner),
            is_certain: user.is_none(),
        })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whose word the records in it are.
    pub fn user(&self) -> u32 {
        self.user
    }

    /// Whether that can be relied on: it is root's, or this process's own.
    pub fn is_certain(&self) -> bool {
        self.is_certain
    }
}

impl AsFd for RecordDirectory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Makes the directory for the records of a user without rights, which only root can.
///
/// # Errors
///
/// When it cannot be made.
pub fn make_record_directory_for(user: u32, group: u32) -> io::Result<()> {
    make_readable(Path::new(SYSTEM))?;
    let directory = Path::new(SYSTEM).join(user.to_string());
    make_readable(&directory)?;
    std::os::unix::fs::lchown(directory, Some(user), Some(group))
}

/// Makes a directory that all may read, whatever the umask. Those above it have to exist.
pub(super) fn make_readable(directory: &Path) -> io::Result<()> {
    match fs::create_dir(directory) {
        Ok(()) => fs::set_permissions(directory, fs::Permissions::from_mode(0o755)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}
