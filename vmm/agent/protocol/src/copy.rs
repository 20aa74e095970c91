//! Copies: trees of files, in pieces.
//!
//! A copy is an [`Entry`], the content of a file after it in [`Piece::Data`] and [`Piece::Hole`], the entries of a directory after it and
//! [`Piece::Leave`]; then [`Piece::End`]. It may fail at any place.

use serde::{Deserialize, Serialize};

/// The most bytes of one [`Piece::Data`].
pub const CHUNK: usize = 128 << 10;

/// A piece of a copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Piece {
    /// A file or a directory. What follows is in it.
    Entry(Entry),
    /// So many bytes of the last file follow, [`CHUNK`] at most.
    Data(u32),
    /// So many bytes of the last file follow that are 0, and need no room where it is written.
    Hole(u64),
    /// The directory that was entered last is complete.
    Leave,
    /// Something that is left out, and why.
    Note(String),
    /// All is there.
    End,
    /// It has failed: what was tried on what, and why that failed. The last piece.
    Failed(String),
}

/// A file, a directory or a symbolic link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its name in its directory.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Its permissions, as of chmod(2).
    pub mode: u32,
    /// The number of its owner.
    pub uid: u32,
    /// The number of its group.
    pub gid: u32,
    /// When it was changed, in seconds since 1970.
    pub seconds: i64,
    /// Nanoseconds besides.
    pub nanoseconds: u32,
}

/// What an [`Entry`] is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link, to this.
    Symlink(Vec<u8>),
}
