//! What the tests make of a distribution's kernel package, whatever way it is packed.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use harness::assets::{built_in, is_built_in, missing, vmlinux};
use harness::skip;

/// A bzImage with this payload (Documentation/arch/x86/boot.rst).
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024];
    image[0x1f1] = 1; // setup_sects
    image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes()); // payload_offset
    image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    image.resize(1024 + 16, 0xcc);
    image.extend(payload);
    image.extend([0xcc; 100]);
    image
}

/// `data` as a program packs it; `None`, and a report, when there is no such program.
fn packed(command: &[&str], data: &[u8]) -> Option<Vec<u8>> {
    let child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        skip::not_tested(&format!(
            "kernels packed by {}, which is missing",
            command[0]
        ));
        return None;
    };
    child.stdin.take().unwrap().write_all(data).unwrap();
    Some(child.wait_with_output().unwrap().stdout)
}

fn elf() -> Vec<u8> {
    let mut elf = b"\x7fELF".to_vec();
    elf.extend((0..20_000_u32).flat_map(u32::to_le_bytes));
    elf
}

#[test]
fn kernel_is_unpacked_by_what_its_payload_begins_with() {
    let elf = elf();
    for command in [
        &["gzip", "-9c"][..],
        &["xz", "-c", "--check=crc32", "--x86", "--lzma2"],
        &["xz", "-c", "--format=lzma"],
        &["zstd", "-19c"],
        &["bzip2", "-9c"],
        &["lz4", "-l", "-c"],
    ] {
        let Some(mut payload) = packed(command, &elf) else {
            continue;
        };
        if command[0] != "gzip" {
            payload.extend((elf.len() as u32).to_le_bytes());
        }
        assert!(
            vmlinux(&bzimage(&payload)).unwrap() == elf,
            "{command:?} is unpacked wrongly"
        );
    }
}

#[test]
fn kernel_that_cannot_be_unpacked_is_refused_with_reason() {
    let error = vmlinux(&bzimage(b"\x89LZO\0 and so on")).unwrap_err();
    assert!(
        error.contains("unknown way") && error.contains("89, 4c, 5a, 4f"),
        "{error}"
    );
    let error = vmlinux(&bzimage(b"\x1f\x8b no gzip at all")).unwrap_err();
    assert!(
        error.contains("gzip: ") && error.contains("package gzip"),
        "{error}"
    );
    for image in [&bzimage(&[1; 100])[..1100], b"", &[0; 0x250]] {
        assert_eq!(vmlinux(image).unwrap_err(), "the bzImage is truncated");
    }
}

#[test]
fn module_that_is_built_in_is_not_missing() {
    let dir = tempfile::tempdir().unwrap();
    let modules = dir.path().join("modules");
    fs::create_dir(&modules).unwrap();
    let touch = |path: &Path| fs::write(path, b"").unwrap();
    let all = missing(dir.path());
    assert_eq!(all[..2], ["bzImage", "vmlinux"]);
    assert!(all.contains(&"virtio_net.ko".to_owned()), "{all:?}");

    for name in &all[..2] {
        touch(&dir.path().join(name));
    }
    for name in &all[2..] {
        if name != "virtio_net.ko" && name != "evdev.ko" {
            touch(&modules.join(name));
        }
    }
    assert_eq!(missing(dir.path()), ["evdev.ko", "virtio_net.ko"]);
    let list = "kernel/drivers/net/virtio_net.ko\nkernel/drivers/tty/serial/8250/8250.ko\n";
    fs::write(modules.join("built-in"), built_in(list)).unwrap();
    assert!(is_built_in(&modules, "8250") && !is_built_in(&modules, "evdev"));
    assert_eq!(missing(dir.path()), ["evdev.ko"]);
}
