//! The kernel's locks on parts of a file that belong to the open file (fcntl_locking(2), "Open file description locks").

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;

use rustix::fs::Stat;

use crate::identity::LinkId;

/// What is locked of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    start: i64,
    /// 0 for all that follows.
    len: i64,
}

/// How it is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Beside other such locks.
    Read,
    /// Beside none.
    Write,
}

impl Range {
    pub const WHOLE: Self = Self { start: 0, len: 0 };

    /// The byte of a link. Namespaces' inodes have 32 bits, of which the highest is always set.
    pub fn of(LinkId { namespace, index }: LinkId) -> Self {
        let place = (namespace & 0x7fff_ffff) << 32 | u64::from(index);
        // 63 bits.
        let start = place as i64;
        Self { start, len: 1 }
    }

    /// Locks it, or changes the lock that the file has, and says whether no other lock is in the way.
    pub fn lock(&self, file: &File, kind: Kind) -> io::Result<bool> {
        let kind = match kind {
            Kind::Read => libc::F_RDLCK,
            Kind::Write => libc::F_WRLCK,
        };
        match self.fcntl(file, libc::F_OFD_SETLK, kind) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) if error.raw_os_error() == Some(libc::EACCES) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A lock of another open file on it.
    pub fn conflict(&self, file: &File) -> io::Result<Option<Kind>> {
        let found = self.fcntl(file, libc::F_OFD_GETLK, libc::F_WRLCK)?;
        Ok(match libc::c_int::from(found) {
            libc::F_UNLCK => None,
            libc::F_RDLCK => Some(Kind::Read),
            _ => Some(Kind::Write),
        })
    }

    /// Returns the type that the call leaves in the structure.
    fn fcntl(&self, file: &File, command: i32, kind: libc::c_int) -> io::Result<libc::c_short> {
        let mut lock = libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: self.start,
            l_len: self.len,
            l_pid: 0,
        };
        // SAFETY: both commands read and write one struct flock, which this is, and keep no pointer to it.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(lock.l_type)
        }
    }

    fn overlaps(&self, start: i64, end: i64) -> bool {
        let own_end = match self.len {
            0 => i64::MAX,
            len => self.start.saturating_add(len - 1),
        };
        start <= own_end && self.start <= end
    }
}

/// How often the table is read: to be passed over each time is as unlikely as can be.
const READINGS: usize = 5;

/// All locks of the machine (proc_locks(5)): the only way to see one on a file that one may not open.
#[derive(Debug)]
pub(super) struct Table(io::Result<String>);

impl Table {
    /// The kernel gives it a page at a time, and a lock that others go before moves over the edge of one and is passed
    /// over. So it is read several times, and what was seen once counts.
    pub fn read() -> Self {
        let readings = (0..READINGS).map(|_| fs::read_to_string("/proc/locks"));
        Self(readings.collect())
    }

    /// Whether one is on this part of the file.
    pub fn has(&self, file: &Stat, range: &Range) -> io::Result<bool> {
        let text = self.0.as_ref().map_err(|error| error.kind())?;
        let (major, minor) = (
            rustix::fs::major(file.st_dev),
            rustix::fs::minor(file.st_dev),
        );
        let id = format!("{major:02x}:{minor:02x}:{}", file.st_ino);
        Ok(text.lines().any(|line| is_on(line, &id, range)))
    }
}

/// Reads `1: OFDLCK ADVISORY  READ -1 fe:00:1234 5 5`. With an arrow after the number it only waits.
fn is_on(line: &str, id: &str, range: &Range) -> bool {
    let words: Vec<_> = line.split_whitespace().collect();
    let [_, "OFDLCK", _, _, _, file, start, end] = words[..] else {
        return false;
    };
    let end = if end == "EOF" {
        Ok(i64::MAX)
    } else {
        end.parse()
    };
    file == id && matches!((start.parse(), end), (Ok(start), Ok(end)) if range.overlaps(start, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_of_the_table_is_of_its_file_and_part_alone() {
        let byte = Range { start: 7, len: 1 };
        let line = "1: OFDLCK ADVISORY  READ -1 fe:00:1234 7 7";
        assert!(is_on(line, "fe:00:1234", &byte) && is_on(line, "fe:00:1234", &Range::WHOLE));
        assert!(!is_on(line, "fe:00:123", &byte));
        assert!(!is_on(line, "fe:00:1234", &Range { start: 8, len: 1 }));
        let all = "2: OFDLCK ADVISORY  READ -1 fe:00:1234 0 EOF";
        assert!(is_on(all, "fe:00:1234", &byte));
        for other in [
            "1: -> OFDLCK ADVISORY  READ -1 fe:00:1234 7 7",
            "1: POSIX  ADVISORY  WRITE 9 fe:00:1234 7 7",
            "",
        ] {
            assert!(!is_on(other, "fe:00:1234", &byte), "{other}");
        }
    }

    #[test]
    fn links_have_bytes_of_their_own() {
        let of = |namespace, index| Range::of(LinkId { namespace, index });
        let all = [
            of(4_026_531_840, 4),
            of(4_026_531_841, 4),
            of(4_026_531_840, 5),
        ];
        for (n, one) in all.iter().enumerate() {
            assert!(one.start >= 0 && one.overlaps(0, i64::MAX));
            assert!(all[..n].iter().all(|other| other != one));
        }
    }
}
