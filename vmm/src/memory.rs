//! The guest's memory in this process.
//!
//! Both it and the guest's physical addresses begin at a multiple of 2 MiB, without which KVM maps no huge page for the
//! guest, and each first touch costs a fault of 4 KiB. The kernel is advised to take huge pages where it can; with
//! `--hugepages` it has to, from those that the host has set aside. A core dump leaves the guest's memory out.

use std::ffi::c_void;
use std::fs;
use std::io;
use std::mem;
use std::ptr;
use std::sync::Arc;

use boot::layout::ram_regions;
use rustix::mm::{self, Advice, MapFlags, ProtFlags};
use vm_memory::{
    Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, MmapRegion,
};

use crate::config::MemorySize;
use crate::control::exit::ExitRequest;

/// A huge page.
const HUGE: usize = 2 << 20;
/// What the host's kernel says of its huge pages (Documentation/admin-guide/mm/hugetlbpage.rst).
const HUGETLB: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Why there is no memory for the guest.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("cannot map {0} of guest memory: choose less with --memory")]
    Map(MemorySize, #[source] io::Error),
    #[error(
        "cannot map {size} of guest memory in huge pages: it takes {wanted} of 2 MiB, and {free} of this host's {total} are \
         free. Set them aside with `echo {all} > {HUGETLB}/nr_hugepages`, or omit --hugepages",
        size = .0,
        all = .1.total + huge_pages(*.0).saturating_sub(.1.free),
        wanted = huge_pages(*.0),
        free = .1.free,
        total = .1.total
    )]
    Huge(MemorySize, HugePages, #[source] io::Error),
}

/// Guest memory, mapped as long as this or anything that shares it lives.
#[derive(Debug)]
pub struct GuestRam {
    // The order counts: a region unmaps its memory only where the last share is gone.
    memory: Arc<GuestMemoryMmap>,
    _regions: Vec<Region>,
}

impl GuestRam {
    /// Maps guest memory, which costs the host nothing until the guest touches it, but with
    /// `hugepages` is set aside at once.
    pub fn map(size: MemorySize, hugepages: bool) -> Result<Self, MemoryError> {
        let failed = |error: io::Error| match HugePages::read() {
            Some(pages) if hugepages => MemoryError::Huge(size, pages, error),
            _ => MemoryError::Map(size, error),
        };
        let (mut regions, mut shared) = (Vec::new(), Vec::new());
        for (start, len) in ram_regions(size.bytes()) {
            let region = Region::map(len, hugepages).map_err(failed)?;
            shared.extend(GuestRegionMmap::with_arc(Arc::clone(&region.shared), start));
            regions.push(region);
        }
        let memory = GuestMemoryMmap::from_regions(shared)
            .map_err(|error| MemoryError::Map(size, io::Error::other(error)))?;
        Ok(Self {
            memory: Arc::new(memory),
            _regions: regions,
        })
    }

    /// The memory, for everything that the guest shares it with.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }
}

/// Makes guest memory, which nothing uses meanwhile, all zeros again. Huge pages that the host has
/// set aside stay the guest's: others might take those that it gives back. Stops when the guest is to
/// end.
pub fn empty(memory: &GuestMemoryMmap, hugepages: bool, exit: &ExitRequest) {
    for region in memory.iter() {
        // What is locked (mlockall) cannot be given back.
        if hugepages || give_back(region).is_err() {
            overwrite(region, exit);
        }
    }
}

fn give_back(region: &GuestRegionMmap) -> io::Result<()> {
    let (start, len) = (region.as_ptr().cast(), region.len() as usize);
    // SAFETY: the mapping is the region's, and private and anonymous: it reads as zeros then. No
    // reference to it exists.
    unsafe { mm::madvise(start, len, Advice::LinuxDontNeed) }?;
    // As for a new mapping: see `Mapping::aligned`.
    let first = region.write_obj(0_u8, MemoryRegionAddress(0));
    first.map_err(io::Error::other)
}

