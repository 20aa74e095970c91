//! A module's file: how it is packed, and what the module says of itself.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::run::unpack::unpacked;

/// The most bytes of a module: those of today's kernels have up to 10 MB, and some 100 with debug data.
const LONGEST: u64 = 1 << 28;
/// How an ELF file begins.
const ELF: &[u8] = b"\x7fELF";

/// Why a module's file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read or unpacked.
    #[error("cannot read or unpack it")]
    Read(#[from] io::Error),
    /// It is longer than any module.
    #[error("it has more than {} MiB", LONGEST >> 20)]
    TooLong,
    /// It is something else than a module.
    #[error("it is no module for x86-64: {0}")]
    Form(&'static str),
    /// It is of another kernel.
    #[error("it is of the kernel {module}, and this one is {kernel}")]
    Release {
        /// Of the module.
        module: String,
        /// Of the kernel.
        kernel: String,
    },
}

/// A module as the kernel loads it.
#[derive(Debug)]
pub struct Module {
    /// The ELF file, with its signature if it has one.
    pub bytes: Vec<u8>,
    /// The modules whose symbols it uses.
    pub depends: Vec<String>,
}

impl Module {
    /// Reads and unpacks the file of a module of the kernel with this release.
    ///
    /// # Errors
    ///
    /// See [`FileError`].
    pub fn read(path: &Path, release: &str) -> Result<Self, FileError> {
        let bytes = unpack(read(path)?)?;
        let info = section(&bytes, ".modinfo")?;
        let value = |key: &str| {
            let mut texts = info.split(|byte| *byte == 0);
            let text = texts.find_map(|text| text.strip_prefix(key.as_bytes()));
            text.map(|text| String::from_utf8_lossy(text).into_owned())
        };
        let magic = value("vermagic=").ok_or(FileError::Form("it names no kernel (vermagic)"))?;
        let module = magic.split(' ').next().unwrap_or_default();
        if module != release {
            return Err(FileError::Release {
                module: module.to_owned(),
                kernel: release.to_owned(),
            });
        }
        let depends = value("depends=").unwrap_or_default();
        let names = depends.split(',').filter(|name| !name.is_empty());
        let depends = names.map(super::canonical).collect();
        Ok(Self { bytes, depends })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(FileError::Form("it is no regular file"));
    }
    let size = metadata.len().min(LONGEST) as usize;
    all_of(File::open(path)?, size)
}

/// Unpacks a file, whatever its name says.
fn unpack(packed: Vec<u8>) -> Result<Vec<u8>, FileError> {
    if packed.starts_with(ELF) {
        return Ok(packed);
    }
    let bytes = all_of(unpacked(&packed[..])?, 4 * packed.len())?;
    match bytes.starts_with(ELF) {
        true => Ok(bytes),
        false => Err(FileError::Form(
            "it is no ELF file, plain or packed by xz, zstd or gzip",
        )),
    }
}

fn all_of(from: impl Read, likely: usize) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::with_capacity(likely);
    from.take(LONGEST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LONGEST {
        return Err(FileError::TooLong);
    }
    Ok(bytes)
}

/// A section of a relocatable ELF file (elf(5)).
fn section<'a>(elf: &'a [u8], wanted: &str) -> Result<&'a [u8], FileError> {
    const RELOCATABLE: u64 = 1;
    const X86_64: u64 = 62;
    const HEADER: u64 = 64;
    let damaged = FileError::Form;
    let number = |at: u64, size: u64| {
        let bytes = range(elf, at, size)?;
        Some(bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    };
    let field = |at, size| number(at, size).ok_or(damaged("the file is too short"));
    if !elf.starts_with(b"\x7fELF\x02\x01")
        || field(0x10, 2)? != RELOCATABLE
        || field(0x12, 2)? != X86_64
    {
        return Err(damaged("it is another kind of ELF file"));
    }
    let (table, size) = (field(0x28, 8)?, field(0x3a, 2)?);
    let (count, names) = (field(0x3c, 2)?, field(0x3e, 2)?);
    if size != HEADER {
        return Err(damaged("its section headers have another size"));
    }
    let contents = |section: u64| {
        let header = table.checked_add(section * HEADER)?;
        let header = range(elf, header, HEADER)?;
        let word = |at: usize| {
            let bytes = header.get(at..at + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        let name = u32::from_le_bytes(header[..4].try_into().ok()?);
        Some((u64::from(name), range(elf, word(0x18)?, word(0x20)?)?))
    };
    let (_, names) = contents(names).ok_or(damaged("its section names are not there"))?;
    let named = |at: u64| {
        let name = names.get(usize::try_from(at).ok()?..)?;
        name.split(|byte| *byte == 0).next()
    };
    // Sections that only take memory have no contents, and need not be within the file.
    let mut sections = (0..count).filter_map(contents);
    let found = sections.find(|(name, _)| named(*name) == Some(wanted.as_bytes()));
    found
        .map(|(_, contents)| contents)
        .ok_or(damaged("it has no section .modinfo"))
}

fn range(bytes: &[u8], at: u64, size: u64) -> Option<&[u8]> {
    let start = usize::try_from(at).ok()?;
    bytes.get(start..start.checked_add(usize::try_from(size).ok()?)?)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::super::tests::module;
    use super::*;

    fn read_bytes(bytes: &[u8]) -> Result<Module, FileError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        Module::read(file.path(), "6.1")
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut to = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        to.write_all(bytes).unwrap();
        to.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        use ruzstd::encoding::{CompressionLevel, compress_to_vec};
        compress_to_vec(bytes, CompressionLevel::Fastest)
    }

    /// What `xz -9 --check=crc32` makes of `module("6.1", &["b", "c-d"])`.
    const XZ: &[u8] = b"\
        \xfd7zXZ\x00\x00\x01i\x22\xde6\x02\x00!\x01\x1c\x00\x00\x00\x10\xcfX\xcc\xe0\x01J\x00{]\
        \x00?\x91E\x84h=\x89\xa6\xda\x9c\xa6\xac.+\xcb\xcc\xed\x9b\x01\xf1\xeaDv\xeb\x03\x5cK\
        \x99\x04\x97\xeb\x149q\xc9\x11\xf3d%\xcew\x84\xf0i\xb0G\xc4\xa7\xd2\xe9\xce\x94\xc9\x05O\
        \x0a\xe6%\xad\xc2\xbe\xe9\x09o\xf1\xbf\xdf\x08(\xb8\x9e:\x816Tj\xb0\xe6s/w]\xb9#R\x14\
        \x1e\xe8\xb5\xc4YjaDA\xdf\x1c\x98l\x7fm:\xa5\x02l\xe2p\xfb\x9b\xbd\xb1pA\x0c\x14\xc6\x9f\
        \x92\xac+\x17\x0d\x00\x00\x00\x9bE.\xd1\x00\x01\x93\x01\xcb\x02\x00\x00\xe9$\x0f\xc7>0\
        \x0d\x8b\x02\x00\x00\x00\x00\x01YZ";

    #[test]
    fn module_is_the_same_however_it_is_packed() {
        let plain = module("6.1", &["b", "c-d"]);
        for packed in [plain.clone(), gzip(&plain), zstd(&plain), XZ.to_vec()] {
            let read = read_bytes(&packed).unwrap();
            assert_eq!(read.bytes, plain);
            assert_eq!(read.depends, ["b", "c_d"]);
        }
    }

    #[test]
    fn module_of_another_kernel_is_refused() {
        let error = read_bytes(&module("6.2", &[])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("6.2") && text.contains("6.1"), "{text}");
    }

    #[test]
    fn module_that_is_cut_off_or_something_else_is_an_error() {
        let plain = module("6.1", &[]);
        for packed in [plain.clone(), gzip(&plain), zstd(&plain), XZ.to_vec()] {
            for length in [0, 1, 5, 20, packed.len() / 2, packed.len() - 1] {
                assert!(read_bytes(&packed[..length]).is_err(), "{length}");
            }
        }
        let mut program = plain;
        program[0x10] = 2;
        assert!(matches!(read_bytes(&program), Err(FileError::Form(_))));
        assert!(matches!(
            Module::read(Path::new("/dev/zero"), ""),
            Err(FileError::Form(_))
        ));
    }

    #[test]
    fn module_that_unpacks_without_end_is_refused() {
        let bomb = gzip(&vec![0; LONGEST as usize + 2]);
        assert!(matches!(read_bytes(&bomb), Err(FileError::TooLong)));
    }

    proptest! {
        #[test]
        fn damaged_module_is_a_module_or_an_error(at in 0..400usize, byte: u8, kind in 0..4usize) {
            let plain = module("6.1", &["b"]);
            let mut packed = [plain.clone(), gzip(&plain), zstd(&plain), XZ.to_vec()][kind].clone();
            let at = at % packed.len();
            packed[at] = byte;
            let _ = unpack(packed).map(|bytes| section(&bytes, ".modinfo").is_ok());
        }
    }
}
