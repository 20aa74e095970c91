//! Copies between host and guest.

use std::fs;
use std::io::{self, BufReader, BufWriter, Write};
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use agent_copy::{Ownership, PackError, Target, UnpackError, pack, unpack};
use agent_protocol::MessageError;
use agent_protocol::copy::{CHUNK, Piece};
use agent_protocol::session::Request;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Agent, ConnectError};
use crate::control::exit::chain;

/// Why something is not copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The agent cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The original of this host.
    #[error(transparent)]
    Read(#[from] PackError),
    /// The copy on this host.
    #[error(transparent)]
    Make(#[from] UnpackError),
    /// What the guest says.
    #[error("{0}")]
    Guest(String),
    /// The connection has ended.
    #[error("the connection to the guest's agent is lost")]
    Lost(#[source] MessageError),
}

/// Copies what is at `path` in the guest to this host, by the rules of `docker cp`. The copies are this user's.
///
/// # Errors
///
/// See [`CopyError`]. What was made stays.
pub fn copy_from(agent: &Agent, path: &Path, to: &Path) -> Result<(), CopyError> {
    let bytes = path.as_os_str().as_bytes();
    let stream = agent.request(&Request::Pack {
        path: bytes.to_vec(),
    })?;
    let target = Target {
        path: to,
        contents: means_contents(path),
    };
    let from = BufReader::with_capacity(CHUNK, &stream);
    match unpack(from, target, Ownership::Own, &mut note) {
        Ok(()) => Ok(()),
        Err(UnpackError::Other(text)) => Err(CopyError::Guest(text)),
        Err(UnpackError::Receive(error)) => Err(CopyError::Lost(error)),
        Err(error) => Err(error.into()),
    }
}

/// Copies what is at `from` on this host to `path` in the guest. Where its agent is root the copies have the owners of the
/// originals, by number.
///
/// # Errors
///
/// See [`CopyError`]. What was made stays.
pub fn copy_to(agent: &Agent, from: &Path, path: &Path) -> Result<(), CopyError> {
    // One that is not there changes nothing in the guest.
    let failed = |error| PackError::Read(from.to_owned(), error);
    fs::symlink_metadata(from).map_err(failed)?;
    let bytes = path.as_os_str().as_bytes();
    let stream = agent.request(&Request::Unpack {
        path: bytes.to_vec(),
        contents: means_contents(from),
    })?;
    match send(from, &stream) {
        Ok(()) => {}
        // Most likely it has said why.
        Err(PackError::Send(error)) => {
            return Err(last_words(&stream).err().unwrap_or(CopyError::Lost(error)));
        }
        Err(error) => {
            // It is not to take what it has for all there is.
            let _ = agent_protocol::write(&stream, &Piece::Failed(chain(&error)));
            return Err(error.into());
        }
    }
    last_words(&stream)
}

fn send(from: &Path, stream: &UnixStream) -> Result<(), PackError> {
    let mut to = BufWriter::with_capacity(CHUNK, Unanswered(stream));
    pack(from, &mut to)?;
    agent_protocol::write(&mut to, &Piece::End)?;
    to.flush().map_err(MessageError::from)?;
    stream
        .shutdown(Shutdown::Write)
        .map_err(MessageError::from)?;
    Ok(())
}

/// What the agent says of a copy in the guest.
fn last_words(stream: &UnixStream) -> Result<(), CopyError> {
    loop {
        match agent_protocol::read(stream).map_err(CopyError::Lost)? {
            Piece::End => return Ok(()),
            Piece::Note(text) => note(text),
            Piece::Failed(text) => return Err(CopyError::Guest(text)),
            Piece::Entry(_) | Piece::Data(_) | Piece::Leave => {
                return Err(UnpackError::Form("it comes from where it should go").into());
            }
        }
    }
}

/// Takes bytes until the agent says something: that the copy has failed.
#[derive(Debug)]
struct Unanswered<'a>(&'a UnixStream);

impl Write for Unanswered<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut answer = [PollFd::new(self.0, PollFlags::IN)];
        match poll(&mut answer, Some(&Timespec::default()))? {
            0 => self.0.write(bytes),
            _ => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn note(text: String) {
    log::warn!("{text}");
}

/// Whether the path of a directory means what is in it, and not the directory itself.
fn means_contents(path: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    let last = bytes
        .split(|byte| *byte == b'/')
        .rfind(|part| !part.is_empty());
    matches!(last, None | Some(b"." | b".."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_that_ends_in_a_dot_or_is_the_root_means_the_contents() {
        for path in [".", "..", "/", "a/.", "/a/..", "a/./"] {
            assert!(means_contents(Path::new(path)), "{path}");
        }
        for path in ["a", "a/", "/a/b", "a/.b", "...", "./a"] {
            assert!(!means_contents(Path::new(path)), "{path}");
        }
    }
}