fn overwrite(region: &GuestRegionMmap, exit: &ExitRequest) {
    let zeros = vec![0; HUGE];
    for at in (0..region.len()).step_by(HUGE) {
        if exit.reason().is_some() {
            return;
        }
        let step = zeros.len().min((region.len() - at) as usize);
        // So much is there.
        let _ = region.write_slice(&zeros[..step], MemoryRegionAddress(at));
    }
}

/// A range of guest memory and its mapping, which vm-memory cannot own: it takes no address.
#[derive(Debug)]
struct Region {
    shared: Arc<MmapRegion>,
    mapping: Option<Mapping>,
}

impl Region {
    fn map(len: usize, hugepages: bool) -> io::Result<Self> {
        let mapping = if hugepages {
            Mapping::huge(len)?
        } else {
            Mapping::aligned(len)?
        };
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        // SAFETY: the mapping has `len` bytes or more, and `drop` below keeps it as long as
        // there is another share of this region.
        let region = unsafe { MmapRegion::build_raw(mapping.start.cast(), len, prot, flags) };
        Ok(Self {
            shared: Arc::new(region.map_err(io::Error::other)?),
            mapping: Some(mapping),
        })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if Arc::get_mut(&mut self.shared).is_none() {
            mem::forget(self.mapping.take());
        }
    }
}

/// Memory that is unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    start: *mut c_void,
    len: usize,
}

impl Mapping {
    fn new(len: usize, flags: MapFlags) -> io::Result<Self> {
        let (access, flags) = (
            ProtFlags::READ | ProtFlags::WRITE,
            flags | MapFlags::PRIVATE,
        );
        // SAFETY: a new mapping of memory where the kernel likes touches nothing else.
        let start = unsafe { mm::mmap_anonymous(ptr::null_mut(), len, access, flags) }?;
        Ok(Self { start, len })
    }

    /// Memory that begins with a huge page, if the kernel has any for us.
    fn aligned(len: usize) -> io::Result<Self> {
        // So much more that it has a place for what is wanted, whose rest on both sides goes back.
        let mut skipped = Self::new(len + HUGE, MapFlags::NORESERVE)?;
        let mut mapping = skipped.split_off(skipped.start.addr().wrapping_neg() % HUGE);
        drop(mapping.split_off(len));
        // The start of a guest takes a few pages at the beginning. With one that is there already the kernel does not
        // take a huge one for them, which it would have to clear.
        // SAFETY: the mapping is ours alone, may be written to, and has a byte.
        unsafe { mapping.start.cast::<u8>().write_volatile(0) };
        mapping.advise(Advice::LinuxHugepage);
        mapping.advise(Advice::LinuxDontDump);
        Ok(mapping)
    }

    /// Huge pages that the host has set aside, promised to us now: a guest would else die of it
    /// later. They are whole, also where the guest's memory ends within the last one.
    fn huge(len: usize) -> io::Result<Self> {
        let flags = MapFlags::HUGETLB | MapFlags::HUGE_2MB;
        let mapping = Self::new(len.next_multiple_of(HUGE), flags)?;
        mapping.advise(Advice::LinuxDontDump);
        Ok(mapping)
    }

    /// Divides the mapping at `at`, at most its length, and returns what follows.
    fn split_off(&mut self, at: usize) -> Self {
        let rest = Self {
            start: self.start.wrapping_byte_add(at),
            len: self.len - at,
        };
        self.len = at;
        rest
    }

