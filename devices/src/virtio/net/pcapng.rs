//! The blocks of a pcapng file (draft-ietf-opsawg-pcapng), little-endian, for one interface.

use std::time::{Duration, SystemTime};

use super::capture::Direction;

/// The most of a frame that is kept: as much as a tap ever gives.
pub(super) const SNAP_LEN: usize = 65_550;

const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const INTERFACE_STATISTICS: u32 = 5;
const ENHANCED_PACKET: u32 = 6;

const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;
const VERSION: [u16; 2] = [1, 0];
const LINKTYPE_ETHERNET: u16 = 1;

const END_OF_OPTIONS: u16 = 0;
const SHB_USERAPPL: u16 = 4;
const IF_NAME: u16 = 2;
const IF_TSRESOL: u16 = 9;
const EPB_FLAGS: u16 = 2;
const ISB_IFRECV: u16 = 4;
const ISB_IFDROP: u16 = 5;

/// Type and length before a block's body.
const HEAD_LEN: usize = 8;
/// What an Enhanced Packet Block has before its frame.
const PACKET_HEAD_LEN: usize = HEAD_LEN + 20;
/// What it has after it: a flags option, the end of the options, and the length again.
const PACKET_TAIL_LEN: usize = 8 + 4 + 4;

/// What a file begins with: the section, and the interface of this name.
pub(super) fn start(name: &str) -> Vec<u8> {
    let mut file = Vec::new();
    block(&mut file, SECTION_HEADER, |body| {
        put(body, BYTE_ORDER_MAGIC.to_le_bytes());
        put(body, VERSION[0].to_le_bytes());
        put(body, VERSION[1].to_le_bytes());
        // The section is as long as the file.
        put(body, (-1i64).to_le_bytes());
        option(body, SHB_USERAPPL, b"minivmm");
    });
    block(&mut file, INTERFACE_DESCRIPTION, |body| {
        put(body, LINKTYPE_ETHERNET.to_le_bytes());
        put(body, [0; 2]);
        put(body, (SNAP_LEN as u32).to_le_bytes());
        option(body, IF_NAME, name.as_bytes());
        // Timestamps count units of 10 to the power of -9 seconds.
        option(body, IF_TSRESOL, &[9]);
    });
    file
}

/// What a file ends with: frames that passed the interface, and those of them that it lacks.
pub(super) fn end(file: &mut Vec<u8>, now: SystemTime, received: u64, dropped: u64) {
    block(file, INTERFACE_STATISTICS, |body| {
        put(body, 0u32.to_le_bytes());
        put(body, timestamp(now));
        option(body, ISB_IFRECV, &received.to_le_bytes());
        option(body, ISB_IFDROP, &dropped.to_le_bytes());
    });
}

/// The length of the block for a frame of which `captured` bytes are kept.
pub(super) fn packet_len(captured: usize) -> usize {
    PACKET_HEAD_LEN + captured.next_multiple_of(4) + PACKET_TAIL_LEN
}

/// Appends a frame that was `original` bytes long. `copy` fills the room that it is given with the
/// first of them, and says how many there were.
pub(super) fn packet(
    file: &mut Vec<u8>,
    now: SystemTime,
    direction: Direction,
    original: usize,
    copy: impl FnOnce(&mut [u8]) -> usize,
) {
    block(file, ENHANCED_PACKET, |body| {
        put(body, 0u32.to_le_bytes());
        put(body, timestamp(now));
        let lengths = body.len();
        put(body, [0; 8]);
        let frame = body.len();
        body.resize(frame + original.min(SNAP_LEN), 0);
        let captured = copy(&mut body[frame..]);
        body.truncate(frame + captured);
        body[lengths..lengths + 4].copy_from_slice(&(captured as u32).to_le_bytes());
        body[lengths + 4..frame].copy_from_slice(&(original as u32).to_le_bytes());
        pad(body, frame);
        let flags: u32 = match direction {
            Direction::Received => 1,
            Direction::Sent => 2,
        };
        option(body, EPB_FLAGS, &flags.to_le_bytes());
    });
}

