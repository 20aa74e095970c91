//! Modules of trees that are made up here.

use std::fs;
use std::path::{Path, PathBuf};

use super::*;

/// A module's ELF file, as far as it is looked at.
pub fn module(release: &str, depends: &[&str]) -> Vec<u8> {
    let depends = depends.join(",");
    let info = format!("license=GPL\0depends={depends}\0vermagic={release} SMP mod_unload \0")
        .into_bytes();
    let names = b"\0.modinfo\0.shstrtab\0";
    let names_at = 64 + info.len();
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    for (number, size) in [
        (1, 2), // relocatable
        (62, 2),
        (1, 4),
        (0, 8),
        (0, 8),
        (names_at + names.len(), 8), // section headers
        (0, 4),
        (64, 2),
        (0, 2),
        (0, 2),
        (64, 2), // of this size
        (3, 2),
        (2, 2), // the last one has their names
    ] {
        elf.extend(&number.to_le_bytes()[..size]);
    }
    elf.extend(&info);
    elf.extend(names);
    let sections = [
        (0u32, 0u32, 0, 0),
        (1, 1, 64, info.len()),
        (10, 3, names_at, names.len()),
    ];
    for (name, kind, at, size) in sections {
        elf.extend(name.to_le_bytes());
        elf.extend(kind.to_le_bytes());
        for number in [0, 0, at, size, 0, 1, 0] {
            elf.extend(number.to_le_bytes());
        }
    }
    elf
}

/// A host's root directory.
#[derive(Debug)]
pub struct Host(tempfile::TempDir);

impl Host {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    pub fn file(&self, path: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
    }

    /// The modules by their paths and what they depend on.
    fn modules(&self, dir: &str, modules: &[(&str, &[&str])]) {
        for (path, depends) in modules {
            let path = Path::new(dir).join(path);
            self.file(path.to_str().unwrap(), module("6.1", depends));
        }
    }

    fn find(&self, kernel: &Kernel, choice: Option<&str>) -> Result<Modules, ModulesError> {
        let places = Places {
            root: self.0.path().into(),
            release: "host".into(),
        };
        Modules::find(kernel, choice.map(Path::new), &places)
    }
}

fn kernel(image: impl Into<PathBuf>) -> Kernel {
    Kernel {
        image: image.into(),
        release: "6.1".into(),
        tree: None,
    }
}

fn needed(name: &'static str) -> Wanted {
    let is_optional = false;
    Wanted { name, is_optional }
}

fn optional(name: &'static str) -> Wanted {
    let is_optional = true;
    Wanted { name, is_optional }
}

fn names(modules: &[Loadable]) -> Vec<(&str, String)> {
    let named = modules
        .iter()
        .map(|module| (&*module.name, module.needs.join(" ")));
    named.collect()
}

/// As on Debian, but for the names.
const INSTALLED: &[(&str, &[&str])] = &[
    ("kernel/a/top.ko", &["middle", "bottom", "inside"]),
    ("kernel/a/middle.ko", &["bottom"]),
    ("kernel/b/bottom.ko", &[]),
    ("kernel/b/with-hyphen.ko", &["top"]),
];

#[test]
fn modules_come_after_what_they_depend_on_wherever_that_is_written() {
    let dep = "kernel/a/top.ko: kernel/a/middle.ko\nkernel/a/middle.ko:\nkernel/b/bottom.ko:\n\
               kernel/b/with-hyphen.ko: kernel/a/top.ko\n";
    for dep in [None, Some(dep)] {
        let host = Host::new();
        host.modules("lib/modules/6.1", INSTALLED);
        host.file("lib/modules/6.1/modules.builtin", "kernel/x/inside.ko\n");
        if let Some(dep) = dep {
            host.file("lib/modules/6.1/modules.dep", dep);
        }
        let modules = host.find(&kernel("/boot/x"), None).unwrap();
        let wanted = [
            needed("inside"),
            needed("with_hyphen"),
            optional("no_such"),
            needed("middle"),
        ];
        let read = modules.read(&wanted).unwrap();
        assert_eq!(
            names(&read),
            [
                ("bottom", String::new()),
                ("middle", "bottom".into()),
                ("top", "bottom middle".into()),
                ("with_hyphen", "bottom middle top".into()),
            ]
        );
        assert_eq!(read[0].bytes, module("6.1", &[]));
    }
}

