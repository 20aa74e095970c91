//! The modules that a guest's kernel needs, read from where they are and in the order to load them.

mod file;
mod index;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

pub use self::file::FileError;
use self::file::Module;
use self::index::Index;
use super::kernel::{Kernel, Places};

/// Why a kernel's modules cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// There is no directory of them.
    #[error("there are no modules of the kernel {release}: looked for {}", super::kernel::list(.tried))]
    NoDirectory {
        /// The kernel's.
        release: String,
        /// The directories.
        tried: Vec<PathBuf>,
    },
    /// A list of them cannot be read.
    #[error("cannot read {path:?}")]
    Index {
        /// The list.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// One that the guest needs is neither a file nor built in.
    #[error(
        "the kernel {release} lacks the module {name}, which {} needs: neither a file in {dir:?} nor built in",
        .needed_by.as_deref().unwrap_or("the guest")
    )]
    Missing {
        /// Its name.
        name: String,
        /// The module that depends on it, or the guest itself.
        needed_by: Option<String>,
        /// The kernel's.
        release: String,
        /// Where the kernel's modules are.
        dir: PathBuf,
    },
    /// Its file cannot be used.
    #[error("cannot use the module {path:?}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: FileError,
    },
}

impl ModulesError {
    /// What to do about it.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::NoDirectory { release, .. } => Some(format!(
                "install them ({}), name their directory by --modules, or say --modules none if the \
                 kernel has all built in",
                packages(release)
            )),
            Self::Missing { release, dir, .. } if index::is_tree(dir) => Some(format!(
                "build {release} with it, as by `make kvm_guest.config` and CONFIG_VIRTIO_FS, \
                 CONFIG_VIRTIO_VSOCKETS and CONFIG_OVERLAY_FS, then `make bzImage modules`"
            )),
            Self::Missing { release, .. } => {
                Some(format!("install its package ({})", packages(release)))
            }
            Self::File {
                source: FileError::Release { .. },
                ..
            } => Some("give --modules the directory of this kernel's own modules".into()),
            Self::Index { .. } | Self::File { .. } => None,
        }
    }
}

fn packages(release: &str) -> String {
    format!(
        "Debian: linux-image-{release}, Ubuntu: linux-modules-{release} and \
         linux-modules-extra-{release}, Fedora: kernel-modules-core and kernel-modules of {release}"
    )
}

/// A module that the guest needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Its name.
    pub name: &'static str,
    /// Whether the guest goes without it where the kernel has none.
    pub is_optional: bool,
}

/// A module and what it depends on.
#[derive(Debug)]
pub struct Loadable {
    /// Its name, with underscores alone.
    pub name: String,
    /// What has to be loaded before, in that order.
    pub needs: Vec<String>,
    /// Its ELF file.
    pub bytes: Vec<u8>,
}

/// The modules of one kernel.
#[derive(Debug)]
pub struct Modules {
    release: String,
    /// None of a kernel that has all built in.
    index: Option<Index>,
}

impl Modules {
    /// Finds the modules of a kernel: in `choice`, else in its kernel tree, beside its image, or where the host has them.
    /// There are none where the choice is `none`.
    ///
    /// # Errors
    ///
    /// See [`ModulesError`].
    pub fn find(
        kernel: &Kernel,
        choice: Option<&Path>,
        places: &Places,
    ) -> Result<Self, ModulesError> {
        let index = match choice {
            Some(choice) if choice == Path::new("none") => None,
            _ => Some(Index::find(kernel, choice, places)?),
        };
        Ok(Self {
            release: kernel.release.clone(),
            index,
        })
    }

