//! Sends an image's files to the guest that has no other root.

use std::io::{self, BufWriter, Write};
use std::net::Shutdown;

use agent_protocol::MessageError;
use agent_protocol::session::{Request, Unpacked};

use super::oci::{Image, OciError};
use crate::agent::{Agent, ConnectError};

/// How much is written at once.
const PIECE: usize = 256 << 10;

/// Why the guest does not have them.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The agent cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The image cannot be read, or the connection has ended.
    #[error(transparent)]
    Image(#[from] OciError),
    /// The agent does not say what has come of it.
    #[error("the agent says nothing of it")]
    Answer(#[source] MessageError),
    /// The agent cannot unpack it.
    #[error("the agent says: {0}")]
    Refused(String),
}

/// Has the agent unpack the image at a path of the guest's, and calls `said` whenever it has taken a part of it.
///
/// # Errors
///
/// See [`SendError`].
pub fn send(agent: &Agent, image: &Image, path: Vec<u8>, said: &dyn Fn()) -> Result<(), SendError> {
    let stream = agent.request(&Request::UnpackRoot { path })?;
    let reported = Reported { to: &stream, said };
    let sent = image.write(BufWriter::with_capacity(PIECE, reported));
    let _ = stream.shutdown(Shutdown::Write);
    // An agent that cannot go on closes the connection, and has said why.
    match (agent_protocol::read(&stream), sent) {
        (Ok(Unpacked::Failed(text)), _) => Err(SendError::Refused(text)),
        (_, Err(error)) => Err(error.into()),
        (Ok(Unpacked::Done), Ok(())) => Ok(()),
        (Err(error), Ok(())) => Err(SendError::Answer(error)),
    }
}

/// A writer that reports each write.
struct Reported<'a, W> {
    to: W,
    said: &'a dyn Fn(),
}

impl<W: Write> Write for Reported<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        (self.said)();
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}
