//! Which QEMU, and how old.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::child::Program;

/// The oldest that is known to work.
const OLDEST: (u32, u32) = (4, 2);
/// How long it may take to print its version; a first start reads it from disk.
const LIMIT: Duration = Duration::from_secs(10);
/// Where it is outside PATH: Red Hat's.
const ELSEWHERE: &str = "/usr/libexec/qemu-kvm";

/// Why there is no QEMU to run.
#[derive(Debug, thiserror::Error)]
pub enum BinaryError {
    #[error(
        "there is no qemu-system-x86_64 in PATH: install it (Debian: apt install qemu-system-x86), or name one with --qemu"
    )]
    Missing,
    #[error("cannot run {0:?}: name a QEMU with --qemu")]
    Run(PathBuf, #[source] io::Error),
    #[error("{0:?} does not print its version as QEMU does: name a QEMU with --qemu")]
    NotQemu(PathBuf),
    #[error("{0:?} is QEMU {1}.{2}: 4.2 or newer is needed")]
    Old(PathBuf, u32, u32),
}

/// A QEMU that can be run.
#[derive(Debug)]
pub(super) struct Qemu {
    pub path: PathBuf,
    /// As its own greeting in QMP has it (VersionInfo of QEMU).
    pub version: Value,
}

impl Qemu {
    /// Whether it is older than this version.
    pub fn is_before(&self, major: u64, minor: u64) -> bool {
        let number = |name: &str| self.version["qemu"][name].as_u64().unwrap_or_default();
        (number("major"), number("minor")) < (major, minor)
    }
}

/// Finds QEMU and checks its version.
pub(super) fn find(given: Option<&Path>) -> Result<Qemu, BinaryError> {
    let path = match given {
        Some(path) => path.to_owned(),
        None => {
            in_path(&std::env::var_os("PATH").unwrap_or_default()).ok_or(BinaryError::Missing)?
        }
    };
    let mut command = Command::new(&path);
    command.arg("--version");
    let output = Program::new(command)
        .output(b"", LIMIT)
        .map_err(|error| BinaryError::Run(path.clone(), error))?;
    match Version::read(&String::from_utf8_lossy(&output.stdout)) {
        None => Err(BinaryError::NotQemu(path)),
        Some(Version { major, minor, .. }) if (major, minor) < OLDEST => {
            Err(BinaryError::Old(path, major, minor))
        }
        Some(version) => Ok(Qemu {
            path,
            version: version.qmp(),
        }),
    }
}

fn in_path(directories: &OsStr) -> Option<PathBuf> {
    let is_program = |path: &PathBuf| {
        path.metadata()
            .is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    std::env::split_paths(directories)
        .map(|directory| directory.join("qemu-system-x86_64"))
        .chain([ELSEWHERE.into()])
        .find(is_program)
}

#[derive(Debug, PartialEq, Eq)]
struct Version<'a> {
    major: u32,
    minor: u32,
    micro: u32,
    /// The distribution's.
    package: &'a str,
}

impl<'a> Version<'a> {
    /// Of "QEMU emulator version 7.2.22 (Debian ...)".
    fn read(text: &'a str) -> Option<Self> {
        let (_, rest) = text.lines().next()?.split_once("QEMU emulator version ")?;
        let mut numbers = rest.split(|c: char| !c.is_ascii_digit());
        let mut number = || numbers.next()?.parse().ok();
        let (major, minor) = (number()?, number()?);
        let package = rest.split_once(" (").map(|(_, package)| package);
        Some(Self {
            major,
            minor,
            micro: number().unwrap_or_default(),
            package: package
                .and_then(|text| text.strip_suffix(')'))
                .unwrap_or_default(),
        })
    }

    fn qmp(&self) -> Value {
        let (major, minor, micro) = (self.major, self.minor, self.micro);
        let qemu = json!({"major": major, "minor": minor, "micro": micro});
        json!({"qemu": qemu, "package": self.package})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_is_read_from_what_distributions_print() {
        for (text, expected) in [
            (
                "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright",
                Some((7, 2, 22, "Debian 1:7.2+dfsg-7")),
            ),
            ("QEMU emulator version 4.1.0\n", Some((4, 1, 0, ""))),
            (
                "QEMU emulator version 10.0.2 (qemu-10)",
                Some((10, 0, 2, "qemu-10")),
            ),
            ("QEMU emulator version 8.1", Some((8, 1, 0, ""))),
            ("busybox v1.35", None),
            ("", None),
        ] {
            let found = Version::read(text).map(|v| (v.major, v.minor, v.micro, v.package));
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn versions_are_compared_by_their_numbers() {
        let version = Version::read("QEMU emulator version 7.2.22 (Debian)").unwrap();
        let qemu = Qemu {
            path: PathBuf::new(),
            version: version.qmp(),
        };
        for ((major, minor), is_before) in [
            ((5, 1), false),
            ((7, 2), false),
            ((7, 10), true),
            ((8, 0), true),
        ] {
            assert_eq!(qemu.is_before(major, minor), is_before, "{major}.{minor}");
        }
    }

    #[test]
    fn program_that_is_no_qemu_is_refused() {
        let error = find(Some(Path::new("/bin/true"))).unwrap_err();
        assert!(matches!(error, BinaryError::NotQemu(_)), "{error}");
        let error = find(Some(Path::new("/no/such"))).unwrap_err();
        assert!(matches!(error, BinaryError::Run(..)), "{error}");
    }
}
