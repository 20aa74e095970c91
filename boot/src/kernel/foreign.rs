//! Names files that are no kernel for this machine, by their magic numbers.

use super::Error::{self, Compressed, NotKernel, OtherMachine};
use super::Image;

/// Offset, magic number, and what the file is then.
type Magic = (
    usize,
    &'static [u8],
    fn(&'static str) -> Error,
    &'static str,
);

/// The first match counts.
const MAGICS: &[Magic] = &[
    (0, b"\x1f\x8b", Compressed, "a gzip-compressed file"),
    (0, b"\xfd7zXZ\0", Compressed, "an xz-compressed file"),
    (0, b"\x28\xb5\x2f\xfd", Compressed, "a zstd-compressed file"),
    (0, b"BZh", Compressed, "a bzip2-compressed file"),
    (0, b"\x5d\0\0", Compressed, "an LZMA-compressed file"),
    (0, b"\x02\x21\x4c\x18", Compressed, "an LZ4-compressed file"),
    (0, b"\x04\x22\x4d\x18", Compressed, "an LZ4-compressed file"),
    (0, b"\x89LZO", Compressed, "an LZO-compressed file"),
    (0x38, b"ARM\x64", OtherMachine, "64-bit ARM"),
    (0x38, b"RSC\x05", OtherMachine, "RISC-V"),
    (0x24, b"\x18\x28\x6f\x01", OtherMachine, "32-bit ARM"),
    (
        4,
        b"zimg",
        OtherMachine,
        "another processor (EFI zboot image)",
    ),
    (0, b"\x27\x05\x19\x56", NotKernel, "a U-Boot image"),
    (
        0,
        b"\xd0\x0d\xfe\xed",
        NotKernel,
        "a device tree or U-Boot FIT image",
    ),
    (0, b"07070", NotKernel, "a cpio archive (an initramfs?)"),
    (0, b"!<arch>\n", NotKernel, "an archive or Debian package"),
    (0, b"QFI\xfb", NotKernel, "a qcow2 disk image"),
    (0, b"hsqs", NotKernel, "a squashfs file system"),
    (0, b"#!", NotKernel, "a script"),
    (0, b"MZ", NotKernel, "an EFI or Windows program"),
];

/// The longest prefix of a bzImage that does not contain its magic number.
const BZIMAGE_PREFIX: u64 = 0x206;

/// The error for an image that is neither ELF nor bzImage.
pub(super) fn name(image: &Image) -> Error {
    let begins =
        |at: usize, magic: &[u8]| image.head.get(at..).is_some_and(|b| b.starts_with(magic));
    let mut magics = MAGICS.iter();
    match magics.find(|(at, magic, ..)| begins(*at, magic)) {
        // The kernel's EFI stub makes a bzImage begin like this.
        Some((_, b"MZ", ..)) if image.size < BZIMAGE_PREFIX => Error::Truncated {
            expected: BZIMAGE_PREFIX,
            actual: image.size,
        },
        Some((.., error, what)) => error(what),
        None => NotKernel("a file of an unknown kind"),
    }
}
