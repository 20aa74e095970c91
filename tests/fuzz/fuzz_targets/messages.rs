//! What guest and host say to each other: each may be anything, in any pieces.
#![no_main]

use std::fmt::Debug;

use agent_protocol::Inbox;
use agent_protocol::boot::{FromInit, ToInit};
use agent_protocol::copy::Piece;
use agent_protocol::session::{FromCommand, Hello, Request, ToCommand, Unpacked};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

fuzz_target!(|input: (u8, u8, &[u8])| {
    let (kind, size, bytes) = input;
    let size = usize::from(size) + 1;
    match kind % 8 {
        0 => messages::<FromInit>(bytes, size),
        1 => messages::<ToInit>(bytes, size),
        2 => messages::<FromCommand>(bytes, size),
        3 => messages::<ToCommand>(bytes, size),
        4 => messages::<Request>(bytes, size),
        5 => messages::<Piece>(bytes, size),
        6 => messages::<Unpacked>(bytes, size),
        _ => messages::<Hello>(bytes, size),
    }
});

/// What comes is the same at once and in pieces of this size, and once more when it is sent again.
fn messages<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8], size: usize) {
    let mut stream = bytes;
    let mut inbox = Inbox::default();
    let mut pieces = bytes.chunks(size);
    let mut next = || {
        loop {
            match inbox.take::<T>() {
                Ok(Some(message)) => return Some(message),
                Ok(None) => inbox.add(pieces.next()?),
                Err(_) => return None,
            }
        }
    };
    loop {
        let message = agent_protocol::read::<T>(&mut stream).ok();
        assert_eq!(message, next());
        let Some(message) = message else {
            return;
        };
        let mut again = Vec::new();
        agent_protocol::write(&mut again, &message).expect("it is no longer than it was");
        assert_eq!(agent_protocol::read::<T>(&again[..]).ok(), Some(message));
    }
}
