//! Kernels and initrds that cannot be.

use super::*;

#[test]
fn kernel_that_does_not_exist_is_refused() {
    assert_refused(
        minivmm(["--kernel", "/nosuch/bzImage"]),
        FAILED,
        &["open", "kernel", "/nosuch/bzImage", "No such file"],
    );
}

#[test]
fn kernel_that_is_a_directory_is_refused() {
    let files = Files::new();
    let directory = text(files.0.path());
    assert_refused(
        minivmm(["--kernel", &directory]),
        FAILED,
        &["kernel", &directory, "directory"],
    );
}

#[test]
fn kernel_that_is_a_fifo_is_refused_at_once() {
    let files = Files::new();
    let fifo = files.path("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, 0o600.into()).unwrap();
    let fifo = text(&fifo);
    assert_refused(
        minivmm(["--kernel", &fifo]),
        FAILED,
        &["kernel", &fifo, "not a regular file"],
    );
}

/// Asserts that `image` is refused as a kernel, with the file's path and these texts.
#[track_caller]
fn assert_no_kernel(image: &[u8], texts: &[&str]) {
    let files = Files::new();
    let path = files.file("image", image);
    let texts = [&["kernel", path.as_str()], texts].concat();
    assert_refused(minivmm(["--kernel", &path]), FAILED, &texts);
}

/// `bytes` with `new` at `offset`.
fn patched(mut bytes: Vec<u8>, offset: usize, new: &[u8]) -> Vec<u8> {
    bytes[offset..offset + new.len()].copy_from_slice(new);
    bytes
}

/// A bzImage with 64 KiB of nothing after its header (Documentation/arch/x86/boot.rst).
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024 + 0x1_0000];
    let mut put = |offset: usize, bytes: &[u8]| {
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0, b"MZ");
    put(0x1f1, &[1]); // setup_sects
    put(0x1f4, &0x1000_u32.to_le_bytes()); // syssize, in units of 16 bytes
    put(0x1fe, &[0x55, 0xaa]);
    put(0x200, &[0xeb, 0x6a]); // jump over the header
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes()); // version
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x214, &0x10_0000_u32.to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x20_0000_u32.to_le_bytes()); // kernel_alignment
    put(0x234, &[1]); // relocatable_kernel
    put(0x236, &1_u16.to_le_bytes()); // xloadflags: XLF_KERNEL_64
    put(0x238, &2047_u32.to_le_bytes()); // cmdline_size
    put(0x258, &0x100_0000_u64.to_le_bytes()); // pref_address
    put(0x260, &0x100_0000_u32.to_le_bytes()); // init_size
    image
}

kvm_test!(kernel_that_is_empty_is_refused, || {
    assert_no_kernel(b"", &["empty"]);
});

kvm_test!(kernel_that_is_truncated_is_refused_with_both_sizes, || {
    assert_no_kernel(
        &bzimage()[..5000],
        &["truncated", "66560", "5000", "copy it again"],
    );
    let elf = Tiny::Echo.elf();
    let sizes = (elf.len().to_string(), (elf.len() - 1).to_string());
    assert_no_kernel(&elf[..elf.len() - 1], &["truncated", &sizes.0, &sizes.1]);
    assert_no_kernel(b"MZ", &["truncated"]);
    assert_no_kernel(&elf[..20], &["truncated"]);
});

kvm_test!(kernel_for_arm_is_refused_with_the_processor, || {
    let elf = Tiny::Echo.elf();
    let image = patched(patched(vec![0; 4096], 0, b"MZ"), 0x38, b"ARM\x64");
    assert_no_kernel(&image, &["64-bit ARM", "x86-64"]);
    assert_no_kernel(
        &patched(elf.clone(), 18, &[183, 0]),
        &["64-bit ARM", "x86-64"],
    );
    let zimage = patched(vec![0; 4096], 0x24, b"\x18\x28\x6f\x01");
    assert_no_kernel(&zimage, &["32-bit ARM", "x86-64"]);
});

kvm_test!(kernel_for_32_bits_is_refused_with_the_remedy, || {
    let elf = Tiny::Echo.elf();
    let i386 = patched(patched(elf, 18, &[3, 0]), 4, &[1]);
    assert_no_kernel(&i386, &["32-bit", "give a 64-bit kernel"]);
    let bzimage = patched(bzimage(), 0x236, &[0]);
    assert_no_kernel(&bzimage, &["64-bit entry", "give a 64-bit kernel"]);
});

kvm_test!(kernel_that_is_none_is_refused_with_what_it_is, || {
    assert_no_kernel(b"\x1f\x8b\x08\0", &["gzip", "decompress"]);
    assert_no_kernel(b"#!/bin/sh\n", &["script", "bzImage"]);
    assert_no_kernel(b"hello, world\n", &["unknown kind", "bzImage"]);
});

#[test]
fn initrd_that_cannot_be_read_is_refused() {
    let files = Files::new();
    let directory = text(files.0.path());
    for (path, why) in [
        ("/nosuch/initrd.img", "No such file"),
        (&directory, "directory"),
    ] {
        assert_refused(
            files.boot(&["--initrd", path]),
            FAILED,
            &["initrd", path, why],
        );
    }
}

kvm_test!(initrd_that_is_empty_is_refused_with_the_remedy, || {
    let files = Files::new();
    let initrd = files.file("initrd.img", b"");
    assert_refused(
        files.boot(&["--initrd", &initrd]),
        FAILED,
        &["initrd", &initrd, "empty", "omit"],
    );
});

kvm_test!(initrd_beyond_the_memory_is_refused_with_both_sizes, || {
    let files = Files::new();
    let initrd = files.file("initrd.img", b"");
    // Sparse: it costs the disk nothing.
    let file = File::options().write(true).open(&initrd).unwrap();
    file.set_len(200 << 20).unwrap();
    assert_refused(
        files.boot(&["--initrd", &initrd, "--memory", "64M"]),
        FAILED,
        &["initrd", &initrd, "200 MiB", "64 MiB", "more memory"],
    );
});
