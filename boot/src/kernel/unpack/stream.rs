//! Formats that are unpacked from their beginning to their end.

use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;

use flate2::bufread::GzDecoder;

use super::vmlinux::Destination;
use super::{Error, Packed};

/// What a payload of gzip begins with.
pub(super) const GZIP: [u8; 2] = *b"\x1f\x8b";
/// What is unpacked at once; it stays in the processor's cache until it is where it belongs.
const BUFFER: u64 = 256 << 10;

/// A gzip file, which ends with the length of what is in it: the kernel's build adds none.
pub(super) fn unpack_gzip<'a>(
    payload: &Packed,
    open: impl FnOnce(&[u8]) -> Result<Destination<'a>, Error>,
) -> Result<Destination<'a>, Error> {
    let bytes = Bytes {
        payload,
        at: 0,
        end: payload.packed + size_of::<u32>() as u64,
    };
    let gzip = GzDecoder::new(BufReader::with_capacity(BUFFER as usize, bytes));
    unpack(gzip, payload.unpacked, open)
}

/// Unpacks `length` bytes, which have to be all, into what `open` makes of the first.
fn unpack<'a>(
    mut unpacker: impl Read,
    length: u64,
    open: impl FnOnce(&[u8]) -> Result<Destination<'a>, Error>,
) -> Result<Destination<'a>, Error> {
    let mut buffer = vec![0; BUFFER.min(length) as usize];
    unpacker.read_exact(&mut buffer).map_err(Error::Stream)?;
    let mut destination = open(&buffer)?;
    destination.write(0, &buffer)?;
    for at in (BUFFER..length).step_by(BUFFER as usize) {
        let bytes = &mut buffer[..BUFFER.min(length - at) as usize];
        unpacker.read_exact(bytes).map_err(Error::Stream)?;
        destination.write(at, bytes)?;
    }
    match unpacker.read(&mut [0]).map_err(Error::Stream)? {
        0 => Ok(destination),
        _ => Err(Error::Payload("it is longer than it says")),
    }
}

/// The payload as a file of its own.
struct Bytes<'a> {
    payload: &'a Packed<'a>,
    at: u64,
    end: u64,
}

impl Read for Bytes<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let size = (self.end - self.at).min(buffer.len() as u64) as usize;
        let position = self.payload.start + self.at;
        let size = self.payload.file.read_at(&mut buffer[..size], position)?;
        self.at += size as u64;
        Ok(size)
    }
}
