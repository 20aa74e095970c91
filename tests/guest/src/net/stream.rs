//! The stream that sources send and sinks check: byte n is the top byte of n times a constant.

/// 2^32 divided by the golden ratio: its multiples' top bytes look random. The tests have the same
/// formula.
const STEP: u32 = 0x9e37_79b9;

/// The position in the stream.
#[derive(Clone, Copy, Debug, Default)]
pub struct Position(pub u64);

impl Position {
    /// Writes the next bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        let mut product = (self.0 as u32).wrapping_mul(STEP);
        for byte in bytes.iter_mut() {
            *byte = (product >> 24) as u8;
            product = product.wrapping_add(STEP);
        }
        self.0 += bytes.len() as u64;
    }

    /// Checks the next bytes; an error is the position of the first wrong one.
    pub fn check(&mut self, bytes: &[u8]) -> Result<(), u64> {
        let mut product = (self.0 as u32).wrapping_mul(STEP);
        for (n, byte) in (self.0..).zip(bytes) {
            if *byte != (product >> 24) as u8 {
                return Err(n);
            }
            product = product.wrapping_add(STEP);
        }
        self.0 += bytes.len() as u64;
        Ok(())
    }
}
