//! Tests of bzImages that are unpacked here.

use std::ops::Range;

use linux_loader::loader::bootparam::KASLR_FLAG;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::kernel::kaslr::Choice;
use crate::kernel::{Kernel, Loaded, Plan};
use crate::tests::images::*;

const ALIGN: u64 = 2 << 20;
const SIZE: usize = 0x2000;

/// Loads a bzImage; the random numbers say at which of the possible places.
fn load_at(
    memory: &GuestMemoryMmap,
    image: &[u8],
    random: [u64; 2],
    cmdline: &str,
) -> Result<Kernel, crate::kernel::Error> {
    let mut file = file_with(image);
    let choice = Choice {
        random,
        cmdline,
        initrd: 0..0,
    };
    Plan::new(memory, &mut file)?.load(memory, &choice, &|_| ())
}

fn kernel(relocations: &[u32]) -> Vec<u8> {
    packed(&gzip(&vmlinux(SIZE, relocations)))
}

fn bytes_at(memory: &GuestMemoryMmap, range: Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    memory
        .read_slice(&mut bytes, GuestAddress(range.start))
        .unwrap();
    bytes
}

fn has_flag(kernel: &Kernel) -> bool {
    kernel.header.unwrap().loadflags & KASLR_FLAG != 0
}

/// Both segments of a kernel of [`vmlinux`] that is not relocated.
fn assert_segments(memory: &GuestMemoryMmap, start: u64, size: usize) {
    let file = vmlinux(size, &[]);
    for (at, offset) in [(0, 0x1000), (VMLINUX_DATA, 0x1000 + size)] {
        let start = start + at;
        let loaded = bytes_at(memory, start..start + size as u64);
        assert!(loaded == file[offset..offset + size], "at {start:#x}");
    }
}

#[test]
fn kernel_goes_to_the_place_that_is_chosen() {
    let memory = memory(64);
    let kernel = load_at(&memory, &kernel(&relocations()), [3, 5], "").unwrap();
    let start = VMLINUX_START + 5 * ALIGN;
    assert_eq!(kernel.entry.0, start + VMLINUX_ENTRY);
    assert_eq!(kernel.occupied, start..start + u64::from(BZIMAGE_INIT_SIZE));
    assert!(matches!(
        kernel.loaded,
        Loaded::Unpacked { is_random: true }
    ));
    assert!(has_flag(&kernel));

    // Segments are as in the file, but for what is relocated.
    let file = vmlinux(SIZE, &[]);
    let offset = 3 * ALIGN;
    let (place, data) = (start + VMLINUX_PLACES, start + VMLINUX_DATA);
    let in_file = |at: u64| match at >= VMLINUX_DATA {
        true => 0x1000 + SIZE + (at - VMLINUX_DATA) as usize,
        false => 0x1000 + at as usize,
    };
    let wide = |at: u64| {
        let number: [u8; 8] = file[in_file(at)..][..8].try_into().unwrap();
        u64::from_le_bytes(number)
    };
    let narrow = |at: u64| wide(at) as u32;
    let at = |address: u64| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
    assert_eq!(at(place), wide(VMLINUX_PLACES) + offset);
    assert_eq!(at(data), wide(VMLINUX_DATA) + offset);
    let expected = narrow(VMLINUX_PLACES + 8).wrapping_sub(offset as u32);
    assert_eq!(at(place + 8) as u32, expected);
    let expected = narrow(VMLINUX_PLACES + 12).wrapping_add(offset as u32);
    assert_eq!(at(place + 12) as u32, expected);
    let expected = narrow(VMLINUX_DATA + 8).wrapping_add(offset as u32);
    assert_eq!(at(data + 8) as u32, expected);
    assert_eq!(at(place + 16), wide(VMLINUX_PLACES + 16));
    assert_eq!(at(data + SIZE as u64), 0, "memory after a segment");
}

