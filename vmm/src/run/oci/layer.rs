//! The tar archive of a layer (image-spec, layer.md): POSIX's and GNU's forms.

use std::collections::HashMap;
use std::io::{self, Read};

use tar::{Archive, EntryType, Header};

use super::layout::Blob;
use crate::run::unpack::unpacked;

/// The most bytes of a layer, unpacked: more than fit into a guest's memory.
const LONGEST: u64 = 64 << 30;
/// The most entries of a layer.
const MOST: usize = 4 << 20;
/// The most bytes of an entry's long names and attributes: a value has up to 64 KiB.
const LONGEST_EXTENSION: u64 = 1 << 20;
/// The most bytes of all names and attributes of a layer.
const MOST_TEXT: usize = 1 << 30;
/// How pax's names of extended attributes begin.
pub const XATTR: &str = "SCHILY.xattr.";
/// The longest path.
const LONGEST_PATH: usize = 4095;

/// Why a layer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// It cannot be read or unpacked, or is no tar archive.
    #[error("cannot read it as a tar archive, plain or packed by gzip, zstd or xz")]
    Read(#[from] io::Error),
    /// It is not what its digest says.
    #[error("it is damaged: its digest is another, or its size")]
    Damaged,
    /// It is larger than any guest's memory.
    #[error("it has more than {MOST} entries, {} GiB, or {} GiB of names", LONGEST >> 30, MOST_TEXT >> 30)]
    TooLarge,
    /// A path would leave the root, or is none.
    #[error("an entry has the path {0:?}, which is none within a root")]
    Path(String),
    /// An entry that no root has.
    #[error("the entry {path:?} is of an unknown kind, or has no valid size")]
    Kind {
        /// Its path.
        path: String,
    },
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A file with so many bytes.
    File(u64),
    /// A symbolic link to that.
    Symlink(Vec<u8>),
    /// Another name of an entry, by that one's path within the root.
    Link(Vec<u8>),
    /// A character device.
    Char(u32, u32),
    /// A block device.
    Block(u32, u32),
    /// A FIFO.
    Fifo,
}

/// An entry of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its path within the root: components with one slash between them, none of which is special; empty for the root.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// When it was changed, in seconds.
    pub mtime: u64,
    /// Extended attributes.
    pub xattrs: Vec<(String, Vec<u8>)>,
    /// Which of the archive's headers is its own.
    pub header: usize,
}

/// What is in a layer.
#[derive(Debug, Default)]
pub struct Layer {
    /// Its entries, in the archive's order.
    pub entries: Vec<Entry>,
}

impl Layer {
    /// Reads the archive, but for the contents of its files.
    ///
    /// # Errors
    ///
    /// See [`LayerError`].
    pub fn read(blob: &Blob) -> Result<Self, LayerError> {
        let mut entries = Vec::new();
        let (mut extension, mut text) = (Extension::default(), 0);
        each_header(blob, |number, header, contents| {
            let kind = header.entry_type();
            if kind.is_pax_global_extensions() {
                return Ok(());
            }
            if extension.take(kind, header, contents)? {
                return Ok(());
            }
            let entry = std::mem::take(&mut extension).entry(number, header)?;
            let xattrs = entry
                .xattrs
                .iter()
                .map(|(name, value)| name.len() + value.len());
            text += entry.path.len() + xattrs.sum::<usize>();
            if entries.len() == MOST || text > MOST_TEXT {
                return Err(LayerError::TooLarge);
            }
            entries.push(entry);
            Ok(())
        })?;
        Ok(Self { entries })
    }
}

/// Calls `visit` for each header of the archive, in which the contents can be read.
///
/// # Errors
///
/// Those of `visit`, and [`LayerError::Read`].
pub fn each_header<E: From<io::Error>>(
    blob: &Blob,
    mut visit: impl FnMut(usize, &Header, &mut dyn Read) -> Result<(), E>,
) -> Result<(), E> {
    let bytes = unpacked(blob.reader())?;
    let mut archive = Archive::new(Limited(bytes, LONGEST));
    for (number, entry) in archive.entries()?.raw(true).enumerate() {
        let mut entry = entry?;
        let header = entry.header().clone();
        visit(number, &header, &mut entry)?;
    }
    Ok(())
}

/// A stream that fails after so many bytes.
struct Limited<R>(R, u64);

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(buffer)?;
        self.1 = self.1.checked_sub(read as u64).ok_or_else(|| {
            io::Error::other(format!("it unpacks to more than {} GiB", LONGEST >> 30))
        })?;
        Ok(read)
    }
}

/// What comes before an entry's own header, and overrules it.
#[derive(Default)]
struct Extension {
    pax: HashMap<String, Vec<u8>>,
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
}

impl Extension {
    /// Takes a header of this kind, if it is of an extension.
    fn take(
        &mut self,
        kind: EntryType,
        header: &Header,
        contents: &mut dyn Read,
    ) -> Result<bool, LayerError> {
        let is_pax = kind.is_pax_local_extensions();
        if !is_pax && !kind.is_gnu_longname() && !kind.is_gnu_longlink() {
            return Ok(false);
        }
        if header.entry_size()? > LONGEST_EXTENSION {
            return Err(LayerError::TooLarge);
        }
        let mut bytes = Vec::new();
        contents.read_to_end(&mut bytes)?;
        if is_pax {
            let records =
                records(&bytes).ok_or_else(|| io::Error::other("a damaged pax header"))?;
            self.pax.extend(records);
            return Ok(true);
        }
        let end = bytes.iter().position(|byte| *byte == 0);
        bytes.truncate(end.unwrap_or(bytes.len()));
        let name = if kind.is_gnu_longname() {
            &mut self.path
        } else {
            &mut self.link
        };
        *name = Some(bytes);
        Ok(true)
    }

