//! The files that the guest remembers, by its numbers for them, and which of them are open.
//!
//! An open one costs a descriptor. One that nothing uses can be closed: it is found again where it was seen last, by its
//! directory and its name there, if it has the same inode number.

mod saved;

use std::collections::{BTreeMap, HashMap};
use std::ffi::CStr;
use std::io;
use std::mem::take;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtiofsd::filesystem::ROOT_ID;
use virtiofsd::fuse::Attr;

/// Files that the guest can remember. Each takes about 300 bytes, and its name.
const MOST: usize = 1 << 20;
/// Descriptors for what the requests being served open.
const SPARE: usize = 32;

/// Where a file was seen last.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Place {
    pub directory: u64,
    pub name: Arc<CStr>,
}

/// What the served file system has of a file.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Opened {
    inode: u64,
    /// How often it was looked up there: as often it is to be forgotten.
    lookups: u64,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Node {
    /// The inode number and the type, which it is known by.
    identity: (u64, u32),
    /// `None` for the root, and for a file that has lost the name it was seen by.
    place: Option<Place>,
    /// Those that were seen in this directory: it stays while they may be looked for.
    #[serde(skip)]
    children: BTreeMap<Arc<CStr>, u64>,
    /// How often the guest has looked it up.
    lookups: u64,
    opened: Option<Opened>,
    /// Requests that use it and its handles: it stays open.
    #[serde(skip)]
    uses: u64,
    /// Its key in `Nodes::idle`.
    #[serde(skip)]
    idle: Option<u64>,
}

/// All of them.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Nodes {
    /// How many descriptors there are for files and handles.
    #[serde(skip)]
    budget: usize,
    nodes: HashMap<u64, Node>,
    /// Those that are open, by their inode numbers in the served file system.
    #[serde(skip)]
    opened: HashMap<u64, u64>,
    /// Those that are closed, by their inode numbers: another name may lead to one of these.
    #[serde(skip)]
    closed: HashMap<u64, u64>,
    /// Those that can be closed, in the order in which they were used.
    #[serde(skip)]
    idle: BTreeMap<u64, u64>,
    handles: HashMap<u64, u64>,
    /// What the served file system is to forget: inodes, and how many lookups of each.
    #[serde(skip)]
    forgotten: Vec<(u64, u64)>,
    /// Numbers are given once.
    next: u64,
}

fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

fn identity(attr: &Attr) -> (u64, u32) {
    (attr.ino, attr.mode & libc::S_IFMT)
}

impl Nodes {
    pub fn new(budget: usize) -> Self {
        let mut nodes = Self {
            budget,
            nodes: HashMap::new(),
            opened: HashMap::new(),
            closed: HashMap::new(),
            idle: BTreeMap::new(),
            handles: HashMap::new(),
            forgotten: Vec::new(),
            next: ROOT_ID + 1,
        };
        nodes.clear();
        nodes
    }

    /// Begins anew, with the root alone.
    pub fn clear(&mut self) {
        self.opened.clear();
        self.closed.clear();
        self.idle.clear();
        self.handles.clear();
        self.forgotten.clear();
        let root = Node {
            opened: Some(Opened {
                inode: ROOT_ID,
                lookups: 1,
            }),
            // Never closed, and never forgotten.
            lookups: 1,
            uses: 1,
            ..Node::default()
        };
        self.nodes = HashMap::from([(ROOT_ID, root)]);
        self.opened.insert(ROOT_ID, ROOT_ID);
    }

    /// Takes what the served file system is to forget.
    pub fn take_forgotten(&mut self) -> Vec<(u64, u64)> {
        take(&mut self.forgotten)
    }

    /// Whether the guest has this number.
    pub fn check(&self, id: u64) -> io::Result<()> {
        let node = self.nodes.get(&id).filter(|node| node.lookups > 0);
        node.map(drop).ok_or_else(|| error(libc::EBADF))
    }

    /// The file of this name that was seen in a directory.
    pub fn child(&self, directory: u64, name: &CStr) -> Option<u64> {
        self.nodes.get(&directory)?.children.get(name).copied()
    }

    /// Keeps a file open, if it is, until [`leave`](Self::leave): its inode in the served file system.
    pub fn enter(&mut self, id: u64) -> Option<u64> {
        let node = self.nodes.get_mut(&id)?;
        let inode = node.opened?.inode;
        node.uses += 1;
        self.stay(id);
        Some(inode)
    }

    pub fn leave(&mut self, id: u64) {
        // It is gone where the guest has begun anew meanwhile.
        if let Some(node) = self.nodes.get_mut(&id) {
            node.uses = node.uses.saturating_sub(1);
            self.rest(id);
            self.prune(id);
        }
    }

