//! fsx, which changes a file at random in every way there is, and compares it with what it must be.

use std::path::PathBuf;
use std::process::Command;

use super::assets::{cache_dir, lock};

/// The directory in the cache, where `cargo install` has put it.
pub const DIR: &str = "fsx";
/// The program in it.
pub const PROGRAM: &str = "bin/fsx";
const VERSION: &str = "0.3.2";

/// The program, which is built once, in less than a minute.
pub fn fsx() -> PathBuf {
    let program = cache_dir().join(DIR).join(PROGRAM);
    if program.exists() {
        return program;
    }
    let _lock = lock("fsx.lock");
    if !program.exists() {
        let mut cargo = Command::new("cargo");
        cargo.args(["install", "-q", "--locked", "--debug", "fsx"]);
        cargo.args(["--version", VERSION, "--root"]);
        cargo.arg(cache_dir().join(DIR));
        // Small, since a guest has it in memory.
        cargo.env("CARGO_PROFILE_DEV_STRIP", "symbols");
        cargo.env("CARGO_PROFILE_DEV_DEBUG", "0");
        let output = cargo.output().expect("cargo is there");
        let why = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "no fsx for tests: {why}");
    }
    program
}