    fn entry(mut self, number: usize, header: &Header) -> Result<Entry, LayerError> {
        let path = self.pax.remove("path").or(self.path.take());
        let path = path.unwrap_or_else(|| header.path_bytes().into_owned());
        let link = self.pax.remove("linkpath").or(self.link.take());
        let link = link.or_else(|| header.link_name_bytes().map(|name| name.into_owned()));
        let unknown = || LayerError::Kind {
            path: String::from_utf8_lossy(&path).into_owned(),
        };
        let size = header.entry_size()?;
        // One that the header has no room for is of a file of 8 GiB; a sparse file has holes.
        let is_other = self.number("size").is_some_and(|other| other != size);
        if is_other || self.pax.keys().any(|key| key.starts_with("GNU.sparse.")) {
            return Err(unknown());
        }
        let device = || {
            let (major, minor) = (header.device_major()?, header.device_minor()?);
            Ok::<_, io::Error>((major.unwrap_or(0), minor.unwrap_or(0)))
        };
        let kind = match header.entry_type() {
            // An old archive's directory is a file whose name ends with a slash.
            EntryType::Regular if path.ends_with(b"/") => Kind::Directory,
            EntryType::Regular | EntryType::Continuous => Kind::File(size),
            EntryType::Directory => Kind::Directory,
            EntryType::Symlink => Kind::Symlink(link.ok_or_else(unknown)?),
            EntryType::Link => Kind::Link(clean(&link.ok_or_else(unknown)?)?),
            EntryType::Char => device().map(|(major, minor)| Kind::Char(major, minor))?,
            EntryType::Block => device().map(|(major, minor)| Kind::Block(major, minor))?,
            EntryType::Fifo => Kind::Fifo,
            _ => return Err(unknown()),
        };
        if matches!(&kind, Kind::Symlink(to) if to.is_empty() || to.contains(&0)) {
            return Err(unknown());
        }
        let xattrs = self.pax.iter().filter_map(|(key, value)| {
            let name = key.strip_prefix(XATTR)?;
            Some((name.to_owned(), value.clone()))
        });
        let mut xattrs: Vec<_> = xattrs.collect();
        xattrs.sort();
        let old = header.as_old();
        // As is every other number of octal digits that fit.
        let mode = field(&old.mode, header.mode().map(u64::from))? as u32;
        Ok(Entry {
            path: clean(&path)?,
            kind,
            mode: mode & 0o7777,
            uid: self
                .number("uid")
                .map_or_else(|| field(&old.uid, header.uid()), Ok)?,
            gid: self
                .number("gid")
                .map_or_else(|| field(&old.gid, header.gid()), Ok)?,
            mtime: self
                .number("mtime")
                .map_or_else(|| field(&old.mtime, header.mtime()), Ok)?,
            xattrs,
            header: number,
        })
    }

    /// A number, without what stands behind its point.
    fn number(&self, key: &str) -> Option<u64> {
        let text = std::str::from_utf8(self.pax.get(key)?).ok()?;
        text.split('.').next()?.parse().ok()
    }
}

/// The records of a pax header, `LENGTH KEY=VALUE` and a newline each. A value may have newlines, too, which the crate's own
/// reader takes for an end.
fn records(mut bytes: &[u8]) -> Option<Vec<(String, Vec<u8>)>> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let digits = bytes.iter().position(|byte| *byte == b' ')?;
        let length: usize = std::str::from_utf8(&bytes[..digits]).ok()?.parse().ok()?;
        let (record, rest) = bytes.split_at_checked(length)?;
        let record = record.get(digits + 1..)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|byte| *byte == b'=')?;
        let key = String::from_utf8(record[..equals].to_vec()).ok()?;
        all.push((key, record[equals + 1..].to_vec()));
        bytes = rest;
    }
    Some(all)
}

/// A number of a header, which may be left out.
fn field(bytes: &[u8], number: io::Result<u64>) -> io::Result<u64> {
    match bytes.iter().all(|byte| matches!(byte, 0 | b' ')) {
        true => Ok(0),
        false => number,
    }
}

/// A path within the root. One that begins with a slash is meant from there.
fn clean(path: &[u8]) -> Result<Vec<u8>, LayerError> {
    let parts = path.split(|byte| *byte == b'/');
    let parts: Vec<_> = parts
        .filter(|part| !part.is_empty() && *part != b".")
        .collect();
    let is_wrong = |part: &&[u8]| *part == b".." || part.len() > 255 || part.contains(&0);
    if parts.iter().any(is_wrong) || path.is_empty() || path.len() > LONGEST_PATH {
        let shown = &path[..path.len().min(256)];
        return Err(LayerError::Path(
            String::from_utf8_lossy(shown).into_owned(),
        ));
    }
    Ok(parts.join(&b'/'))
}
