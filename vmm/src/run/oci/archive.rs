//! The merged layers as one tar archive (POSIX pax).
//!
//! The directories come first, each before what is in it, then all files, each with its other names behind it, then the rest.

use std::collections::HashMap;
use std::io::{self, Read, Write};

use tar::{Builder, EntryType, Header};

use super::layer::{Entry, Kind, Layer, XATTR, each_header};
use super::layout::Blob;
use super::tree::{Source, Tree};

/// The most bytes of a name that a header has room for.
const NAME: usize = 100;

/// Writes the archive.
///
/// # Errors
///
/// A layer cannot be read again, has changed, or `to` fails.
pub fn write(tree: &Tree, layers: &[(Blob, Layer)], to: impl Write) -> io::Result<()> {
    let entry = |source: Source| &layers[source.layer].1.entries[source.entry];
    let mut archive = Output(Builder::new(to));
    for (path, source) in tree.directories() {
        archive.directory(path, source.map(entry))?;
    }
    let others = tree.others();
    for (layer, (blob, _)) in layers.iter().enumerate() {
        let end = layer + 1;
        let sources = others.range(
            Source { layer, entry: 0 }..Source {
                layer: end,
                entry: 0,
            },
        );
        let files = sources.map(|(source, paths)| (entry(*source), &paths[..]));
        let files = files.filter(|(entry, _)| matches!(entry.kind, Kind::File(_)));
        archive.files(blob, &files.collect::<Vec<_>>())?;
    }
    for (source, paths) in &others {
        archive.other(entry(*source), paths)?;
    }
    archive.0.into_inner().map(drop)
}

struct Output<W: Write>(Builder<W>);

impl<W: Write> Output<W> {
    fn directory(&mut self, path: &[u8], entry: Option<&Entry>) -> io::Result<()> {
        let implied = Entry {
            path: Vec::new(),
            kind: Kind::Directory,
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: 0,
            xattrs: Vec::new(),
            header: 0,
        };
        let entry = entry.unwrap_or(&implied);
        let path = [b"./", path].concat();
        let header = header(EntryType::Directory, entry);
        self.entry(header, &path, None, &entry.xattrs, &mut io::empty())
    }

    /// Files of a layer, each with its names.
    fn files(&mut self, blob: &Blob, files: &[(&Entry, &[&[u8]])]) -> io::Result<()> {
        if files.is_empty() {
            return Ok(());
        }
        let files: HashMap<_, _> = files.iter().map(|file| (file.0.header, file)).collect();
        let mut left = files.len();
        each_header(blob, |number, original, contents| {
            let Some((entry, paths)) = files.get(&number) else {
                return Ok(());
            };
            let Kind::File(size) = entry.kind else {
                return Ok(());
            };
            if original.entry_size()? != size {
                return Err(changed());
            }
            left -= 1;
            let mut header = header(EntryType::Regular, entry);
            header.set_size(size);
            self.named(header, entry, paths, None, contents)
        })?;
        if left == 0 { Ok(()) } else { Err(changed()) }
    }

    /// Anything but a file or a directory.
    fn other(&mut self, entry: &Entry, paths: &[&[u8]]) -> io::Result<()> {
        let (kind, target, device) = match &entry.kind {
            Kind::Symlink(target) => (EntryType::Symlink, Some(&target[..]), None),
            Kind::Char(major, minor) => (EntryType::Char, None, Some((major, minor))),
            Kind::Block(major, minor) => (EntryType::Block, None, Some((major, minor))),
            Kind::Fifo => (EntryType::Fifo, None, None),
            // Files are there already; the others are of no source.
            Kind::File(_) | Kind::Directory | Kind::Link(_) => return Ok(()),
        };
        let mut header = header(kind, entry);
        if let Some((major, minor)) = device {
            header.set_device_major(*major)?;
            header.set_device_minor(*minor)?;
        }
        self.named(header, entry, paths, target, &mut io::empty())
    }

    /// An entry by its first name, and links to it by the others.
    fn named(
        &mut self,
        own: Header,
        entry: &Entry,
        paths: &[&[u8]],
        target: Option<&[u8]>,
        contents: &mut dyn Read,
    ) -> io::Result<()> {
        let [path, others @ ..] = paths else {
            return Ok(());
        };
        self.entry(own, path, target, &entry.xattrs, contents)?;
        for other in others {
            let header = header(EntryType::Link, entry);
            self.entry(header, other, Some(path), &[], &mut io::empty())?;
        }
        Ok(())
    }

    fn entry(
        &mut self,
        mut header: Header,
        path: &[u8],
        target: Option<&[u8]>,
        xattrs: &[(String, Vec<u8>)],
        contents: &mut dyn Read,
    ) -> io::Result<()> {
        let mut pax: Vec<(String, &[u8])> = Vec::new();
        let names = header.as_old_mut();
        let fields = [
            ("path", Some(path), &mut names.name),
            ("linkpath", target, &mut names.linkname),
        ];
        for (key, name, field) in fields {
            let Some(name) = name else { continue };
            let length = name.len().min(NAME);
            field[..length].copy_from_slice(&name[..length]);
            if name.len() > NAME {
                pax.push((key.to_owned(), name));
            }
        }
        for (name, value) in xattrs {
            pax.push((format!("{XATTR}{name}"), value));
        }
        if !pax.is_empty() {
            let records = pax.iter().map(|(key, value)| (&key[..], *value));
            self.0.append_pax_extensions(records)?;
        }
        header.set_cksum();
        self.0.append(&header, contents)
    }
}

fn header(kind: EntryType, entry: &Entry) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(entry.mode);
    header.set_uid(entry.uid);
    header.set_gid(entry.gid);
    header.set_mtime(entry.mtime);
    header.set_size(0);
    header
}

fn changed() -> io::Error {
    io::Error::other("a layer has changed since it was read")
}
