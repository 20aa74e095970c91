//! Where a copy goes, known before it comes.

use std::ffi::OsStr;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, accessat};

use super::unpack::open_directory;

/// An open directory, and what the copy is called in it. No link that comes to be there later is followed.
#[derive(Debug)]
pub struct Place {
    pub(crate) directory: OwnedFd,
    /// Of the directory, for messages.
    pub(crate) path: PathBuf,
    /// The directory itself gets what is in the copied one, if there is none.
    pub(crate) name: Option<Vec<u8>>,
}

impl Place {
    /// Finds it by the rules of `docker cp`: what is called `name`, or without one the contents of a directory, goes into
    /// a directory that is there, or else to this path.
    ///
    /// # Errors
    ///
    /// There is no directory for it, or one that this process may not write.
    pub fn find(path: &Path, name: Option<&OsStr>) -> io::Result<Self> {
        let (directory, name) = if path.is_dir() {
            (path, name)
        } else {
            let is_a_directorys = path.as_os_str().as_bytes().ends_with(b"/");
            let name = path.file_name().filter(|_| !is_a_directorys);
            let name = name.ok_or(ErrorKind::NotFound)?;
            let parent = path.parent().filter(|it| !it.as_os_str().is_empty());
            (parent.unwrap_or(Path::new(".")), Some(name))
        };
        let found = Self {
            directory: open_directory(directory)?,
            path: directory.to_owned(),
            name: name.map(|name| name.as_bytes().to_vec()),
        };
        let wanted = Access::WRITE_OK | Access::EXEC_OK;
        accessat(&found.directory, ".", wanted, AtFlags::EACCESS)?;
        Ok(found)
    }
}
