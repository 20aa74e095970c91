//! What a guest boots with, loaded from files that stay open for its next boot.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::PathBuf;

use boot::{BootSpec, BootState, Platform};
use rustix::rand::GetRandomFlags;
use vm_memory::GuestMemoryMmap;

use super::{Error, failed_to};
use crate::config::Config;
use crate::memory;
use crate::plan::Plan;

/// A kernel and all that it finds in memory.
#[derive(Debug)]
pub struct Loader {
    kernel: (PathBuf, File),
    initrd: Option<(PathBuf, File)>,
    cmdline: String,
    platform: Platform,
    /// Memory that is touched first is filled with huge pages before.
    fills: bool,
}

impl Loader {
    /// What `config` names, with its files opened.
    pub fn new(config: &Config, plan: &Plan, kernel: File, initrd: Option<File>) -> Self {
        Self {
            kernel: (config.kernel.clone(), kernel),
            initrd: config.initrd.clone().zip(initrd),
            cmdline: config.whole_cmdline(),
            platform: plan.platform(),
            fills: config.shares_memory() && !config.hugepages,
        }
    }

    /// Loads it into memory that is all zeros.
    pub fn load(&mut self, memory: &GuestMemoryMmap) -> Result<BootState, Error> {
        let fill = |range: Range<u64>| {
            if self.fills {
                memory::fill(memory, &range);
            }
        };
        fill(memory::taken_first(memory));
        let mut spec = BootSpec {
            kernel: &mut self.kernel.1,
            initrd: self.initrd.as_mut().map(|(_, file)| file),
            cmdline: &self.cmdline,
            random: random().map_err(failed_to("get random numbers"))?,
            prepare: &|kernel| fill(kernel.start..kernel.end + memory::AFTER_KERNEL),
            platform: &self.platform,
        };
        let boot = boot::load(memory, &mut spec).map_err(|error| self.name_file(error))?;
        log::debug!("kernel {:?}: {}", self.kernel.0, boot.loaded);
        Ok(boot)
    }

    /// The boot crate knows files, not their paths.
    fn name_file(&self, error: boot::Error) -> Error {
        match (error, &self.initrd) {
            (boot::Error::Kernel(source), _) => Error::Kernel(self.kernel.0.clone(), source),
            (boot::Error::Initrd(source), Some((path, _))) => Error::Initrd(path.clone(), source),
            (error, _) => Error::Boot(error),
        }
    }
}

/// By which the kernel is moved: as good as a guest's own, which it would take from its CPU.
fn random() -> io::Result<[u64; 2]> {
    let mut bytes = [[0; 8]; 2];
    for bytes in &mut bytes {
        // A system call for so few is never cut short.
        rustix::rand::getrandom(bytes, GetRandomFlags::empty())?;
    }
    Ok(bytes.map(u64::from_ne_bytes))
}
