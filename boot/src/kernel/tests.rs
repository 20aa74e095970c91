//! Tests of the kernel loaders: images made here, good, bad and random.

use super::*;
use crate::tests::images::*;
use proptest::prelude::*;
use vm_memory::Bytes;

fn load_bytes(bytes: &[u8]) -> Result<Kernel, Error> {
    load_kernel(&memory(64), &mut file_with(bytes))
}

fn error_of(bytes: &[u8]) -> Error {
    load_bytes(bytes).unwrap_err()
}

#[test]
fn bzimage_fitting_is_loaded_at_its_preferred_address() {
    let memory = memory(64);
    let kernel = load_kernel(&memory, &mut file_with(&bzimage())).unwrap();
    assert_eq!(kernel.protocol, Protocol::Linux64);
    assert_eq!(kernel.entry, GuestAddress(BZIMAGE_PREF + 0x200));
    assert_eq!(
        kernel.occupied,
        BZIMAGE_PREF..BZIMAGE_PREF + u64::from(BZIMAGE_INIT_SIZE)
    );
    assert_eq!(
        (kernel.cmdline_max, kernel.initrd_end_max),
        (2047, 0x8000_0000)
    );
    let mut loaded = vec![0; BZIMAGE_KERNEL];
    memory
        .read_slice(&mut loaded, GuestAddress(BZIMAGE_PREF))
        .unwrap();
    assert_eq!(loaded, bzimage()[BZIMAGE_SETUP..]);
}

#[test]
fn bzimage_header_does_not_contain_the_code_behind_it() {
    let short = patched(bzimage(), 0x201, &[0x60]); // the header ends at 0x262
    let header = load_bytes(&short).unwrap().header.unwrap();
    let (init_size, handover) = (header.init_size, header.handover_offset);
    // init_size (0x260) is cut off in the middle and keeps its two low bytes.
    assert_eq!((init_size, handover), (BZIMAGE_INIT_SIZE & 0xffff, 0));
}

#[test]
fn bzimage_not_relocatable_is_loaded_where_it_says_and_keeps_both_places() {
    let kernel = load_bytes(&patched(bzimage(), 0x234, &[0])).unwrap();
    assert_eq!(kernel.entry, GuestAddress(0x10_0200));
    assert_eq!(kernel.occupied, 0x10_0000..0x200_0000);
}

#[test]
fn bzimage_with_signature_behind_it_is_loaded() {
    let mut signed = bzimage();
    signed.extend([0xaa; 1472]);
    load_bytes(&signed).unwrap();
}

#[test]
fn bzimage_larger_than_memory_says_how_much_it_needs() {
    let big = patched(bzimage(), 0x260, &0x337_8000_u32.to_le_bytes());
    let text = error_of(&big).to_string();
    assert_eq!(
        text,
        "it needs 68 MiB of memory to start, and the guest has 64 MiB; give it more memory"
    );
    load_kernel(&memory(68), &mut file_with(&big)).unwrap();
}

#[test]
fn bzimage_truncated_anywhere_is_truncated() {
    let image = bzimage();
    for length in [
        2,
        100,
        0x1f1,
        0x206,
        0x26b,
        0x300,
        0x400,
        0x8000,
        image.len() - 1,
    ] {
        let error = error_of(&image[..length]);
        assert!(
            matches!(error, Error::Truncated { .. }),
            "{length:#x}: {error}"
        );
    }
}

#[test]
fn bzimage_32_bit_is_refused() {
    let no_64 = patched(bzimage(), 0x236, &[0, 0]);
    let old = patched(bzimage(), 0x206, &0x20b_u16.to_le_bytes());
    for image in [no_64, old] {
        assert!(matches!(error_of(&image), Error::Bzimage32));
    }
}

#[test]
fn bzimage_with_absurd_fields_is_refused() {
    let not_high = patched(bzimage(), 0x211, &[0]);
    let no_payload = patched(bzimage(), 0x1f4, &[0; 4]);
    let overflowing = patched(bzimage(), 0x258, &(u64::MAX - 5).to_le_bytes());
    for image in [not_high, no_payload, overflowing] {
        assert!(matches!(error_of(&image), Error::Damaged(_)));
    }
    let low = patched(bzimage(), 0x258, &0x1000_u64.to_le_bytes());
    assert!(matches!(error_of(&low), Error::TooLow(0x1000)));
    let high = patched(bzimage(), 0x258, &0x1_0000_0000_u64.to_le_bytes());
    assert!(matches!(error_of(&high), Error::TooHigh(_)));
}

#[test]
fn elf_without_note_is_entered_by_the_linux_protocol() {
    let memory = memory(64);
    let kernel = load_kernel(&memory, &mut file_with(&elf(false))).unwrap();
    assert_eq!(kernel.protocol, Protocol::Linux64);
    assert_eq!(kernel.entry, GuestAddress(ELF_START));
    assert_eq!(kernel.occupied, ELF_START..ELF_START + ELF_MEMORY_SIZE);
    let mut loaded = vec![0; 0x1001];
    memory
        .read_slice(&mut loaded, GuestAddress(ELF_START))
        .unwrap();
    assert_eq!(loaded[..0x1000], [0xf4; 0x1000]);
    assert_eq!(loaded[0x1000], 0);
}

#[test]
fn elf_with_note_is_entered_by_pvh() {
    let kernel = load_bytes(&elf(true)).unwrap();
    assert_eq!(kernel.protocol, Protocol::Pvh);
    assert_eq!(kernel.entry, GuestAddress(PVH_ENTRY));
}

