//! Which crate may use which, checked against cargo's metadata; that links between the documents
//! lead to files; and that the demo installs what it takes.
//!
//! The leaves know neither each other nor the monitor, and only the monitor knows KVM. A new
//! dependency of a crate is a decision: it is added here in the same change.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// What any crate may use besides its own: errors, logs, typed bits, and calls of the operating
/// system.
const COMMON: &[&str] = &["bitflags", "libc", "log", "rustix", "thiserror"];

/// A crate, what it may use besides [`COMMON`], and what it must never use, not even for its tests.
const CRATES: &[(&str, &[&str], &[&str])] = &[
    (
        "agent",
        &[
            "agent-copy",
            "agent-protocol",
            // Addresses and routes of the guest's NICs.
            "netlink-packet-core",
            "netlink-packet-route",
            // A DHCP client.
            "smoltcp",
            // Files that the host sends.
            "tar",
        ],
        &["boot", "net", "devices", "vmm", "tokio", "vm-memory"],
    ),
    (
        "agent-copy",
        &["agent-protocol"],
        &["agent", "boot", "net", "devices", "vmm", "serde", "libc"],
    ),
    (
        "agent-protocol",
        &["postcard", "serde"],
        &["agent", "boot", "net", "devices", "vmm", "rustix", "libc"],
    ),
    (
        "boot",
        &[
            "acpi_tables",
            "flate2",
            "kvm-bindings",
            "linux-loader",
            "vm-memory",
        ],
        &["kvm-ioctls", "net", "devices", "vmm", "libc", "rustix"],
    ),
    (
        "net",
        // serde: a macvtap's description goes into the registry.
        &["rtnetlink", "serde"],
        &[
            "vm-memory",
            "kvm-bindings",
            "kvm-ioctls",
            "boot",
            "devices",
            "vmm",
        ],
    ),
    (
        "devices",
        &[
            "imago",
            "io-uring",
            "serde",
            "serde_json",
            "vhost",
            "virtio-bindings",
            "virtio-queue",
            "vm-memory",
            "vm-superio",
            "vmm-sys-util",
        ],
        &["kvm-bindings", "kvm-ioctls", "tokio", "boot", "net", "vmm"],
    ),
    (
        "fileserver",
        // virtiofsd, and what it is built on: for types in its interface.
        &[
            // The form of what is saved, as in virtiofsd.
            "postcard",
            "seccompiler",
            "serde",
            "vhost",
            "vhost-user-backend",
            "virtio-queue",
            "virtiofsd",
            "vm-memory",
        ],
        &[
            "kvm-bindings",
            "kvm-ioctls",
            "tokio",
            "boot",
            "net",
            "devices",
            "vmm",
        ],
    ),
    (
        "vmm",
        &[
            "agent-copy",
            "agent-protocol",
            "boot",
            "clap",
            // The archive that a guest's kernel unpacks.
            "cpio",
            "devices",
            "env_logger",
            "event-manager",
            "fileserver",
            // Compressed modules of kernels, and OCI images.
            "flate2",
            "lzma-rust2",
            "ruzstd",
            "kvm-bindings",
            "kvm-ioctls",
            "net",
            // Users and their groups, which rustix leaves to the C library.
            "nix",
            // Regular expressions of `minivmm wait`.
            "regex-lite",
            "serde",
            "serde_json",
            // Digests and archives of OCI images.
            "sha2",
            "tar",
            "signal-hook",
            // The Debian package of the agent.
            "tar",
            // Targets of `minivmm run` in a file.
            "toml",
            "vm-memory",
            "vmm-sys-util",
        ],
        &["rtnetlink", "tokio"],
    ),
];

/// A member of the workspace.
#[derive(Debug)]
struct Member {
    manifest: PathBuf,
    /// What it is built with: dependencies and build dependencies.
    uses: BTreeSet<String>,
    /// What its tests use besides.
    tests_use: BTreeSet<String>,
}

impl Member {
    fn sources(&self) -> PathBuf {
        self.manifest.parent().unwrap().join("src")
    }
}

fn workspace() -> BTreeMap<String, Member> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--offline",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo starts");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo metadata: {errors}");
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    let packages = metadata["packages"].as_array().expect("a list of packages");
    packages.iter().map(member).collect()
}

fn member(package: &Value) -> (String, Member) {
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let dependencies = package["dependencies"].as_array().expect("a list");
    // `kind` is null for an ordinary dependency. Those for a target or a feature are in the list like any other.
    let named = |for_tests: bool| {
        let chosen = dependencies
            .iter()
            .filter(|d| (d["kind"].as_str() == Some("dev")) == for_tests);
        chosen.map(|d| text(&d["name"])).collect()
    };
    let member = Member {
        manifest: text(&package["manifest_path"]).into(),
        uses: named(false),
        tests_use: named(true),
    };
    (text(&package["name"]), member)
}

/// Every Rust file below `directory`.
fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).expect("the sources can be read") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

#[test]
fn workspace_members_are_these_crates() {
    let members = workspace();
    let members: BTreeSet<&str> = members.keys().map(String::as_str).collect();
    assert_eq!(members, CRATES.iter().map(|(name, ..)| *name).collect());
}

#[test]
fn crates_use_only_what_they_may() {
    let members = workspace();
    for (name, may_use, _) in CRATES {
        let allowed: BTreeSet<String> = may_use
            .iter()
            .chain(COMMON)
            .map(|d| (*d).to_owned())
            .collect();
        let more: Vec<_> = members[*name].uses.difference(&allowed).collect();
        assert!(
            more.is_empty(),
            "{name} uses {more:?}, which it may not yet: a decision"
        );
    }
}

