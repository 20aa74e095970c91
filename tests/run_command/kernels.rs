//! Debian's kernel as others have theirs: in the tree where it was built, and with packed modules.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::harness::assets::assets;
use super::harness::initramfs::find;

/// The modules' files, with the names of the modules as their files have them.
fn modules() -> Vec<(PathBuf, String)> {
    let entries = fs::read_dir(assets().modules()).unwrap();
    let files = entries.map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|end| end == "ko"));
    let mut all: Vec<_> = files
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (path, name)
        })
        .collect();
    all.sort();
    all
}

/// A kernel tree, as `make bzImage modules` leaves one of a kernel before 6.2; returns its bzImage.
pub fn tree(at: &Path) -> PathBuf {
    let image = at.join("arch/x86/boot/bzImage");
    let drivers = at.join("drivers/all");
    let config = at.join("include/config");
    for directory in [image.parent().unwrap(), &drivers, &config] {
        fs::create_dir_all(directory).unwrap();
    }
    fs::copy(assets().bzimage(), &image).unwrap();
    // That it is there makes this a tree; the image says its own release.
    fs::write(config.join("kernel.release"), "6.1.0\n").unwrap();
    let modules = modules();
    for (path, name) in &modules {
        fs::copy(path, drivers.join(name)).unwrap();
    }
    let order = modules
        .iter()
        .map(|(_, name)| format!("drivers/all/{name}\n"));
    fs::write(at.join("modules.order"), order.collect::<String>()).unwrap();
    image
}

/// The modules packed by xz, zstd and gzip in turn, as distributions have them.
pub fn packed(at: &Path) {
    let ways = [
        (
            "xz",
            "xz-utils",
            &["--check=crc32", "--lzma2=dict=1MiB"][..],
            "xz",
        ),
        ("zstd", "zstd", &["-q", "--rm", "-19"], "zst"),
        ("gzip", "gzip", &["-9"], "gz"),
    ];
    for ((path, name), (program, package, options, end)) in
        modules().iter().zip(ways.iter().cycle())
    {
        let to = at.join(name);
        fs::copy(path, &to).unwrap();
        let status = Command::new(find(program, package))
            .args(*options)
            .arg(&to)
            .status();
        assert!(status.unwrap().success(), "{program} {name}");
        assert!(at.join(format!("{name}.{end}")).exists() && !to.exists());
    }
}
