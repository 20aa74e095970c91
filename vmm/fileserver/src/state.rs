//! What the guest has open: forgotten, or passed on to the server of a guest that goes on where this one was saved.
//!
//! virtiofsd has a form for it, of paths below the directory; a file that has none any more when the guest is saved, or is
//! not found by it afterwards, gives the guest errors. What is closed is in [`Nodes`](crate::nodes::Nodes). Locks are not
//! part of it, nor is which extensions of FUSE were agreed on with the guest's kernel: files that it makes after that get
//! no supplementary group.

use std::fs::File;
use std::io;

use virtiofsd::filesystem::{FileSystem, SerializableFileSystem};
use virtiofsd::server::Server;

/// A session of the guest's with the file system. None of its requests is being served meanwhile.
pub(crate) trait Session: Send + Sync {
    /// Forgets what the guest has open.
    fn forget(&self);
    /// Writes that.
    fn save(&self, state: File) -> io::Result<()>;
    /// Opens what has been saved, in place of what the guest has open.
    fn restore(&self, state: File) -> io::Result<()>;
}

impl<F: FileSystem + SerializableFileSystem + Send + Sync> Session for Server<F> {
    fn forget(&self) {
        self.destroy();
    }

    fn save(&self, state: File) -> io::Result<()> {
        self.prepare_serialization(Default::default());
        self.serialize(state)
    }

    fn restore(&self, state: File) -> io::Result<()> {
        self.forget();
        let restored = self.deserialize_and_apply(state);
        restored.inspect_err(|_| self.forget())
    }
}
