//! The guest's memory in this process.
//!
//! Both it and the guest's physical addresses begin at a multiple of 2 MiB, without which KVM maps no huge page for the
//! guest, and each first touch costs a fault of 4 KiB. The kernel is advised to take huge pages where it can; with
//! `--hugepages` it has to, from those that the host has set aside. A core dump leaves the guest's memory out.
//!
//! Memory that other processes share is a memfd, whose offsets the regions name, as vhost-user needs them. It cannot
//! shrink, so that touching it never ends the monitor with SIGBUS. There the kernel takes the advice of huge pages only if
//! the host allows it: /sys/kernel/mm/transparent_hugepage/shmem_enabled is `never` unless someone sets it to `advise`. So
//! what a guest touches first, and nearly all of, is [filled](fill()) with huge pages before.

mod fill;
mod mapping;

use std::fs::{self, File};
use std::io;
use std::mem;
use std::sync::Arc;

use boot::layout::ram_regions;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, memfd_create};
use rustix::mm::{Advice, madvise};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, MmapRegion,
};

pub use self::fill::{AFTER_KERNEL, fill, taken_first};
use self::mapping::{HUGE, Mapping};
use crate::config::MemorySize;
use crate::control::exit::ExitRequest;

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
    #[error(
        "cannot create a memfd of {0} for guest memory that other processes share: limits of open files and of a file's \
         size (`ulimit -n`, `ulimit -f`) count for it"
    )]
    Memfd(MemorySize, #[source] io::Error),
}

/// Whether other processes may map guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// It is this process's own, and anonymous.
    Private,
    /// It is a memfd: each region of the guest memory has its file and offset.
    Shared,
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
    pub fn map(size: MemorySize, hugepages: bool, sharing: Sharing) -> Result<Self, MemoryError> {
        let failed = |error: io::Error| match HugePages::read() {
            Some(pages) if hugepages => MemoryError::Huge(size, pages, error),
            _ => MemoryError::Map(size, error),
        };
        let memfd = (sharing == Sharing::Shared).then(|| memfd(size, hugepages));
        let memfd = memfd.transpose()?;
        let (mut regions, mut shared, mut offset) = (Vec::new(), Vec::new(), 0);
        for (start, len) in ram_regions(size.bytes()) {
            let place = memfd
                .as_ref()
                .map(|memfd| FileOffset::from_arc(Arc::clone(memfd), offset));
            offset += len as u64;
            let region = Region::map(len, hugepages, place).map_err(failed)?;
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

/// A file for guest memory, which has none of it yet. Whoever gets it can change neither its size, on which every
/// mapping of it relies, nor what may be done with it.
fn memfd(size: MemorySize, hugepages: bool) -> Result<Arc<File>, MemoryError> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut len = size.bytes();
    if hugepages {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        len = len.next_multiple_of(HUGE as u64);
    }
    let create = || {
        let file = File::from(memfd_create("guest-memory", flags)?);
        file.set_len(len)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(Arc::new(file))
    };
    create().map_err(|error| MemoryError::Memfd(size, error))
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
    if let Some(place) = region.file_offset() {
        // What other processes have mapped of it, too.
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(place.file(), hole, place.start(), region.len())?;
    } else {
        let (start, len) = (region.as_ptr().cast(), region.len() as usize);
        // SAFETY: the mapping is the region's, and private and anonymous: it reads as zeros then. No
        // reference to it exists.
        unsafe { madvise(start, len, Advice::LinuxDontNeed) }?;
    }
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
    fn map(len: usize, hugepages: bool, place: Option<FileOffset>) -> io::Result<Self> {
        let mapping = if hugepages {
            Mapping::huge(len, place.as_ref())?
        } else {
            Mapping::aligned(len, place.as_ref())?
        };
        let flags = match place {
            Some(_) => libc::MAP_SHARED,
            None => libc::MAP_PRIVATE,
        };
        let mut region = MmapRegionBuilder::new(len)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags);
        if let Some(place) = place {
            region = region.with_file_offset(place);
        }
        // SAFETY: the mapping has `len` bytes or more, and `drop` below keeps it as long as
        // there is another share of this region.
        let region = unsafe { region.with_raw_mmap_pointer(mapping.start().cast()) };
        Ok(Self {
            shared: Arc::new(region.build().map_err(io::Error::other)?),
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
    use std::os::unix::fs::{FileExt, MetadataExt};

    use vm_memory::GuestAddress;

    use super::*;

    const BOTH: [Sharing; 2] = [Sharing::Private, Sharing::Shared];
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
        let sizes = ["16M", "17M", "20000K", "3075M", "5G"];
        for (size, sharing) in sizes.iter().flat_map(|size| BOTH.map(|both| (size, both))) {
            let ram = GuestRam::map(size.parse().unwrap(), false, sharing).unwrap();
            let mut bytes = 0;
            for region in ram.memory().iter() {
                let host = region.as_ptr() as u64;
                assert!(host.is_multiple_of(HUGE as u64), "{size}: {host:#x}");
                assert!(region.start_addr().0.is_multiple_of(HUGE as u64));
                let place = region.file_offset().map(FileOffset::start);
                assert_eq!(place, (sharing == Sharing::Shared).then_some(bytes));
                bytes += region.len();
            }
            assert_eq!(bytes, size.parse::<MemorySize>().unwrap().bytes());
            let last = GuestAddress(ram.memory().last_addr().0);
            ram.memory().write_obj(7_u8, last).unwrap();
        }
    }

    #[test]
    fn shared_memory_is_a_file_whose_size_is_fixed() {
        let ram = GuestRam::map("5G".parse().unwrap(), false, Sharing::Shared).unwrap();
        for region in ram.memory().iter() {
            let (file, offset) = {
                let place = region.file_offset().unwrap();
                (place.file(), place.start())
            };
            region
                .write_obj(MARK, MemoryRegionAddress(region.len() - 8))
                .unwrap();
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, offset + region.len() - 8)
                .unwrap();
            assert_eq!(u64::from_le_bytes(bytes), MARK);
            file.write_all_at(&[7], offset).unwrap();
            assert_eq!(region.read_obj::<u8>(MemoryRegionAddress(0)).unwrap(), 7);
            for len in [0, 4096, 6 << 30] {
                let error = file.set_len(len).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{len}");
            }
            assert_eq!(file.metadata().unwrap().len(), 5 << 30);
            let error = fcntl_add_seals(file, SealFlags::WRITE).unwrap_err();
            assert_eq!(error.raw_os_error(), libc::EPERM);
        }
    }

    #[test]
    fn memory_is_unmapped_with_its_last_share() {
        for (is_shared, sharing) in [true, false]
            .iter()
            .flat_map(|s| BOTH.map(|both| (*s, both)))
        {
            let ram = GuestRam::map("5G".parse().unwrap(), false, sharing).unwrap();
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
        for (is_kept, sharing) in [false, true]
            .iter()
            .flat_map(|k| BOTH.map(|both| (*k, both)))
        {
            let ram = GuestRam::map("20001K".parse().unwrap(), false, sharing).unwrap();
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
            if let (Some(place), false) = (memory.iter().next().unwrap().file_offset(), is_kept) {
                let held = place.file().metadata().unwrap().blocks() * 512;
                assert!(held <= 4 * marked.len() as u64 * 4096, "holds {held} bytes");
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
