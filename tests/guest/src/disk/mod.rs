//! The modes that use a disk.
//!
//! | file | what it does |
//! | --- | --- |
//! | `check.rs` | `disk`: everything that a disk can do, by two drivers |
//! | `load.rs` | `disk-load`: reads or writes as fast as possible, and measures |
//! | `journal.rs` | `disk-journal`: writes numbered blocks, and says which are flushed |
//! | `grow.rs` | `disk-grow`: waits until the disk is larger |

pub mod check;
pub mod grow;
pub mod journal;
pub mod load;

use alloc::string::String;

use crate::options::Options;
use crate::report;
use crate::virtio::Kind;
use crate::virtio::blk::SECTOR;
use crate::virtio::device::VirtioDevice;

/// What a sector is filled with: each word depends on the sector, its place and `seed`
/// (`tests/harness/images.rs`).
pub fn pattern(seed: u64, sector: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    for (place, word) in (0..).zip(bytes.chunks_exact_mut(8)) {
        let value = (seed << 40 | sector << 8 | place).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// Runs a mode on the disk of the options, and reports its result.
fn with_disk(
    name: &str,
    options: &Options,
    mode: impl FnOnce(VirtioDevice) -> Result<String, String>,
) {
    let disk = VirtioDevice::find(Kind::Block, options.index).map_err(String::from);
    match disk.and_then(mode) {
        Ok(detail) => report::ok(name, detail),
        Err(why) => report::fail(name, why),
    }
}