    /// Reads these modules and all that they depend on. Each comes after what it needs. What is built in is
    /// not among them.
    ///
    /// # Errors
    ///
    /// See [`ModulesError`].
    pub fn read(&self, wanted: &[Wanted]) -> Result<Vec<Loadable>, ModulesError> {
        let Some(index) = &self.index else {
            return Ok(Vec::new());
        };
        let names = wanted.iter().map(|wanted| canonical(wanted.name));
        let mut read = self.read_all(index, names.collect())?;
        let mut order = Order::default();
        for wanted in wanted {
            let name = canonical(wanted.name);
            let before = order.all.len();
            match order.add(&name, None, index, &read) {
                Err(_) if wanted.is_optional => order.all.truncate(before),
                Err(missing) => {
                    return Err(ModulesError::Missing {
                        name: missing.name,
                        needed_by: missing.needed_by,
                        release: self.release.clone(),
                        dir: index.dir.clone(),
                    });
                }
                Ok(()) => {}
            }
        }
        let needs = |name: &String| {
            let mut own = Order::default();
            // All are there, as for the whole order.
            let _ = own.add(name, None, index, &read);
            own.all.pop();
            own.all
        };
        let needs: Vec<_> = order.all.iter().map(needs).collect();
        let modules = order.all.into_iter().zip(needs);
        Ok(modules
            .filter_map(|(name, needs)| {
                let bytes = read.remove(&name)?.bytes;
                Some(Loadable { name, needs, bytes })
            })
            .collect())
    }

    /// Reads the files of these and all that they depend on, a wave of dependencies after the other.
    fn read_all(
        &self,
        index: &Index,
        names: Vec<String>,
    ) -> Result<HashMap<String, Module>, ModulesError> {
        let mut read: HashMap<String, Module> = HashMap::new();
        let mut next = names;
        while !next.is_empty() {
            next.sort();
            next.dedup();
            next.retain(|name| !read.contains_key(name) && !index.built_in.contains(name));
            let files = next.drain(..);
            let files: Vec<_> = files
                .filter_map(|name| index.files.get(&name).map(|path| (name, path)))
                .collect();
            for (name, module) in parallel(&files, |path| Module::read(path, &self.release))? {
                next.extend(module.depends.iter().cloned());
                read.insert(name, module);
            }
        }
        Ok(read)
    }
}

/// The modules by a thread for each CPU.
fn parallel(
    files: &[(String, &PathBuf)],
    read: impl Fn(&Path) -> Result<Module, FileError> + Sync,
) -> Result<Vec<(String, Module)>, ModulesError> {
    let next = AtomicUsize::new(0);
    let all = Mutex::new(Vec::with_capacity(files.len()));
    let work = || {
        while let Some((name, path)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            let module = read(path).map_err(|source| ModulesError::File {
                path: path.to_path_buf(),
                source,
            });
            let mut all = all
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            all.push(module.map(|module| (name.clone(), module)));
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 1..threads.min(files.len()) {
            // This thread does the work of one that cannot be started.
            let _ = thread::Builder::new()
                .name("modules".into())
                .spawn_scoped(scope, work);
        }
        work();
    });
    let all = all.into_inner();
    all.unwrap_or_else(std::sync::PoisonError::into_inner)
        .into_iter()
        .collect()
}

/// One that is neither a file nor built in.
#[derive(Debug)]
struct Missing {
    name: String,
    needed_by: Option<String>,
}

/// The order to load modules in.
#[derive(Debug, Default)]
struct Order {
    all: Vec<String>,
    /// Those whose dependencies are being added: modules that depend on each other cannot be loaded in any order.
    open: Vec<String>,
}

impl Order {
    /// Adds a module after what it depends on.
    fn add(
        &mut self,
        name: &str,
        needed_by: Option<&str>,
        index: &Index,
        read: &HashMap<String, Module>,
    ) -> Result<(), Missing> {
        let is_known = |names: &[String]| names.iter().any(|known| known == name);
        if index.built_in.contains(name) || is_known(&self.all) || is_known(&self.open) {
            return Ok(());
        }
        let module = read.get(name).ok_or_else(|| Missing {
            name: name.to_owned(),
            needed_by: needed_by.map(str::to_owned),
        })?;
        self.open.push(name.to_owned());
        let added = module
            .depends
            .iter()
            .try_for_each(|dependency| self.add(dependency, Some(name), index, read));
        self.open.pop();
        added?;
        self.all.push(name.to_owned());
        Ok(())
    }
}

/// A module's name as the kernel has it: its file may have a hyphen for an underscore.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
pub(super) mod tests;
