//! Where records are: root's in `/run/minivmm`, a user's in `/run/minivmm/UID`, which only root can make, or in
//! `XDG_RUNTIME_DIR`, or without that in `/tmp/minivmm-UID`, if that is the user's alone. What stands in a user's directory is that user's word.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

/// Root's.
const SYSTEM: &str = "/run/minivmm";
/// Where users without another place have theirs.
const TMP: &str = "/tmp";
/// How its name begins there. The user's number follows.
const PREFIX: &str = "minivmm-";
/// Its mode.
const PRIVATE: u32 = 0o700;

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
        // Root's own place is there wherever it may write.
        let last = runtime.or_else(|| (user != 0).then(|| in_tmp(user)));
        let system = PathBuf::from(SYSTEM);
        let of_user = system.join(user.to_string());
        [system, of_user].into_iter().chain(last).collect()
    }

    /// Makes one of [`Self::own`], unless it is there already.
    ///
    /// # Errors
    ///
    /// When this process may not, when the directory above it is missing, and when the one in /tmp is another user's, or open to
    /// others.
    pub fn make(path: &Path) -> io::Result<()> {
        let user = rustix::process::geteuid().as_raw();
        match path == in_tmp(user) {
            true => make_private(path, user),
            false => make_readable(path),
        }
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
        // All others may not read them.
        if rustix::process::geteuid().is_root() {
            let entries = fs::read_dir(TMP).into_iter().flatten().flatten();
            all.extend(entries.filter_map(|entry| of_user_in_tmp(&entry.path())));
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
        let user = rustix::process::geteuid().as_raw();
        let is_safe = |path: &PathBuf| *path != in_tmp(user) || check_private(path, user).is_ok();
        let paths = Self::own().into_iter().filter(is_safe);
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

fn in_tmp(user: u32) -> PathBuf {
    Path::new(TMP).join(format!("{PREFIX}{user}"))
}

/// The directory of the user who stands in its name, if it is that user's.
fn of_user_in_tmp(path: &Path) -> Option<RecordDirectory> {
    let name = path.file_name()?.to_str()?;
    let user = name.strip_prefix(PREFIX)?.parse().ok()?;
    let directory = RecordDirectory::open(path.to_owned(), Some(user)).ok()?;
    let owner = rustix::fs::fstat(&directory.fd).ok()?.st_uid;
    (owner == user).then_some(directory)
}

/// Makes a directory where everybody can make one. What is there already has to be as this would make it.
fn make_private(directory: &Path, user: u32) -> io::Result<()> {
    match DirBuilder::new().mode(PRIVATE).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    check_private(directory, user)
}

/// Whether it is no symbolic link, and a directory that this user alone can use. In a directory with the sticky bit it then stays so.
fn check_private(directory: &Path, user: u32) -> io::Result<()> {
    let found = fs::symlink_metadata(directory)?;
    match found.is_dir() && found.uid() == user && found.mode() & 0o777 == PRIVATE {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "it is not a directory of this user's alone",
        )),
    }
}

/// Makes a directory that all may read, whatever the umask. Those above it have to exist.
pub(super) fn make_readable(directory: &Path) -> io::Result<()> {
    match fs::create_dir(directory) {
        Ok(()) => fs::set_permissions(directory, fs::Permissions::from_mode(0o755)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn directory_where_everybody_can_make_one_is_the_users_alone_or_refused() {
        let above = tempfile::tempdir().unwrap();
        let path = above.path().join("minivmm-7");
        let user = rustix::process::geteuid().as_raw();
        make_private(&path, user).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(&path), 0o700);
        make_private(&path, user).unwrap();

        assert!(make_private(&path, user + 1).is_err(), "another's");
        for mode in [0o755, 0o770, 0o707] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert!(make_private(&path, user).is_err(), "{mode:o}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        let link = above.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(make_private(&link, user).is_err(), "a link");
        let file = above.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(make_private(&file, user).is_err(), "a file");
    }

    #[test]
    fn directory_in_tmp_is_of_the_user_in_its_name_who_has_made_it() {
        let above = tempfile::tempdir().unwrap();
        let user = rustix::process::geteuid().as_raw();
        let found = |name: &str| {
            let path = above.path().join(name);
            fs::create_dir(&path).unwrap();
            of_user_in_tmp(&path).map(|found| (found.user(), found.is_certain()))
        };
        let own = format!("minivmm-{user}");
        assert_eq!(found(&own), Some((user, false)));
        let others = format!("minivmm-{}", user + 1);
        for name in [&*others, "minivmm-", "minivmm-x", "7"] {
            assert_eq!(found(name), None, "{name}");
        }
    }
}
