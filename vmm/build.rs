//! Builds the agent of guests, a static program that the library has inside.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The one target whose guests there are.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// What the agent is made of, from this crate's directory.
const SOURCES: [&str; 3] = ["agent", "../Cargo.toml", "../Cargo.lock"];
/// Of the cargo that runs this script, for the crates that it builds: not for the agent.
const FOREIGN: [&str; 6] = [
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_TARGET_DIR",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTDOCFLAGS",
    "RUSTFLAGS",
];

fn main() {
    for source in SOURCES {
        println!("cargo::rerun-if-changed={source}");
    }
    let variable = |name: &str| PathBuf::from(env::var_os(name).expect("cargo sets it"));
    let manifest = variable("CARGO_MANIFEST_DIR").join("agent/Cargo.toml");
    let target = variable("OUT_DIR").join("agent");
    build(&variable("CARGO"), &manifest, &target);
    let program = target.join(TARGET).join("agent/minivmm-agent");
    println!("cargo::rustc-env=MINIVMM_AGENT={}", program.display());
}

/// The flags of the linker are for the agent's own crates alone since a target is named.
fn build(cargo: &Path, manifest: &Path, target: &Path) {
    let mut command = Command::new(cargo);
    FOREIGN.iter().for_each(|name| {
        command.env_remove(name);
    });
    command
        .args(["build", "--quiet", "--locked", "--profile", "agent"])
        .args(["--target", TARGET, "--bin", "minivmm-agent"])
        .arg("--manifest-path")
        .arg(manifest)
        .arg("--target-dir")
        .arg(target)
        .env(
            "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
            "-C target-feature=+crt-static -C relocation-model=static",
        );
    // Who builds for a test waits for this build longer than a smaller agent saves.
    if env::var_os("PROFILE").is_some_and(|profile| profile == "debug") {
        command.env("CARGO_PROFILE_AGENT_LTO", "off");
        command.env("CARGO_PROFILE_AGENT_CODEGEN_UNITS", "16");
    }
    let status = command.status().expect("cargo starts again");
    assert!(status.success(), "the agent of guests cannot be built");
}