    fn advise(&self, advice: Advice) {
        // SAFETY: the mapping is ours, and neither advice that is given here changes what it holds.
        if let Err(error) = unsafe { mm::madvise(self.start, self.len, advice) } {
            // A kernel that is built without it.
            log::debug!("the kernel takes no advice {advice:?} on guest memory: {error}");
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // None has nothing to unmap, and munmap would refuse it.
        if self.len > 0 {
            // SAFETY: the mapping is ours, and who shares it keeps it from being dropped (`Region`).
            let _ = unsafe { mm::munmap(self.start, self.len) };
        }
    }
}

/// The huge pages of the host.
#[derive(Clone, Copy, Debug)]
pub struct HugePages {
    total: u64,
    free: u64,
}

impl HugePages {
    /// `None` where the kernel has none of this size.
    fn read() -> Option<Self> {
        let read = |name| {
            let text = fs::read_to_string(format!("{HUGETLB}/{name}")).ok()?;
            text.trim().parse::<u64>().ok()
        };
        // What is promised to others counts as free there until they touch it.
        let free = read("free_hugepages")?.saturating_sub(read("resv_hugepages")?);
        Some(Self {
            total: read("nr_hugepages")?,
            free,
        })
    }
}

/// How many of them hold so much.
fn huge_pages(size: MemorySize) -> u64 {
    size.bytes().div_ceil(HUGE as u64)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use vm_memory::GuestAddress;

    use super::*;

    const MARK: u64 = 0x6d69_6e69_766d_6d21;

    /// Whether the mark is at this address, where there may be no memory, or that of another test.
    fn is_marked(address: usize) -> bool {
        let memory = File::open("/proc/self/mem").unwrap();
        let mut bytes = [0; 8];
        let read = memory.read_exact_at(&mut bytes, address as u64);
        read.is_ok() && u64::from_le_bytes(bytes) == MARK
    }

    #[test]
    fn regions_begin_with_a_huge_page_whatever_their_size() {
        for size in ["16M", "17M", "20000K", "3075M", "5G"] {
            let ram = GuestRam::map(size.parse().unwrap(), false).unwrap();
            let mut bytes = 0;
            for region in ram.memory().iter() {
                let host = region.as_ptr() as u64;
                assert!(host.is_multiple_of(HUGE as u64), "{size}: {host:#x}");
                assert!(region.start_addr().0.is_multiple_of(HUGE as u64));
                bytes += region.len();
            }
            assert_eq!(bytes, size.parse::<MemorySize>().unwrap().bytes());
            let last = GuestAddress(ram.memory().last_addr().0);
            ram.memory().write_obj(7_u8, last).unwrap();
        }
    }

    #[test]
    fn memory_is_unmapped_with_its_last_share() {
        for is_shared in [true, false] {
            let ram = GuestRam::map("5G".parse().unwrap(), false).unwrap();
            let mut places = Vec::new();
            for region in ram.memory().iter() {
                ram.memory().write_obj(MARK, region.start_addr()).unwrap();
                places.push(region.as_ptr().addr());
            }
            assert_eq!(places.len(), 2);
            let share = is_shared.then(|| GuestMemoryMmap::clone(ram.memory()));
            drop(ram);
            for place in places {
                assert_eq!(is_marked(place), is_shared);
            }
            drop(share);
        }
    }

    #[test]
    fn emptied_memory_reads_as_zeros_from_its_first_to_its_last_byte() {
        let exit = ExitRequest::new().unwrap();
        // Overwritten, as huge pages are, or given back.
        for is_kept in [false, true] {
            let ram = GuestRam::map("20001K".parse().unwrap(), false).unwrap();
            let memory = ram.memory();
            let last = memory.last_addr().0 - 7;
            let marked = [0, 4096, HUGE as u64 - 4, 5 << 20, last].map(GuestAddress);
            for address in marked {
                memory.write_obj(MARK, address).unwrap();
            }
            empty(memory, is_kept, &exit);
            for address in marked {
                assert_eq!(memory.read_obj::<u64>(address).unwrap(), 0, "{address:?}");
            }
        }
    }

    #[test]
    fn too_few_huge_pages_are_refused_with_what_to_set_aside() {
        let pages = HugePages { total: 10, free: 3 };
        let cause = io::Error::from_raw_os_error(libc::ENOMEM);
        let error = MemoryError::Huge("20001K".parse().unwrap(), pages, cause);
        assert_eq!(
            error.to_string(),
            "cannot map 20000K of guest memory in huge pages: it takes 10 of 2 MiB, and 3 of this host's 10 are free. Set \
             them aside with `echo 17 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages`, or omit --hugepages"
        );
    }
}
