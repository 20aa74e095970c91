//! The relocations at the end of a payload (arch/x86/boot/compressed/misc.c, `handle_relocations`).
//!
//! They are lists of addresses, each in 32 bits, at which there is another address: of 64 bits, of 32
//! bits subtracted (which newer kernels have no more), of 32 bits. Each list has a 0 before it.

use vm_memory::{ByteValued, VolatileMemory, VolatileSlice};

use super::Error;

/// The virtual address of physical address 0 in a kernel as it is linked (`__START_KERNEL_map`).
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// The three lists: for 64 bits, 32 bits subtracted, and 32 bits.
#[derive(Debug, PartialEq)]
struct Lists<'a>([&'a [[u8; 4]]; 3]);

impl<'a> Lists<'a> {
    /// `bytes` is all that follows the ELF file.
    fn read(bytes: &'a [u8]) -> Result<Self, Error> {
        let odd = Error::Relocations("their lists do not fill what follows the kernel");
        let (words, []) = bytes.as_chunks() else {
            return Err(odd);
        };
        let lists: Vec<_> = words.split(|word| *word == [0; 4]).collect();
        match lists[..] {
            [[], wide, inverse, plain] => Ok(Self([wide, inverse, plain])),
            [[], wide, plain] => Ok(Self([wide, &[], plain])),
            _ => Err(odd),
        }
    }
}

/// Moves the kernel in `image`, which begins at the physical address `linked` as it is linked, by `offset`
/// in virtual memory.
pub(super) fn apply(
    bytes: &[u8],
    image: &VolatileSlice,
    linked: u64,
    offset: u64,
) -> Result<(), Error> {
    let Lists([wide, inverse, plain]) = Lists::read(bytes)?;
    let start = KERNEL_MAP.wrapping_add(linked);
    let narrow = offset as u32; // less than 1 GiB
    each(wide, image, start, |value: u64| value.wrapping_add(offset))?;
    each(inverse, image, start, |value: u32| {
        value.wrapping_sub(narrow)
    })?;
    each(plain, image, start, |value: u32| value.wrapping_add(narrow))
}

fn each<T: ByteValued>(
    list: &[[u8; 4]],
    image: &VolatileSlice,
    start: u64,
    change: impl Fn(T) -> T,
) -> Result<(), Error> {
    for word in list {
        let address = i64::from(i32::from_le_bytes(*word)) as u64;
        let place = image.get_ref(address.wrapping_sub(start) as usize);
        let place = place.map_err(|_| Error::Relocations("one is outside of the kernel"))?;
        place.store(change(place.load()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LINKED: u64 = 0x100_0000;
    const START: u32 = 0x8100_0000;

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn applied(words: &[u32], image: &mut [u8], offset: u64) -> Result<(), Error> {
        apply(&bytes(words), &VolatileSlice::from(image), LINKED, offset)
    }

    #[test]
    fn each_list_changes_its_own_places() {
        let image = [0x8100_0000_u32, 0x1234, 5, 0x8100_0000, u32::MAX, 7];
        let mut image = bytes(&image);
        let words = [0, START + 12, 0, START + 4, 0, START];
        applied(&words, &mut image, 0x20_0000).unwrap();
        let expected = [
            0x8120_0000,
            0x1234_u32.wrapping_sub(0x20_0000),
            5,
            0x8120_0000,
            u32::MAX,
            7,
        ];
        assert_eq!(image, bytes(&expected));
    }

    #[test]
    fn two_lists_have_none_to_subtract_from() {
        let mut image = bytes(&[1, 1, 1]);
        applied(&[0, START + 4, 0, START], &mut image, 16).unwrap();
        assert_eq!(image, bytes(&[17, 17, 1]));
    }

    #[test]
    fn lists_that_do_not_fill_the_end_are_refused() {
        let of = |words: &[u32]| applied(words, &mut [0; 64], 16);
        for words in [
            &[][..],
            &[0],
            &[START, 0, START],
            &[0, 0, 0, 0, START],
            &[0, 0, 0, START, 0],
        ] {
            assert!(
                matches!(of(words), Err(Error::Relocations(_))),
                "{words:x?}"
            );
        }
        assert!(Lists::read(&[0; 13]).is_err());
        of(&[0, 0, 0]).unwrap();
    }

    #[test]
    fn relocation_outside_of_the_kernel_is_refused() {
        for (place, fits) in [(START + 60, true), (START + 61, false), (START - 4, false)] {
            let result = applied(&[0, 0, 0, place], &mut [0; 64], 16);
            assert_eq!(result.is_ok(), fits, "{place:#x}");
        }
        for place in [1, 0x7fff_ffff, u32::MAX, START + 57] {
            let result = applied(&[0, place, 0, 0], &mut [0; 64], 16);
            assert!(result.is_err(), "{place:#x}");
        }
    }

    proptest! {
        #[test]
        fn any_lists_never_panic(
            words in prop::collection::vec(prop_oneof![
                Just(0),
                START..START + 64,
                any::<u32>(),
            ], 0..40),
            offset in 0_u64..1 << 30,
        ) {
            let _ = applied(&words, &mut [0; 64], offset);
        }
    }
}
