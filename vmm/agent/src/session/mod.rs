//! Sessions: what the host asks for on a connection.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use agent_protocol::session::{Copied, ExecFailure, FromCommand, Hello, Request};
use agent_protocol::{MessageError, VERSION};

use crate::children::Children;

/// Serves a connection to its end.
pub fn serve(stream: UnixStream, children: &Arc<Children>) {
    // The host has closed it, or says something else: there is none to say so to.
    let _ = answer(&stream, children);
}

fn answer(stream: &UnixStream, _children: &Arc<Children>) -> Result<(), MessageError> {
    agent_protocol::write(stream, &Hello { version: VERSION })?;
    let text = String::from("this agent runs no commands and copies no files");
    match agent_protocol::read(stream)? {
        Request::Exec(_) => agent_protocol::write(
            stream,
            &FromCommand::Failed {
                reason: ExecFailure::Refused,
                text,
            },
        ),
        Request::Stream { .. } => Ok(()),
        Request::Pack { .. } | Request::Unpack { .. } => {
            agent_protocol::write(stream, &Copied::Failed(text))
        }
    }
}
