//! The freestanding test guest as a file.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use super::assets::cache_dir;
use super::vm::in_lab;

/// The guest's ELF. Cargo's own lock keeps test processes from building it twice at a time; the lab
/// gets it built.
pub fn elf() -> &'static Path {
    static ELF: OnceLock<PathBuf> = OnceLock::new();
    ELF.get_or_init(|| {
        if let Some(built) = std::env::var_os("MINIVMM_GUEST") {
            return built.into();
        }
        if in_lab() {
            return cache_dir().join("guest");
        }
        let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/guest/Cargo.toml");
        // Only tests have such a directory. The demo builds no guest, and make builds the
        // benchmark's, `MINIVMM_GUEST`.
        let target =
            Path::new(option_env!("CARGO_TARGET_TMPDIR").unwrap_or_default()).join("guest");
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args([
            "build",
            "--release",
            "--quiet",
            "--locked",
            "--manifest-path",
            manifest,
        ]);
        cargo.arg("--target-dir").arg(&target);
        // Of the same toolchain: rustup would choose one by the folder of each crate, where no
        // cargo has settled it.
        cargo.env("RUSTC", Path::new(env!("CARGO")).with_file_name("rustc"));
        // The settings of the outer build are not for this one.
        for variable in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET"] {
            cargo.env_remove(variable);
        }
        let status = cargo.stdin(Stdio::null()).status().expect("cargo starts");
        assert!(status.success(), "cannot build the test guest: {status}");
        target.join("release/guest")
    })
}
