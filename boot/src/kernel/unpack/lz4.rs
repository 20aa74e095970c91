//! LZ4 as the kernel's build uses it: the legacy frame, whose blocks of 8 MiB are packed each by itself
//! (lz4_Frame_format.md, "Legacy frame").

use super::vmlinux::Destination;
use super::{Error, Packed};
use crate::share::share;

/// What the payload begins with.
pub(super) const MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
/// The unpacked size of each block but the last.
const BLOCK: u64 = 8 << 20;
/// The packed size of a block that does not get smaller (`LZ4_compressBound`).
const PACKED_MAX: u64 = BLOCK + BLOCK / 255 + 16;

/// A block: its place in the payload, unpacked and packed.
#[derive(Debug)]
struct Block {
    at: u64,
    size: u64,
    packed_at: u64,
    packed_size: u64,
}

/// Unpacks the payload into what `open` makes of its beginning.
pub(super) fn unpack<'a>(
    payload: &Packed,
    open: impl FnOnce(&[u8]) -> Result<Destination<'a>, Error>,
) -> Result<Destination<'a>, Error> {
    let blocks = blocks(payload)?;
    let mut unpacker = Unpacker::default();
    let first = blocks.first().ok_or(Error::Payload("it has no block"))?;
    let destination = open(unpacker.unpack(payload, first)?)?;
    destination.write(first.at, &unpacker.block)?;
    share(&blocks[1..], &mut unpacker, |unpacker, block| {
        destination.write(block.at, unpacker.unpack(payload, block)?)
    })?;
    Ok(destination)
}

/// The blocks, each with its size before it.
fn blocks(payload: &Packed) -> Result<Vec<Block>, Error> {
    let mut blocks = Vec::new();
    let mut packed_at = MAGIC.len() as u64;
    for at in (0..payload.unpacked).step_by(BLOCK as usize) {
        let mut size = [0; 4];
        payload.read(packed_at, &mut size)?;
        packed_at += size.len() as u64;
        let packed_size = u64::from(u32::from_le_bytes(size));
        if packed_size > PACKED_MAX {
            return Err(Error::Payload("a block of LZ4 is too large"));
        }
        blocks.push(Block {
            at,
            size: BLOCK.min(payload.unpacked - at),
            packed_at,
            packed_size,
        });
        packed_at += packed_size;
    }
    match packed_at == payload.packed {
        true => Ok(blocks),
        false => Err(Error::Payload("its blocks of LZ4 do not fill it")),
    }
}

/// Memory for a block, packed and unpacked.
#[derive(Default)]
struct Unpacker {
    packed: Vec<u8>,
    block: Vec<u8>,
}

impl Unpacker {
    fn unpack(&mut self, payload: &Packed, block: &Block) -> Result<&[u8], Error> {
        self.packed.resize(block.packed_size as usize, 0);
        payload.read(block.packed_at, &mut self.packed)?;
        self.block.resize(block.size as usize, 0);
        match lz4_flex::block::decompress_into(&self.packed, &mut self.block) {
            Ok(size) if size as u64 == block.size => Ok(&self.block),
            _ => Err(Error::Payload("a block of LZ4 is damaged")),
        }
    }
}