/// Appends a block: its options end and its lengths are filled in here.
fn block(file: &mut Vec<u8>, kind: u32, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = file.len();
    put(file, kind.to_le_bytes());
    put(file, [0; 4]);
    fill(file);
    option(file, END_OF_OPTIONS, &[]);
    let len = (file.len() + 4 - start) as u32;
    put(file, len.to_le_bytes());
    file[start + 4..start + HEAD_LEN].copy_from_slice(&len.to_le_bytes());
}

fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    // Only a name can be too long, and a name that is cut is still one.
    let value = &value[..value.len().min(u16::MAX.into())];
    put(body, code.to_le_bytes());
    put(body, (value.len() as u16).to_le_bytes());
    let start = body.len();
    body.extend_from_slice(value);
    pad(body, start);
}

/// Nanoseconds since 1970, the upper half first.
fn timestamp(now: SystemTime) -> [u8; 8] {
    let since = now.duration_since(SystemTime::UNIX_EPOCH);
    let nanos = since.map_or(0, |since: Duration| since.as_nanos() as u64);
    nanos.rotate_left(32).to_le_bytes()
}

fn put<const N: usize>(body: &mut Vec<u8>, bytes: [u8; N]) {
    body.extend_from_slice(&bytes);
}

/// Fills what began at `start` up to a multiple of 4 bytes.
fn pad(body: &mut Vec<u8>, start: usize) {
    body.resize(start + (body.len() - start).next_multiple_of(4), 0);
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// One block, taken apart.
    #[derive(Debug, PartialEq)]
    pub(crate) enum Block {
        Section(Options),
        Interface(Options),
        Packet(Packet),
        Statistics(Options),
    }

    pub(crate) type Options = Vec<(u16, Vec<u8>)>;

    #[derive(Debug, PartialEq)]
    pub(crate) struct Packet {
        pub(crate) nanos: u64,
        pub(crate) original: u32,
        pub(crate) frame: Vec<u8>,
        pub(crate) options: Options,
    }

    impl Packet {
        pub(crate) fn flags(&self) -> u32 {
            let (code, value) = &self.options[0];
            assert_eq!((*code, self.options.len()), (EPB_FLAGS, 1));
            u32_at(value, 0)
        }
    }

    fn u16_at(bytes: &[u8], at: usize) -> u16 {
        u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn nanos_at(bytes: &[u8], at: usize) -> u64 {
        u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
    }

    fn options(mut bytes: &[u8]) -> Options {
        let mut options = Vec::new();
        loop {
            let (code, len) = (u16_at(bytes, 0), usize::from(u16_at(bytes, 2)));
            if code == END_OF_OPTIONS {
                assert_eq!(bytes.len(), 4, "nothing follows the last option");
                return options;
            }
            options.push((code, bytes[4..4 + len].to_vec()));
            assert!(
                bytes[4 + len..4 + len.next_multiple_of(4)]
                    .iter()
                    .all(|&b| b == 0)
            );
            bytes = &bytes[4 + len.next_multiple_of(4)..];
        }
    }

    /// Takes a file apart, which has to end with a whole block.
    pub(crate) fn parse(mut file: &[u8]) -> Vec<Block> {
        let mut blocks = Vec::new();
        while !file.is_empty() {
            let (kind, len) = (u32_at(file, 0), u32_at(file, 4) as usize);
            assert_eq!(len % 4, 0, "blocks are aligned");
            assert_eq!(u32_at(file, len - 4) as usize, len, "both lengths agree");
            let body = &file[8..len - 4];
            blocks.push(match kind {
                SECTION_HEADER => {
                    assert_eq!(u32_at(body, 0), BYTE_ORDER_MAGIC);
                    assert_eq!((u16_at(body, 4), u16_at(body, 6)), (1, 0));
                    assert_eq!(body[8..16], [0xff; 8]);
                    Block::Section(options(&body[16..]))
                }
                INTERFACE_DESCRIPTION => {
                    assert_eq!((u16_at(body, 0), u16_at(body, 2)), (1, 0));
                    assert_eq!(u32_at(body, 4), 65_550);
                    Block::Interface(options(&body[8..]))
                }
                INTERFACE_STATISTICS => {
                    assert_eq!(u32_at(body, 0), 0, "the first interface");
                    Block::Statistics(options(&body[12..]))
                }
                ENHANCED_PACKET => {
                    assert_eq!(u32_at(body, 0), 0, "the first interface");
                    let captured = u32_at(body, 12) as usize;
                    assert_eq!(packet_len(captured), len);
                    Block::Packet(Packet {
                        nanos: nanos_at(body, 4),
                        original: u32_at(body, 16),
                        frame: body[20..20 + captured].to_vec(),
                        options: options(&body[20 + captured.next_multiple_of(4)..]),
                    })
                }
                kind => panic!("block of unknown type {kind:#x}"),
            });
            file = &file[len..];
        }
        blocks
    }

    #[test]
    fn file_begins_with_section_and_interface() {
        for name in ["net0", "n", "", "sixteen bytes ok"] {
            let expected = [
                Block::Section(vec![(SHB_USERAPPL, b"minivmm".to_vec())]),
                Block::Interface(vec![
                    (IF_NAME, name.as_bytes().to_vec()),
                    (IF_TSRESOL, vec![9]),
                ]),
            ];
            assert_eq!(parse(&start(name)), expected);
        }
    }

    #[test]
    fn name_that_is_too_long_is_cut() {
        let blocks = parse(&start(&"x".repeat(70_000)));
        let Block::Interface(options) = &blocks[1] else {
            panic!("{blocks:?}");
        };
        assert_eq!(options[0].1.len(), 65_535);
    }

    #[test]
    fn file_ends_with_statistics() {
        let mut file = start("net0");
        end(&mut file, SystemTime::UNIX_EPOCH, 7, u64::MAX);
        let expected = [
            (ISB_IFRECV, 7u64.to_le_bytes().to_vec()),
            (ISB_IFDROP, vec![0xff; 8]),
        ];
        assert_eq!(parse(&file)[2..], [Block::Statistics(expected.to_vec())]);
    }

    #[test]
    fn packet_has_its_bytes_as_they_are() {
        let mut file = Vec::new();
        let now = SystemTime::UNIX_EPOCH + Duration::from_nanos(0x0102_0304_0506_0708);
        packet(&mut file, now, Direction::Sent, 5, |to| {
            to.copy_from_slice(b"frame");
            5
        });
        let expected = [
            &[6, 0, 0, 0, 52, 0, 0, 0, 0, 0, 0, 0][..],
            &[4, 3, 2, 1, 8, 7, 6, 5, 5, 0, 0, 0, 5, 0, 0, 0],
            b"frame\0\0\0",
            &[2, 0, 4, 0, 2, 0, 0, 0, 0, 0, 0, 0, 52, 0, 0, 0],
        ];
        assert_eq!(file, expected.concat());
    }

    #[test]
    fn packet_of_any_length_is_aligned_and_snapped() {
        let time = Duration::new(1_700_000_000, 123_456_789);
        // Its length, what there is of it, and what is kept.
        let cases = [
            (0, 0, 0),
            (1, 1, 1),
            (59, 59, 59),
            (60, 60, 60),
            (100, 42, 42),
            (65_550, 65_550, 65_550),
            (65_551, 65_551, 65_550),
            (100_000, 100_000, 65_550),
        ];
        for (original, there, kept) in cases {
            let mut file = Vec::new();
            let now = SystemTime::UNIX_EPOCH + time;
            packet(&mut file, now, Direction::Received, original, |to| {
                let len = there.min(to.len());
                to[..len].fill(7);
                len
            });
            let blocks = parse(&file);
            let [Block::Packet(packet)] = &blocks[..] else {
                panic!("{blocks:?}");
            };
            assert_eq!(packet.nanos, time.as_nanos() as u64);
            assert_eq!(packet.original as usize, original);
            assert_eq!(packet.frame, vec![7; kept]);
            assert_eq!(packet.flags(), 1);
        }
    }
}
