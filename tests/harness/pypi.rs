//! What tests in Python take from PyPI.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::assets::{cache_dir, lock};

/// Where Python finds it (`PYTHONPATH`), under this name of the cache; downloaded once. `words` are pip's.
pub fn library(name: &str, words: &[&str]) -> PathBuf {
    let library = cache_dir().join(name);
    let _lock = lock(&format!("{name}.lock"));
    if !library.exists() {
        let temp = cache_dir().join(format!("{name}.new"));
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "-q"]);
        pip.args(["--root-user-action=ignore", "--target"]);
        // Of a download that was cut short.
        let _ = fs::remove_dir_all(&temp);
        let status = pip.arg(&temp).args(words).status();
        assert!(status.expect("python3 is there").success(), "{pip:?}");
        fs::rename(&temp, &library).expect("the cache can be written");
    }
    library
}
