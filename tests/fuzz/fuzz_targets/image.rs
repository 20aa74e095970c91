//! A disk image: a small qcow2 image in which the fuzzer has changed what it likes, and what a guest
//! then does with it.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};

use arbitrary::Arbitrary;
use devices::disk::{self, Format, ImageSpec};
use devices::virtio::Segments;
use libfuzzer_sys::fuzz_target;

const CLUSTER: usize = 512;
/// Clusters of the file: the header, the refcount table, a refcount block, the L1 table, two L2
/// tables, and data.
const CLUSTERS: usize = 24;
/// The disk: what two L2 tables describe.
const DISK: u64 = 64 << 10;

#[derive(Debug, Arbitrary)]
struct Input {
    version_2: bool,
    readonly: bool,
    ephemeral: bool,
    patches: Vec<Patch>,
    ops: Vec<Op>,
}

/// A number of up to 8 bytes at an offset in the file.
#[derive(Debug, Arbitrary)]
struct Patch {
    at: u16,
    number: u64,
    len: u8,
}

#[derive(Debug, Arbitrary)]
enum Op {
    Read(u8, u8),
    Write(u8, u8),
    Discard(u8, u8),
    Zero(u8, u8, bool),
    Flush,
    Grow(u32),
}

fuzz_target!(|input: Input| {
    let bytes = image(&input);
    // SAFETY: memfd_create takes a name that ends with a 0, and flags.
    let fd = unsafe { libc::memfd_create(c"image".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "a memfd can be made");
    // SAFETY: memfd_create has returned this descriptor, which nothing else owns.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(&bytes).expect("a memfd can be written");
    let spec = ImageSpec {
        path: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
        format: Format::Qcow2,
        readonly: input.readonly,
        ephemeral: input.ephemeral,
        direct: false,
        backing: None,
    };
    let Ok(storage) = disk::open(&spec) else {
        return;
    };
    let image = storage.image();
    // Without an answer: any is right, as long as there is one.
    let _ = transfer(0, image.size().min(DISK) as usize, |segments| {
        image.read(0, segments)
    });
    for op in &input.ops {
        let writes = !input.readonly || input.ephemeral;
        let range = |at: &u8, len: &u8| {
            let at = u64::from(*at) * 512 % image.size();
            (at, ((u64::from(*len) + 1) * 512).min(image.size() - at))
        };
        let _ = match op {
            Op::Read(at, len) => {
                let (at, len) = range(at, len);
                transfer(0, len as usize, |segments| image.read(at, segments))
            }
            Op::Write(at, len) if writes => {
                let (at, len) = range(at, len);
                transfer(7, len as usize, |segments| image.write(at, segments))
            }
            Op::Discard(at, len) if writes => {
                let (at, len) = range(at, len);
                image.discard(at, len)
            }
            Op::Zero(at, len, unmap) if writes => {
                let (at, len) = range(at, len);
                image.write_zeroes(at, len, *unmap)
            }
            Op::Grow(sectors) if writes => image.grow(u64::from(*sectors) * 512),
            _ => image.flush(),
        };
    }
});

/// Has `act` read or write memory.
fn transfer(
    fill: u8,
    len: usize,
    act: impl FnOnce(Segments<'_>) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut bytes = vec![fill; len];
    let iovecs = [libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }];
    // SAFETY: the iovec describes `bytes`, which is not used before the iovecs are gone.
    act(unsafe { Segments::new(&iovecs) })
}

/// A valid image with the fuzzer's changes.
fn image(input: &Input) -> Vec<u8> {
    let mut bytes = vec![0; CLUSTERS * CLUSTER];
    let mut put = |at: usize, number: &[u8]| bytes[at..at + number.len()].copy_from_slice(number);
    put(0, b"QFI\xfb");
    put(4, &(if input.version_2 { 2u32 } else { 3 }).to_be_bytes());
    put(20, &CLUSTER.trailing_zeros().to_be_bytes());
    put(24, &DISK.to_be_bytes());
    put(36, &2u32.to_be_bytes());
    let cluster = |number: usize| (number * CLUSTER) as u64;
    put(40, &cluster(3).to_be_bytes());
    put(48, &cluster(1).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    if !input.version_2 {
        put(96, &4u32.to_be_bytes());
        put(100, &104u32.to_be_bytes());
    }
    put(CLUSTER, &cluster(2).to_be_bytes());
    for number in 0..CLUSTERS {
        put(2 * CLUSTER + 2 * number, &1u16.to_be_bytes());
    }
    let copied = 1 << 63;
    put(3 * CLUSTER, &(cluster(4) | copied).to_be_bytes());
    put(3 * CLUSTER + 8, &(cluster(5) | copied).to_be_bytes());
    for number in 6..CLUSTERS {
        // Every second cluster of the disk.
        put(
            4 * CLUSTER + 16 * (number - 6),
            &(cluster(number) | copied).to_be_bytes(),
        );
    }
    for patch in &input.patches {
        let len = usize::from(patch.len % 8) + 1;
        let at = usize::from(patch.at) % (bytes.len() - len);
        bytes[at..at + len].copy_from_slice(&patch.number.to_be_bytes()[8 - len..]);
    }
    bytes
}
