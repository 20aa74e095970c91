//! What the guest has said on its console, the newest of it, for readers that come and go.

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// How much is kept for a reader that comes later.
pub const HISTORY: usize = 64 << 10;
/// How far a reader may be behind.
pub const MOST_BEHIND: usize = 256 << 10;

/// A ring that whoever has the guest's output pushes it into. Readers each have a position in all
/// that was ever said.
#[derive(Debug)]
pub struct Transcript {
    said: Mutex<Said>,
    news: EventFd,
}

#[derive(Debug, Default)]
struct Said {
    newest: VecDeque<u8>,
    /// How much was said in all: the position behind `newest`.
    end: u64,
    readers: usize,
    /// The readers have yet to look at what came last.
    is_signalled: bool,
}

impl Transcript {
    /// Nothing was said.
    ///
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            said: Mutex::default(),
            news: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// Adds to what was said. Without a reader that is a copy, and no system call.
    pub fn push(&self, bytes: &[u8]) {
        let mut said = self.said();
        said.add(bytes);
        if said.readers > 0 && !std::mem::replace(&mut said.is_signalled, true) {
            let _ = self.news.write(1);
        }
    }

    /// Readable when something was said since [`Transcript::take_news`], if there is a reader.
    pub fn news(&self) -> &EventFd {
        &self.news
    }

    /// To be called before readers look.
    pub fn take_news(&self) {
        let mut said = self.said();
        said.is_signalled = false;
        let _ = self.news.read();
    }

    /// A new reader, and where it begins.
    pub fn attach(&self) -> u64 {
        let mut said = self.said();
        said.readers += 1;
        said.end - said.newest.len().min(HISTORY) as u64
    }

    /// A reader has left.
    pub fn detach(&self) {
        let mut said = self.said();
        said.readers -= 1;
        if said.readers == 0 {
            said.keep(HISTORY);
            said.newest.shrink_to(HISTORY);
        }
    }

    /// The position behind what was said last.
    pub fn end(&self) -> u64 {
        self.said().end
    }

    /// Copies what was said from `position` on, as much of it as `buffer` has room for; `None` when
    /// that is no longer known.
    pub fn read(&self, position: u64, buffer: &mut [u8]) -> Option<usize> {
        let said = self.said();
        let behind = usize::try_from(said.end.checked_sub(position)?).ok()?;
        let start = said.newest.len().checked_sub(behind)?;
        let length = behind.min(buffer.len());
        for (to, byte) in buffer
            .iter_mut()
            .zip(said.newest.range(start..start + length))
        {
            *to = *byte;
        }
        Some(length)
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Said {
    fn add(&mut self, bytes: &[u8]) {
        let room = if self.readers > 0 {
            MOST_BEHIND
        } else {
            HISTORY
        };
        let newest = &bytes[bytes.len().saturating_sub(room)..];
        self.keep(room - newest.len());
        let needed = self.newest.len() + newest.len();
        if needed > self.newest.capacity() {
            // Doubled each time, but not beyond the bound.
            let grown = needed.max(2 * self.newest.capacity()).min(room);
            self.newest.reserve_exact(grown - self.newest.len());
        }
        self.newest.extend(newest);
        self.end += bytes.len() as u64;
    }

    fn keep(&mut self, most: usize) {
        self.newest.drain(..self.newest.len().saturating_sub(most));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(transcript: &Transcript, position: u64) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 2 * MOST_BEHIND];
        let length = transcript.read(position, &mut buffer)?;
        buffer.truncate(length);
        Some(buffer)
    }

    #[test]
    fn newest_is_kept_up_to_a_bound() {
        let transcript = Transcript::new().unwrap();
        let all: Vec<u8> = (0..3 * HISTORY).map(|n| (n % 251) as u8).collect();
        for piece in all.chunks(1000) {
            transcript.push(piece);
        }
        assert!(transcript.said().newest.capacity() <= HISTORY);
        let start = transcript.attach();
        assert_eq!(start, 2 * HISTORY as u64);
        assert_eq!(read(&transcript, start).unwrap(), all[2 * HISTORY..]);
        assert_eq!(read(&transcript, transcript.end()).unwrap(), b"");
        assert_eq!(read(&transcript, start - 1), None);
    }

    #[test]
    fn more_than_all_the_room_at_once_leaves_its_end() {
        let transcript = Transcript::new().unwrap();
        transcript.push(b"before");
        transcript.push(&[&[b'x'; MOST_BEHIND][..], b"end"].concat());
        assert_eq!(transcript.end(), 6 + MOST_BEHIND as u64 + 3);
        let newest = read(&transcript, transcript.attach()).unwrap();
        assert_eq!(newest.len(), HISTORY);
        assert!(newest.ends_with(b"xxend"));
    }

    #[test]
    fn readers_may_be_behind_and_are_lost_when_they_are_too_far() {
        let transcript = Transcript::new().unwrap();
        let start = transcript.attach();
        transcript.push(&[b'x'; MOST_BEHIND]);
        assert_eq!(read(&transcript, start).unwrap().len(), MOST_BEHIND);
        transcript.push(b"y");
        assert_eq!(read(&transcript, start), None);
        assert_eq!(read(&transcript, start + 1).unwrap().len(), MOST_BEHIND);
        transcript.detach();
        let said = transcript.said();
        assert_eq!(said.newest.len(), HISTORY);
        assert!(said.newest.capacity() <= HISTORY);
    }

    #[test]
    fn only_readers_are_signalled_and_once_until_they_look() {
        let transcript = Transcript::new().unwrap();
        transcript.push(b"alone");
        assert!(transcript.news().read().is_err());
        transcript.attach();
        transcript.push(b"a");
        transcript.push(b"b");
        assert_eq!(transcript.news().read().unwrap(), 1);
        transcript.push(b"c");
        assert!(transcript.news().read().is_err());
        transcript.take_news();
        transcript.push(b"d");
        assert_eq!(transcript.news().read().unwrap(), 1);
    }
}
