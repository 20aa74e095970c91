//! Sessions: what the agent does for the host in a guest that runs.
//!
//! Each connection begins with [`Hello`] of the agent's, then a [`Request`] of the host's.

use serde::{Deserialize, Serialize};

#[cfg(doc)]
use crate::copy::Piece;

/// The agent's first message on each connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`](crate::VERSION).
    pub version: u32,
}

/// What a connection is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// To run a command. The host then opens the command's streams, each a connection of its own, and the command
    /// starts when all are there. This one carries [`ToCommand`] and [`FromCommand`]. When the host closes it before the command has
    /// ended, the command gets SIGHUP, and SIGKILL if it goes on.
    Exec(Box<Exec>),
    /// To unpack the tar archive of a root file system, which the host sends from here on and then shuts down its half. The
    /// agent says [`Unpacked`] when all is there, or what has failed.
    UnpackRoot {
        /// The directory, absolute.
        path: Vec<u8>,
    },
    /// To be a stream of a command's: bytes alone from here on.
    Stream {
        /// The session of its [`Exec`].
        session: SessionId,
        /// Which one.
        stream: Stream,
    },
    /// To get a copy of a file or a directory, which the agent sends from here on.
    Pack {
        /// Its path.
        path: Vec<u8>,
        /// Where one that is relative begins: an absolute path. Where there is no such directory it is the root directory.
        directory: Vec<u8>,
        /// What a symbolic link leads to is meant, not the link.
        follows: bool,
    },
    /// To make a copy, which the host sends from here on. The agent says [`Piece::End`] when all is there, or
    /// [`Piece::Failed`] at any time.
    Unpack {
        /// Where it goes, an absolute path.
        path: Vec<u8>,
        /// What is in the copied directory goes into the one that is there, not the directory itself.
        contents: bool,
    },
}

/// What came of the archive of a root file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unpacked {
    /// All is there.
    Done,
    /// It has failed: what was tried on what, and why.
    Failed(String),
}

/// Which session a stream belongs to: a random number of the host's.
pub type SessionId = u64;

/// A command to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// By which its streams know it.
    pub session: SessionId,
    /// The program and its arguments; there is a program.
    pub argv: Vec<Vec<u8>>,
    /// Variables of its environment, `NAME=VALUE`, besides those that the agent gives every command: HOME, USER,
    /// LOGNAME and PATH.
    pub env: Vec<Vec<u8>>,
    /// The directory in which it starts; that of its user by default.
    pub directory: Option<Directory>,
    /// `USER[:GROUP]`, each a name or a number; root by default.
    pub user: Option<String>,
    /// A terminal instead of three streams.
    pub terminal: Option<Window>,
    /// Whether it may leave core files.
    pub core: bool,
}

/// Where a command starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// An absolute path.
    pub path: Vec<u8>,
    /// Whether it is an error that it is not there: else the command starts in the root directory.
    pub required: bool,
}

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Lines.
    pub rows: u16,
    /// Characters of a line.
    pub columns: u16,
}

/// A stream of a command's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Stream {
    /// Its standard input, to the agent.
    Stdin,
    /// Its standard output, from the agent.
    Stdout,
    /// Its standard error, from the agent.
    Stderr,
    /// Its terminal, in both directions: the one stream of a command that has one.
    Terminal,
}

/// What the host says of a command that it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToCommand {
    /// A signal for its process group, as a number of x86-64's.
    Signal(i32),
    /// Its terminal has another size.
    Resize(Window),
}

/// What the agent says of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromCommand {
    /// It runs.
    Started {
        /// Its process in the guest.
        pid: u32,
        /// Its directory is not there, and it has started in the root directory.
        elsewhere: bool,
    },
    /// It could not be started. The last message.
    Failed {
        /// Why.
        reason: ExecFailure,
        /// What was tried on what, and why that failed.
        text: String,
    },
    /// It has ended with this status; all that it wrote has been sent. The last message.
    Exited(i32),
    /// A signal has ended it; all that it wrote has been sent. The last message.
    Killed {
        /// The signal's number.
        signal: i32,
        /// Whether it left a core file.
        core: bool,
    },
}

/// Why a command could not be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecFailure {
    /// There is no such program: status 127 of a shell's.
    NotFound,
    /// It cannot be run: 126.
    NotExecutable,
    /// Its user, its directory or a resource is missing: 125.
    Refused,
}
