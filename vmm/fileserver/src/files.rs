//! The file system that the guest sees: that of virtiofsd, with as many descriptors as this process may have.
//!
//! virtiofsd keeps one for each file that the guest remembers, and a guest remembers as many as its memory holds. Here the
//! guest's numbers are of [`Nodes`], which has virtiofsd forget files and look them up again, as the guest could.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, InHeader, SetattrIn};

use crate::nodes::Nodes;

/// A file system of virtiofsd's that can be served: its files and handles have numbers, and another one can go on with them.
pub trait Numbered: FileSystem<Inode = u64, Handle = u64> + SerializableFileSystem {}

impl<F: FileSystem<Inode = u64, Handle = u64> + SerializableFileSystem> Numbered for F {}

/// A file system, and what the guest remembers of it.
pub(crate) struct Files<F: Numbered> {
    served: F,
    nodes: Mutex<Nodes>,
}

/// A file that stays open.
struct Use<'f, F: Numbered> {
    files: &'f Files<F>,
    id: u64,
    inode: u64,
}

impl<F: Numbered> Drop for Use<'_, F> {
    fn drop(&mut self) {
        self.files.change(|nodes| nodes.leave(self.id));
    }
}

impl<F: Numbered> Files<F> {
    /// Serves a file system, which lets the guest have `budget` descriptors.
    pub fn new(served: F, budget: u64) -> Self {
        let budget = usize::try_from(budget).unwrap_or(usize::MAX);
        let nodes = Mutex::new(Nodes::new(budget));
        Self { served, nodes }
    }

    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is remembered, and closes what that leaves unneeded.
    fn change<T>(&self, change: impl FnOnce(&mut Nodes) -> T) -> T {
        let mut nodes = self.nodes();
        let result = change(&mut nodes);
        let forgotten = nodes.take_forgotten();
        drop(nodes);
        if !forgotten.is_empty() {
            self.served.batch_forget(own(), forgotten);
        }
        result
    }

