//! Streams that are packed by gzip, zstd or xz, or not at all.

use std::io::{self, BufRead, Read};

use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

const XZ: &[u8] = b"\xfd7zXZ\0";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
/// Of zstd's frames that are to be skipped: 0x184d2a50 to 0x184d2a5f (RFC 8878, 3.1.2).
const SKIPPED: &[u8] = b"\x2a\x4d\x18";
const GZIP: &[u8] = b"\x1f\x8b";

/// What is in a stream, by its first bytes.
///
/// # Errors
///
/// They cannot be read.
pub fn unpacked<'a>(mut packed: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let start = packed.fill_buf()?;
    let is_skipped = start.get(1..4) == Some(SKIPPED) && start[0] & 0xf0 == 0x50;
    Ok(if start.starts_with(XZ) {
        Box::new(lzma_rust2::XzReader::new(packed, true))
    } else if start.starts_with(ZSTD) || is_skipped {
        Box::new(Zstd::Between(packed))
    } else if start.starts_with(GZIP) {
        Box::new(flate2::bufread::MultiGzDecoder::new(packed))
    } else {
        Box::new(packed)
    })
}

/// A stream of zstd, frame after frame.
enum Zstd<R: BufRead> {
    /// A frame may begin.
    Between(R),
    /// In a frame.
    Within(Box<StreamingDecoder<R, FrameDecoder>>),
    /// An error was the end.
    Ended,
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            *self = match std::mem::replace(self, Self::Ended) {
                Self::Ended => return Ok(0),
                Self::Within(mut frame) => match frame.read(buffer)? {
                    0 => Self::Between(frame.into_inner()),
                    read => {
                        *self = Self::Within(frame);
                        return Ok(read);
                    }
                },
                Self::Between(mut source) => {
                    if source.fill_buf()?.is_empty() {
                        return Ok(0);
                    }
                    next_frame(source)?
                }
            };
        }
    }
}

fn next_frame<R: BufRead>(mut source: R) -> io::Result<Zstd<R>> {
    let is_skipped = source
        .fill_buf()?
        .first()
        .is_some_and(|byte| byte & 0xf0 == 0x50);
    if !is_skipped {
        let frame = StreamingDecoder::new(source).map_err(io::Error::other)?;
        return Ok(Zstd::Within(Box::new(frame)));
    }
    let mut header = [0; 8];
    source.read_exact(&mut header)?;
    let [_, magic @ .., a, b, c, d] = header;
    if magic != SKIPPED {
        return Err(io::Error::other(
            "a zstd stream goes on with something else",
        ));
    }
    let length = u64::from(u32::from_le_bytes([a, b, c, d]));
    let skipped = io::copy(&mut source.by_ref().take(length), &mut io::sink())?;
    if skipped < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Zstd::Between(source))
}

#[cfg(test)]
mod tests {
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    fn all(packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        unpacked(packed)?.read_to_end(&mut bytes).map(|_| bytes)
    }

    #[test]
    fn zstd_frames_follow_each_other_and_others_are_skipped() {
        let frame = |text: &str| compress_to_vec(text.as_bytes(), CompressionLevel::Fastest);
        let skipped = b"\x5a\x2a\x4d\x18\x03\0\0\0abc".to_vec();
        let first = skipped.clone();
        let packed = [first, frame("one "), skipped, frame(""), frame("two")].concat();
        assert_eq!(all(&packed).unwrap(), b"one two");
        for length in [packed.len() - 1, packed.len() - 5, 10] {
            assert!(all(&packed[..length]).is_err(), "{length}");
        }
        assert!(all(&[frame("one"), b"rest".to_vec()].concat()).is_err());
        assert!(all(&[frame("one"), vec![0x50; 20]].concat()).is_err());
    }

    #[test]
    fn stream_that_is_not_packed_is_left_as_it_is() {
        for bytes in [&b""[..], b"x", b"Plain"] {
            assert_eq!(all(bytes).unwrap(), bytes);
        }
    }
}
