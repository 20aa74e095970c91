//! LZ4 as the kernel's build uses it: the legacy frame, whose blocks of 8 MiB are packed each by itself
//! (lz4_Frame_format.md, "Legacy frame"; lz4_Block_format.md).
//!
//! A crate unpacks a block into 8 MiB of memory, whose first touch takes longer than all else here, 3 us a page. So
//! this goes by a window that stays in the processor's cache.

use super::vmlinux::Destination;
use super::{Error, Packed};
use crate::share::share;

/// What the payload begins with.
pub(super) const MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
/// The unpacked size of each block but the last.
const BLOCK: u64 = 8 << 20;
/// How far back a match may reach, and one byte.
const HISTORY: usize = 64 << 10;
/// The history, and what is unpacked until all of it goes to its place.
const WINDOW: usize = HISTORY + (256 << 10);
/// What is read from the file at once.
const INPUT: usize = 64 << 10;
/// A length in a token that goes on in the next byte.
const LONG: usize = 15;
/// The shortest match.
const MIN_MATCH: usize = 4;
/// The longest match whose length is in its token.
const SHORT_MATCH: usize = LONG - 1 + MIN_MATCH;

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
    unpacker.begin(first);
    let destination = open(unpacker.next(payload)?)?;
    share(&blocks, &mut unpacker, |unpacker, block| {
        let mut done = 0;
        unpacker.begin(block);
        loop {
            let bytes = unpacker.next(payload)?;
            let size = bytes.len() as u64;
            match size {
                0 if done == block.size => return Ok(()),
                1.. if done + size <= block.size => destination.write(block.at + done, bytes)?,
                _ => return Err(Error::Payload("a block of LZ4 has another size")),
            }
            done += size;
        }
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

/// Where in a block the unpacker is.
#[derive(Clone, Copy, Debug, Default)]
enum State {
    /// At a token.
    #[default]
    Token,
    /// At so many literals of a sequence with this token.
    Literals(usize, u8),
    /// Before so many bytes of a match, which is so far back.
    Match(usize, usize),
}

/// Unpacks a block piece by piece.
#[derive(Default)]
struct Unpacker {
    input: Input,
    window: Vec<u8>,
    /// How much of the window is unpacked.
    filled: usize,
    state: State,
}

impl Unpacker {
    fn begin(&mut self, block: &Block) {
        self.window.resize(WINDOW, 0);
        self.input.begin(block);
        self.filled = 0;
        self.state = State::Token;
    }

    /// The next piece of the block, an empty one at its end.
    fn next(&mut self, payload: &Packed) -> Result<&[u8], Error> {
        let start = self.filled.min(HISTORY);
        self.window.copy_within(self.filled - start..self.filled, 0);
        self.filled = start;
        while self.filled < WINDOW && !self.is_at_end() {
            self.state = match self.state {
                State::Token => {
                    self.input.fill(payload)?;
                    self.short_sequences();
                    let token = self.input.byte(payload)?;
                    State::Literals(self.input.length(payload, token >> 4)?, token)
                }
                State::Literals(0, token) => self.begin_match(payload, token)?,
                State::Literals(left, token) => {
                    State::Literals(left - self.literals(payload, left)?, token)
                }
                State::Match(0, _) => State::Token,
                State::Match(left, offset) => State::Match(left - self.copy(left, offset), offset),
            };
        }
        Ok(&self.window[start..self.filled])
    }

    /// A block ends with literals.
    fn is_at_end(&self) -> bool {
        self.input.is_at_end() && matches!(self.state, State::Literals(0, _))
    }

    /// Does sequences that have short literals and a short match, until one is other: nearly all. Both are copied with a
    /// fixed length, and what is too much is written over by the next.
    fn short_sequences(&mut self) {
        let mut packed = self.input.rest();
        let mut filled = self.filled;
        while let Some((sequence, _)) = packed.split_first_chunk::<{ 1 + LONG + 2 }>() {
            let literals = usize::from(sequence[0] >> 4);
            let length = usize::from(sequence[0]) % 16 + MIN_MATCH;
            let to = filled + literals;
            let offset = [sequence[1 + literals], sequence[2 + literals]];
            let offset = usize::from(u16::from_le_bytes(offset));
            let is_short = literals < LONG && length <= SHORT_MATCH;
            let fits = to + SHORT_MATCH <= WINDOW && (SHORT_MATCH..=to).contains(&offset);
            if !is_short || !fits {
                break;
            }
            self.window[filled..filled + LONG].copy_from_slice(&sequence[1..=LONG]);
            let from = to - offset;
            self.window.copy_within(from..from + SHORT_MATCH, to);
            filled = to + length;
            packed = &packed[1 + literals + 2..];
        }
        self.filled = filled;
        self.input.keep(packed.len());
    }

    /// Copies literals, at most `left`, and returns how many.
    fn literals(&mut self, payload: &Packed, left: usize) -> Result<usize, Error> {
        self.input.fill(payload)?;
        let from = self.input.rest();
        let size = left.min(from.len()).min(WINDOW - self.filled);
        if size == 0 {
            return Err(CUT_OFF);
        }
        self.window[self.filled..][..size].copy_from_slice(&from[..size]);
        self.input.keep(from.len() - size);
        self.filled += size;
        Ok(size)
    }

    fn begin_match(&mut self, payload: &Packed, token: u8) -> Result<State, Error> {
        let offset = [self.input.byte(payload)?, self.input.byte(payload)?];
        let offset = usize::from(u16::from_le_bytes(offset));
        if !(1..=self.filled).contains(&offset) {
            return Err(Error::Payload("a match of LZ4 is before its block"));
        }
        let length = self.input.length(payload, token & 15)?;
        Ok(State::Match(length + MIN_MATCH, offset))
    }

    /// Copies bytes of a match, at most `left`, and returns how many.
    fn copy(&mut self, left: usize, offset: usize) -> usize {
        let from = self.filled - offset;
        let size = left.min(WINDOW - self.filled);
        let end = self.filled + size;
        while self.filled < end {
            // A match that reaches into itself repeats itself: what there is of it doubles.
            let size = (self.filled - from).min(end - self.filled);
            self.window.copy_within(from..from + size, self.filled);
            self.filled += size;
        }
        size
    }
}

const CUT_OFF: Error = Error::Payload("a block of LZ4 ends too early");

/// The packed bytes of a block, read as they are needed.
#[derive(Default)]
struct Input {
    buffer: Vec<u8>,
    /// What of the buffer is still to be used.
    start: usize,
    end: usize,
    /// What of the payload is still to be read.
    next: u64,
    last: u64,
}

impl Input {
    fn begin(&mut self, block: &Block) {
        self.buffer.resize(INPUT, 0);
        (self.start, self.end) = (0, 0);
        self.next = block.packed_at;
        self.last = block.packed_at + block.packed_size;
    }

    fn rest(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Drops all but the last `size` bytes of the rest.
    fn keep(&mut self, size: usize) {
        self.start = self.end - size;
    }

    fn is_at_end(&self) -> bool {
        self.start == self.end && self.next == self.last
    }

    /// Reads more unless a whole short sequence is there.
    fn fill(&mut self, payload: &Packed) -> Result<(), Error> {
        if self.end - self.start > 2 * LONG || self.next == self.last {
            return Ok(());
        }
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let size = (self.last - self.next).min((INPUT - self.end) as u64);
        let more = &mut self.buffer[self.end..][..size as usize];
        payload.read(self.next, more)?;
        self.next += size;
        self.end += size as usize;
        Ok(())
    }

    fn byte(&mut self, payload: &Packed) -> Result<u8, Error> {
        self.fill(payload)?;
        let byte = *self.rest().first().ok_or(CUT_OFF)?;
        self.start += 1;
        Ok(byte)
    }

    /// A length whose first part is in the token.
    fn length(&mut self, payload: &Packed, first: u8) -> Result<usize, Error> {
        let mut length = usize::from(first);
        if length == LONG {
            loop {
                let more = self.byte(payload)?;
                length += usize::from(more);
                if more != u8::MAX {
                    break;
                }
            }
        }
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tests::images::file_with;

    /// What a block holds that has to unpack to `size` bytes.
    fn unpacked(block: &[u8], size: u64) -> Result<Vec<u8>, Error> {
        let file = file_with(block);
        let payload = Packed {
            file: &file,
            start: 0,
            packed: block.len() as u64,
            unpacked: size,
        };
        let block = Block {
            at: 0,
            size,
            packed_at: 0,
            packed_size: block.len() as u64,
        };
        let mut unpacker = Unpacker::default();
        unpacker.begin(&block);
        let mut content = Vec::new();
        loop {
            let bytes = unpacker.next(&payload)?;
            if bytes.is_empty() {
                return Ok(content);
            }
            content.extend_from_slice(bytes);
        }
    }

    fn assert_unpacked(content: &[u8]) {
        let packed = lz4_flex::block::compress(content);
        assert!(unpacked(&packed, content.len() as u64).unwrap() == content);
    }

    #[test]
    fn runs_longer_than_the_window_are_whole() {
        assert_unpacked(&vec![0; 3 * WINDOW]);
        let run: Vec<_> = (0..3 * WINDOW).map(|n| (n % 7) as u8).collect();
        assert_unpacked(&run);
    }

    #[test]
    fn literals_longer_than_window_and_input_are_whole() {
        let mut number = 1_u32;
        let mut next = || {
            number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (number >> 24) as u8
        };
        let noise: Vec<_> = (0..3 * WINDOW).map(|_| next()).collect();
        assert_unpacked(&noise);
        // A match from as far back as it can be.
        assert_unpacked(&[&noise[..0xffff], &noise[..1000], b"the end of it"].concat());
    }

    #[test]
    fn empty_block_holds_nothing() {
        assert_eq!(unpacked(&[0], 0).unwrap(), []);
    }

    #[test]
    fn block_that_ends_anywhere_else_is_refused() {
        let content: Vec<_> = (0..2000_u32).flat_map(|n| (n / 3).to_le_bytes()).collect();
        let packed = lz4_flex::block::compress(&content);
        for length in 0..packed.len() {
            let result = unpacked(&packed[..length], content.len() as u64);
            // Between two sequences it may end, but then it is shorter.
            assert!(result.is_err() || result.unwrap().len() < content.len());
        }
    }

    #[test]
    fn match_from_before_the_block_is_refused() {
        for block in [
            &[0x10, 7, 0, 0, 0x10, 7][..],
            &[0x10, 7, 2, 0, 0x10, 7],
            &[0, 1, 0],
        ] {
            assert!(unpacked(block, 100).is_err(), "{block:x?}");
        }
        assert_eq!(
            unpacked(&[0x10, 7, 1, 0, 0x10, 8], 6).unwrap(),
            [7, 7, 7, 7, 7, 8]
        );
    }

    /// Text that repeats itself at all distances and lengths.
    fn content() -> impl Strategy<Value = Vec<u8>> {
        let word = prop::collection::vec(any::<u8>(), 1..40);
        let words = prop::collection::vec(word, 1..20);
        let order = prop::collection::vec(any::<prop::sample::Index>(), 0..3000);
        (words, order).prop_map(|(words, order)| {
            let word = |index: prop::sample::Index| index.get(&words).clone();
            order.into_iter().flat_map(word).collect()
        })
    }

    proptest! {
        #[test]
        fn any_content_is_unpacked(content in content()) {
            let packed = lz4_flex::block::compress(&content);
            prop_assert!(unpacked(&packed, content.len() as u64).unwrap() == content);
        }

        #[test]
        fn mutated_blocks_are_as_lz4_flex_has_them(
            content in content(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        ) {
            let mut packed = lz4_flex::block::compress(&content);
            for (at, byte) in changes {
                let at = at.index(packed.len());
                packed[at] = byte;
            }
            // The crate takes some blocks that end with a match, and we what is shorter.
            let theirs = lz4_flex::block::decompress(&packed, 1 << 20);
            if let (Ok(theirs), Ok(ours)) = (theirs, unpacked(&packed, 1 << 20)) {
                prop_assert!(ours == theirs);
            }
        }

        #[test]
        fn random_bytes_never_panic(block in prop::collection::vec(any::<u8>(), 0..1000)) {
            let _ = unpacked(&block, 1 << 20);
        }
    }
}
