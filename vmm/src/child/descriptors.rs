//! File descriptors that a program inherits.

use std::ffi::c_uint;
use std::fs;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// The number of the first that is passed by number: the lowest that a shell leaves free.
pub const FIRST: RawFd = 3;

/// Descriptors for a program: some under numbers that are wanted, others under any number.
///
/// Close-on-exec stays set on them here: no other child of this process inherits one.
#[derive(Debug)]
pub struct Passed {
    /// By the numbers that they get.
    numbered: Vec<(RawFd, OwnedFd)>,
    others: Vec<OwnedFd>,
    /// A descriptor with a wanted number is overwritten during the fork. These keep the pipe away by which
    /// [`std::process::Command`] learns whether exec worked.
    _occupied: Vec<OwnedFd>,
}

impl Passed {
    /// Moves the descriptors to numbers above those that are wanted, so that none overwrites another.
    pub fn new(numbered: Vec<(RawFd, OwnedFd)>, others: Vec<OwnedFd>) -> io::Result<Self> {
        let last = numbered.iter().map(|(wanted, _)| *wanted).max();
        let above = last.map_or(FIRST, |last| last + 1);
        let move_up = |fd: OwnedFd| rustix::io::fcntl_dupfd_cloexec(&fd, above);
        let numbered = numbered.into_iter();
        let numbered = numbered.map(|(wanted, fd)| Ok((wanted, move_up(fd)?)));
        let numbered = numbered.collect::<io::Result<_>>()?;
        let others = others.into_iter().map(|fd| Ok(move_up(fd)?));
        let others = others.collect::<io::Result<_>>()?;
        let mut occupied = Vec::new();
        loop {
            let filler = OwnedFd::from(File::open("/dev/null")?);
            if filler.as_raw_fd() >= above {
                break;
            }
            occupied.push(filler);
        }
        Ok(Self {
            numbered,
            others,
            _occupied: occupied,
        })
    }

    /// Gives them to the program that this process becomes. Runs between fork and exec.
    pub fn place(&self) -> io::Result<()> {
        for (wanted, fd) in &self.numbered {
            // SAFETY: dup2 takes numbers. Whatever had the new one is closed, which no destructor of
            // this process will notice, since it is about to become another program.
            if unsafe { libc::dup2(fd.as_raw_fd(), *wanted) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        for fd in &self.others {
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
        }
        Ok(())
    }
}

/// Has exec close every descriptor from [`FIRST`] on, also those that this process has inherited and knows nothing of. May
/// run after a fork: it makes system calls alone.
pub fn close_on_exec() {
    // SAFETY: it takes numbers, and changes what exec does alone.
    let done = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            FIRST as c_uint,
            c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if done == 0 {
        return;
    }
    // A kernel before 5.11.
    for number in FIRST..limit() {
        // SAFETY: as above.
        unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
}

/// No descriptor has this number or a larger one, in all likelihood.
fn limit() -> RawFd {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    limit.unwrap_or(u64::MAX).min(1 << 16) as RawFd
}

/// Closes every descriptor from [`FIRST`] on but those to `keep`.
///
/// # Safety
///
/// Nothing in this process may own one of those that are closed.
pub unsafe fn close_but(keep: &[RawFd]) -> io::Result<()> {
    let entries = fs::read_dir("/proc/self/fd")?;
    let number = |entry: io::Result<fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    let numbers: Vec<RawFd> = entries.filter_map(number).collect();
    for number in numbers {
        if number >= FIRST && !keep.contains(&number) {
            // SAFETY: as for this function. That of the directory is closed already, and its number given to none.
            unsafe { libc::close(number) };
        }
    }
    Ok(())
}

/// Closes every descriptor of a process that needs none. Runs after a fork, and calls what may be called there.
pub(super) fn close_all() {
    // SAFETY: it takes numbers. This process runs no destructor of what owned them.
    if unsafe { libc::syscall(libc::SYS_close_range, 0, c_uint::MAX, 0) } == 0 {
        return;
    }
    // A kernel before 5.9.
    for number in 0..limit() {
        // SAFETY: as above.
        unsafe { libc::close(number) };
    }
}