#[test]
fn elf_truncated_anywhere_is_truncated() {
    let image = elf(true);
    for length in [4, 63, 64, 100, 0x801, 0x813, 0x1000, 0x1fff] {
        let error = error_of(&image[..length]);
        assert!(
            matches!(error, Error::Truncated { .. }),
            "{length:#x}: {error}"
        );
    }
}

#[test]
fn elf_of_another_kind_is_named() {
    assert!(matches!(
        error_of(&patched(elf(false), 4, &[1])),
        Error::Elf32
    ));
    let i386 = patched(patched(elf(false), 4, &[1]), 18, &[3, 0]);
    assert!(matches!(error_of(&i386), Error::Elf32));
    let arm64 = patched(elf(false), 18, &[183, 0]);
    assert!(matches!(
        error_of(&arm64),
        Error::OtherMachine("64-bit ARM")
    ));
    let s390 = patched(
        elf(false),
        5,
        &[2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 22],
    );
    assert!(matches!(error_of(&s390), Error::OtherMachine("s390")));
    let shared = patched(elf(false), 16, &[3]);
    assert!(error_of(&shared).to_string().contains("shared object"));
    let object = patched(elf(false), 16, &[1]);
    assert!(error_of(&object).to_string().contains("object file"));
}

#[test]
fn elf_linked_at_a_wrong_place_is_refused() {
    let at = |address: u64| patched(elf(false), 64 + 24, &address.to_le_bytes());
    assert!(matches!(error_of(&at(0x1000)), Error::TooLow(0x1000)));
    assert!(matches!(
        error_of(&at(0x400_0000)),
        Error::DoesNotFit { .. }
    ));
    assert!(matches!(
        error_of(&at(0xffff_ffff_8100_0000)),
        Error::TooHigh(_)
    ));
    assert!(matches!(error_of(&at(u64::MAX)), Error::Damaged(_)));
}

#[test]
fn elf_that_contradicts_itself_is_refused() {
    let entry_outside = patched(elf(false), 24, &0x80_0000_u64.to_le_bytes());
    let no_segments = patched(elf(false), 56, &[0, 0]);
    let odd_headers = patched(elf(false), 54, &[55, 0]);
    let file_larger = patched(elf(false), 64 + 40, &0x10_u64.to_le_bytes());
    for image in [entry_outside, no_segments, odd_headers, file_larger] {
        assert!(matches!(error_of(&image), Error::Damaged(_)));
    }
}

#[test]
fn foreign_files_are_named() {
    let at = |offset: usize, magic: &[u8]| patched(vec![0; 4096], offset, magic);
    let cases = [
        (at(0, b"\x1f\x8b\x08"), "gzip"),
        (at(0, b"\xfd7zXZ\0"), "xz"),
        (at(0, b"\x28\xb5\x2f\xfd"), "zstd"),
        (at(0x38, b"ARM\x64"), "64-bit ARM"),
        (patched(at(0, b"MZ"), 0x38, b"ARM\x64"), "64-bit ARM"),
        (at(0x24, b"\x18\x28\x6f\x01"), "32-bit ARM"),
        (at(0, b"070701"), "cpio"),
        (at(0, b"#!/bin/sh"), "script"),
        (at(0, b"hello"), "unknown kind"),
        (b"x".to_vec(), "unknown kind"),
    ];
    for (bytes, expected) in cases {
        let text = error_of(&bytes).to_string();
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

#[test]
fn empty_file_is_empty() {
    assert!(matches!(error_of(&[]), Error::Empty));
}

#[test]
fn directory_is_a_directory() {
    let mut directory = File::open(std::env::temp_dir()).unwrap();
    let error = load_kernel(&memory(64), &mut directory).unwrap_err();
    assert!(matches!(error, Error::Directory));
}

#[test]
fn pipe_has_no_size() {
    let (reader, _writer) = std::io::pipe().unwrap();
    let mut file = File::from(std::os::fd::OwnedFd::from(reader));
    assert!(matches!(
        load_kernel(&memory(64), &mut file),
        Err(Error::Size(_))
    ));
}

fn any_image() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![Just(bzimage()), Just(elf(false)), Just(elf(true))]
}

/// A kernel that was accepted is where its description says.
fn check(result: Result<Kernel, Error>) -> Result<(), TestCaseError> {
    if let Ok(kernel) = result {
        prop_assert!(kernel.occupied.contains(&kernel.entry.0));
        prop_assert!(kernel.occupied.start >= 1 << 20 && kernel.occupied.end <= 64 << 20);
    }
    Ok(())
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        check(load_bytes(&bytes))?;
    }

    #[test]
    fn random_bytes_behind_a_magic_number_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 1024..4096),
        is_elf in any::<bool>(),
    ) {
        let bytes = match is_elf {
            true => patched(bytes, 0, b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0"),
            false => patched(bytes, 0x202, b"HdrS"),
        };
        check(load_bytes(&bytes))?;
    }

    #[test]
    fn truncated_images_never_panic_and_never_load(image in any_image(), part in 0.0..1.0) {
        let length = (image.len() as f64 * part) as usize;
        prop_assert!(load_bytes(&image[..length]).is_err());
    }

    #[test]
    fn mutated_headers_never_panic(
        image in any_image(),
        changes in prop::collection::vec((0_usize..0x900, any::<u8>()), 1..6),
    ) {
        let mutated = changes.iter().fold(image, |image, &(at, byte)| patched(image, at, &[byte]));
        check(load_bytes(&mutated))?;
    }

    #[test]
    fn mutated_numbers_never_panic(
        image in any_image(),
        at in 0_usize..0x280,
        number in prop_oneof![any::<u64>(), 0..u64::from(u32::MAX), Just(u64::MAX), Just(1 << 63)],
    ) {
        check(load_bytes(&patched(image, at, &number.to_le_bytes())))?;
    }
}