    /// A file that is not open and the directories above it that are not, the file first.
    pub fn closed_from(&self, id: u64) -> io::Result<Vec<u64>> {
        let mut closed = Vec::new();
        let mut at = id;
        while let Some(node) = self.nodes.get(&at)
            && node.opened.is_none()
        {
            closed.push(at);
            // It is not what it was, or somewhere else.
            let place = node.place.as_ref().ok_or_else(|| error(libc::ESTALE))?;
            at = place.directory;
        }
        Ok(closed)
    }

    /// Where to look for a file that is not open.
    pub fn place_of_closed(&self, id: u64) -> Option<Place> {
        let node = self.nodes.get(&id).filter(|node| node.opened.is_none());
        node.and_then(|node| node.place.clone())
    }

    /// This was found where a file was seen last. It is open, if this is the file.
    pub fn reopened(&mut self, id: u64, inode: u64, attr: &Attr) -> io::Result<()> {
        let is_other = match self.opened.get(&inode).copied() {
            Some(other) => {
                self.count(other, inode);
                other != id
            }
            None => match self.nodes.get(&id) {
                Some(node) if node.opened.is_none() && node.identity == identity(attr) => {
                    self.open(id, inode);
                    false
                }
                _ => {
                    self.forgotten.push((inode, 1));
                    true
                }
            },
        };
        match is_other {
            true => Err(error(libc::ESTALE)),
            false => Ok(()),
        }
    }

    /// The file that this may be by another name: one that is closed.
    pub fn closed_twin(&self, inode: u64, attr: &Attr) -> Option<u64> {
        let has_names = attr.nlink > 1 && attr.mode & libc::S_IFMT != libc::S_IFDIR;
        let is_new = has_names && !self.opened.contains_key(&inode);
        self.closed.get(&attr.ino).copied().filter(|_| is_new)
    }

    /// The guest has looked this name up in a directory, and this is there: its number for it.
    pub fn found(&mut self, directory: u64, name: &CStr, inode: u64, attr: &Attr) -> u64 {
        let known = self.opened.get(&inode).copied();
        let closed = |id: &u64| {
            let node = self.nodes.get(id);
            node.is_some_and(|node| node.opened.is_none() && node.identity == identity(attr))
        };
        let id = match (known, self.child(directory, name).filter(closed)) {
            (Some(id), _) => {
                self.count(id, inode);
                id
            }
            (None, Some(id)) => {
                self.open(id, inode);
                id
            }
            (None, None) => self.add(inode, attr),
        };
        if let Some(node) = self.nodes.get_mut(&id) {
            node.lookups += 1;
        }
        self.put(id, directory, name);
        self.rest(id);
        id
    }

    /// The guest forgets so many lookups.
    pub fn forget(&mut self, id: u64, lookups: u64) {
        if let Some(node) = self.nodes.get_mut(&id).filter(|_| id != ROOT_ID) {
            node.lookups = node.lookups.saturating_sub(lookups);
            self.prune(id);
        }
    }

    /// A name is gone from a directory.
    pub fn unnamed(&mut self, directory: u64, name: &CStr) {
        self.unname(directory, name);
    }

    /// A name has moved, over another one or in exchange for it.
    pub fn renamed(&mut self, from: (u64, &CStr), to: (u64, &CStr), is_exchange: bool) {
        let moved = self.unname(from.0, from.1);
        let replaced = self.unname(to.0, to.1);
        if let Some(moved) = moved {
            self.put(moved, to.0, to.1);
            self.rest(moved);
        }
        if let Some(replaced) = replaced.filter(|_| is_exchange) {
            self.put(replaced, from.0, from.1);
            self.rest(replaced);
        }
    }

