//! File descriptors that a program finds under known numbers.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The number of the first: the lowest that a shell leaves free.
pub const FIRST: RawFd = 3;

/// Descriptors that a program is to have as [`FIRST`] and the numbers that follow, in order.
///
/// Close-on-exec stays set on them here: no other child of this process inherits one.
#[derive(Debug)]
pub struct Handover {
    descriptors: Vec<OwnedFd>,
    /// Whatever has a wanted number during the fork is overwritten there. These keep the pipe away by which
    /// [`Command`] learns whether exec worked.
    _occupied: Vec<OwnedFd>,
}

impl Handover {
    /// Moves the descriptors to numbers above those that they will have, so that none overwrites another.
    ///
    /// # Errors
    ///
    /// Fails when the process has no file descriptor left.
    pub fn new(descriptors: Vec<OwnedFd>) -> io::Result<Self> {
        let above = FIRST + descriptors.len() as RawFd;
        let move_up = |fd: OwnedFd| Ok(rustix::io::fcntl_dupfd_cloexec(&fd, above)?);
        let descriptors = descriptors
            .into_iter()
            .map(move_up)
            .collect::<io::Result<_>>()?;
        let mut occupied = Vec::new();
        loop {
            let filler = OwnedFd::from(File::open("/dev/null")?);
            if filler.as_raw_fd() >= above {
                break;
            }
            occupied.push(filler);
        }
        Ok(Self {
            descriptors,
            _occupied: occupied,
        })
    }

    /// Lets the program inherit them. Keep this value until it has been started.
    pub fn attach(&self, command: &mut Command) {
        let numbers: Vec<RawFd> = self.descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let place = move || {
            for (wanted, &fd) in (FIRST..).zip(&numbers) {
                // SAFETY: dup2 takes numbers. Whatever had the new one is closed, which no destructor of
                // this process will notice, since it is about to become another program.
                if unsafe { libc::dup2(fd, wanted) } < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: what runs between fork and exec makes system calls alone: it allocates nothing and takes no lock.
        unsafe { command.pre_exec(place) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::Stdio;

    use super::*;

    #[test]
    fn handover_gives_the_numbers_in_order() {
        let pipes: Vec<_> = (0..3).map(|_| io::pipe().unwrap()).collect();
        let (mut readers, writers): (Vec<_>, Vec<_>) = pipes.into_iter().unzip();
        let writers = writers.into_iter().map(OwnedFd::from).collect();
        let handover = Handover::new(writers).unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", "printf a >&3; printf b >&4; printf c >&5"]);
        handover.attach(&mut shell);
        assert!(shell.status().unwrap().success());
        drop(handover);
        for (reader, expected) in readers.iter_mut().zip(["a", "b", "c"]) {
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            assert_eq!(text, expected);
        }
    }

    #[test]
    fn handover_to_a_missing_program_is_told() {
        let handover = Handover::new(vec![File::open("/dev/null").unwrap().into()]).unwrap();
        let mut missing = Command::new("/no/such/program");
        missing.stdin(Stdio::null());
        handover.attach(&mut missing);
        assert_eq!(missing.spawn().unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
