//! The files that a guest's start reads and writes: none is written that is anything else as well. And files that others
//! read meanwhile.

use std::fmt;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::stdio::{stderr, stdin, stdout};

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The kernel's image.
    Kernel,
    /// The initial RAM disk.
    Initrd,
    /// A disk's image, which its lock keeps from other guests.
    Disk,
    /// What the guest reads on its console.
    Input,
    /// What the guest writes on its console.
    Console,
    /// What passes a NIC.
    Capture,
    /// What happens to the guest.
    Events,
    /// minivmm's own log.
    Log,
}

impl Role {
    fn is_written(self) -> bool {
        matches!(
            self,
            Self::Console | Self::Capture | Self::Events | Self::Log
        )
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "the kernel",
            Self::Initrd => "the initrd",
            Self::Disk => "a disk",
            Self::Input => "the console's input",
            Self::Console => "the console",
            Self::Capture => "a NIC's capture",
            Self::Events => "the events",
            Self::Log => "the log",
        })
    }
}

/// A file with two uses, one of which would write over the other.
#[derive(Debug, thiserror::Error)]
#[error("{writer} cannot be written to {path:?}, which is {other} too: give another file")]
pub struct SharedFile {
    writer: Role,
    other: Role,
    path: PathBuf,
}

/// The files so far, by device and inode.
#[derive(Debug, Default)]
pub struct Files(Vec<(Role, u64, u64)>);

impl Files {
    /// The standard streams, of which the console has two where it is `on_stdio`. What they share is
    /// the choice of the program that opened them.
    pub fn standard(on_stdio: bool) -> Self {
        let mut files = Self::default();
        let console = [(Role::Input, stdin()), (Role::Console, stdout())];
        let console = console.into_iter().filter(|_| on_stdio);
        for (role, stream) in console.chain([(Role::Log, stderr())]) {
            if let Ok(metadata) = metadata(stream) {
                files.push(role, &metadata);
            }
        }
        files
    }

    /// Adds a file.
    ///
    /// # Errors
    ///
    /// Fails when it is there already, and is written in one of its roles.
    pub fn add(&mut self, role: Role, path: &Path, metadata: &Metadata) -> Result<(), SharedFile> {
        let id = (metadata.dev(), metadata.ino());
        let same = |known: &&(Role, u64, u64)| (known.1, known.2) == id;
        let roles = self.0.iter().filter(same).map(|known| (known.0, role));
        for (known, new) in roles {
            let (writer, other) = if new.is_written() {
                (new, known)
            } else {
                (known, new)
            };
            if writer.is_written() {
                let path = path.to_owned();
                return Err(SharedFile {
                    writer,
                    other,
                    path,
                });
            }
        }
        self.push(role, metadata);
        Ok(())
    }

    fn push(&mut self, role: Role, metadata: &Metadata) {
        // A terminal or /dev/null may be shared.
        if metadata.is_file() || metadata.file_type().is_fifo() {
            self.0.push((role, metadata.dev(), metadata.ino()));
        }
    }
}

fn metadata(stream: impl AsFd) -> io::Result<Metadata> {
    File::from(stream.as_fd().try_clone_to_owned()?).metadata()
}

/// Opens a file that is to be written, and leaves what is in it. Waits until a FIFO has a reader.
pub fn open_for_writing(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false);
    match options.clone().custom_flags(libc::O_NONBLOCK).open(path) {
        Ok(file) => {
            fcntl_setfl(&file, OFlags::empty())?;
            Ok(file)
        }
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) && is_fifo(path) => {
            log::info!("waiting for a program to open the FIFO {path:?} for reading");
            options.open(path)
        }
        Err(error) => Err(error),
    }
}

/// Empties a file that has an end. Pipes and terminals have none.
pub fn empty(file: &File) -> io::Result<()> {
    if file.metadata()?.is_file() {
        file.set_len(0)
    } else {
        Ok(())
    }
}

