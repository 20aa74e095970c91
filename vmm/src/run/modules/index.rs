//! Where a kernel's modules are.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::{ModulesError, canonical};
use crate::run::kernel::{Kernel, Places};

/// How deep directories of modules are nested at most: kernel/drivers/net/ethernet/VENDOR/CARD today.
const DEEPEST: u32 = 16;
/// Files that a directory of modules has, and few others.
const MARKS: [&str; 3] = ["modules.dep", "modules.builtin", "modules.order"];

/// The modules of a kernel, by their names in canonical form.
#[derive(Debug, Default)]
pub struct Index {
    /// The directory.
    pub dir: PathBuf,
    /// Their files.
    pub files: HashMap<String, PathBuf>,
    /// Those that the kernel has inside.
    pub built_in: HashSet<String>,
}

impl Index {
    /// Finds the modules of a kernel: in `choice`, else in its kernel tree, beside its image, or where the host has them.
    ///
    /// # Errors
    ///
    /// There is no directory of them.
    pub fn find(
        kernel: &Kernel,
        choice: Option<&Path>,
        places: &Places,
    ) -> Result<Self, ModulesError> {
        let tried = match choice {
            Some(dir) => chosen(dir, &kernel.release),
            None => usual(kernel, places),
        };
        match tried.iter().find(|dir| dir.is_dir()) {
            Some(dir) => Self::of(dir.clone()),
            None => Err(ModulesError::NoDirectory {
                release: kernel.release.clone(),
                tried,
            }),
        }
    }

    fn of(dir: PathBuf) -> Result<Self, ModulesError> {
        let built_in = read(&dir.join("modules.builtin"))?.unwrap_or_default();
        let built_in = built_in.lines().map(name_of).collect();
        let files = if is_tree(&dir) {
            let order = read(&dir.join("modules.order"))?.unwrap_or_default();
            in_tree(&dir, &order)
        } else if let Some(dep) = read(&dir.join("modules.dep"))? {
            let paths = dep.lines().filter_map(|line| line.split(':').next());
            paths.map(|path| (name_of(path), dir.join(path))).collect()
        } else {
            let mut files = HashMap::new();
            walk(&dir, DEEPEST, &mut files);
            files
        };
        Ok(Self {
            dir,
            files,
            built_in,
        })
    }
}

/// Where modules are in a directory that the user names: what `make modules_install INSTALL_MOD_PATH=DIR` or an
/// unpacked package makes, or the modules' own directory.
fn chosen(dir: &Path, release: &str) -> Vec<PathBuf> {
    ["lib/modules", "usr/lib/modules", ""]
        .map(|below| dir.join(below).join(release))
        .into_iter()
        .chain([dir.to_owned()])
        .collect()
}

fn usual(kernel: &Kernel, places: &Places) -> Vec<PathBuf> {
    if let Some(tree) = &kernel.tree {
        return vec![tree.clone()];
    }
    let mut all = Vec::new();
    if let Some(dir) = kernel.image.parent() {
        if MARKS.iter().any(|mark| dir.join(mark).exists()) {
            all.push(dir.to_owned());
        }
        if dir.ends_with("boot") {
            let root = dir.parent().unwrap_or(dir).to_owned();
            let release = String::new();
            let beside = Places { root, release };
            all.extend(beside.modules(&kernel.release));
        }
    }
    let host = places.modules(&kernel.release);
    all.extend(host);
    let mut seen = HashSet::new();
    all.retain(|dir| seen.insert(dir.clone()));
    all
}

pub(super) fn is_tree(dir: &Path) -> bool {
    dir.join("include/config/kernel.release").exists()
}

/// The modules of a build: `fs/fuse/fuse.o` in kernels since 6.2, `fs/fuse/fuse.ko` before, and `kernel/fs/fuse/fuse.ko` in old
/// ones, where each line has that prefix.
fn in_tree(tree: &Path, order: &str) -> HashMap<String, PathBuf> {
    let is_old = order.lines().all(|line| line.starts_with("kernel/"));
    let prefix = if is_old { "kernel/" } else { "" };
    let lines = order.lines().filter_map(|line| line.strip_prefix(prefix));
    lines
        .map(|line| {
            let path = tree.join(line).with_extension("ko");
            (name_of(line), path)
        })
        .collect()
}

/// All files of modules below a directory. Links to directories lead elsewhere: `build` and `source`.
fn walk(dir: &Path, deeper: u32, files: &mut HashMap<String, PathBuf>) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut entries: Vec<_> = entries.map(|entry| (entry.file_name(), entry)).collect();
    // As depmod prefers them.
    entries.sort_by_key(|(name, _)| (name != "updates", name.clone()));
    for (name, entry) in entries {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if deeper > 0 {
                walk(&path, deeper - 1, files);
            }
        } else if let Some(name) = name.to_str().filter(|name| is_module(name)) {
            files.entry(name_of(name)).or_insert(path);
        }
    }
}

fn is_module(file: &str) -> bool {
    let ends = [".ko", ".ko.gz", ".ko.xz", ".ko.zst"];
    ends.iter().any(|end| file.ends_with(end))
}

/// The module's name of a path such as `kernel/fs/fuse/virtiofs.ko.xz`.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or_default();
    canonical(file.split('.').next().unwrap_or_default())
}

fn read(path: &Path) -> Result<Option<String>, ModulesError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ModulesError::Index {
            path: path.to_owned(),
            source,
        }),
    }
}