#[test]
fn modules_are_found_beside_the_kernel_in_its_tree_or_where_the_user_says() {
    let one: &[(&str, &[&str])] = &[("kernel/one.ko", &[])];
    let host = Host::new();
    let found = |kernel: &Kernel, choice: Option<&str>| {
        let modules = host.find(kernel, choice)?;
        let read = modules.read(&[needed("one")])?;
        assert_eq!(names(&read), [("one", String::new())]);
        Ok::<_, ModulesError>(modules.index.unwrap().dir)
    };
    let unpacked = kernel(host.path("deb/boot/vmlinuz-6.1"));
    let error = found(&unpacked, None).unwrap_err();
    for tried in ["deb/lib/modules/6.1\"", "usr/lib/modules/6.1\""] {
        assert!(error.to_string().contains(tried), "{error}");
    }
    assert!(error.remedy().unwrap().contains("linux-image-6.1"));

    host.modules("usr/lib/modules/6.1", one);
    let dir = host.path("usr/lib/modules/6.1");
    assert_eq!(found(&unpacked, None).unwrap(), dir);
    host.modules("deb/lib/modules/6.1", one);
    let dir = host.path("deb/lib/modules/6.1");
    assert_eq!(found(&unpacked, None).unwrap(), dir);
    for choice in ["deb", "deb/lib/modules", "deb/lib/modules/6.1"] {
        let choice = host.path(choice);
        let other = kernel("/elsewhere/bzImage");
        assert_eq!(found(&other, choice.to_str()).unwrap(), dir);
    }
    // As Fedora and Arch have it.
    host.file("fedora/6.1/modules.builtin", "");
    host.modules("fedora/6.1", one);
    let beside = kernel(host.path("fedora/6.1/vmlinuz"));
    assert_eq!(found(&beside, None).unwrap(), host.path("fedora/6.1"));
}

#[test]
fn modules_of_a_kernel_tree_are_those_that_it_has_built() {
    for order in [
        "fs/top.o\nkernel/bottom.o\n",
        "fs/top.ko\nkernel/bottom.ko\n",
        "kernel/fs/top.ko\nkernel/kernel/bottom.ko\n",
    ] {
        let host = Host::new();
        host.file("include/config/kernel.release", "6.1\n");
        host.file("modules.order", order);
        host.file("modules.builtin", "kernel/drivers/virtio/inside.ko\n");
        host.modules(
            "",
            &[
                ("fs/top.ko", &["bottom", "inside"]),
                ("kernel/bottom.ko", &[]),
            ],
        );
        host.modules("stray", &[("no-such.ko", &[])]);
        let tree = Kernel {
            tree: Some(host.path("")),
            ..kernel(host.path("arch/x86/boot/bzImage"))
        };
        for choice in [None, host.path("").to_str()] {
            let modules = host.find(&tree, choice).unwrap();
            let read = modules.read(&[needed("top")]).unwrap();
            assert_eq!(
                names(&read),
                [("bottom", String::new()), ("top", "bottom".into())]
            );
            let error = modules.read(&[needed("no_such")]).unwrap_err();
            assert!(error.remedy().unwrap().contains("make bzImage modules"));
        }
    }
}

#[test]
fn module_that_is_missing_is_an_error_with_its_name_and_package() {
    let host = Host::new();
    host.modules("lib/modules/6.1", &[("top.ko", &["gone"]), ("ok.ko", &[])]);
    let modules = host.find(&kernel("x"), None).unwrap();
    let error = modules.read(&[needed("top")]).unwrap_err();
    let text = error.to_string();
    for part in ["module gone", "which top needs", "lib/modules/6.1"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(error.remedy().unwrap().contains("linux-image-6.1"));
    let text = modules.read(&[needed("none")]).unwrap_err().to_string();
    assert!(text.contains("which the guest needs"), "{text}");
    let read = modules.read(&[optional("top"), needed("ok")]).unwrap();
    assert_eq!(names(&read), [("ok", String::new())]);
}

#[test]
fn module_that_cannot_be_used_is_an_error_with_its_path() {
    let host = Host::new();
    host.file("lib/modules/6.1/other.ko", module("6.2", &[]));
    host.file("lib/modules/6.1/damaged.ko.xz", b"\xfd7zXZ\0nothing");
    let modules = host.find(&kernel("x"), None).unwrap();
    for (name, file) in [("other", "6.1/other.ko"), ("damaged", "damaged.ko.xz")] {
        // Also an optional one: it is there, and whoever put it there wants it.
        for is_optional in [false, true] {
            let error = modules.read(&[Wanted { name, is_optional }]).unwrap_err();
            assert!(error.to_string().contains(file), "{error}");
            assert!(std::error::Error::source(&error).is_some());
        }
    }
}

#[test]
fn modules_that_depend_on_each_other_have_an_end() {
    let host = Host::new();
    host.modules(
        "lib/modules/6.1",
        &[("a.ko", &["b"]), ("b.ko", &["a", "b"])],
    );
    std::os::unix::fs::symlink(".", host.path("lib/modules/6.1/build")).unwrap();
    let modules = host.find(&kernel("x"), None).unwrap();
    let read = modules.read(&[needed("a")]).unwrap();
    assert_eq!(names(&read), [("b", "a".into()), ("a", "b".into())]);
}

#[test]
fn kernel_with_all_built_in_has_no_modules() {
    let host = Host::new();
    let modules = host.find(&kernel("x"), Some("none")).unwrap();
    assert!(modules.read(&[needed("virtio_pci")]).unwrap().is_empty());
}
