//! Directories of the host's in the guest.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use agent_protocol::boot::{Access, Share};
use rustix::mount::MountFlags;

use super::mounts::{self, MountError, mount};

/// Where the parts of an overlay are mounted until it is there: in a file system that every guest has.
const PARTS: [&str; 2] = ["/run/minivmm-lower", "/run/minivmm-memory"];

/// Mounts a directory of the host's. Returns why it is not there, where the guest can do without it.
///
/// # Errors
///
/// See [`MountError`].
pub fn mount_share(share: &Share) -> Result<Option<MountError>, MountError> {
    let at = Path::new(OsStr::from_bytes(&share.path));
    let mounted = match share.access {
        Access::ReadOnly => mount(&share.tag, at, "virtiofs", MountFlags::RDONLY, ""),
        Access::ReadWrite => mount(&share.tag, at, "virtiofs", MountFlags::empty(), ""),
        Access::Overlay => mount_over(&share.tag, at),
    };
    match mounted {
        Err(error @ MountError::Directory(..)) if share.optional => Ok(Some(error)),
        mounted => mounted.map(|()| None),
    }
}

fn mount_over(tag: &str, at: &Path) -> Result<(), MountError> {
    let [lower, memory] = PARTS.map(Path::new);
    mount(tag, lower, "virtiofs", MountFlags::RDONLY, "")?;
    mounts::mount_overlay(lower, memory, at)?;
    for part in PARTS {
        // An empty directory does no harm.
        let _ = fs::remove_dir(part);
    }
    Ok(())
}
