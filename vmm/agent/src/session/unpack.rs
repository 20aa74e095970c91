//! The root file system that the host sends: a tar archive, unpacked as it comes.

use std::fs;
use std::io::{self, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;

use agent_protocol::session::Unpacked;
use rustix::fs::{CWD, FileType, Gid, Mode, Uid, chownat, makedev, mknodat};
use tar::{Archive, Entry, EntryType};

use crate::chain;

/// How much is read at once.
const PIECE: usize = 256 << 10;
/// The stack of the thread: the archive's reader keeps little on it.
const STACK: usize = 256 << 10;

/// Why an archive is not unpacked.
#[derive(Debug, thiserror::Error)]
enum UnpackError {
    #[error("cannot make the directory {0:?}")]
    Directory(PathBuf, #[source] io::Error),
    #[error("cannot read the archive")]
    Read(#[source] io::Error),
    #[error("cannot unpack {0:?}")]
    Entry(PathBuf, #[source] io::Error),
    #[error("{0:?} is not within the directory")]
    Outside(PathBuf),
}

/// Unpacks what comes on the stream after `first` into a directory, by a thread of its own, and says what came of it.
pub fn serve(path: Vec<u8>, first: Vec<u8>, stream: UnixStream) {
    let refused = stream.try_clone();
    let work = move || {
        let directory = PathBuf::from(std::ffi::OsStr::from_bytes(&path));
        let unpacked = stream
            .set_nonblocking(false)
            .map_err(UnpackError::Read)
            .and_then(|()| unpack(&directory, first.chain(&stream)));
        let result =
            unpacked.map_or_else(|error| Unpacked::Failed(chain(&error)), |()| Unpacked::Done);
        let _ = agent_protocol::write(&stream, &result);
    };
    let started = thread::Builder::new().stack_size(STACK).spawn(work);
    if let (Err(error), Ok(stream)) = (started, refused) {
        let text = format!("cannot start a thread: {error}");
        let _ = agent_protocol::write(&stream, &Unpacked::Failed(text));
    }
}

fn unpack(directory: &Path, from: impl Read) -> Result<(), UnpackError> {
    let failed = |error| UnpackError::Directory(directory.to_owned(), error);
    fs::create_dir_all(directory).map_err(failed)?;
    let mut archive = Archive::new(BufReader::with_capacity(PIECE, from));
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.set_unpack_xattrs(true);
    for entry in archive.entries().map_err(UnpackError::Read)? {
        let mut entry = entry.map_err(UnpackError::Read)?;
        let path = entry.path().map_err(UnpackError::Read)?.into_owned();
        let made = match entry.header().entry_type() {
            EntryType::Char => node(&entry, directory, FileType::CharacterDevice),
            EntryType::Block => node(&entry, directory, FileType::BlockDevice),
            EntryType::Fifo => node(&entry, directory, FileType::Fifo),
            _ => entry.unpack_in(directory),
        };
        match made {
            Ok(true) => {}
            Ok(false) => return Err(UnpackError::Outside(path)),
            Err(error) => return Err(UnpackError::Entry(path, error)),
        }
    }
    Ok(())
}

/// Makes a device or a FIFO, which the archive's reader does not; whether that is within the directory.
fn node<R: Read>(entry: &Entry<'_, R>, directory: &Path, kind: FileType) -> io::Result<bool> {
    let path = entry.path()?;
    let is_plain = |part| {
        matches!(
            part,
            std::path::Component::Normal(_) | std::path::Component::CurDir
        )
    };
    if !path.components().all(is_plain) {
        return Ok(false);
    }
    let path = directory.join(path);
    // A symbolic link could lead to elsewhere.
    let parent = path.parent().unwrap_or(directory).canonicalize()?;
    if !parent.starts_with(directory.canonicalize()?) {
        return Ok(false);
    }
    let header = entry.header();
    let (major, minor) = match kind {
        FileType::Fifo => (0, 0),
        _ => (
            header.device_major()?.unwrap_or(0),
            header.device_minor()?.unwrap_or(0),
        ),
    };
    let mode = Mode::from_raw_mode(header.mode()? & 0o7777);
    mknodat(CWD, &path, kind, mode, makedev(major, minor))?;
    let number = |id: u64| u32::try_from(id).map_err(io::Error::other);
    let (uid, gid) = (number(header.uid()?)?, number(header.gid()?)?);
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    chownat(
        CWD,
        &path,
        Some(uid),
        Some(gid),
        rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
    )?;
    // What the process masks is meant, too.
    fs::set_permissions(
        &path,
        std::os::unix::fs::PermissionsExt::from_mode(mode.as_raw_mode()),
    )?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::Shutdown;

    use super::*;

    fn header(kind: EntryType, size: u64) -> tar::Header {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(0o640);
        header.set_uid(rustix::process::getuid().as_raw().into());
        header.set_gid(rustix::process::getgid().as_raw().into());
        header.set_mtime(1_700_000_000);
        header.set_size(size);
        header
    }

    /// What the agent says of an archive whose first bytes have come already.
    fn serve_bytes(directory: &Path, archive: &[u8]) -> Unpacked {
        let (mut host, stream) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let (first, rest) = archive.split_at(archive.len().min(700));
        serve(
            directory.as_os_str().as_bytes().to_vec(),
            first.to_vec(),
            stream,
        );
        // It may have refused the archive before its end.
        let _ = host.write_all(rest);
        host.shutdown(Shutdown::Write).unwrap();
        agent_protocol::read(&host).unwrap()
    }

    #[test]
    fn archive_is_unpacked_with_links_and_modes() {
        let mut archive = tar::Builder::new(Vec::new());
        let long = format!("d/{}", "n".repeat(200));
        archive
            .append_data(&mut header(EntryType::Directory, 0), "d/", io::empty())
            .unwrap();
        archive
            .append_data(&mut header(EntryType::Regular, 5), &long, &b"hello"[..])
            .unwrap();
        archive
            .append_link(&mut header(EntryType::Link, 0), "hard", &long)
            .unwrap();
        archive
            .append_link(&mut header(EntryType::Symlink, 0), "soft", "/d/x")
            .unwrap();
        archive
            .append_data(&mut header(EntryType::Fifo, 0), "d/fifo", io::empty())
            .unwrap();
        let archive = archive.into_inner().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        assert_eq!(serve_bytes(&path, &archive), Unpacked::Done);
        assert_eq!(fs::read(path.join(&long)).unwrap(), b"hello");
        assert_eq!(fs::read_link(path.join("soft")).unwrap(), Path::new("/d/x"));
        use std::os::unix::fs::{FileTypeExt, MetadataExt};
        let file = fs::metadata(path.join("hard")).unwrap();
        assert_eq!((file.nlink(), file.mode() & 0o7777), (2, 0o640));
        assert_eq!(file.mtime(), 1_700_000_000);
        let fifo = fs::metadata(path.join("d/fifo")).unwrap();
        assert!(fifo.file_type().is_fifo() && fifo.mode() & 0o7777 == 0o640);
    }

    #[test]
    fn archive_that_is_damaged_or_leads_elsewhere_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let outside = directory.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let inside = directory.path().join("inside");
        for kind in [EntryType::Regular, EntryType::Fifo] {
            let mut archive = tar::Builder::new(Vec::new());
            let target = outside.as_os_str().to_owned();
            archive
                .append_link(&mut header(EntryType::Symlink, 0), "a", target)
                .unwrap();
            archive
                .append_data(&mut header(kind, 0), "a/b", io::empty())
                .unwrap();
            let result = serve_bytes(&inside, &archive.into_inner().unwrap());
            assert!(
                matches!(&result, Unpacked::Failed(text) if text.contains("a/b")),
                "{result:?}"
            );
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        let result = serve_bytes(&inside, &[1; 2048]);
        assert!(matches!(&result, Unpacked::Failed(text) if text.contains("read the archive")));
    }
}
