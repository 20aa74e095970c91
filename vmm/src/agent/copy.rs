//! Copies between host and guest.

use std::fs;
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use agent_copy::{Limits, Ownership, PackError, Place, Target, UnpackError, pack, unpack};
use agent_protocol::MessageError;
use agent_protocol::copy::{CHUNK, Piece};
use agent_protocol::session::Request;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Agent, ConnectError};
use crate::control::exit::chain;

/// The most notes of one copy that are shown.
const MOST_NOTES: usize = 100;
/// The most characters of what a guest says.
const LONGEST_TEXT: usize = 1000;

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
    let stream = agent.request(&Request::Pack {
        path: path.as_os_str().as_bytes().to_vec(),
        directory: b"/".to_vec(),
        follows: false,
    })?;
    let target = Target::Path {
        path: to,
        contents: means_contents(path),
    };
    receive(&stream, target, Limits::NONE)
}

/// How much a copy may have that no person watches, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The most of a copy.
    pub limits: Limits,
    /// How long nothing may come.
    pub silence: Duration,
    /// When it must have ended.
    pub until: Instant,
}

/// Copies what is at `path` in the guest, or what a symbolic link there leads to, to the `place` on this host. A path that is
/// relative begins at `directory`.
///
/// # Errors
///
/// See [`CopyError`]. What was made stays.
pub fn copy_to_place(
    agent: &Agent,
    path: &Path,
    directory: &[u8],
    place: &Place,
    bounds: Bounds,
) -> Result<(), CopyError> {
    let stream = agent.request(&Request::Pack {
        path: path.as_os_str().as_bytes().to_vec(),
        directory: directory.to_vec(),
        follows: true,
    })?;
    let from = Bounded {
        stream: &stream,
        bounds,
    };
    receive(from, Target::Place(place), bounds.limits)
}

fn receive(from: impl Read, target: Target, limits: Limits) -> Result<(), CopyError> {
    let from = BufReader::with_capacity(CHUNK, from);
    let mut notes = 0;
    let mut note = |text: String| {
        notes += 1;
        if notes <= MOST_NOTES {
            note(cut(text));
        }
    };
    match unpack(from, target, Ownership::Own, limits, &mut note) {
        Ok(()) => Ok(()),
        Err(UnpackError::Other(text)) => Err(CopyError::Guest(cut(text))),
        Err(UnpackError::Receive(error)) => Err(CopyError::Lost(error)),
        Err(error) => Err(error.into()),
    }
}

/// What a guest says, as far as anyone reads it.
fn cut(text: String) -> String {
    match text.char_indices().nth(LONGEST_TEXT) {
        Some((end, _)) => text[..end].to_owned(),
        None => text,
    }
}

/// A stream that ends in time.
#[derive(Debug)]
struct Bounded<'a> {
    stream: &'a UnixStream,
    bounds: Bounds,
}

impl Read for Bounded<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let Bounds { silence, until, .. } = self.bounds;
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(ErrorKind::TimedOut, "it takes too long"));
        }
        self.stream.set_read_timeout(Some(left.min(silence)))?;
        let read = self.stream.read(bytes);
        read.map_err(|error| match error.kind() {
            ErrorKind::WouldBlock => io::Error::new(ErrorKind::TimedOut, "nothing more comes"),
            _ => error,
        })
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
            Piece::Entry(_) | Piece::Data(_) | Piece::Hole(_) | Piece::Leave => {
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
pub fn means_contents(path: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    let last = bytes
        .split(|byte| *byte == b'/')
        .rfind(|part| !part.is_empty());
    matches!(last, None | Some(b"." | b".."))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn guest_that_says_nothing_or_never_ends_is_not_waited_for() {
        for (silence, until, text) in [
            (10, 60_000, "nothing more comes"),
            (60_000, 0, "it takes too long"),
        ] {
            let (mut theirs, stream) = UnixStream::pair().unwrap();
            let directory = tempfile::tempdir().unwrap();
            let target = Target::Path {
                path: directory.path(),
                contents: false,
            };
            let bounds = Bounds {
                limits: Limits::NONE,
                silence: Duration::from_millis(silence),
                until: Instant::now() + Duration::from_millis(until),
            };
            agent_protocol::write(&mut theirs, &Piece::Note("a".into())).unwrap();
            let from = Bounded {
                stream: &stream,
                bounds,
            };
            let error = receive(from, target, Limits::NONE).unwrap_err();
            assert!(chain(&error).contains(text), "{}", chain(&error));
        }
    }

    #[test]
    fn text_of_a_guest_is_cut() {
        let (theirs, stream) = UnixStream::pair().unwrap();
        let sends = thread::spawn(move || {
            for _ in 0..2 * MOST_NOTES {
                agent_protocol::write(&theirs, &Piece::Note("a".into())).unwrap();
            }
            let text = "\u{e9}".repeat(2 * LONGEST_TEXT);
            agent_protocol::write(&theirs, &Piece::Failed(text)).unwrap();
        });
        let target = Target::Path {
            path: Path::new("/nowhere"),
            contents: false,
        };
        let error = receive(&stream, target, Limits::NONE).unwrap_err();
        sends.join().unwrap();
        assert_eq!(error.to_string().chars().count(), LONGEST_TEXT);
    }

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
