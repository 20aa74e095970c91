//! Messages on a stream.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The most bytes of a message without its length. A command line and an environment of Linux have
/// up to 2 MiB.
pub const LONGEST: usize = 4 << 20;

/// Why there is no message.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The other end has closed the connection, between two messages.
    #[error("the connection is closed")]
    Closed,
    /// The connection fails, or ends in the middle of a message.
    #[error("cannot read or write the connection")]
    Io(#[from] io::Error),
    /// It has more than [`LONGEST`] bytes.
    #[error("a message of {0} bytes is longer than {LONGEST}")]
    TooLong(usize),
    /// The other end says something else.
    #[error("a message has another form")]
    Form(#[source] postcard::Error),
}

/// Writes one message.
///
/// # Errors
///
/// [`MessageError::Io`] and [`MessageError::TooLong`].
pub fn write<T: Serialize>(mut to: impl Write, message: &T) -> Result<(), MessageError> {
    let bytes = postcard::to_extend(message, vec![0; 4]).map_err(MessageError::Form)?;
    let length = bytes.len() - 4;
    if length > LONGEST {
        return Err(MessageError::TooLong(length));
    }
    let mut bytes = bytes;
    // LONGEST fits.
    bytes[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(to.write_all(&bytes)?)
}

/// Reads one message.
///
/// # Errors
///
/// See [`MessageError`].
pub fn read<T: DeserializeOwned>(mut from: impl Read) -> Result<T, MessageError> {
    let mut length = [0; 4];
    let first = loop {
        match from.read(&mut length) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => break read?,
        }
    };
    if first == 0 {
        return Err(MessageError::Closed);
    }
    from.read_exact(&mut length[first..])?;
    let length = u32::from_le_bytes(length) as usize;
    if length > LONGEST {
        return Err(MessageError::TooLong(length));
    }
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes)?;
    postcard::from_bytes(&bytes).map_err(MessageError::Form)
}

/// What has come of messages on a stream that does not block.
#[derive(Debug, Default)]
pub struct Inbox(Vec<u8>);

impl Inbox {
    /// Adds what has come.
    pub fn add(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next message, if all of it has come.
    ///
    /// # Errors
    ///
    /// [`MessageError::TooLong`] and [`MessageError::Form`].
    pub fn take<T: DeserializeOwned>(&mut self) -> Result<Option<T>, MessageError> {
        let Some((length, rest)) = self.0.split_first_chunk() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length) as usize;
        if length > LONGEST {
            return Err(MessageError::TooLong(length));
        }
        let Some(bytes) = rest.get(..length) else {
            return Ok(None);
        };
        let message = postcard::from_bytes(bytes).map_err(MessageError::Form)?;
        self.0.drain(..length + 4);
        Ok(Some(message))
    }

    /// What has come after the messages that were taken.
    #[must_use]
    pub fn into_rest(self) -> Vec<u8> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::session::{FromCommand, Request};

    const STARTED: FromCommand = FromCommand::Started {
        pid: 5,
        elsewhere: false,
    };

    #[test]
    fn messages_on_one_stream_are_read_one_by_one() {
        let mut stream = Vec::new();
        write(&mut stream, &FromCommand::Exited(37)).unwrap();
        write(&mut stream, &STARTED).unwrap();
        let mut stream = &stream[..];
        assert_eq!(
            read::<FromCommand>(&mut stream).unwrap(),
            FromCommand::Exited(37)
        );
        assert_eq!(read::<FromCommand>(&mut stream).unwrap(), STARTED);
        assert!(matches!(
            read::<FromCommand>(&mut stream),
            Err(MessageError::Closed)
        ));
    }

    #[test]
    fn message_that_is_cut_off_is_an_error() {
        let mut stream = Vec::new();
        write(&mut stream, &FromCommand::Exited(37)).unwrap();
        for length in 1..stream.len() {
            let read = read::<FromCommand>(&stream[..length]);
            assert!(
                matches!(read, Err(MessageError::Io(_))),
                "{length}: {read:?}"
            );
        }
    }

    #[test]
    fn inbox_has_messages_once_all_of_them_has_come_and_keeps_the_rest() {
        let mut stream = Vec::new();
        write(&mut stream, &FromCommand::Exited(37)).unwrap();
        write(&mut stream, &FromCommand::Exited(38)).unwrap();
        let mut inbox = Inbox::default();
        let mut taken = Vec::new();
        for byte in stream.iter().chain(b"rest") {
            inbox.add(&[*byte]);
            taken.extend(inbox.take::<FromCommand>().unwrap());
            if taken.len() == 2 {
                break;
            }
        }
        assert_eq!(taken, [FromCommand::Exited(37), FromCommand::Exited(38)]);
        inbox.add(b"rest");
        assert_eq!(inbox.into_rest(), b"rest");
    }

    #[test]
    fn inbox_refuses_a_length_beyond_the_limit_unread() {
        let mut inbox = Inbox::default();
        inbox.add(&[0xff; 4]);
        let taken = inbox.take::<Request>();
        assert!(matches!(taken, Err(MessageError::TooLong(0xffff_ffff))));
    }

    #[test]
    fn length_beyond_the_limit_is_refused_unread() {
        let read = read::<FromCommand>(&[0xff; 4][..]);
        assert!(matches!(read, Err(MessageError::TooLong(0xffff_ffff))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes: Vec<u8>) {
            let mut stream = (bytes.len() as u32).to_le_bytes().to_vec();
            stream.extend(&bytes);
            let _ = read::<Request>(&stream[..]);
        }
    }
}
