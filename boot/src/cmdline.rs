//! Checks the kernel command line.

use thiserror::Error as ThisError;

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
}

/// `cmdline` and a NUL, for [`layout::CMDLINE`]; the kernel takes `max` bytes before the NUL.
pub(crate) fn bytes(cmdline: &str, max: usize) -> Result<Vec<u8>, Error> {
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
    Ok([cmdline.as_bytes(), b"\0"].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longest_line_ends_with_nul() {
        let bytes = bytes(&"x".repeat(2047), 2047).unwrap();
        assert_eq!(bytes[..2047], [b'x'; 2047]);
        assert_eq!(bytes[2047..], [0]);
    }

    #[test]
    fn one_byte_too_long_is_refused() {
        let error = bytes(&"x".repeat(2048), 2047).unwrap_err();
        assert_eq!(
            error.to_string(),
            "it has 2048 bytes and this kernel takes 2047; shorten it"
        );
    }

    #[test]
    fn kernel_with_absurd_limit_stays_in_its_area() {
        let error = bytes(&"x".repeat(0x1_0000), usize::MAX).unwrap_err();
        assert!(matches!(error, Error::TooLong { max: 0xffff, .. }));
    }

    #[test]
    fn nul_or_umlaut_is_refused_with_its_position() {
        for (text, at) in [("a\0b", 2), ("grün", 3)] {
            let error = bytes(text, 2047).unwrap_err();
            assert!(matches!(error, Error::Character { position, .. } if position == at));
        }
    }
}