    /// The guest has a handle of a file, which stays open with it.
    pub fn add_handle(&mut self, id: u64, handle: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.uses += 1;
            self.stay(id);
            self.handles.insert(handle, id);
        }
    }

    /// The inode of a handle's file in the served file system.
    pub fn inode_of_handle(&self, id: u64, handle: u64) -> io::Result<u64> {
        let id = self.handles.get(&handle).filter(|file| **file == id);
        let opened = id.and_then(|id| self.nodes.get(id)?.opened);
        opened
            .map(|opened| opened.inode)
            .ok_or_else(|| error(libc::EBADF))
    }

    pub fn remove_handle(&mut self, handle: u64) {
        if let Some(id) = self.handles.remove(&handle) {
            self.leave(id);
        }
    }

    /// Closes what was used least recently, where descriptors are short. Fails when the guest remembers too much.
    pub fn make_room(&mut self) -> io::Result<()> {
        while self.opened.len() + self.handles.len() + SPARE > self.budget
            && let Some((_, id)) = self.idle.pop_first()
        {
            self.close(id);
        }
        match self.nodes.len() < MOST {
            true => Ok(()),
            false => Err(error(libc::ENFILE)),
        }
    }

    /// Closes all that can be closed.
    pub fn close_idle(&mut self) {
        while let Some((_, id)) = self.idle.pop_first() {
            self.close(id);
        }
    }

    fn add(&mut self, inode: u64, attr: &Attr) -> u64 {
        let id = self.next;
        self.next += 1;
        let node = Node {
            identity: identity(attr),
            ..Node::default()
        };
        self.nodes.insert(id, node);
        self.open(id, inode);
        id
    }

    /// The served file system has looked up what is open already.
    fn count(&mut self, id: u64, inode: u64) {
        let opened = self
            .nodes
            .get_mut(&id)
            .and_then(|node| node.opened.as_mut());
        match opened {
            Some(opened) => opened.lookups += 1,
            None => self.forgotten.push((inode, 1)),
        }
    }

    fn open(&mut self, id: u64, inode: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.opened = Some(Opened { inode, lookups: 1 });
            let ino = node.identity.0;
            self.opened.insert(inode, id);
            self.not_closed(ino, id);
            self.rest(id);
        }
    }

    fn close(&mut self, id: u64) {
        if let Some(node) = self.nodes.get_mut(&id)
            && let Some(opened) = node.opened.take()
        {
            node.idle = None;
            self.closed.insert(node.identity.0, id);
            self.opened.remove(&opened.inode);
            self.forgotten.push((opened.inode, opened.lookups));
        }
    }

    fn not_closed(&mut self, ino: u64, id: u64) {
        if self.closed.get(&ino) == Some(&id) {
            self.closed.remove(&ino);
        }
    }

    /// It can be closed, if it is open, nothing uses it, and it can be found again.
    fn rest(&mut self, id: u64) {
        self.stay(id);
        if let Some(node) = self.nodes.get_mut(&id)
            && node.opened.is_some()
            && node.uses == 0
            && node.place.is_some()
        {
            self.idle.insert(self.next, id);
            node.idle = Some(self.next);
            self.next += 1;
        }
    }

    /// It cannot be closed.
    fn stay(&mut self, id: u64) {
        let node = self.nodes.get_mut(&id);
        if let Some(key) = node.and_then(|node| node.idle.take()) {
            self.idle.remove(&key);
        }
    }

    /// A file is in this place.
    fn put(&mut self, id: u64, directory: u64, name: &CStr) {
        if self.child(directory, name) == Some(id) || self.is_below(directory, id) {
            return;
        }
        if let Some(place) = self.nodes.get(&id).and_then(|node| node.place.clone()) {
            self.unname(place.directory, &place.name);
        }
        // What was seen there is there no more.
        self.unname(directory, name);
        let name: Arc<CStr> = name.into();
        if let Some(above) = self.nodes.get_mut(&directory) {
            above.children.insert(name.clone(), id);
            if let Some(node) = self.nodes.get_mut(&id) {
                node.place = Some(Place { directory, name });
            }
        }
    }

    /// Whether a directory is, as far as is known, the other one or below it. One that has moved on the host may seem to be.
    fn is_below(&self, directory: u64, other: u64) -> bool {
        let node = self.nodes.get(&other);
        // The root stays. Most that is looked up has nothing below it.
        if other == ROOT_ID || node.is_none_or(|node| node.children.is_empty()) {
            return other == ROOT_ID || directory == other;
        }
        let mut at = Some(directory);
        while let Some(id) = at
            && id != other
        {
            let place = self.nodes.get(&id).and_then(|node| node.place.as_ref());
            at = place.map(|place| place.directory);
        }
        at.is_some()
    }

    /// The file that was seen in this place has none now.
    fn unname(&mut self, directory: u64, name: &CStr) -> Option<u64> {
        let id = self.nodes.get_mut(&directory)?.children.remove(name)?;
        if let Some(node) = self.nodes.get_mut(&id) {
            node.place = None;
        }
        self.stay(id);
        self.prune(directory);
        Some(id)
    }

    /// Drops a file that neither the guest nor anything else needs, and then maybe its directory.
    fn prune(&mut self, id: u64) {
        let mut at = Some(id);
        while let Some(id) = at {
            let unneeded =
                |node: &&Node| node.lookups == 0 && node.uses == 0 && node.children.is_empty();
            if self.nodes.get(&id).filter(unneeded).is_none() {
                return;
            }
            self.stay(id);
            self.close(id);
            at = None;
            if let Some(node) = self.nodes.remove(&id) {
                self.not_closed(node.identity.0, id);
                if let Some(place) = node.place {
                    if let Some(above) = self.nodes.get_mut(&place.directory) {
                        above.children.remove(&place.name);
                    }
                    at = Some(place.directory);
                }
            }
        }
    }
}
