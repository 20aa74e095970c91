//! Opening a qcow2 image and the files below it.
//!
//! What an image names as its backing file is the word of whoever wrote the image. It is opened if
//! it lies in the image's directory or below, or is what the user has named, and only as what the
//! header says it is: a format is never found out by looking, since a guest may have written what
//! would be found. What is judged is the descriptor that is used.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use imago::format::builder::FormatDriverBuilder;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess};

use super::Qcow2Image;
use super::file::HostFile;
use super::header::{AUTOCLEAR_AT, BackingName, Header, HeaderError};
use super::order::Order;
use crate::disk::lock::Access;
use crate::disk::open::{Found, OpenError, length, make_direct};
use crate::disk::{Format, ImageSpec};

/// The most files of an image: itself, and those below it.
const MAX_DEPTH: usize = 16;
/// The most memory that the tables of all of them take.
const MAX_MEMORY: u64 = 256 << 20;
/// What O_DIRECT is content with everywhere.
const DIRECT_ALIGNMENT: usize = 4096;

/// The files of an image, as far as they are open.
struct Chain<'a> {
    spec: &'a ImageSpec,
    /// Device and inode of what `backing=` names.
    named: Option<(u64, u64)>,
    /// Device and inode of each file.
    open: Vec<(u64, u64)>,
    memory: u64,
}

/// Opens the image in `file`, which was found at the path that `spec` has.
pub(in crate::disk) fn open(
    spec: &ImageSpec,
    found: &Found,
    file: File,
    access: Access,
) -> Result<Qcow2Image, OpenError> {
    let named = spec.backing.as_deref().map(Found::at).transpose()?;
    let mut chain = Chain {
        spec,
        named: named.map(|found| found.id),
        open: vec![found.id],
        memory: 0,
    };
    let (image, file, header, backing_size) = chain.open(found, file, access)?;
    let writable = access == Access::Write;
    Ok(Qcow2Image::new(image, file, header, backing_size, writable))
}

type Opened = (FormatAccess<HostFile>, HostFile, Header, Option<u64>);

impl Chain<'_> {
    /// Opens one qcow2 image of the chain, and what is below it.
    fn open(&mut self, found: &Found, file: File, access: Access) -> Result<Opened, OpenError> {
        let refused = |error| OpenError::Open(found.path().into(), error);
        let bad_header = |error| OpenError::Header(found.path().into(), error);
        let writable = access == Access::Write;
        let header = Header::read(&file).map_err(bad_header)?;
        if writable && header.snapshots > 0 {
            return Err(bad_header(HeaderError::Snapshots(header.snapshots)));
        }
        if writable && self.spec.direct && header.cluster_size() < DIRECT_ALIGNMENT as u64 {
            return Err(bad_header(HeaderError::DirectClusters));
        }
        let order = match writable {
            true => {
                let read = |bytes: &mut [u8], at| read_padded(&file, bytes, at);
                let order = Order::new(&header, read).map_err(refused)?;
                let file_length = length(&file).map_err(refused)?;
                order.check(file_length).map_err(bad_header)?;
                Some(order)
            }
            false => None,
        };
        self.memory += header.memory(order.as_ref().map_or(0, Order::refblocks));
        if self.memory > MAX_MEMORY {
            return Err(bad_header(HeaderError::Memory(
                "tables, and those below it,",
            )));
        }
        let backing = match &header.backing {
            Some(name) => Some(self.open_backing(found, name).map_err(|source| {
                let (image, backing) = (found.path().into(), name.path.clone());
                OpenError::Backing(image, backing, Box::new(source))
            })?),
            None => None,
        };
        if writable && header.autoclear != 0 {
            // imago would write the whole header anew, which a power cut may tear.
            let cleared = file.write_all_at(&[0; 8], AUTOCLEAR_AT);
            cleared.and_then(|()| file.sync_data()).map_err(refused)?;
        }
        let backing_size = backing.as_ref().map(FormatAccess::size);
        let file = self.host_file(found, file, order)?;
        let builder = Qcow2::<HostFile>::builder(file.clone());
        let builder = builder.backing(backing).data_file(None).write(writable);
        let image = builder
            .open(DenyImplicitOpenGate::default())
            .map_err(|error| OpenError::Tables(found.path().into(), error))?;
        Ok((FormatAccess::new(image), file, header, backing_size))
    }

    /// Opens the file below `image` that its header names.
    fn open_backing(
        &mut self,
        image: &Found,
        name: &BackingName,
    ) -> Result<FormatAccess<HostFile>, OpenError> {
        let path = || image.path().into();
        let format = match name.format.as_deref() {
            Some("raw") => Format::Raw,
            Some("qcow2") => Format::Qcow2,
            Some(other) => return Err(OpenError::BackingFormat(other.into())),
            None => {
                let (image, backing) = (path(), name.path.clone());
                return Err(OpenError::BackingFormatMissing(image, backing));
            }
        };
        let location = image.location().map_err(|e| OpenError::Open(path(), e))?;
        let directory = location.parent().unwrap_or(Path::new("/"));
        let found = Found::at(&directory.join(&name.path))?;
        if self.open.contains(&found.id) {
            return Err(OpenError::BackingLoop);
        }
        if self.open.len() >= MAX_DEPTH {
            return Err(OpenError::BackingDepth(MAX_DEPTH));
        }
        if self.named != Some(found.id) {
            let at = found.location();
            let at = at.map_err(|error| OpenError::Open(found.path().into(), error))?;
            // All of the host's files are below /, and all of its disks in /dev.
            let shared = image.is_device || directory == Path::new("/");
            if shared || !at.starts_with(directory) {
                return Err(OpenError::BackingOutside(at, directory.into()));
            }
        }
        let file = found.open(Access::Read)?;
        self.open.push(found.id);
        match format {
            Format::Qcow2 => Ok(self.open(&found, file, Access::Read)?.0),
            Format::Raw => {
                let file = self.host_file(&found, file, None)?;
                let raw = Raw::open_image(file, false);
                let raw = raw.map_err(|error| OpenError::Open(found.path().into(), error))?;
                Ok(FormatAccess::new(raw))
            }
        }
    }

    fn host_file(
        &self,
        found: &Found,
        file: File,
        order: Option<Order>,
    ) -> Result<HostFile, OpenError> {
        if !self.spec.direct {
            return Ok(HostFile::new(file, 1, order));
        }
        make_direct(&file).map_err(|error| OpenError::Direct(found.path().into(), error))?;
        Ok(HostFile::new(file, DIRECT_ALIGNMENT, order))
    }
}

/// Reads `bytes` whole: what follows the end of a file reads as zeros.
fn read_padded(file: &File, mut bytes: &mut [u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.read_at(bytes, at) {
            Ok(0) => {
                bytes.fill(0);
                break;
            }
            Ok(done) => {
                bytes = &mut bytes[done..];
                at += done as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
