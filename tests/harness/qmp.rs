//! QEMU's own client of QMP, which tests in Python use.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::assets::{cache_dir, lock};

/// From PyPI.
const PACKAGE: &str = "qemu.qmp==0.0.3";

/// Where Python finds the client (`PYTHONPATH`); downloaded once.
pub fn library() -> PathBuf {
    let library = cache_dir().join("qemu.qmp");
    let _lock = lock("qemu.qmp.lock");
    if !library.exists() {
        let temp = cache_dir().join("qemu.qmp.new");
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "-q", "--no-deps"]);
        pip.args(["--root-user-action=ignore", "--target"]);
        // Of a download that was cut short.
        let _ = fs::remove_dir_all(&temp);
        let status = pip.arg(&temp).arg(PACKAGE).status();
        assert!(status.expect("python3 is there").success(), "{pip:?}");
        fs::rename(&temp, &library).expect("the cache can be written");
    }
    library
}
