//! Gives back to the host what only the start of a guest has needed: what malloc holds and no longer
//! uses, and pages of the program and its libraries, which come back from the page cache when they
//! are needed again.

use std::ffi::{c_int, c_void};
use std::{ptr, slice};

use rustix::mm::{Advice, madvise};

/// How malloc holds little (mallopt(3)): with one arena for all threads; with blocks of 32 KiB and
/// more mapped, which are new and zero without being touched, and given back when they are freed;
/// and with little room at the end of its heap, out of which such a block would else be taken.
const PARAMETERS: [(c_int, c_int); 4] = [
    (libc::M_ARENA_MAX, 1),
    (libc::M_MMAP_THRESHOLD, 32 << 10),
    (libc::M_TOP_PAD, 16 << 10),
    (libc::M_TRIM_THRESHOLD, 32 << 10),
];

/// Of the only processors that this runs on.
const PAGE: usize = 4096;

/// Has malloc hold little. To be called while there are no other threads: each of them would get an
/// arena of its own.
pub fn hold_little() {
    for (parameter, value) in PARAMETERS {
        // SAFETY: mallopt takes two numbers, and sets a parameter under malloc's own lock.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Gives back what can be had again.
pub fn give_back() {
    // SAFETY: malloc_trim returns pages to the kernel that hold nothing of anybody's.
    unsafe { libc::malloc_trim(0) };
    // SAFETY: the callback does not unwind, and uses what it gets during the call alone.
    unsafe { libc::dl_iterate_phdr(Some(forget), ptr::null_mut()) };
}

/// Takes the pages of a loaded object out of this process that it cannot have written to.
unsafe extern "C" fn forget(
    object: *mut libc::dl_phdr_info,
    _: libc::size_t,
    _: *mut c_void,
) -> c_int {
    // SAFETY: dl_iterate_phdr passes a pointer that is valid during the call.
    let object = unsafe { &*object };
    // SAFETY: these are its program headers, loaded as long as it is.
    let headers = unsafe { slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into()) };
    for header in headers {
        if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
            continue;
        }
        let end = (object.dlpi_addr + header.p_vaddr + header.p_memsz) as usize;
        let start = (object.dlpi_addr + header.p_vaddr) as usize / PAGE * PAGE;
        let first = ptr::with_exposed_provenance_mut(start);
        // SAFETY: it is a private mapping of a file that nothing has been written to: a page
        // that is taken out is read again at the next access.
        let _ = unsafe { madvise(first, end - start, Advice::LinuxDontNeed) };
    }
    0
}
