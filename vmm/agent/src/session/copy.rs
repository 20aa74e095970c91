//! Copies, each in a thread of its own.

use std::fs;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use agent_copy::{Limits, Ownership, PackError, Target, UnpackError, pack, unpack};
use agent_protocol::MessageError;
use agent_protocol::copy::{CHUNK, Piece};
use rustix::process::geteuid;

use crate::chain;

/// The most copies at once.
const MOST: usize = 16;
/// The stack of a thread.
const STACK: usize = 256 << 10;
/// The most notes of one copy: the host reads them when it has sent all.
const MOST_NOTES: usize = 100;
/// How long the host may take to see that a copy has failed, and stop.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is to be copied.
#[derive(Debug)]
pub enum Copy {
    /// To the host.
    Pack {
        /// Its path.
        path: Vec<u8>,
        /// Where one that is relative begins.
        directory: Vec<u8>,
        /// What a symbolic link leads to is meant.
        follows: bool,
    },
    /// From the host.
    Unpack {
        /// Where it goes.
        path: Vec<u8>,
        /// As of [`Target::Path`].
        contents: bool,
    },
}

/// Those that run.
#[derive(Debug, Default)]
pub struct Copies(Arc<()>);

impl Copies {
    /// Starts one. `first` is what has come after the request.
    pub fn start(&self, copy: Copy, stream: UnixStream, first: Vec<u8>) {
        let refused = match self.spawn(copy, &stream, first) {
            Ok(()) => return,
            Err(error) => format!("cannot start a thread for the copy: {error}"),
        };
        // A host that has gone does not miss it.
        let _ = agent_protocol::write(&stream, &Piece::Failed(refused));
    }

    fn spawn(&self, copy: Copy, stream: &UnixStream, first: Vec<u8>) -> io::Result<()> {
        if Arc::strong_count(&self.0) > MOST {
            return Err(io::Error::other("as many run as may"));
        }
        let (count, stream) = (self.0.clone(), stream.try_clone()?);
        stream.set_nonblocking(false)?;
        let copy = move || {
            // The host has gone: there is none to say it to.
            let _ = match copy {
                Copy::Pack {
                    path,
                    directory,
                    follows,
                } => send(&path, &directory, follows, &stream),
                Copy::Unpack { path, contents } => {
                    receive(&absolute(&path), contents, &stream, &first)
                }
            };
            drop(count);
        };
        let thread = thread::Builder::new().name("copy".into());
        thread.stack_size(STACK).spawn(copy).map(drop)
    }
}

/// A path of the host's: as in Docker, it begins at the root directory.
fn absolute(path: &[u8]) -> PathBuf {
    Path::new("/").join(std::ffi::OsStr::from_bytes(path))
}

fn send(
    path: &[u8],
    directory: &[u8],
    follows: bool,
    stream: &UnixStream,
) -> Result<(), MessageError> {
    let mut to = BufWriter::with_capacity(CHUNK, stream);
    let found = original(path, directory, follows);
    let last = match found.and_then(|path| pack(&path, &mut to)) {
        Ok(()) => Piece::End,
        Err(error @ PackError::Read(..)) => Piece::Failed(chain(&error)),
        Err(PackError::Send(error)) => return Err(error),
    };
    agent_protocol::write(&mut to, &last)?;
    Ok(to.flush()?)
}

/// The path of what is copied.
fn original(path: &[u8], directory: &[u8], follows: bool) -> Result<PathBuf, PackError> {
    let begins = Some(absolute(directory)).filter(|it| it.is_dir());
    let begins = begins.unwrap_or_else(|| "/".into());
    let path = begins.join(std::ffi::OsStr::from_bytes(path));
    match follows {
        true => fs::canonicalize(&path).map_err(|error| PackError::Read(path, error)),
        false => Ok(path),
    }
}

fn receive(
    path: &Path,
    contents: bool,
    mut stream: &UnixStream,
    first: &[u8],
) -> Result<(), MessageError> {
    let from = BufReader::with_capacity(CHUNK, first.chain(stream));
    let ownership = match geteuid().is_root() {
        true => Ownership::Kept,
        false => Ownership::Own,
    };
    let mut notes = Vec::new();
    let mut note = |text| {
        if notes.len() < MOST_NOTES {
            notes.push(text);
        }
    };
    let target = Target::Path { path, contents };
    let last = match unpack(from, target, ownership, Limits::NONE, &mut note) {
        Ok(()) => Piece::End,
        Err(UnpackError::Receive(error)) => return Err(error),
        Err(error) => Piece::Failed(chain(&error)),
    };
    for note in notes {
        agent_protocol::write(stream, &Piece::Note(note))?;
    }
    agent_protocol::write(stream, &last)?;
    stream.shutdown(Shutdown::Write)?;
    // What is closed with something unread might take this message with it.
    stream.set_read_timeout(Some(PATIENCE))?;
    while stream.read(&mut [0; 4096])? > 0 {}
    Ok(())
}
