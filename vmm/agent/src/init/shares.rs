//! Directories of the host's in the guest.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use agent_protocol::boot::Share;
use rustix::mount::MountFlags;

use super::mounts::{MountError, mount};

/// Mounts a directory of the host's. Returns why it is not there, where the guest can do without it.
///
/// # Errors
///
/// See [`MountError`].
pub fn mount_share(share: &Share) -> Result<Option<MountError>, MountError> {
    let flags = match share.read_only {
        true => MountFlags::RDONLY,
        false => MountFlags::empty(),
    };
    let at = Path::new(OsStr::from_bytes(&share.path));
    match mount(&share.tag, at, "virtiofs", flags, "") {
        Err(error @ MountError::Directory(..)) if share.optional => Ok(Some(error)),
        mounted => mounted.map(|()| None),
    }
}
