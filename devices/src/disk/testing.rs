//! What tests of images share: QEMU's tools, and images as bytes.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::{Format, Image, ImageSpec, OpenError, Storage, open};
use crate::virtio::Segments;

#[path = "../../../tests/harness/skip.rs"]
mod skip;

/// Tries again while another test starts a process, which has all our open files and their locks for
/// a moment, also those that we have closed.
fn when_unlocked<T>(mut attempt: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match attempt() {
            Ok(done) => return done,
            Err(text) => assert!(Instant::now() < deadline, "{text}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Opens an image that no other uses by now.
pub(super) fn opened(spec: &ImageSpec) -> Storage {
    when_unlocked(|| match open(spec) {
        Err(OpenError::InUse { path, .. }) => Err(format!("{path:?} is in use")),
        done => Ok(done.unwrap()),
    })
}

/// Whether QEMU's tools are here; a test that needs them is left out otherwise.
pub(super) fn has_qemu_img() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|at| at.join("qemu-img").is_file());
    if !found {
        skip::leave_out("tests of disk images need qemu-img (Debian: qemu-utils)");
    }
    found
}

/// Runs a program in `directory`, and returns what it wrote; it has to succeed.
pub(super) fn run(directory: &Path, command: &str) -> String {
    let (ok, text) = run_unlocked(directory, command);
    assert!(ok, "{command}: {text}");
    text
}

fn run_unlocked(directory: &Path, command: &str) -> (bool, String) {
    when_unlocked(|| match try_run(directory, command) {
        (false, text) if text.contains("lock") => Err(format!("{command}: {text}")),
        done => Ok(done),
    })
}

/// Runs a program in `directory`; returns whether it succeeded, and what it wrote.
pub(super) fn try_run(directory: &Path, command: &str) -> (bool, String) {
    let mut words = command.split_whitespace();
    let mut program = Command::new(words.next().unwrap());
    let output = program.args(words).current_dir(directory).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    (output.status.success(), text)
}

/// How many errors and how many lost clusters qemu-img check finds.
pub(super) fn check(path: &Path) -> (u64, u64) {
    let name = path.file_name().unwrap().to_str().unwrap();
    let command = format!("qemu-img check -f qcow2 --output=json {name}");
    let (_, text) = run_unlocked(path.parent().unwrap(), &command);
    let start = text.find('{').unwrap_or_else(|| panic!("{text}"));
    let mut json = serde_json::Deserializer::from_str(&text[start..]).into_iter();
    let report: serde_json::Value = json.next().unwrap().unwrap();
    assert_eq!(report["check-errors"], 0, "{text}");
    let count = |name: &str| report[name].as_u64().unwrap_or(0);
    (count("corruptions"), count("leaks"))
}

/// An image that is opened for writing.
pub(super) fn spec(path: impl Into<PathBuf>, format: Format) -> ImageSpec {
    ImageSpec {
        path: path.into(),
        format,
        readonly: false,
        ephemeral: false,
        direct: false,
        backing: None,
    }
}

/// The iovecs of `bytes`, in pieces.
fn pieces(bytes: &mut [u8]) -> Vec<libc::iovec> {
    let pieces = bytes.chunks_mut(1536).map(|piece| libc::iovec {
        iov_base: piece.as_mut_ptr().cast(),
        iov_len: piece.len(),
    });
    pieces.collect()
}

pub(super) fn read(image: &dyn Image, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0xee; len];
    let iovecs = pieces(&mut bytes);
    // SAFETY: the iovecs describe `bytes`, which is not touched before they are gone.
    image.read(offset, unsafe { Segments::new(&iovecs) })?;
    Ok(bytes)
}

pub(super) fn write(image: &dyn Image, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
    let mut bytes = bytes.to_vec();
    let iovecs = pieces(&mut bytes);
    // SAFETY: the iovecs describe `bytes`, which is not touched before they are gone.
    image.write(offset, unsafe { Segments::new(&iovecs) })
}

/// Something that is done to an image.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Write(u64, usize, u8),
    Zero(u64, usize, bool),
    Discard(u64, usize),
    Flush,
}

/// Operations on an image of `sectors` sectors.
pub(super) fn ops(sectors: u64) -> impl proptest::strategy::Strategy<Value = Vec<Op>> {
    use proptest::prelude::*;
    let range = (0..sectors, 1..200u64).prop_map(move |(at, len)| {
        let len = len.min(sectors - at);
        (at * 512, (len * 512) as usize)
    });
    let op = prop_oneof![
        6 => (range.clone(), 1..=255u8).prop_map(|((at, len), byte)| Op::Write(at, len, byte)),
        1 => (range.clone(), any::<bool>()).prop_map(|((at, len), unmap)| Op::Zero(at, len, unmap)),
        1 => range.prop_map(|(at, len)| Op::Discard(at, len)),
        1 => Just(Op::Flush),
    ];
    proptest::collection::vec(op, 1..40)
}

impl Op {
    /// Does it to an image and to what is expected of it.
    pub fn apply(&self, image: &dyn Image, mirror: &mut [u8]) {
        match *self {
            Self::Write(at, len, byte) => {
                write(image, at, &vec![byte; len]).unwrap();
                mirror[at as usize..][..len].fill(byte);
            }
            Self::Zero(at, len, unmap) => {
                image.write_zeroes(at, len as u64, unmap).unwrap();
                mirror[at as usize..][..len].fill(0);
            }
            Self::Discard(at, len) => {
                image.discard(at, len as u64).unwrap();
                let now = read(image, at, len).unwrap();
                let expected = &mut mirror[at as usize..][..len];
                for (now, before) in now.iter().zip(expected) {
                    assert!(*now == *before || *now == 0);
                    *before = *now;
                }
            }
            Self::Flush => image.flush().unwrap(),
        }
    }
}
