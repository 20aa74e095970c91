//! Modules of the kernel's, which the initramfs has with what each depends on.
//!
//! A signature is left out where the kernel takes a module without: to verify one costs more than all else of loading it.

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::ptr;
use std::slice;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Ends a signed module (kernel/module_signature.h).
const MAGIC: &[u8] = b"~Module signature appended~\n";
/// The size of a module_signature, which stands before [`MAGIC`].
const DESCRIPTION: usize = 12;

/// Why a module cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// The initramfs lacks it, or what it says of it.
    #[error("cannot read {0:?} of the initramfs")]
    Read(PathBuf, #[source] io::Error),
    /// The kernel refuses it. Its log says more.
    #[error("the kernel cannot load its module {name}")]
    Load {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The modules of the initramfs.
#[derive(Debug)]
pub struct Modules {
    directory: PathBuf,
    /// What has to be loaded before each, in that order.
    needs: HashMap<String, Vec<String>>,
    loaded: HashSet<String>,
    /// Whether the kernel wants signatures.
    signed: bool,
}

impl Modules {
    /// Those of a directory. There are none where it has no list, as with a kernel that needs none.
    ///
    /// # Errors
    ///
    /// [`ModuleError::Read`].
    pub fn read(directory: &Path) -> Result<Self, ModuleError> {
        let list = read_if_there(&directory.join("list"))?;
        let needs = list.lines().filter_map(|line| {
            let mut names = line.split_ascii_whitespace().map(str::to_owned);
            Some((names.next()?, names.collect()))
        });
        Ok(Self {
            directory: directory.to_owned(),
            needs: needs.collect(),
            loaded: HashSet::new(),
            signed: false,
        })
    }

    /// Loads those that every guest of this initramfs needs.
    ///
    /// # Errors
    ///
    /// See [`ModuleError`].
    pub fn load_all(&mut self) -> Result<(), ModuleError> {
        let names = read_if_there(&self.directory.join("load"))?;
        names.lines().try_for_each(|name| self.load(name))
    }

    /// Loads a module after those that it needs. One that the initramfs does not have is one that the kernel has built
    /// in, or there is none: whoever uses it sees that.
    ///
    /// # Errors
    ///
    /// See [`ModuleError`].
    pub fn load(&mut self, name: &str) -> Result<(), ModuleError> {
        let Some(needs) = self.needs.get(name) else {
            return Ok(());
        };
        for name in needs.clone().iter().map(String::as_str).chain([name]) {
            if self.loaded.insert(name.to_owned()) {
                self.insert(name)?;
            }
        }
        Ok(())
    }

    fn insert(&mut self, name: &str) -> Result<(), ModuleError> {
        let path = self.directory.join(format!("{name}.ko"));
        let file = Mapping::of(&path).map_err(|error| ModuleError::Read(path, error))?;
        let whole = file.bytes();
        let unsigned = without_signature(whole);
        let mut result = init_module(if self.signed { whole } else { unsigned });
        // Lockdown says EPERM, module.sig_enforce EKEYREJECTED.
        if matches!(result, Err(Errno::PERM | Errno::KEYREJECTED)) && unsigned.len() < whole.len() {
            self.signed = true;
            result = init_module(whole);
        }
        match result {
            // It is built in, or another name of one that is loaded.
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(ModuleError::Load {
                name: name.to_owned(),
                source: error.into(),
            }),
        }
    }
}

fn init_module(module: &[u8]) -> Result<(), Errno> {
    const NO_PARAMETERS: &CStr = c"";
    rustix::system::init_module(module, NO_PARAMETERS)
}

fn read_if_there(path: &Path) -> Result<String, ModuleError> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read.map_err(|error| ModuleError::Read(path.to_owned(), error)),
    }
}

/// A module as it was before it was signed.
fn without_signature(module: &[u8]) -> &[u8] {
    let stripped = || {
        let signed = module.strip_suffix(MAGIC)?;
        let (signed, description) = signed.split_last_chunk::<DESCRIPTION>()?;
        // Algorithm, hash, kind, lengths of signer and key, three bytes of padding, and the length of the signature.
        let [_, _, _, signer, key, _, _, _, length @ ..] = *description;
        let appended = u32::from_be_bytes(length) as usize + signer as usize + key as usize;
        signed.get(..signed.len().checked_sub(appended)?)
    };
    stripped().unwrap_or(module)
}

/// A file in memory, without a copy.
#[derive(Debug)]
struct Mapping {
    start: *mut libc::c_void,
    length: usize,
}

impl Mapping {
    fn of(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let length = file.metadata()?.len() as usize;
        // SAFETY: the kernel chooses a place where nothing is.
        let start = unsafe {
            mmap(
                ptr::null_mut(),
                length,
                ProtFlags::READ,
                MapFlags::PRIVATE | MapFlags::POPULATE,
                &file,
                0,
            )
        }?;
        Ok(Self { start, length })
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: so many bytes are mapped until the drop, and only this process knows the file, which it does not write.
        unsafe { slice::from_raw_parts(self.start.cast(), self.length) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it is the mapping of `of`, and borrows of its bytes have ended. A failure leaves it mapped.
        let _ = unsafe { munmap(self.start, self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed(module: &[u8], signature: &[u8], length: u32) -> Vec<u8> {
        let mut description = [0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        description[8..].copy_from_slice(&length.to_be_bytes());
        [module, signature, &description, MAGIC].concat()
    }

    #[test]
    fn signature_of_a_module_is_left_out() {
        assert_eq!(
            without_signature(&signed(b"\x7fELFmodule", &[7; 256], 256)),
            b"\x7fELFmodule"
        );
    }

    #[test]
    fn module_without_a_signature_or_with_a_wrong_one_stays_whole() {
        for module in [
            b"\x7fELFmodule".to_vec(),
            signed(b"module", &[7; 256], u32::MAX),
            MAGIC.to_vec(),
            Vec::new(),
        ] {
            assert_eq!(without_signature(&module), module);
        }
    }

    #[test]
    fn module_that_the_initramfs_lacks_is_an_error_with_its_name() {
        let directory = std::env::temp_dir().join(format!("modules-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("list"), "virtio\nvirtio_pci virtio\n").unwrap();
        fs::write(directory.join("load"), "built_in\nvirtio_pci\n").unwrap();
        let loaded = Modules::read(&directory).unwrap().load_all();
        fs::remove_dir_all(&directory).unwrap();
        assert!(
            matches!(&loaded, Err(ModuleError::Read(path, _)) if path.ends_with("virtio.ko")),
            "{loaded:?}"
        );
    }
}
