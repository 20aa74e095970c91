//! Locks on image files that QEMU, qemu-img and minivmm respect alike.
//!
//! They are open file description locks on single bytes, all of them read locks, as QEMU's
//! block/file-posix.c has them. A byte of the first hundred says "I do this", one of the second
//! hundred "no other may do this". Whoever opens an image sets his bytes first and then looks
//! for others' that forbid it, so that of two at the same time at least one is refused.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

/// How long a lock is waited for that no process is seen to have, and how often it is tried.
const PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(2);
/// "I do this": what an image's user does.
const DOES: libc::off_t = 100;
/// "Nobody else may do this."
const FORBIDS: libc::off_t = 200;

/// What can be done with an image: QEMU's BLK_PERM_* numbers.
const READ: libc::off_t = 0;
const WRITE: libc::off_t = 1;
const RESIZE: libc::off_t = 3;

/// What a user of an image does with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Reads it; others may read it too.
    Read,
    /// Writes it, alone.
    Write,
}

/// Why there is no lock.
#[derive(Debug)]
pub(super) enum Refused {
    /// Others use the image: programs with a process ID, where they could be found.
    Used(Vec<String>),
    /// There are no locks on this file system, or no memory.
    Failed(io::Error),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

/// Locks `file` for as long as its file description is open.
///
/// A write lock is refused while anybody uses the image, a read lock while anybody writes it.
///
/// An io_uring gives its files back some time after its process has ended. So a lock that no process
/// is seen to have is waited for.
pub(super) fn take(file: &File, access: Access) -> Result<(), Refused> {
    let start = Instant::now();
    loop {
        match try_take(file, access) {
            Err(Refused::Used(users)) if users.is_empty() && start.elapsed() < PATIENCE => {
                thread::sleep(PAUSE);
            }
            result => return result,
        }
    }
}

fn try_take(file: &File, access: Access) -> Result<(), Refused> {
    let does: &[libc::off_t] = match access {
        Access::Read => &[READ],
        Access::Write => &[READ, WRITE, RESIZE],
    };
    let forbids = [WRITE, RESIZE];
    let ours = does.iter().map(|what| DOES + what);
    for byte in ours.chain(forbids.map(|what| FORBIDS + what)) {
        request(file, libc::F_OFD_SETLK, &mut read_lock(byte)).map_err(|error| {
            match error.kind() {
                // A write lock of a program that is none of QEMU's.
                io::ErrorKind::WouldBlock => Refused::Used(users(file)),
                _ => error.into(),
            }
        })?;
    }
    let theirs = does.iter().map(|what| FORBIDS + what);
    for byte in theirs.chain(forbids.map(|what| DOES + what)) {
        // Would a write lock be granted? Locks of this file description do not stand in its way.
        let mut lock = read_lock(byte);
        lock.l_type = libc::F_WRLCK as libc::c_short;
        request(file, libc::F_OFD_GETLK, &mut lock)?;
        if lock.l_type != libc::F_UNLCK as libc::c_short {
            return Err(Refused::Used(users(file)));
        }
    }
    Ok(())
}

/// A read lock of one byte.
fn read_lock(byte: libc::off_t) -> libc::flock {
    libc::flock {
        l_type: libc::F_RDLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn request(file: &File, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: these commands of fcntl take an open descriptor, which `file` owns, and a flock, which
    // `lock` is.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut *lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The programs that hold locks on this file, as far as /proc shows them to this user.
///
/// The kernel names no owner of such a lock. But it lists a description's locks under each process
/// that has it open, and so ours: with the file's device and number as it calls them.
fn users(file: &File) -> Vec<String> {
    let own_lock = format!("/proc/self/fdinfo/{}", file.as_raw_fd());
    let own = fs::read_to_string(own_lock).unwrap_or_default();
    let Some(id) = locked_files(&own).next() else {
        return Vec::new();
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut users: Vec<u32> = numbers
        .filter(|pid| *pid != std::process::id() && has_locked(*pid, id))
        .collect();
    users.sort_unstable();
    users
        .into_iter()
        .map(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("{} (process {pid})", name.trim().escape_debug())
        })
        .collect()
}

fn has_locked(pid: u32, id: &str) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fdinfo"));
    let texts = descriptors.into_iter().flatten().flatten();
    texts
        .filter_map(|entry| fs::read_to_string(entry.path()).ok())
        .any(|text| locked_files(&text).any(|file| file == id))
}

/// The files of the locks in a text of fdinfo, as in
/// `lock: 1: OFDLCK  ADVISORY  READ -1 00:2a:1234 100 100`.
fn locked_files(fdinfo: &str) -> impl Iterator<Item = &str> {
    let locks = fdinfo.lines().filter(|line| line.starts_with("lock:"));
    locks.filter_map(|line| line.split_whitespace().nth(6))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn twice() -> (File, File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        (
            file.reopen().unwrap(),
            File::options().read(true).open(file.path()).unwrap(),
        )
    }

    #[test]
    fn readers_share_an_image() {
        let (one, other) = twice();
        take(&one, Access::Read).unwrap();
        take(&other, Access::Read).unwrap();
    }

    #[test]
    fn writer_is_alone() {
        for [first, second] in [
            [Access::Write, Access::Write],
            [Access::Write, Access::Read],
            [Access::Read, Access::Write],
        ] {
            let file = tempfile::NamedTempFile::new().unwrap();
            let (one, other) = (file.reopen().unwrap(), file.reopen().unwrap());
            take(&one, first).unwrap();
            assert!(matches!(try_take(&other, second), Err(Refused::Used(_))));
        }
    }

    #[test]
    fn lock_ends_with_its_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let one = file.reopen().unwrap();
        take(&one, Access::Write).unwrap();
        drop(one);
        // A process that another test starts may have the file for a moment more.
        while take(&file.reopen().unwrap(), Access::Write).is_err() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn locks_are_found_in_fdinfo() {
        let (one, _) = twice();
        take(&one, Access::Read).unwrap();
        let own = fs::read_to_string(format!("/proc/self/fdinfo/{}", one.as_raw_fd())).unwrap();
        let ids: Vec<&str> = locked_files(&own).collect();
        assert_eq!(ids.len(), 3, "{own}");
        assert!(ids[0].split(':').count() == 3, "{own}");
        assert!(has_locked(std::process::id(), ids[0]));
        assert!(!has_locked(1, "ff:ff:0"));
    }
}
