//! FUSE requests (include/uapi/linux/fuse.h), as a guest's kernel or whoever has taken it over sends them.

use crate::client::{Guest, HIPRIO, REQUESTS};

pub const ROOT: u64 = 1;

// Opcodes.
pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const READLINK: u32 = 5;
pub const SYMLINK: u32 = 6;
pub const MKNOD: u32 = 8;
pub const MKDIR: u32 = 9;
pub const UNLINK: u32 = 10;
pub const RMDIR: u32 = 11;
pub const RENAME: u32 = 12;
pub const LINK: u32 = 13;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
pub const RELEASE: u32 = 18;
pub const INIT: u32 = 26;
pub const OPENDIR: u32 = 27;
pub const READDIR: u32 = 28;
pub const CREATE: u32 = 35;
const RENAME2: u32 = 45;

/// An answer's header.
const HEADER: usize = 16;
const ROOM: u32 = 0x11_0000;

/// What an entry shows of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub node: u64,
    pub size: u64,
    pub mode: u32,
    pub links: u32,
    pub uid: u32,
    pub gid: u32,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Entry {
    fn of(answer: &[u8]) -> Self {
        Self {
            node: long(answer, 0),
            ..Self::of_attributes(&answer[40..])
        }
    }

    fn of_attributes(attributes: &[u8]) -> Self {
        Self {
            node: 0,
            size: long(attributes, 8),
            mode: word(attributes, 60),
            links: word(attributes, 64),
            uid: word(attributes, 68),
            gid: word(attributes, 72),
        }
    }
}

/// Bytes of words and long words.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

/// The answer to a request, or the error's number.
pub type Answer<T> = Result<T, i32>;

/// A process of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
}

pub const GUEST_ROOT: User = User { uid: 0, gid: 0 };

/// A request's bytes.
pub fn request(opcode: u32, node: u64, user: User, body: &[u8]) -> Vec<u8> {
    let mut bytes = words(&[40 + body.len() as u32, opcode]);
    bytes.extend(longs(&[0x77, node]));
    bytes.extend(words(&[user.uid, user.gid, 1, 0]));
    bytes.extend(body);
    bytes
}

impl Guest {
    /// Serves the directory and mounts it.
    pub fn mount(mut self) -> Self {
        let answer = self.call(INIT, 0, &words(&[7, 31, 0x2_0000, 0])).unwrap();
        assert_eq!(word(&answer, 0), 7);
        self
    }

    pub fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Answer<Vec<u8>> {
        self.call_as(GUEST_ROOT, opcode, node, body)
    }

    pub fn call_as(&mut self, user: User, opcode: u32, node: u64, body: &[u8]) -> Answer<Vec<u8>> {
        self.call_with(user, opcode, node, body, ROOM)
    }

    fn call_with(
        &mut self,
        user: User,
        opcode: u32,
        node: u64,
        body: &[u8],
        room: u32,
    ) -> Answer<Vec<u8>> {
        let request = request(opcode, node, user, body);
        let answer = self.transact(REQUESTS, &request, room);
        assert_eq!(word(&answer, 0) as usize, answer.len());
        assert_eq!(long(&answer, 8), 0x77);
        match word(&answer, 4) as i32 {
            0 => Ok(answer[HEADER..].to_vec()),
            error => Err(-error),
        }
    }

    pub fn lookup(&mut self, parent: u64, name: &str) -> Answer<Entry> {
        let answer = self.call(LOOKUP, parent, format!("{name}\0").as_bytes());
        answer.map(|answer| Entry::of(&answer))
    }

    /// Looks each name up in the one before.
    pub fn walk(&mut self, path: &str) -> Answer<Entry> {
        let mut node = ROOT;
        let mut entry = None;
        for name in path.split('/') {
            let found = self.lookup(node, name)?;
            node = found.node;
            entry = Some(found);
        }
        Ok(entry.unwrap())
    }

    pub fn forget(&mut self, node: u64, lookups: u64) {
        let request = request(FORGET, node, GUEST_ROOT, &longs(&[lookups]));
        assert!(self.transact(HIPRIO, &request, 0).is_empty());
    }

    pub fn getattr(&mut self, node: u64) -> Answer<Entry> {
        let answer = self.call(GETATTR, node, &[0; 16])?;
        Ok(Entry::of_attributes(&answer[16..]))
    }

