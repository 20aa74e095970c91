//! The log as it is kept in the directory of a VM: a file of bounded size, and the one before it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::stdio::dup2_stderr;

/// The most bytes of each file.
const ROOM: usize = 512 << 10;

/// The file that follows the log, and takes what has no more room in it.
pub fn older(log: &Path) -> PathBuf {
    log.with_extension("old")
}

/// A log that is kept.
#[derive(Debug)]
pub struct Kept {
    path: PathBuf,
    /// None when there can be no further one: its directory is gone, or full.
    file: Option<File>,
    size: usize,
    /// Whether it is stderr as well, on which lines are not written a second time.
    is_stderr: bool,
}

impl Kept {
    /// An empty one.
    pub fn new(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            file: Some(create(path)?),
            size: 0,
            is_stderr: false,
        })
    }

    /// Makes it this process's stderr, for messages that are none of the log.
    pub fn replace_stderr(&mut self) -> io::Result<()> {
        self.is_stderr = true;
        match &self.file {
            Some(file) => Ok(dup2_stderr(file)?),
            None => Ok(()),
        }
    }

    /// Adds lines, without colours. Returns whether they are to go nowhere else.
    pub fn write(&mut self, lines: &[u8]) -> bool {
        let lines = without_colours(lines);
        // The last of them, where they are more than there is room for.
        let lines = &lines[lines.len().saturating_sub(ROOM)..];
        if self.size + lines.len() > ROOM {
            self.start_over();
        }
        if let Some(file) = &mut self.file {
            // There is no other place to say that it is full.
            let _ = file.write_all(lines);
            self.size += lines.len();
        }
        self.is_stderr
    }

    fn start_over(&mut self) {
        let next = fs::rename(&self.path, older(&self.path)).and_then(|()| create(&self.path));
        self.file = next.ok();
        self.size = 0;
        if self.is_stderr {
            let _ = self.replace_stderr();
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(0o600).open(path)
}

/// Leaves out what sets a colour: ESC, `[`, numbers, `m`. Nothing else in the log has an ESC.
fn without_colours(lines: &[u8]) -> Vec<u8> {
    let mut in_colour = false;
    let is_text = |byte: &u8| {
        let was = in_colour;
        in_colour = *byte == 0x1b || (was && *byte != b'm');
        !was && !in_colour
    };
    lines.iter().copied().filter(is_text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_left_out() {
        let line = b"minivmm: \x1b[33mwarn\x1b[0m: 5 m\n";
        assert_eq!(without_colours(line), b"minivmm: warn: 5 m\n");
    }

    #[test]
    fn log_is_bounded_and_keeps_the_newest() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut kept = Kept::new(&path).unwrap();
        for n in 0..100_000 {
            kept.write(format!("line {n} of the log\n").as_bytes());
        }
        let read = |path: &Path| fs::read_to_string(path).unwrap();
        let (old, new) = (read(&older(&path)), read(&path));
        assert!(old.len() <= ROOM && new.len() <= ROOM);
        assert!(old.len() + new.len() > ROOM);
        assert!(new.ends_with("line 99999 of the log\n"));
        // What follows the end of the one is the begin of the other.
        let number =
            |line: Option<&str>| line.unwrap()[5..].split(' ').next().unwrap().parse::<u32>();
        let (last, first) = (number(old.lines().last()), number(new.lines().next()));
        assert_eq!(last.unwrap() + 1, first.unwrap());
        assert!(!kept.write(&vec![b'x'; 3 * ROOM]));
        assert_eq!(read(&path).len(), ROOM);
    }

    #[test]
    fn log_whose_directory_is_gone_is_kept_no_longer() {
        let directory = tempfile::tempdir().unwrap();
        let mut kept = Kept::new(&directory.path().join("log")).unwrap();
        drop(directory);
        for _ in 0..3 {
            kept.write(&vec![b'x'; ROOM]);
        }
        assert!(kept.file.is_none());
    }
}
