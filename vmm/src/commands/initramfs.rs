//! `minivmm initramfs`: what a guest of `minivmm run` starts from, as a file.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::cli::InitramfsArgs;
use crate::files;
use crate::run::initramfs::{self, InitramfsError};
use crate::run::kernel::{Kernel, Places};

/// Why there is no such file.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsCommandError {
    /// It cannot be made.
    #[error(transparent)]
    Make(#[from] InitramfsError),
    /// It cannot be written.
    #[error("cannot write {path:?}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl InitramfsCommandError {
    /// What to do about it.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Make(error) => error.remedy(),
            Self::Write { .. } => None,
        }
    }
}

/// Makes the archive and writes it.
///
/// # Errors
///
/// See [`InitramfsCommandError`].
pub fn run(args: &InitramfsArgs) -> Result<(), InitramfsCommandError> {
    let kernel = Kernel::find(args.kernel.as_deref(), &Places::host());
    let kernel = kernel.map_err(InitramfsError::from)?;
    let archive = initramfs::make(&kernel, args.modules.as_deref(), &args.needs())?;
    log::info!(
        "{} KiB for the kernel {} ({:?})",
        archive.len() >> 10,
        kernel.release,
        kernel.image
    );
    let written = if args.output == Path::new("-") {
        io::stdout().write_all(&archive)
    } else {
        files::write_whole(&args.output, &archive)
    };
    written.map_err(|source| InitramfsCommandError::Write {
        path: args.output.clone(),
        source,
    })
}
