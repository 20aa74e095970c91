//! Checks and writes the kernel command line.

use thiserror::Error as ThisError;
use vm_memory::{Bytes, GuestMemoryError, GuestMemoryMmap};

use crate::layout;

/// Why a command line cannot be passed.
#[derive(Debug, ThisError)]
pub enum Error {
    /// A byte that the kernel does not read as text.
    #[error("it has the character {character:?} at position {position}; use ASCII only")]
    Character {
        /// The character.
        character: char,
        /// Its place, the first character is 1.
        position: usize,
    },
    /// The kernel would cut it off.
    #[error("it has {length} bytes and this kernel takes {max}; shorten it")]
    TooLong {
        /// The bytes of the command line.
        length: usize,
        /// The bytes that the kernel takes.
        max: usize,
    },
    /// Writing fails.
    #[error("cannot write it to guest memory")]
    Write(#[source] GuestMemoryError),
}

/// Writes `cmdline` and a NUL to [`layout::CMDLINE`]; the kernel takes `max` bytes before the NUL.
pub(crate) fn write(memory: &GuestMemoryMmap, cmdline: &str, max: usize) -> Result<(), Error> {
    let bad = |c: char| c == '\0' || !c.is_ascii();
    if let Some((position, character)) = cmdline.chars().enumerate().find(|&(_, c)| bad(c)) {
        let position = position + 1;
        return Err(Error::Character {
            character,
            position,
        });
    }
    let max = max.min(layout::CMDLINE_SIZE as usize - 1);
    let length = cmdline.len();
    if length > max {
        return Err(Error::TooLong { length, max });
    }
    let bytes = [cmdline.as_bytes(), b"\0"].concat();
    memory
        .write_slice(&bytes, layout::CMDLINE)
        .map_err(Error::Write)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory;

    #[test]
    fn write_longest_line_ends_with_nul() {
        let memory = memory(1);
        write(&memory, &"x".repeat(2047), 2047).unwrap();
        let mut bytes = [1; 2048];
        memory.read_slice(&mut bytes, layout::CMDLINE).unwrap();
        assert_eq!(bytes[..2047], [b'x'; 2047]);
        assert_eq!(bytes[2047], 0);
    }

    #[test]
    fn write_one_byte_too_long_is_refused() {
        let error = write(&memory(1), &"x".repeat(2048), 2047).unwrap_err();
        assert_eq!(
            error.to_string(),
            "it has 2048 bytes and this kernel takes 2047; shorten it"
        );
    }

    #[test]
    fn write_kernel_with_absurd_limit_stays_in_its_area() {
        let error = write(&memory(1), &"x".repeat(0x1_0000), usize::MAX).unwrap_err();
        assert!(matches!(error, Error::TooLong { max: 0xffff, .. }));
    }

    #[test]
    fn write_nul_or_umlaut_is_refused_with_its_position() {
        for (text, at) in [("a\0b", 2), ("grün", 3)] {
            let error = write(&memory(1), text, 2047).unwrap_err();
            assert!(matches!(error, Error::Character { position, .. } if position == at));
        }
    }
}