    /// Changes the owner, the mode or the size.
    pub fn setattr(
        &mut self,
        node: u64,
        valid: u32,
        size: u64,
        [mode, uid, gid]: [u32; 3],
    ) -> Answer<()> {
        let mut body = words(&[valid, 0]);
        body.extend(longs(&[0, size, 0, 0, 0, 0]));
        body.extend(words(&[0, 0, 0, mode, 0, uid, gid, 0]));
        self.call(SETATTR, node, &body).map(drop)
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Answer<u64> {
        let answer = self.call(OPEN, node, &words(&[flags as u32, 0]))?;
        Ok(long(&answer, 0))
    }

    pub fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Answer<Vec<u8>> {
        let mut body = longs(&[handle, offset]);
        body.extend(words(&[size, 0, 0, 0, 0, 0]));
        // As a driver does it: room for as much as is asked for.
        let room = HEADER as u32 + size;
        self.call_with(GUEST_ROOT, READ, node, &body, room)
    }

    pub fn write(&mut self, node: u64, handle: u64, offset: u64, bytes: &[u8]) -> Answer<u32> {
        let mut body = longs(&[handle, offset]);
        body.extend(words(&[bytes.len() as u32, 0, 0, 0, 0, 0]));
        body.extend(bytes);
        self.call(WRITE, node, &body).map(|answer| word(&answer, 0))
    }

    /// Opens a file, reads it whole, and closes it.
    pub fn read_file(&mut self, node: u64) -> Answer<String> {
        let handle = self.open(node, libc::O_RDONLY)?;
        let bytes = self.read(node, handle, 0, 0x1_0000);
        self.release(node, handle)?;
        bytes.map(|bytes| String::from_utf8(bytes).unwrap())
    }

    pub fn release(&mut self, node: u64, handle: u64) -> Answer<()> {
        let mut body = longs(&[handle]);
        body.extend([0; 16]);
        self.call(RELEASE, node, &body).map(drop)
    }

    pub fn create(&mut self, user: User, parent: u64, name: &str) -> Answer<(Entry, u64)> {
        let flags = (libc::O_RDWR | libc::O_CREAT | libc::O_EXCL) as u32;
        let mut body = words(&[flags, libc::S_IFREG | 0o644, 0, 0]);
        body.extend(format!("{name}\0").as_bytes());
        let answer = self.call_as(user, CREATE, parent, &body)?;
        Ok((Entry::of(&answer), long(&answer, 128)))
    }

    pub fn mkdir(&mut self, parent: u64, name: &str) -> Answer<Entry> {
        let body = [words(&[0o755, 0]), format!("{name}\0").into()].concat();
        let answer = self.call(MKDIR, parent, &body);
        answer.map(|answer| Entry::of(&answer))
    }

    pub fn mknod(&mut self, parent: u64, name: &str, mode: u32, device: u32) -> Answer<Entry> {
        let body = [words(&[mode, device, 0, 0]), format!("{name}\0").into()].concat();
        let answer = self.call(MKNOD, parent, &body);
        answer.map(|answer| Entry::of(&answer))
    }

    pub fn symlink(&mut self, parent: u64, name: &str, target: &str) -> Answer<Entry> {
        let answer = self.call(SYMLINK, parent, format!("{name}\0{target}\0").as_bytes());
        answer.map(|answer| Entry::of(&answer))
    }

    pub fn link(&mut self, node: u64, parent: u64, name: &str) -> Answer<Entry> {
        let body = [longs(&[node]), format!("{name}\0").into()].concat();
        let answer = self.call(LINK, parent, &body);
        answer.map(|answer| Entry::of(&answer))
    }

    pub fn rename(&mut self, from: (u64, &str), to: (u64, &str)) -> Answer<()> {
        let names = format!("{}\0{}\0", from.1, to.1);
        let body = [longs(&[to.0]), names.into()].concat();
        self.call(RENAME, from.0, &body).map(drop)
    }

    pub fn exchange(&mut self, one: (u64, &str), two: (u64, &str)) -> Answer<()> {
        let names = format!("{}\0{}\0", one.1, two.1);
        let flags = words(&[libc::RENAME_EXCHANGE, 0]);
        let body = [longs(&[two.0]), flags, names.into()].concat();
        self.call(RENAME2, one.0, &body).map(drop)
    }

    pub fn unlink(&mut self, parent: u64, name: &str) -> Answer<()> {
        let name = format!("{name}\0");
        self.call(UNLINK, parent, name.as_bytes()).map(drop)
    }

    pub fn rmdir(&mut self, parent: u64, name: &str) -> Answer<()> {
        let name = format!("{name}\0");
        self.call(RMDIR, parent, name.as_bytes()).map(drop)
    }

    /// The names in a directory, sorted.
    pub fn list(&mut self, node: u64) -> Answer<Vec<String>> {
        let flags = libc::O_RDONLY as u32;
        let handle = long(&self.call(OPENDIR, node, &words(&[flags, 0]))?, 0);
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let mut body = longs(&[handle, offset]);
            body.extend(words(&[0x1000, 0, 0, 0, 0, 0]));
            let entries = self.call(READDIR, node, &body)?;
            let mut rest = &entries[..];
            if rest.is_empty() {
                break;
            }
            while !rest.is_empty() {
                offset = long(rest, 8);
                let len = word(rest, 16) as usize;
                let name = String::from_utf8_lossy(&rest[24..24 + len]).into_owned();
                if name != "." && name != ".." {
                    names.push(name);
                }
                rest = &rest[(24 + len).next_multiple_of(8)..];
            }
        }
        names.sort();
        Ok(names)
    }
}
