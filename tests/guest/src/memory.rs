//! The heap, memory that devices use too, and the functions on memory that the compiler calls.

use core::alloc::{GlobalAlloc, Layout};
use core::arch::asm;
use core::cell::RefCell;
use core::ptr::NonNull;

use linked_list_allocator::Heap;

use crate::boot::Boot;

/// The page size that virtio rings and DMA memory are aligned to.
pub const PAGE: usize = 4096;

unsafe extern "C" {
    /// The first byte after the image; only its address is used.
    #[link_name = "image_end"]
    static IMAGE_END: u8;
}

/// The address after this image.
pub fn image_end() -> u64 {
    &raw const IMAGE_END as u64
}

struct Allocator(RefCell<Heap>);

// SAFETY: there is one processor, and interrupt handlers never allocate.
unsafe impl Sync for Allocator {}

#[global_allocator]
static HEAP: Allocator = Allocator(RefCell::new(Heap::empty()));

/// Gives all RAM after the image to the heap.
pub fn start_heap(boot: &Boot) {
    let start = image_end();
    let size = boot.ram.end.saturating_sub(start) as usize;
    // SAFETY: the loader's map calls it RAM; the zero page and the command line, which are read
    // already, are the only things in RAM besides this image that are used, and this runs once.
    unsafe { HEAP.0.borrow_mut().init(start as *mut u8, size) };
}

// SAFETY: `Heap` returns memory without another owner; it is never used from two places at once
// (see `Allocator`).
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0
            .borrow_mut()
            .allocate_first_fit(layout)
            .map_or(core::ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if let Some(pointer) = NonNull::new(pointer) {
            // SAFETY: the caller got it from `alloc` with this layout.
            unsafe { self.0.borrow_mut().deallocate(pointer, layout) };
        }
    }
}

/// A number that memory holds in one piece and in any pattern of bits.
pub trait Word: Copy {}

impl Word for u8 {}
impl Word for u16 {}
impl Word for u32 {}
impl Word for u64 {}

/// Reads memory that is no Rust object: a register, or what the loader left.
///
/// # Safety
///
/// The address must be readable, and the read without harm.
pub unsafe fn read_at<T: Word>(address: u64) -> T {
    if address.is_multiple_of(align_of::<T>() as u64) {
        // SAFETY: as the caller promises; aligned; any bits are a `T`.
        unsafe { (address as *const T).read_volatile() }
    } else {
        // SAFETY: as the caller promises; any bits are a `T`.
        unsafe { (address as *const T).read_unaligned() }
    }
}

/// Writes memory that is no Rust object.
///
/// # Safety
///
/// The address must be writable, and no Rust object may be there.
pub unsafe fn write_at<T: Word>(address: u64, value: T) {
    if address.is_multiple_of(align_of::<T>() as u64) {
        // SAFETY: as the caller promises; aligned.
        unsafe { (address as *mut T).write_volatile(value) }
    } else {
        // SAFETY: as the caller promises.
        unsafe { (address as *mut T).write_unaligned(value) }
    }
}

/// Zeroed pages that a device may read and write at any time, so that no reference into them is
/// kept.
#[derive(Debug)]
pub struct Shared {
    base: NonNull<u8>,
    size: usize,
}

impl Shared {
    /// Allocates at least `size` bytes, from a page's start.
    pub fn new(size: usize) -> Self {
        let layout = Self::layout(size);
        // SAFETY: the layout's size is not zero.
        let base = unsafe { alloc::alloc::alloc_zeroed(layout) };
        let Some(base) = NonNull::new(base) else {
            alloc::alloc::handle_alloc_error(layout)
        };
        Self {
            base,
            size: layout.size(),
        }
    }

    /// Gives the memory up, as its physical and its virtual address, for `from_raw`.
    pub fn into_raw(self) -> (u64, NonNull<u8>) {
        let shared = core::mem::ManuallyDrop::new(self);
        (shared.address(), shared.base)
    }

    /// Takes back what `into_raw` gave.
    ///
    /// # Safety
    ///
    /// It must come from `into_raw` of memory with this size, and once only.
    pub unsafe fn from_raw(base: NonNull<u8>, size: usize) -> Self {
        Self {
            base,
            size: Self::layout(size).size(),
        }
    }

    /// The physical address, which is the virtual one.
    pub fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Reads the word at an offset.
    pub fn read<T: Word>(&self, offset: usize) -> T {
        // SAFETY: inside the allocation, which no reference covers.
        unsafe { read_at(self.checked(offset, size_of::<T>())) }
    }

    /// Writes the word at an offset.
    pub fn write<T: Word>(&mut self, offset: usize, value: T) {
        // SAFETY: inside the allocation, which no reference covers.
        unsafe { write_at(self.checked(offset, size_of::<T>()), value) }
    }

    /// Copies bytes in.
    pub fn put(&mut self, offset: usize, bytes: &[u8]) {
        let to = self.checked(offset, bytes.len()) as *mut u8;
        // SAFETY: inside the allocation, which no reference covers, so that it cannot overlap
        // either.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Copies bytes out.
    pub fn get(&self, offset: usize, bytes: &mut [u8]) {
        let from = self.checked(offset, bytes.len()) as *const u8;
        // SAFETY: inside the allocation, which no reference covers, so that it cannot overlap
        // either.
        unsafe { core::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
    }

    fn checked(&self, offset: usize, length: usize) -> u64 {
        assert!(
            offset <= self.size && length <= self.size - offset,
            "{offset}+{length} is outside of shared memory"
        );
        self.address() + offset as u64
    }

    fn layout(size: usize) -> Layout {
        let size = size.max(1).next_multiple_of(PAGE);
        Layout::from_size_align(size, PAGE)
            .unwrap_or_else(|error| panic!("{size} bytes of shared memory: {error}"))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout, since a rounded size stays as it is.
        unsafe { alloc::alloc::dealloc(self.base.as_ptr(), Self::layout(self.size)) };
    }
}

// The compiler calls the following by name; libc usually has them. String instructions keep the
// compiler from recognising a loop here as the very function that it stands in.

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller's promise: both ranges are valid and do not overlap.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= count {
        // SAFETY: the caller's promise, and copying upwards never reads what it has written.
        return unsafe { memcpy(to, from, count) };
    }
    let (last_to, last_from) = (
        to.wrapping_add(count).wrapping_sub(1),
        from.wrapping_add(count).wrapping_sub(1),
    );
    // SAFETY: the caller's promise: both ranges are valid; downwards, since `to` lies inside the
    // source.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") count => _, inout("rdi") last_to => _,
            inout("rsi") last_from => _, options(nostack));
    };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller's promise: the range is valid.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") byte as u8,
            options(nostack, preserves_flags));
    };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    for at in 0..count {
        // SAFETY: the caller's promise: both ranges have `count` bytes, and any bits are a byte.
        let [a, b] = [left, right].map(|bytes| unsafe { read_at::<u8>(bytes as u64 + at as u64) });
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    // SAFETY: the same promise.
    unsafe { memcmp(left, right, count) }
}
