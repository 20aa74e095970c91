//! Reads a tree.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use agent_protocol::MessageError;
use agent_protocol::copy::{CHUNK, Entry, Kind, Piece};
use rustix::fs::OFlags;

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
    let mut file: File = options.open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    send(&mut to, entry(path, &metadata, Kind::File))?;
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(length) => {
                // CHUNK fits.
                agent_protocol::write(&mut to, &Piece::Data(length as u32))?;
                to.write_all(&chunk[..length]).map_err(MessageError::from)?;
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