#[test]
fn kernel_without_kaslr_is_where_it_is_linked() {
    for (image, cmdline) in [
        (kernel(&relocations()), "quiet nokaslr"),
        (kernel(&[]), "quiet"),
    ] {
        let memory = memory(64);
        let kernel = load_at(&memory, &image, [3, 5], cmdline).unwrap();
        assert_eq!(kernel.entry.0, VMLINUX_START + VMLINUX_ENTRY);
        let is_random = matches!(kernel.loaded, Loaded::Unpacked { is_random: true });
        assert_eq!((is_random, has_flag(&kernel)), (false, false));
        assert_segments(&memory, VMLINUX_START, SIZE);
    }
}

#[test]
fn kernel_larger_than_what_is_unpacked_at_once_is_whole() {
    let size = 0x9_0000;
    let memory = memory(64);
    let kernel = load_at(&memory, &packed(&gzip(&vmlinux(size, &[]))), [3, 5], "").unwrap();
    assert!(matches!(
        kernel.loaded,
        Loaded::Unpacked { is_random: false }
    ));
    assert_segments(&memory, VMLINUX_START, size);
}

/// Asserts that the kernel is left to its own decompressor, for this reason.
fn assert_left(image: &[u8], reason: &str) {
    let memory = memory(64);
    let kernel = load_at(&memory, image, [3, 5], "").unwrap();
    let text = kernel.loaded.to_string();
    assert!(
        text.contains("left to unpack itself") && text.contains(reason),
        "{reason}: {text}"
    );
    assert_eq!(kernel.entry.0, BZIMAGE_PREF + 0x200);
    assert_eq!(
        kernel.occupied,
        BZIMAGE_PREF..BZIMAGE_PREF + u64::from(BZIMAGE_INIT_SIZE)
    );
    assert!(!has_flag(&kernel));
    let loaded = bytes_at(
        &memory,
        BZIMAGE_PREF..BZIMAGE_PREF + (image.len() - BZIMAGE_SETUP) as u64,
    );
    assert!(loaded == image[BZIMAGE_SETUP..]);
}

