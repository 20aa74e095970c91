//! Huge pages for memory that other processes share, where the kernel takes none by itself.
//!
//! A first touch of a small page costs the guest an exit, 8,500 instructions in all, and a boot touches 27,000 of them. A huge
//! page, which is 512 of them, costs as much as 90.

use std::ops::Range;

use vm_memory::{
    Address, Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use super::mapping::HUGE;

/// Since Linux 6.1 (include/uapi/asm-generic/mman-common.h), whatever the host's settings of huge pages are but `deny`.
const MADV_COLLAPSE: libc::c_int = 25;
/// Linux describes a page of 4 KiB by 64 bytes (`struct page`).
const DESCRIPTION: u64 = 4096 / 64;
/// What else it takes of the memory's end while it boots: measured with 1 to 4 GiB.
const BOOT: u64 = 8 << 20;

/// What Linux takes next to its own memory until the first programs run: measured with 512 MiB and 1 GiB.
pub const AFTER_KERNEL: u64 = 16 << 20;

/// The addresses at the end of the memory that Linux takes while it boots.
pub fn taken_first(memory: &GuestMemoryMmap) -> Range<u64> {
    let bytes: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    let end = memory.last_addr().raw_value() + 1;
    end.saturating_sub(bytes / DESCRIPTION + BOOT)..end
}

/// Takes whole huge pages for the memory at `range`, if the kernel has any. What it holds stays.
pub fn fill(memory: &GuestMemoryMmap, range: &Range<u64>) {
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        let whole = region.len() / HUGE as u64 * HUGE as u64;
        let first = range.start.saturating_sub(start) / HUGE as u64 * HUGE as u64;
        let end = range.end.saturating_sub(start).min(whole);
        fill_region(region, first..end.next_multiple_of(HUGE as u64));
    }
}

/// The same for offsets in a region, multiples of a huge page.
fn fill_region(region: &GuestRegionMmap, range: Range<u64>) {
    // The kernel makes a huge page out of small ones, and not out of none.
    for at in range.clone().step_by(HUGE) {
        let _ = region.read_obj::<u8>(MemoryRegionAddress(at));
    }
    let Some(len) = range.end.checked_sub(range.start).filter(|len| *len > 0) else {
        return;
    };
    let start = region.as_ptr().wrapping_add(range.start as usize);
    // SAFETY: the region has these bytes, and the call changes nothing that can be seen of them.
    if unsafe { libc::madvise(start.cast(), len as usize, MADV_COLLAPSE) } != 0 {
        let error = std::io::Error::last_os_error();
        log::debug!("no huge pages for the guest's memory: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::memory::{GuestRam, Sharing};

    const MIB: u64 = 1 << 20;

    fn ram(size: &str, sharing: Sharing) -> GuestRam {
        GuestRam::map(size.parse().unwrap(), false, sharing).unwrap()
    }

    /// What shared memory takes of the host, in bytes.
    fn held(ram: &GuestRam) -> u64 {
        let region = ram.memory().iter().next().unwrap();
        let place = region.file_offset().unwrap();
        place.file().metadata().unwrap().blocks() * 512
    }

    #[test]
    fn end_of_the_memory_is_taken_first() {
        for (size, expected) in [
            ("32M", 32 * MIB - 8 * MIB - MIB / 2..32 * MIB),
            ("16M", 16 * MIB - 8 * MIB - MIB / 4..16 * MIB),
            ("1G", 1000 * MIB..1024 * MIB),
            ("4G", (5 << 30) - 72 * MIB..5 << 30),
        ] {
            let ram = ram(size, Sharing::Private);
            assert_eq!(taken_first(ram.memory()), expected, "{size}");
        }
    }

    #[test]
    fn filled_memory_holds_what_it_held() {
        let ram = ram("20001K", Sharing::Shared);
        let memory = ram.memory();
        let last = memory.last_addr().0 - 7;
        let marked = [0, 5 * MIB - 4, 7 * MIB, last].map(GuestAddress);
        for (n, address) in marked.into_iter().enumerate() {
            memory.write_obj(0x6d69_6e69 + n as u64, address).unwrap();
        }
        fill(memory, &(3 * MIB..9 * MIB));
        fill(memory, &(7 * MIB..1 << 40));
        for (n, address) in marked.into_iter().enumerate() {
            let read: u64 = memory.read_obj(address).unwrap();
            assert_eq!(read, 0x6d69_6e69 + n as u64, "{address:?}");
        }
    }

    #[test]
    fn whole_huge_pages_are_filled_and_nothing_else() {
        let ram = ram("20001K", Sharing::Shared);
        let before = held(&ram);
        // The last page is no whole one.
        fill(ram.memory(), &(19 * MIB..20 * MIB));
        assert_eq!(held(&ram), before);
        fill(ram.memory(), &(11 * MIB..11 * MIB + 1));
        let filled = held(&ram) - before;
        // A kernel that has none leaves the small page.
        assert!([4096, HUGE as u64].contains(&filled), "{filled} bytes");
    }
}
