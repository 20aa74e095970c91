//! Makes a tree.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use agent_protocol::MessageError;
use agent_protocol::copy::{CHUNK, Entry, Kind, Piece};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, SeekFrom, Timespec, Timestamps, Uid, chownat, fchmod,
    fchown, ftruncate, futimens, mkdirat, openat, seek, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use crate::Place;

/// Why a tree is not made.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// A part of it cannot be made.
    #[error("cannot make {0:?}")]
    Make(PathBuf, #[source] io::Error),
    /// A part of it cannot be written.
    #[error("cannot write {0:?}")]
    Write(PathBuf, #[source] io::Error),
    /// The other end has failed.
    #[error("{0}")]
    Other(String),
    /// The connection has.
    #[error("cannot receive the copy")]
    Receive(#[from] MessageError),
    /// There is no end of it.
    #[error("it has more than {} files and directories or {} MiB, and no more is copied", .0.entries, .0.bytes >> 20)]
    TooMuch(Limits),
    /// The other end says what is none.
    #[error("what is received is no copy: {0}")]
    Form(&'static str),
}

/// Whose the copies are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// Those who own the originals, by number, with all their permissions.
    Kept,
    /// This process's, without set-user-ID and the like: the other end is not trusted.
    Own,
}

impl Ownership {
    fn mode(self, mode: u32) -> Mode {
        Mode::from_raw_mode(match self {
            Self::Kept => mode & 0o7777,
            Self::Own => mode & 0o777,
        })
    }
}

/// The most of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Files, directories and links.
    pub entries: u64,
    /// Bytes of files.
    pub bytes: u64,
}

impl Limits {
    /// As much as there is.
    pub const NONE: Self = Self {
        entries: u64::MAX,
        bytes: u64::MAX,
    };
}

/// Where a copy goes.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// By the rules of `docker cp`: into a directory that is there when the copy comes, or else to this path.
    Path {
        /// The path.
        path: &'a Path,
        /// What is in the copied directory goes into the one that is there, not the directory itself.
        contents: bool,
    },
    /// To a place that was found before. The copy is no symbolic link.
    Place(&'a Place),
}

/// Makes what the other end sends, to [`Piece::End`]. `note` gets what was left out.
///
/// # Errors
///
/// See [`UnpackError`]. What was made stays.
pub fn unpack(
    mut from: impl Read,
    target: Target,
    ownership: Ownership,
    limits: Limits,
    note: &mut dyn FnMut(String),
) -> Result<(), UnpackError> {
    let mut tree: Option<Tree> = None;
    loop {
        let piece = agent_protocol::read(&mut from)?;
        let made = match (piece, &mut tree) {
            (Piece::Entry(entry), None) => {
                let mut started = Tree::new(ownership, limits);
                started.start(target, entry)?;
                tree = Some(started);
                continue;
            }
            (Piece::Note(text), _) => {
                note(text);
                continue;
            }
            (Piece::Failed(text), _) => return Err(UnpackError::Other(text)),
            (Piece::End, None) => return Ok(()),
            (_, None) => return Err(UnpackError::Form("it begins with no entry")),
            (Piece::End, Some(tree)) => return tree.end(),
            (Piece::Entry(entry), Some(tree)) => tree.enter(entry),
            (Piece::Leave, Some(tree)) => tree.leave(),
            (Piece::Data(length), Some(tree)) => tree.write(&mut from, length as usize),
            (Piece::Hole(length), Some(tree)) => tree.skip(length),
        };
        made?;
    }
}

/// A directory or a file that is being made.
#[derive(Debug)]
struct Open {
    fd: OwnedFd,
    /// What it is to be when it is complete; `None` for a directory that was there.
    entry: Option<Entry>,
}

#[derive(Debug)]
struct Tree {
    ownership: Ownership,
    limits: Limits,
    /// What it may still have.
    left: Limits,
    /// The directory that was entered last, or in which the copy goes, for messages.
    path: PathBuf,
    directories: Vec<Open>,
    file: Option<Open>,
    chunk: Vec<u8>,
}

impl Tree {
    fn new(ownership: Ownership, limits: Limits) -> Self {
        Self {
            ownership,
            limits,
            left: limits,
            path: PathBuf::new(),
            directories: Vec::new(),
            file: None,
            chunk: Vec::new(),
        }
    }

    /// Makes the first entry, or finds that it is there.
    fn start(&mut self, target: Target, top: Entry) -> Result<(), UnpackError> {
        match target {
            Target::Path { path, contents } => self.start_at_path(path, contents, top),
            Target::Place(place) => self.start_at_place(place, top),
        }
    }

    fn start_at_place(&mut self, place: &Place, mut top: Entry) -> Result<(), UnpackError> {
        if matches!(top.kind, Kind::Symlink(_)) {
            return Err(UnpackError::Form("it is a symbolic link"));
        }
        self.path = place.path.clone();
        let fd = place.directory.try_clone();
        let fd = fd.map_err(|error| self.failed(b"", error))?;
        match &place.name {
            Some(name) => {
                top.name = name.clone();
                self.make(fd.as_fd(), top)
            }
            None if top.kind == Kind::Directory => {
                self.directories.push(Open { fd, entry: None });
                Ok(())
            }
            None => Err(UnpackError::Form("it is no directory")),
        }
    }

    fn start_at_path(
        &mut self,
        target: &Path,
        contents: bool,
        mut top: Entry,
    ) -> Result<(), UnpackError> {
        // What a link leads to is the target. One that leads nowhere is replaced.
        let path = fs::canonicalize(target).unwrap_or_else(|_| target.to_owned());
        let failed = |error: Errno| UnpackError::Make(target.to_owned(), error.into());
        self.path = path.clone();
        let is_directory = top.kind == Kind::Directory;
        if path.is_dir() {
            let fd = open_directory(&path).map_err(failed)?;
            if is_directory && contents {
                self.directories.push(Open { fd, entry: None });
                return Ok(());
            }
            return self.make(fd.as_fd(), top);
        }
        let bytes = target.as_os_str().as_bytes();
        if !is_directory && (bytes.ends_with(b"/") || bytes.ends_with(b"/.")) {
            return Err(failed(Errno::NOENT));
        }
        if is_directory && path.exists() {
            return Err(failed(Errno::NOTDIR));
        }
        let name = path.file_name().ok_or(Errno::NOENT).map_err(failed)?;
        top.name = name.as_bytes().to_vec();
        let parent = path.parent().filter(|it| !it.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let fd = open_directory(parent).map_err(failed)?;
        self.path = parent.to_owned();
        self.make(fd.as_fd(), top)
    }

    /// Makes an entry in the directory that was entered last.
    fn enter(&mut self, entry: Entry) -> Result<(), UnpackError> {
        self.close_file()?;
        let Some(Open { fd, .. }) = self.directories.last() else {
            return Err(UnpackError::Form("it goes on after its end"));
        };
        let directory = fd
            .try_clone()
            .map_err(|error| self.failed(&entry.name, error))?;
        self.make(directory.as_fd(), entry)
    }

    fn make(&mut self, directory: BorrowedFd, entry: Entry) -> Result<(), UnpackError> {
        if !is_name(&entry.name) {
            return Err(UnpackError::Form(
                "the name of an entry has other parts than one",
            ));
        }
        self.left.entries = self.take(self.left.entries, 1)?;
        let made = match &entry.kind {
            Kind::Directory => make_directory(directory, &entry.name),
            Kind::File => replace(directory, &entry.name, || {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                openat(directory, &entry.name, flags, Mode::RUSR | Mode::WUSR)
            })
            .map(|fd| (fd, true)),
            Kind::Symlink(target) => {
                let made = self.make_symlink(directory, &entry, target);
                return made.map_err(|error| self.failed(&entry.name, error.into()));
            }
        };
        let (fd, is_new) = made.map_err(|error| self.failed(&entry.name, error.into()))?;
        let is_directory = entry.kind == Kind::Directory;
        if is_directory {
            self.path.push(OsStr::from_bytes(&entry.name));
        }
        // One that was there stays as it was.
        let open = Open {
            fd,
            entry: is_new.then_some(entry),
        };
        match is_directory {
            true => self.directories.push(open),
            false => self.file = Some(open),
        }
        Ok(())
    }

    fn make_symlink(
        &self,
        directory: BorrowedFd,
        entry: &Entry,
        target: &[u8],
    ) -> rustix::io::Result<()> {
        replace(directory, &entry.name, || {
            symlinkat(target, directory, &entry.name)
        })?;
        if self.ownership == Ownership::Own {
            return Ok(());
        }
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        chownat(directory, &entry.name, Some(uid), Some(gid), flags)
    }

    /// Writes a part of the file that was entered last.
    fn write(&mut self, mut from: impl Read, length: usize) -> Result<(), UnpackError> {
        if length > CHUNK {
            return Err(UnpackError::Form("a piece is too long"));
        }
        self.left.bytes = self.take(self.left.bytes, length as u64)?;
        self.chunk.resize(CHUNK, 0);
        let chunk = &mut self.chunk[..length];
        from.read_exact(chunk).map_err(MessageError::from)?;
        let Some(Open { fd, entry }) = &self.file else {
            return Err(UnpackError::Form("it has the content of no file"));
        };
        let mut left = &*chunk;
        while !left.is_empty() {
            match rustix::io::write(fd, left) {
                Ok(length) => left = &left[length..],
                Err(Errno::INTR) => {}
                Err(error) => {
                    let name = entry.as_ref().map_or(&[][..], |entry| &entry.name);
                    let path = self.path.join(OsStr::from_bytes(name));
                    return Err(UnpackError::Write(path, error.into()));
                }
            }
        }
        Ok(())
    }

    /// Leaves a hole in the file that was entered last.
    fn skip(&self, length: u64) -> Result<(), UnpackError> {
        let Some(Open { fd, entry }) = &self.file else {
            return Err(UnpackError::Form("it has the content of no file"));
        };
        // Beyond the largest file both fail.
        let skipped = i64::try_from(length)
            .map_err(|_| Errno::FBIG)
            .and_then(|length| seek(fd, SeekFrom::Current(length)))
            .and_then(|end| ftruncate(fd, end));
        skipped.map_err(|error| {
            let name = entry.as_ref().map_or(&[][..], |entry| &entry.name);
            UnpackError::Write(self.path.join(OsStr::from_bytes(name)), error.into())
        })
    }

    /// The directory that was entered last is complete.
    fn leave(&mut self) -> Result<(), UnpackError> {
        self.close_file()?;
        let Some(directory) = self.directories.pop() else {
            return Err(UnpackError::Form(
                "it leaves more directories than it enters",
            ));
        };
        self.complete(directory)?;
        self.path.pop();
        Ok(())
    }

    fn close_file(&mut self) -> Result<(), UnpackError> {
        match self.file.take() {
            Some(file) => self.complete(file),
            None => Ok(()),
        }
    }

    /// All is there.
    fn end(&mut self) -> Result<(), UnpackError> {
        self.close_file()?;
        match self.directories.is_empty() {
            true => Ok(()),
            false => Err(UnpackError::Form("it ends within a directory")),
        }
    }

    /// Gives a new file or directory its owner, permissions and time.
    fn complete(&self, Open { fd, entry }: Open) -> Result<(), UnpackError> {
        let Some(entry) = entry else {
            return Ok(());
        };
        let time = Timespec {
            tv_sec: entry.seconds,
            tv_nsec: entry.nanoseconds.into(),
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        let completed = (|| {
            if self.ownership == Ownership::Kept {
                let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
                fchown(&fd, Some(uid), Some(gid))?;
            }
            // Another owner would clear some of them.
            fchmod(&fd, self.ownership.mode(entry.mode))?;
            futimens(&fd, &times)
        })();
        completed.map_err(|error| self.failed(&entry.name, error.into()))
    }

    /// What is left of a limit.
    fn take(&self, left: u64, wanted: u64) -> Result<u64, UnpackError> {
        let left = left.checked_sub(wanted);
        left.ok_or(UnpackError::TooMuch(self.limits))
    }

    fn failed(&self, name: &[u8], error: io::Error) -> UnpackError {
        UnpackError::Make(self.path.join(OsStr::from_bytes(name)), error)
    }
}

/// Whether it is the name of an entry in a directory.
fn is_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..") && !name.contains(&b'/') && !name.contains(&0)
}

pub(crate) fn open_directory(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

/// Makes a directory, or opens the one that is there, but not by a link. Whether it is new.
fn make_directory(parent: BorrowedFd, name: &[u8]) -> rustix::io::Result<(OwnedFd, bool)> {
    let is_new = match mkdirat(parent, name, Mode::RWXU) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(error) => return Err(error),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok((openat(parent, name, flags, Mode::empty())?, is_new))
}

/// Makes something, in the place of the file or the link that is there. Devices and the like stay.
fn replace<T>(
    directory: BorrowedFd,
    name: &[u8],
    make: impl Fn() -> rustix::io::Result<T>,
) -> rustix::io::Result<T> {
    match make() {
        Err(Errno::EXIST) => {
            let there = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
            match FileType::from_raw_mode(there.st_mode) {
                FileType::RegularFile | FileType::Symlink => {}
                FileType::Directory => return Err(Errno::ISDIR),
                _ => return Err(Errno::EXIST),
            }
            unlinkat(directory, name, AtFlags::empty())?;
            make()
        }
        made => made,
    }
}

#[cfg(test)]
mod tests;