#[test]
fn payload_of_another_format_is_left() {
    assert_left(&bzimage(), "too short");
    for (magic, name) in [
        (&b"\xcc"[..], "unknown program"),
        (b"\x02\x21\x4c\x18", "LZ4"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x89LZO\0\r", "LZO"),
    ] {
        let payload = [magic, &[0; 100], &0x1000_u32.to_le_bytes()].concat();
        assert_left(&packed(&payload), name);
    }
}

#[test]
fn payload_that_is_damaged_is_left() {
    let content = vmlinux(0x9_0000, &relocations());
    let payload = gzip(&content);
    let end = payload.len() - 4;
    let with_length = |length: usize| {
        let length = (length as u32).to_le_bytes();
        patched(payload.clone(), end, &length)
    };
    assert_left(&packed(&with_length(0)), "too short");
    assert_left(&packed(&with_length(usize::MAX)), "more than");
    assert_left(&packed(&payload[..3]), "too short");
    assert_left(
        &packed(&with_length(content.len() - 1)),
        "longer than it says",
    );
    assert_left(&packed(&with_length(content.len() + 1)), "cannot unpack");
    let half = [&payload[..payload.len() / 2], &payload[end..]].concat();
    assert_left(&packed(&half), "cannot unpack");
    let checksum = payload.len() - 8;
    assert_left(
        &packed(&patched(payload.clone(), checksum, &[1, 2, 3, 4])),
        "cannot unpack",
    );
    let outside = patched(packed(&payload), 0x248, &0x7000_0000_u32.to_le_bytes());
    assert_left(&outside, "not in the image");
    assert_left(
        &packed(&patched(payload, 0x400, &[0xff; 40])),
        "cannot unpack",
    );
}

#[test]
fn payload_without_a_kernel_is_left() {
    let content = vmlinux(SIZE, &relocations());
    let with = |at: usize, bytes: &[u8]| packed(&gzip(&patched(content.clone(), at, bytes)));
    assert_left(&packed(&gzip(b"\x7fELF")), "too short");
    assert_left(&with(0, b"MZ"), "not a 64-bit ELF");
    assert_left(&with(4, &[1]), "not a 64-bit ELF");
    assert_left(&with(18, &[3]), "not a 64-bit ELF");
    assert_left(&with(54, &[32]), "wrong size");
    assert_left(&with(24, &[0xff; 8]), "entry point");
    assert_left(&with(56, &[0]), "entry point");
    assert_left(&with(40, &[0; 8]), "a segment is not in it");
    for offset in [u64::MAX, u64::MAX - 128, 0x1000_0000] {
        assert_left(&with(40, &offset.to_le_bytes()), "section headers");
    }
    assert_left(&with(32, &[0xff; 8]), "program headers");
    let program = 64;
    assert_left(&with(program + 8, &[0xff; 8]), "not in it");
    assert_left(
        &with(program + 24, &0xf0_0000_u64.to_le_bytes()),
        "outside of its memory",
    );
    assert_left(&with(program + 40, &[0; 8]), "outside of its memory");
    assert_left(&with(program + 40, &[0xff; 8]), "outside of its memory");
}

#[test]
fn kernel_with_odd_relocations_is_left() {
    let outside = VMLINUX_MAP + BZIMAGE_INIT_SIZE;
    for words in [&[1][..], &[0], &[0, 0, 0, 0, 0], &[0, 0, outside]] {
        assert_left(&kernel(words), "relocations are odd");
    }
    let odd = [&vmlinux(SIZE, &relocations())[..], &[0]].concat();
    assert_left(&packed(&gzip(&odd)), "relocations are odd");
}

#[test]
fn kernel_that_cannot_be_moved_is_left() {
    let image = kernel(&relocations());
    for alignment in [0_u32, 0x1000, 0x30_0000] {
        let odd = patched(image.clone(), 0x230, &alignment.to_le_bytes());
        assert_left(&odd, "multiples of 2 MiB");
    }
}

#[test]
fn bomb_takes_no_more_than_the_kernels_memory() {
    let mut content = vmlinux(SIZE, &[]);
    content.resize(BZIMAGE_INIT_SIZE as usize + 1, 0);
    let bomb = gzip(&content);
    assert_left(&packed(&bomb), "more than the kernel's memory");
    // It says that it is smaller.
    let end = bomb.len() - 4;
    let length = (vmlinux(SIZE, &[]).len() as u32).to_le_bytes();
    assert_left(&packed(&patched(bomb, end, &length)), "longer than it says");
}

proptest! {
    #[test]
    fn mutated_payloads_never_panic(
        changes in prop::collection::vec((0_usize..600, any::<u8>()), 1..6),
        in_content in any::<bool>(),
        random in any::<[u64; 2]>(),
    ) {
        let change = |bytes: Vec<u8>| {
            changes.iter().fold(bytes, |bytes, &(at, byte)| {
                let at = at % bytes.len();
                patched(bytes, at, &[byte])
            })
        };
        let content = vmlinux(SIZE, &relocations());
        let image = match in_content {
            true => packed(&gzip(&change(content))),
            false => packed(&change(gzip(&content))),
        };
        if let Ok(kernel) = load_at(&memory(64), &image, random, "") {
            prop_assert!(kernel.occupied.contains(&kernel.entry.0));
            prop_assert!(kernel.occupied.start >= 1 << 20 && kernel.occupied.end <= 64 << 20);
        }
    }

    #[test]
    fn mutated_numbers_in_the_kernel_never_panic(
        at in 0_usize..64 + 2 * 56,
        number in prop_oneof![any::<u64>(), 0..u64::from(u32::MAX), Just(u64::MAX), Just(1 << 63)],
        random in any::<[u64; 2]>(),
    ) {
        let content = patched(vmlinux(SIZE, &relocations()), at, &number.to_le_bytes());
        load_at(&memory(64), &packed(&gzip(&content)), random, "").unwrap();
    }
}
