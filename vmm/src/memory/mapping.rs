//! Memory that is mapped where huge pages can be.

use std::ffi::c_void;
use std::io;
use std::ptr;

use rustix::mm::{self, Advice, MapFlags, ProtFlags};
use vm_memory::FileOffset;

/// A huge page.
pub const HUGE: usize = 2 << 20;

/// Memory that is unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    start: *mut c_void,
    len: usize,
}

impl Mapping {
    /// Memory that begins with a huge page, if the kernel has any for us: anonymous, or that at `place`.
    pub fn aligned(len: usize, place: Option<&FileOffset>) -> io::Result<Self> {
        let mut mapping = Self::reserve(len)?;
        if let Some(place) = place {
            mapping.replace(place)?;
        }
        // The start of a guest takes a few pages at the beginning. With one that is there already the kernel does not
        // take a huge one for them, which it would have to clear.
        // SAFETY: the mapping is ours alone, may be written to, and has a byte; `place`, if there is one, has
        // all of it.
        unsafe { mapping.start.cast::<u8>().write_volatile(0) };
        mapping.advise(Advice::LinuxHugepage);
        mapping.advise(Advice::LinuxDontDump);
        Ok(mapping)
    }

    /// Huge pages that the host has set aside, promised to us now: a guest would else die of it
    /// later. They are whole, also where the guest's memory ends within the last one.
    pub fn huge(len: usize, place: Option<&FileOffset>) -> io::Result<Self> {
        let len = len.next_multiple_of(HUGE);
        let mapping = if let Some(place) = place {
            let mut mapping = Self::reserve(len)?;
            mapping.replace(place)?;
            mapping
        } else {
            Self::new(len, MapFlags::HUGETLB | MapFlags::HUGE_2MB)?
        };
        mapping.advise(Advice::LinuxDontDump);
        Ok(mapping)
    }

    /// Where it begins.
    pub fn start(&self) -> *mut c_void {
        self.start
    }

    fn new(len: usize, flags: MapFlags) -> io::Result<Self> {
        let (access, flags) = (
            ProtFlags::READ | ProtFlags::WRITE,
            flags | MapFlags::PRIVATE,
        );
        // SAFETY: a new mapping of memory where the kernel likes touches nothing else.
        let start = unsafe { mm::mmap_anonymous(ptr::null_mut(), len, access, flags) }?;
        Ok(Self { start, len })
    }

    /// Anonymous memory that begins at a multiple of a huge page.
    fn reserve(len: usize) -> io::Result<Self> {
        // So much more that it has a place for what is wanted, whose rest on both sides goes back.
        let mut skipped = Self::new(len + HUGE, MapFlags::NORESERVE)?;
        let mut mapping = skipped.split_off(skipped.start.addr().wrapping_neg() % HUGE);
        drop(mapping.split_off(len));
        Ok(mapping)
    }

    /// Puts memory of a file in place of anonymous memory that nothing uses yet.
    fn replace(&mut self, place: &FileOffset) -> io::Result<()> {
        let (access, flags) = (
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED | MapFlags::FIXED,
        );
        let (file, offset) = (place.file(), place.start());
        // SAFETY: what is replaced is this mapping alone, which is ours and nothing refers to.
        unsafe { mm::mmap(self.start, self.len, access, flags, file, offset) }?;
        Ok(())
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
