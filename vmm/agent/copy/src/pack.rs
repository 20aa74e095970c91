//! Reads a tree.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use agent_protocol::MessageError;
use agent_protocol::copy::{CHUNK, Entry, Kind, Piece};
use rustix::fs::{OFlags, SeekFrom, seek};
use rustix::io::Errno;

/// What st_blocks of stat(2) counts.
const BLOCK: u64 = 512;

/// Why a tree is not copied.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// A part of it cannot be read.
    #[error("cannot read {0:?}")]
    Read(PathBuf, #[source] io::Error),
    /// The other end takes no more.
    #[error("cannot send the copy")]
    Send(#[from] MessageError),
}

/// What is still to be done.
enum Step {
    Enter(PathBuf),
    Leave,
}

/// Sends what is at `path`, all of it but [`Piece::End`]. A symbolic link is copied, not followed.
///
/// # Errors
///
/// See [`PackError`].
pub fn pack(path: &Path, mut to: impl Write) -> Result<(), PackError> {
    let mut steps = vec![Step::Enter(path.to_owned())];
    while let Some(step) = steps.pop() {
        let path = match step {
            Step::Enter(path) => path,
            Step::Leave => {
                agent_protocol::write(&mut to, &Piece::Leave)?;
                continue;
            }
        };
        let failed = |error| PackError::Read(path.clone(), error);
        let metadata = fs::symlink_metadata(&path).map_err(failed)?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            send(&mut to, entry(&path, &metadata, Kind::Directory))?;
            steps.push(Step::Leave);
            let mut names = names(&path).map_err(failed)?;
            names.sort_by(|a, b| b.cmp(a));
            steps.extend(names.into_iter().map(Step::Enter));
        } else if kind.is_symlink() {
            let target = fs::read_link(&path).map_err(failed)?;
            let target = target.into_os_string().into_vec();
            send(&mut to, entry(&path, &metadata, Kind::Symlink(target)))?;
        } else if kind.is_file() {
            pack_file(&path, &mut to)?;
        } else {
            let text = format!("left out {path:?}: it is no file, directory or symbolic link");
            agent_protocol::write(&mut to, &Piece::Note(text))?;
        }
    }
    Ok(())
}

fn names(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory)?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

fn pack_file(path: &Path, mut to: impl Write) -> Result<(), PackError> {
    let failed = |error| PackError::Read(path.to_owned(), error);
    // It may be another one by now: a FIFO, or a link.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(flags.bits() as i32);
    let file: File = options.open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    send(&mut to, entry(path, &metadata, Kind::File))?;
    // Of a file of the kernel's own neither says anything.
    let is_sparse = metadata.blocks().saturating_mul(BLOCK) < metadata.len();
    let next = |at| match is_sparse {
        true => next_data(&file, at, metadata.len()),
        false => Ok(None),
    };
    let mut at = 0;
    while let Some(data) = next(at).map_err(failed)? {
        if data.start > at {
            agent_protocol::write(&mut to, &Piece::Hole(data.start - at))?;
        }
        at = data.start + pack_data((&file).take(data.end - data.start), &mut to, failed)?;
        // The end, or it has become shorter.
        if at < data.end || at >= metadata.len() {
            return Ok(());
        }
    }
    pack_data(&file, to, failed).map(drop)
}

/// Where the next bytes are that are not in a hole, and moves there: none, at `size`, if a hole is the end. `None` where the file
/// system does not say it.
fn next_data(file: &File, at: u64, size: u64) -> io::Result<Option<Range<u64>>> {
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        // Nothing but a hole.
        Err(Errno::NXIO) => size.max(at),
        Err(Errno::INVAL) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let end = match start < size {
        true => seek(file, SeekFrom::Hole(start))?,
        false => start,
    };
    seek(file, SeekFrom::Start(start))?;
    Ok(Some(start..end))
}

/// Sends what can be read, and returns how much it was.
fn pack_data(
    mut from: impl Read,
    mut to: impl Write,
    failed: impl Fn(io::Error) -> PackError,
) -> Result<u64, PackError> {
    let mut chunk = vec![0; CHUNK];
    let mut sent = 0;
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return Ok(sent),
            Ok(length) => {
                // CHUNK fits.
                agent_protocol::write(&mut to, &Piece::Data(length as u32))?;
                to.write_all(&chunk[..length]).map_err(MessageError::from)?;
                sent += length as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

fn entry(path: &Path, metadata: &Metadata, kind: Kind) -> Entry {
    let name = path.file_name().unwrap_or_default();
    Entry {
        name: name.as_bytes().to_vec(),
        kind,
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        seconds: metadata.mtime(),
        // Less than a second.
        nanoseconds: metadata.mtime_nsec() as u32,
    }
}

fn send(to: impl Write, entry: Entry) -> Result<(), MessageError> {
    agent_protocol::write(to, &Piece::Entry(entry))
}