/// Writes a file so that a reader sees the old or the new, never a part. No other thread or process may do the same
/// meanwhile.
pub fn replace(path: &Path, mode: u32, contents: &[u8]) -> io::Result<File> {
    let new = path.with_extension("new");
    let _ = fs::remove_file(&new);
    let mut file = File::create_new(&new)?;
    let written = file
        .set_permissions(fs::Permissions::from_mode(mode))
        .and_then(|()| file.write_all(contents))
        .and_then(|()| fs::rename(&new, path));
    written
        .map(|()| file)
        .inspect_err(|_| drop(fs::remove_file(&new)))
}

/// Writes a file that a user has named: at its path are the old one or the new one whole, also when this process is killed.
/// A FIFO or a device is written to as it is.
pub fn write_whole(path: &Path, contents: &[u8]) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(found) if !found.is_file() => {
            return open_for_writing(path)?.write_all(contents);
        }
        _ => {}
    }
    // What a link leads to is replaced, not the link.
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = directory.join(format!(".{name}.{}", std::process::id()));
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    let unnamed = rustix::fs::open(directory, flags, Mode::from_raw_mode(0o666));
    let written = match unnamed {
        Ok(file) => {
            let mut file = File::from(file);
            file.write_all(contents)?;
            let open = format!("/proc/self/fd/{}", file.as_raw_fd());
            rustix::fs::linkat(CWD, open, CWD, &new, AtFlags::SYMLINK_FOLLOW).map_err(Into::into)
        }
        // Not every file system has files without names.
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
            File::create_new(&new).and_then(|mut file| file.write_all(contents))
        }
        Err(error) => return Err(error.into()),
    };
    written
        .and_then(|()| fs::rename(&new, &path))
        .inspect_err(|_| drop(fs::remove_file(&new)))
}

/// Opens a file of this user's alone, or a FIFO, to write to, and leaves what is in it. Does not wait for
/// a reader of a FIFO: there is always one then, itself.
pub fn open_for_events(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(is_fifo(path)).write(true);
    options.create(true).truncate(false).mode(0o600).open(path)
}

fn is_fifo(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_that_is_written_whole_replaces_another_or_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for contents in ["first, and longer", "second"] {
            write_whole(&path("a"), contents.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(path("a")).unwrap(), contents);
        }
        std::os::unix::fs::symlink("a", path("link")).unwrap();
        write_whole(&path("link"), b"third").unwrap();
        assert_eq!(fs::read(path("a")).unwrap(), b"third");
        write_whole(Path::new("/dev/null"), b"x").unwrap();
        assert!(write_whole(&path("missing/a"), b"x").is_err());
        let full = write_whole(Path::new("/dev/full"), b"x").unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }

    #[test]
    fn file_with_two_uses_is_refused_when_one_of_them_writes() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::write(path("a"), "").unwrap();
        fs::write(path("b"), "").unwrap();
        fs::hard_link(path("a"), path("second name of a")).unwrap();
        let check = |uses: &[(Role, PathBuf)]| {
            let mut files = Files::default();
            uses.iter()
                .try_for_each(|(role, path)| files.add(*role, path, &fs::metadata(path).unwrap()))
        };
        use Role::{Capture, Console, Initrd, Kernel};
        let null = PathBuf::from("/dev/null");
        for uses in [
            [(Kernel, path("a")), (Initrd, path("a"))],
            [(Kernel, path("a")), (Console, path("b"))],
            [(Console, null.clone()), (Capture, null)],
        ] {
            check(&uses).unwrap();
        }
        for uses in [
            [(Kernel, path("a")), (Capture, path("second name of a"))],
            [(Console, path("a")), (Initrd, path("a"))],
            [(Capture, path("b")), (Capture, path("b"))],
        ] {
            let error = check(&uses).unwrap_err();
            assert_eq!(error.path, uses[1].1);
            assert!(error.writer.is_written(), "{error}");
        }
    }
}