#[test]
fn crates_never_use_what_they_must_not() {
    let members = workspace();
    for (name, _, never) in CRATES {
        let member = &members[*name];
        for used in member.uses.union(&member.tests_use) {
            assert!(
                !never.contains(&used.as_str()),
                "{name} must never use {used}"
            );
        }
    }
}

#[test]
fn kvm_is_known_to_the_monitor_alone() {
    for (name, member) in workspace() {
        let knows = member.uses.contains("kvm-ioctls") || member.tests_use.contains("kvm-ioctls");
        assert_eq!(knows, name == "vmm", "{name}");
    }
}

#[test]
fn boot_forbids_unsafe_code() {
    let root = workspace()["boot"].sources().join("lib.rs");
    let source = fs::read_to_string(root).expect("the crate's root can be read");
    assert!(source.contains("#![forbid(unsafe_code)]"));
}

#[test]
fn every_crate_inherits_the_workspaces_lints() {
    for (name, member) in workspace() {
        let manifest = fs::read_to_string(&member.manifest).expect("the manifest can be read");
        let mut lines = manifest.lines().skip_while(|line| line.trim() != "[lints]");
        assert!(
            lines.next().is_some() && lines.next() == Some("workspace = true"),
            "{name} sets lints of its own"
        );
    }
}

#[test]
fn no_crate_has_asynchronous_code() {
    for (name, member) in workspace() {
        for file in rust_files(&member.sources()) {
            let source = fs::read_to_string(&file).expect("a source can be read");
            let waits = source.lines().any(|line| line.contains("async fn "));
            assert!(!waits, "{name}: {} is asynchronous", file.display());
        }
    }
}

/// The modules of a crate, and which others each of them uses, by its `crate::` paths outside of
/// tests.
fn modules(sources: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in rust_files(sources)
        .iter()
        .filter(|file| !file.ends_with("tests.rs"))
    {
        let path = file.strip_prefix(sources).unwrap().with_extension("");
        let module = path.iter().next().unwrap().to_str().unwrap().to_owned();
        let used = all.entry(module).or_default();
        for path in source_of(file).split("crate::").skip(1) {
            let list = path
                .strip_prefix('{')
                .and_then(|rest| rest.split('}').next());
            let paths = list.map_or(vec![path], |list| list.split(',').collect());
            let words = |path: &str| {
                path.trim()
                    .split(|c: char| !c.is_alphanumeric() && c != '_')
                    .next()
                    .map(str::to_owned)
            };
            used.extend(paths.into_iter().filter_map(words));
        }
    }
    all.remove("lib");
    let names: BTreeSet<String> = all.keys().cloned().collect();
    for (name, used) in &mut all {
        used.retain(|other| names.contains(other) && other != name);
    }
    all
}

/// The code of a file without its comments and its tests.
fn source_of(file: &Path) -> String {
    let source = fs::read_to_string(file).expect("a source can be read");
    let code = source
        .split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or_default();
    let lines = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    lines.flat_map(|line| [line, "\n"]).collect()
}

#[test]
fn modules_of_net_use_each_other_in_one_direction() {
    let mut left = modules(&workspace()["net"].sources());
    assert!(left["macvtap"].contains("diagnose"), "{left:?}");
    // One that uses none of those that are left is in no circle.
    while let Some(free) = left.iter().find(|(_, used)| used.is_empty()) {
        let free = free.0.clone();
        left.remove(&free);
        for used in left.values_mut() {
            used.remove(&free);
        }
    }
    assert!(left.is_empty(), "these modules are in a circle: {left:#?}");
}

#[test]
fn links_in_the_documentation_lead_to_files() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let docs = fs::read_dir(root.join("docs")).expect("the documentation can be read");
    let docs = docs.map(|entry| entry.expect("an entry").path());
    let pages = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(|name| root.join(name));
    for page in docs.chain(pages) {
        let text = fs::read_to_string(&page).expect("a page can be read");
        let links = text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.contains("://")) {
            let file = link.split('#').next().unwrap_or_default();
            let target = page.parent().expect("a folder").join(file);
            assert!(target.exists(), "{}: {link}", page.display());
        }
    }
}

/// The part of a file of the project between two markers.
fn between(file: &str, start: &str, end: &str) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
    let text = fs::read_to_string(file).expect("a file can be read");
    let (_, rest) = text.split_once(start).expect("the start");
    rest.split_once(end).expect("the end").0.to_owned()
}

#[test]
fn the_demo_installs_what_every_lab_has() {
    let installed = between("resources/install-tools", "wanted+=(", ")");
    let installed: BTreeSet<_> = installed.split_whitespace().collect();
    let (lab, guest) = ("tests/lab/machine.rs", "tests/harness/initramfs.rs");
    for (file, list) in [(lab, "const LAB_TOOLS"), (guest, "const GUEST_TOOLS")] {
        let list = between(file, list, "];");
        let programs: Vec<_> = list
            .lines()
            .filter_map(|line| line.trim().strip_prefix("(\"")?.split('"').next())
            .collect();
        assert!(!programs.is_empty(), "{file}");
        for program in programs {
            assert!(
                installed.contains(program),
                "{program}: on a new machine the demo lacks what {file} takes"
            );
        }
    }
}
