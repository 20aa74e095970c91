//! What the loader passes: the command line and the memory map (Linux,
//! Documentation/arch/x86/zero-page.rst).

use core::ops::Range;

use crate::memory::read_at;

const E820_COUNT: u64 = 0x1e8;
const COMMAND_LINE: u64 = 0x228;
const E820: u64 = 0x2d0;
const E820_ENTRY: u64 = 20;
const E820_RAM: u32 = 1;
/// Room for the command line; what is longer is cut.
const LINE_SIZE: usize = 2048;

/// The boot parameters, copied out of the zero page.
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
    /// Reads the zero page at `base`.
    pub fn read(base: u64) -> Self {
        let mut command_line = CommandLine {
            bytes: [0; LINE_SIZE],
            length: 0,
        };
        let text = u64::from(peek::<u32>(base + COMMAND_LINE));
        for (at, slot) in (text..).zip(&mut command_line.bytes) {
            *slot = peek(at);
            if *slot == 0 {
                break;
            }
            command_line.length += 1;
        }
        Self {
            command_line,
            ram: own_ram(base),
        }
    }
}

/// The range of the memory map that this image lies in, as far as it is mapped (4 GiB).
fn own_ram(base: u64) -> Range<u64> {
    let own = crate::memory::image_end();
    let count = u64::from(peek::<u8>(base + E820_COUNT));
    let ranges = (0..count).filter_map(|n| {
        let entry = base + E820 + n * E820_ENTRY;
        let start: u64 = peek(entry);
        let end = start.saturating_add(peek(entry + 8)).min(1 << 32);
        (peek::<u32>(entry + 16) == E820_RAM).then_some(start..end)
    });
    // Without a usable map there is at least the image's own page.
    ranges
        .into_iter()
        .find(|range| range.contains(&own))
        .unwrap_or(own..own)
}

fn peek<T: crate::memory::Word>(address: u64) -> T {
    // SAFETY: all of the lower 4 GiB is mapped; the loader promises that the zero page and the
    // command line are there.
    unsafe { read_at(address) }
}