    /// Opens a file where it is closed, and keeps it open.
    fn enter(&self, id: u64) -> io::Result<Use<'_, F>> {
        self.nodes().check(id)?;
        loop {
            let closed = {
                let mut nodes = self.nodes();
                if let Some(inode) = nodes.enter(id) {
                    return Ok(Use {
                        files: self,
                        id,
                        inode,
                    });
                }
                // Forgotten meanwhile, or else there are some.
                nodes.check(id)?;
                nodes.closed_from(id)?
            };
            for id in closed.into_iter().rev() {
                self.reopen(id)?;
            }
        }
    }

    /// Opens a file again whose directory is open. Without effect where one of the two is not what it was: whoever wants
    /// the file looks again.
    fn reopen(&self, id: u64) -> io::Result<()> {
        let place = self.nodes().place_of_closed(id);
        let Some(place) = place else { return Ok(()) };
        let inode = self.nodes().enter(place.directory);
        let Some(inode) = inode else { return Ok(()) };
        let directory = Use {
            files: self,
            id: place.directory,
            inode,
        };
        // Now that it does not make room itself.
        self.make_room()?;
        let found = self.served.lookup(own(), directory.inode, &place.name);
        let found = found.map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => io::Error::from_raw_os_error(libc::ESTALE),
            _ => error,
        })?;
        self.change(|nodes| nodes.reopened(id, found.inode, &found.attr))
    }

    /// Keeps the file of this name open, if it is remembered: it is about to lose the name.
    fn keep(&self, directory: u64, name: &CStr) -> Option<Use<'_, F>> {
        let id = self.nodes().child(directory, name)?;
        self.enter(id).ok()
    }

    fn make_room(&self) -> io::Result<()> {
        self.change(Nodes::make_room)
    }

    /// Has a name in a directory looked up or made: the guest's entry.
    fn entry(
        &self,
        directory: u64,
        name: &CStr,
        look_up: impl FnOnce(u64) -> io::Result<Entry>,
    ) -> io::Result<Entry> {
        let directory = self.enter(directory)?;
        self.make_room()?;
        let entry = look_up(directory.inode)?;
        Ok(self.found(&directory, name, entry))
    }

    /// The guest's entry for one of the served file system.
    fn found(&self, directory: &Use<F>, name: &CStr, entry: Entry) -> Entry {
        let twin = self.nodes().closed_twin(entry.inode, &entry.attr);
        // If it is this file, this is its number.
        drop(twin.map(|twin| self.enter(twin)));
        let found = |nodes: &mut Nodes| nodes.found(directory.id, name, entry.inode, &entry.attr);
        let inode = self.change(found);
        Entry { inode, ..entry }
    }

    /// Has a name removed from a directory.
    fn remove(
        &self,
        directory: u64,
        name: &CStr,
        remove: impl FnOnce(u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let directory = self.enter(directory)?;
        let _kept = self.keep(directory.id, name);
        remove(directory.inode)?;
        self.change(|nodes| nodes.unnamed(directory.id, name));
        Ok(())
    }

    /// Has a file opened, with a handle.
    fn open_with(
        &self,
        file: u64,
        open: impl FnOnce(u64) -> io::Result<(Option<u64>, OpenOptions)>,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let file = self.enter(file)?;
        self.make_room()?;
        let (handle, options) = open(file.inode)?;
        if let Some(handle) = handle {
            self.change(|nodes| nodes.add_handle(file.id, handle));
        }
        Ok((handle, options))
    }

    /// Has a handle closed.
    fn release_with(
        &self,
        file: u64,
        handle: u64,
        release: impl FnOnce(u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let inode = self.nodes().inode_of_handle(file, handle)?;
        release(inode)?;
        self.change(|nodes| nodes.remove_handle(handle));
        Ok(())
    }
}

/// The number of bytes that [`Nodes`] take, these, and the served file system's.
impl<F: Numbered> SerializableFileSystem for Files<F> {
    fn prepare_serialization(&self, cancel: Arc<AtomicBool>) {
        // What is closed is only taken for the same where it is: a path may lead to another file by then.
        self.change(Nodes::close_idle);
        self.served.prepare_serialization(cancel);
    }

    fn serialize(&self, mut state: File) -> io::Result<()> {
        let nodes = self.nodes().save()?;
        state.write_all(&(nodes.len() as u64).to_le_bytes())?;
        state.write_all(&nodes)?;
        // It has the same numbers and handles where it is restored.
        self.served.serialize(state)
    }

    fn deserialize_and_apply(&self, mut state: File) -> io::Result<()> {
        let mut len = [0; 8];
        state.read_exact(&mut len)?;
        let mut nodes = Vec::new();
        let mut part = (&state).take(u64::from_le_bytes(len));
        part.read_to_end(&mut nodes)?;
        let restored = self.nodes().restored(&nodes)?;
        self.served.deserialize_and_apply(state)?;
        *self.nodes() = restored;
        Ok(())
    }
}

/// What this process does by itself, of no user of the guest's.
fn own() -> Context {
    InHeader::default().into()
}

/// Requests about one file, which have the inode of the served file system for it.
macro_rules! about_a_file {
    ($(fn $name:ident(ctx, inode $(, $arg:ident: $kind:ty)*) -> $result:ty;)*) => {$(
        fn $name(&self, ctx: Context, inode: u64 $(, $arg: $kind)*) -> io::Result<$result> {
            let file = self.enter(inode)?;
            self.served.$name(ctx, file.inode $(, $arg)*)
        }
    )*};
}

/// Requests that make a name in a directory.
macro_rules! makes_an_entry {
    ($(fn $name:ident(ctx, parent, name $(, $arg:ident: $kind:ty)*);)*) => {$(
        fn $name(&self, ctx: Context, parent: u64, name: &CStr $(, $arg: $kind)*) -> io::Result<Entry> {
            let make = |parent| self.served.$name(ctx, parent, name $(, $arg)*);
            self.entry(parent, name, make)
        }
    )*};
}

impl<F: Numbered> FileSystem for Files<F> {
    type Inode = u64;
    type Handle = u64;
    type DirIter = F::DirIter;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let options = self.served.init(capable)?;
        self.nodes().clear();
        Ok(options)
    }

    fn destroy(&self) {
        self.served.destroy();
        self.nodes().clear();
    }

    fn forget(&self, _: Context, inode: u64, count: u64) {
        self.change(|nodes| nodes.forget(inode, count));
    }

    fn batch_forget(&self, _: Context, requests: Vec<(u64, u64)>) {
        self.change(|nodes| {
            for (inode, count) in requests {
                nodes.forget(inode, count);
            }
        });
    }

    about_a_file! {
        fn getattr(ctx, inode, handle: Option<u64>) -> (Attr, Duration);
        fn setattr(ctx, inode, attr: SetattrIn, handle: Option<u64>, valid: SetattrValid)
            -> (Attr, Duration);
        fn readlink(ctx, inode) -> Vec<u8>;
        fn flush(ctx, inode, handle: u64, lock_owner: u64) -> ();
        fn fsync(ctx, inode, datasync: bool, handle: u64) -> ();
        fn fallocate(ctx, inode, handle: u64, mode: u32, offset: u64, length: u64) -> ();
        fn statfs(ctx, inode) -> libc::statvfs64;
        fn setxattr(ctx, inode, name: &CStr, value: &[u8], flags: u32, more: SetxattrFlags) -> ();
        fn getxattr(ctx, inode, name: &CStr, size: u32) -> GetxattrReply;
        fn listxattr(ctx, inode, size: u32) -> ListxattrReply;
        fn removexattr(ctx, inode, name: &CStr) -> ();
        fn readdir(ctx, inode, handle: u64, size: u32, offset: u64) -> F::DirIter;
        fn fsyncdir(ctx, inode, datasync: bool, handle: u64) -> ();
        fn access(ctx, inode, mask: u32) -> ();
        fn lseek(ctx, inode, handle: u64, offset: u64, whence: u32) -> u64;
        fn syncfs(ctx, inode) -> ();
    }

    makes_an_entry! {
        fn lookup(ctx, parent, name);
        fn mknod(ctx, parent, name, mode: u32, device: u32, umask: u32, more: Extensions);
        fn mkdir(ctx, parent, name, mode: u32, umask: u32, more: Extensions);
    }

    fn symlink(
        &self,
        ctx: Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
        more: Extensions,
    ) -> io::Result<Entry> {
        let make = |parent| self.served.symlink(ctx, target, parent, name, more);
        self.entry(parent, name, make)
    }

    fn link(&self, ctx: Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let file = self.enter(inode)?;
        let make = |parent| self.served.link(ctx, file.inode, parent, name);
        self.entry(parent, name, make)
    }

    fn unlink(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        let remove = |parent| self.served.unlink(ctx, parent, name);
        self.remove(parent, name, remove)
    }

    fn rmdir(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        let remove = |parent| self.served.rmdir(ctx, parent, name);
        self.remove(parent, name, remove)
    }

    fn rename(
        &self,
        ctx: Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        let (old, new) = (self.enter(old_parent)?, self.enter(new_parent)?);
        let _kept = [self.keep(old.id, old_name), self.keep(new.id, new_name)];
        let (from, to) = (old.inode, new.inode);
        self.served
            .rename(ctx, from, old_name, to, new_name, flags)?;
        let is_exchange = flags & libc::RENAME_EXCHANGE != 0;
        self.change(|nodes| {
            nodes.renamed((old.id, old_name), (new.id, new_name), is_exchange);
        });
        Ok(())
    }

    fn create(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        more: Extensions,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        let parent = self.enter(parent)?;
        self.make_room()?;
        let (inode, file) = (parent.inode, &self.served);
        let created = file.create(ctx, inode, name, mode, kill_priv, flags, umask, more);
        let (entry, handle, options) = created?;
        let entry = self.found(&parent, name, entry);
        if let Some(handle) = handle {
            self.change(|nodes| nodes.add_handle(entry.inode, handle));
        }
        Ok((entry, handle, options))
    }

    fn open(
        &self,
        ctx: Context,
        inode: u64,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let open = |inode| self.served.open(ctx, inode, kill_priv, flags);
        self.open_with(inode, open)
    }

    fn opendir(
        &self,
        ctx: Context,
        inode: u64,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        self.open_with(inode, |inode| self.served.opendir(ctx, inode, flags))
    }

    fn release(
        &self,
        ctx: Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        owner: Option<u64>,
    ) -> io::Result<()> {
        self.release_with(inode, handle, |inode| {
            self.served
                .release(ctx, inode, flags, handle, flush, flock_release, owner)
        })
    }

    fn releasedir(&self, ctx: Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        let release = |inode| self.served.releasedir(ctx, inode, flags, handle);
        self.release_with(inode, handle, release)
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        to: W,
        size: u32,
        offset: u64,
        owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let file = self.enter(inode)?;
        self.served
            .read(ctx, file.inode, handle, to, size, offset, owner, flags)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        from: R,
        size: u32,
        offset: u64,
        owner: Option<u64>,
        delayed: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        let file = self.enter(inode)?;
        let inode = file.inode;
        self.served.write(
            ctx, inode, handle, from, size, offset, owner, delayed, kill_priv, flags,
        )
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        offset: u64,
        to_inode: u64,
        to_handle: u64,
        to_offset: u64,
        len: u64,
        flags: u64,
    ) -> io::Result<usize> {
        let (file, to_file) = (self.enter(inode)?, self.enter(to_inode)?);
        let (from, to) = (file.inode, to_file.inode);
        self.served.copyfilerange(
            ctx, from, handle, offset, to, to_handle, to_offset, len, flags,
        )
    }
}
