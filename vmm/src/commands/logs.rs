//! `minivmm logs`: what a VM has logged.

use std::fs;

use crate::cli::LogsArgs;
use crate::instance::{self, FindError};
use crate::log_writer::older;

/// The newest part of it, up to 1 MiB.
pub fn run(args: &LogsArgs) -> Result<String, FindError> {
    let log = instance::find_also_ended(&args.name)?.log_path();
    let read = |path| fs::read(path).unwrap_or_default();
    let text = [read(older(&log)), read(log)].concat();
    Ok(String::from_utf8_lossy(&text).into_owned())
}
