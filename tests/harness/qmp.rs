//! QEMU's own client of QMP, which tests in Python use.

use std::path::PathBuf;

use super::pypi;

/// Where Python finds the client (`PYTHONPATH`); downloaded once.
pub fn library() -> PathBuf {
    pypi::library("qemu.qmp", &["--no-deps", "qemu.qmp==0.0.3"])
}
