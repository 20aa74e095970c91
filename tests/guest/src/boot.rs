//! What the loader passes: the command line and the memory map, in the zero page (Linux,
//! Documentation/arch/x86/zero-page.rst) or PVH's start info.

use core::ops::Range;

use crate::memory::read_at;

const E820_COUNT: u64 = 0x1e8;
const COMMAND_LINE: u64 = 0x228;
const E820: u64 = 0x2d0;
const E820_ENTRY: u64 = 20;
/// Offsets in PVH's start info (Xen's include/public/arch-x86/hvm/start_info.h).
const PVH_COMMAND_LINE: u64 = 24;
const PVH_MAP: u64 = 40;
const PVH_MAP_COUNT: u64 = 48;
const PVH_MAP_ENTRY: u64 = 24;
/// The type of an entry that is RAM, in both maps.
const RAM: u32 = 1;
/// Room for the command line; what is longer is cut.
const LINE_SIZE: usize = 2048;

/// The boot parameters, copied out of what the loader left.
pub struct Boot {
    /// The kernel command line.
    pub command_line: CommandLine,
    /// The range of RAM that holds this image.
    pub ram: Range<u64>,
}

/// A command line, kept without a heap, which does not exist yet.
pub struct CommandLine {
    bytes: [u8; LINE_SIZE],
    length: usize,
}

impl CommandLine {
    /// The text, up to the first byte that is not UTF-8.
    pub fn text(&self) -> &str {
        self.bytes[..self.length]
            .utf8_chunks()
            .next()
            .map_or("", |chunk| chunk.valid())
    }
}

impl Boot {
    /// Reads what is at `base`: PVH's start info, or the zero page.
    pub fn read(base: u64, is_pvh: bool) -> Self {
        let (line, map) = if is_pvh { pvh(base) } else { zero_page(base) };
        let mut command_line = CommandLine {
            bytes: [0; LINE_SIZE],
            length: 0,
        };
        for (at, slot) in (line..).zip(&mut command_line.bytes) {
            *slot = peek(at);
            if *slot == 0 {
                break;
            }
            command_line.length += 1;
        }
        Self {
            command_line,
            ram: own_ram(map),
        }
    }
}

/// A memory map: entries begin with start, size and type.
struct Map {
    base: u64,
    count: u64,
    entry: u64,
}

/// The addresses of command line and memory map in a zero page.
fn zero_page(base: u64) -> (u64, Map) {
    let map = Map {
        base: base + E820,
        count: peek::<u8>(base + E820_COUNT).into(),
        entry: E820_ENTRY,
    };
    (peek::<u32>(base + COMMAND_LINE).into(), map)
}

/// The same in PVH's start info, of version 1 or later.
fn pvh(base: u64) -> (u64, Map) {
    let map = Map {
        base: peek(base + PVH_MAP),
        count: peek::<u32>(base + PVH_MAP_COUNT).into(),
        entry: PVH_MAP_ENTRY,
    };
    (peek(base + PVH_COMMAND_LINE), map)
}

/// The range of the memory map that this image lies in, as far as it is mapped (4 GiB).
fn own_ram(map: Map) -> Range<u64> {
    let own = crate::memory::image_end();
    let mut ranges = (0..map.count).filter_map(|n| {
        let entry = map.base + n * map.entry;
        let start: u64 = peek(entry);
        let end = start.saturating_add(peek(entry + 8)).min(1 << 32);
        (peek::<u32>(entry + 16) == RAM).then_some(start..end)
    });
    // Without a usable map there is at least the image's own page.
    ranges
        .find(|range| range.contains(&own))
        .unwrap_or(own..own)
}

fn peek<T: crate::memory::Word>(address: u64) -> T {
    // SAFETY: all of the lower 4 GiB is mapped; the loader promises that the parameters and
    // the command line are there.
    unsafe { read_at(address) }
}
