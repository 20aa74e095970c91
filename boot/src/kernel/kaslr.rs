//! Where a kernel runs that can run anywhere: what its decompressor chooses in arch/x86/boot/compressed/kaslr.c.

use std::ops::Range;

/// The virtual addresses that the kernel has for itself, with CONFIG_RANDOMIZE_BASE (`KERNEL_IMAGE_SIZE`).
const IMAGE_SPACE: u64 = 1 << 30;

/// What a kernel's place depends on besides the kernel.
#[derive(Clone, Debug)]
pub(crate) struct Choice<'a> {
    /// Random numbers: for the virtual place and the physical one.
    pub random: [u64; 2],
    /// The kernel command line, which may forbid it.
    pub cmdline: &'a str,
    /// The memory of the initrd, which is kept free.
    pub initrd: Range<u64>,
}

/// A kernel that can be moved.
#[derive(Clone, Copy, Debug)]
pub(super) struct Movable {
    /// The physical address at which it is linked, a multiple of `align`, which is the lowest as well.
    pub linked: u64,
    /// The memory that it needs.
    pub size: u64,
    /// What its physical and virtual addresses are multiples of.
    pub align: u64,
}

/// A place for a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The physical address.
    pub physical: u64,
    /// What is added to the virtual addresses at which it is linked.
    pub offset: u64,
}

impl Choice<'_> {
    /// A random place below `ram_end`; `None` if the command line forbids it.
    pub(super) fn place(&self, kernel: Movable, ram_end: u64) -> Option<Place> {
        if self.has_word(|word| word == "nokaslr") {
            return None;
        }
        // Not all of the RAM may be the kernel's then.
        let limits_memory = |word: &str| word.starts_with("mem=") || word.starts_with("memmap=");
        let physical = if self.has_word(limits_memory) {
            kernel.linked
        } else {
            self.physical(kernel, ram_end)
        };
        let space = IMAGE_SPACE.saturating_sub(kernel.linked);
        let slots = slots(&(0..space), kernel);
        Some(Place {
            physical,
            offset: pick(self.random[0], slots) * kernel.align,
        })
    }

    fn has_word(&self, wanted: impl Fn(&str) -> bool) -> bool {
        self.cmdline.split_ascii_whitespace().any(wanted)
    }

    /// Below the initrd or above it.
    fn physical(&self, kernel: Movable, ram_end: u64) -> u64 {
        let initrd = match self.initrd.is_empty() {
            true => ram_end..ram_end,
            false => self.initrd.clone(),
        };
        let above = initrd.end.next_multiple_of(kernel.align).max(kernel.linked);
        let ranges = [kernel.linked..initrd.start, above..ram_end];
        let [lower, upper] = ranges.each_ref().map(|range| slots(range, kernel));
        match pick(self.random[1], lower + upper) {
            n if n < lower || upper == 0 => kernel.linked + n * kernel.align,
            n => above + (n - lower) * kernel.align,
        }
    }
}

/// How many places of this kernel are in `range`, which begins with one.
fn slots(range: &Range<u64>, kernel: Movable) -> u64 {
    let length = range.end.saturating_sub(range.start);
    let rest = length.checked_sub(kernel.size);
    rest.map_or(0, |rest| rest / kernel.align + 1)
}

/// One of so many, the first where there is none.
fn pick(random: u64, count: u64) -> u64 {
    random.checked_rem(count).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const KERNEL: Movable = Movable {
        linked: 16 * MIB,
        size: 50 * MIB + 4096,
        align: 2 * MIB,
    };

    fn choice(random: [u64; 2], cmdline: &str, initrd: Range<u64>) -> Choice<'_> {
        Choice {
            random,
            cmdline,
            initrd,
        }
    }

    #[test]
    fn nokaslr_as_a_word_forbids_it() {
        let is_random = |cmdline| {
            choice([7, 7], cmdline, 0..0)
                .place(KERNEL, 512 * MIB)
                .is_some()
        };
        assert!(is_random("quiet nokaslr_x xnokaslr nokaslr=1"));
        for cmdline in ["nokaslr", "quiet nokaslr", "a\tnokaslr\nb"] {
            assert!(!is_random(cmdline), "{cmdline}");
        }
    }

    #[test]
    fn memory_that_the_command_line_limits_keeps_the_physical_place() {
        for cmdline in ["mem=64M", "quiet memmap=4M$100M"] {
            let place = choice([7, 7], cmdline, 0..0).place(KERNEL, 512 * MIB);
            let (physical, offset) = (16 * MIB, 14 * MIB);
            assert_eq!(place, Some(Place { physical, offset }));
        }
    }

    #[test]
    fn every_slot_is_taken() {
        // 50 MiB fit 6 times from 16 MiB to 78, and twice from 80 to 134.
        let initrd = 78 * MIB..80 * MIB - 1;
        let places: Vec<_> = (0..8)
            .map(|n| choice([n, n], "", initrd.clone()).place(KERNEL, 134 * MIB))
            .map(|place| place.unwrap().physical / MIB)
            .collect();
        assert_eq!(places, [16, 18, 20, 22, 24, 26, 80, 82]);
    }

    #[test]
    fn kernel_that_fits_once_stays() {
        let place = choice([7, 7], "", 0..0).place(KERNEL, 67 * MIB).unwrap();
        assert_eq!(place.physical, 16 * MIB);
    }

    proptest! {
        #[test]
        fn any_place_is_free_and_aligned(
            random in any::<[u64; 2]>(),
            linked in 1_u64..16,
            pages in 1_u64..0x4_0000,
            align in prop_oneof![Just(2 * MIB), Just(16 * MIB)],
            spare in 0_u64..4096 * MIB,
            initrd_pages in 0_u64..0x8000,
        ) {
            let kernel = Movable { linked: linked * align, size: pages << 12, align };
            // As where the initrd is placed: at the end, or before the kernel's first place.
            let ram_end = kernel.linked + kernel.size + spare;
            let end = ram_end.min(2048 * MIB);
            let start = end.saturating_sub(initrd_pages << 12);
            let initrd = match start >= kernel.linked + kernel.size {
                true => start..end,
                false => 0..kernel.linked.min(initrd_pages << 12),
            };
            let place = choice(random, "quiet", initrd.clone()).place(kernel, ram_end).unwrap();
            let run = place.physical..place.physical + kernel.size;
            prop_assert!(run.start >= kernel.linked && run.end <= ram_end);
            prop_assert!(initrd.is_empty() || run.end <= initrd.start || run.start >= initrd.end);
            prop_assert_eq!((place.physical % align, place.offset % align), (0, 0));
            prop_assert!(place.offset == 0 || kernel.linked + place.offset + kernel.size <= IMAGE_SPACE);
        }
    }
}
