//! `minivmm agent`: the agent for guests that have an init of their own.

use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use tar::{Builder, EntryType, Header};

use crate::cli::AgentArgs;
use crate::files;
use crate::run::initramfs::AGENT;

const UNIT: &str = include_str!("../../../resources/minivmm-agent.service");
const CONTROL: &str = concat!(
    "Package: minivmm-agent\nVersion: ",
    env!("CARGO_PKG_VERSION"),
    "\nArchitecture: amd64\nMaintainer: minivmm\nSection: admin\nPriority: optional\n\
     Description: Agent for the host's minivmm\n \
     Runs commands and copies files for the host of a virtual machine, by vsock.\n"
);
/// A package that is installed into an image, where systemd does not run, is started when that boots.
const POSTINST: &str = "\
#!/bin/sh
set -e
if [ \"$1\" = configure ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemctl restart minivmm-agent.service
fi
";
const PRERM: &str = "\
#!/bin/sh
set -e
if [ \"$1\" = remove ] && [ -d /run/systemd/system ]; then
    systemctl stop minivmm-agent.service
fi
";
/// Where the unit is, and what enables it.
const WANTED: &str = "./usr/lib/systemd/system/multi-user.target.wants/";

/// The agent cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {path:?}")]
pub struct PackageError {
    /// The file.
    path: PathBuf,
    /// Why.
    source: io::Error,
}

/// Writes the program or its package.
///
/// # Errors
///
/// [`PackageError`].
pub fn run(args: &AgentArgs) -> Result<(), PackageError> {
    write(args).map_err(|source| PackageError {
        path: args.output.clone(),
        source,
    })
}

fn write(args: &AgentArgs) -> io::Result<()> {
    let package;
    let contents = if args.deb {
        package = debian_package()?;
        &package
    } else {
        AGENT
    };
    if args.output == Path::new("-") {
        return io::stdout().write_all(contents);
    }
    files::write_whole(&args.output, contents)?;
    if !args.deb && args.output.is_file() {
        let mode = fs::metadata(&args.output)?.permissions().mode();
        // Whoever may read a program may run it.
        let mode = mode | (mode & 0o444) >> 2;
        fs::set_permissions(&args.output, Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// The package: an archive of ar(5) with three members (deb(5)).
fn debian_package() -> io::Result<Vec<u8>> {
    let control = archive(|tar| {
        directories(tar, "./")?;
        file(tar, "./control", CONTROL.as_bytes(), 0o644)?;
        file(tar, "./postinst", POSTINST.as_bytes(), 0o755)?;
        file(tar, "./prerm", PRERM.as_bytes(), 0o755)
    })?;
    let data = archive(|tar| {
        directories(tar, "./usr/libexec/")?;
        file(tar, "./usr/libexec/minivmm-agent", AGENT, 0o755)?;
        directories(tar, WANTED)?;
        let unit = "./usr/lib/systemd/system/minivmm-agent.service";
        file(tar, unit, UNIT.as_bytes(), 0o644)?;
        let mut link = header(EntryType::Symlink, 0, 0o777);
        let wanted = format!("{WANTED}minivmm-agent.service");
        tar.append_link(&mut link, wanted, "../minivmm-agent.service")
    })?;
    let mut package = b"!<arch>\n".to_vec();
    for (name, contents) in [
        ("debian-binary", &b"2.0\n"[..]),
        ("control.tar.gz", &control),
        ("data.tar.gz", &data),
    ] {
        let size = contents.len();
        let header = format!(
            "{name:<16}{:<12}{:<6}{:<6}{:<8}{size:<10}`\n",
            0, 0, 0, 100644
        );
        package.extend(header.bytes());
        package.extend(contents);
        // Members begin at even offsets.
        package.resize(package.len().next_multiple_of(2), b'\n');
    }
    Ok(package)
}

type Tar = Builder<GzEncoder<Vec<u8>>>;

fn archive(fill: impl FnOnce(&mut Tar) -> io::Result<()>) -> io::Result<Vec<u8>> {
    let mut tar = Builder::new(GzEncoder::new(Vec::new(), Compression::best()));
    fill(&mut tar)?;
    tar.into_inner()?.finish()
}

/// Root's, and of no time: the same minivmm makes the same package.
fn header(kind: EntryType, size: usize, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size as u64);
    header
}

fn file(tar: &mut Tar, path: &str, contents: &[u8], mode: u32) -> io::Result<()> {
    let mut header = header(EntryType::Regular, contents.len(), mode);
    append(tar, &mut header, path, contents)
}

/// A directory, which ends in a slash, after those above it.
fn directories(tar: &mut Tar, path: &str) -> io::Result<()> {
    for (end, _) in path.match_indices('/') {
        let mut header = header(EntryType::Directory, 0, 0o755);
        append(tar, &mut header, &path[..=end], &[])?;
    }
    Ok(())
}

/// The crate leaves the `./` off, with which dpkg's own packages begin.
fn append(tar: &mut Tar, header: &mut Header, path: &str, contents: &[u8]) -> io::Result<()> {
    let name = &mut header.as_old_mut().name;
    name[..path.len()].copy_from_slice(path.as_bytes());
    header.set_cksum();
    tar.append(header, contents)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn package_is_one_of_debians_and_the_same_each_time() {
        let directory = tempfile::tempdir().unwrap();
        let args = AgentArgs {
            output: directory.path().join("agent.deb"),
            deb: true,
        };
        run(&args).unwrap();
        assert!(fs::read(&args.output).unwrap() == debian_package().unwrap());

        let dpkg = |option: &str, more: &[&str]| {
            let mut command = Command::new("dpkg-deb");
            let output = command.arg(option).arg(&args.output).args(more).output();
            let output = output.expect("dpkg-deb starts");
            assert!(output.status.success(), "{output:?}");
            assert!(output.stderr.is_empty(), "{output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        assert_eq!(dpkg("--field", &["Package"]), "minivmm-agent\n");
        let root = directory.path().join("root");
        dpkg("--raw-extract", &[root.to_str().unwrap()]);
        let program = root.join("usr/libexec/minivmm-agent");
        assert!(fs::read(&program).unwrap() == AGENT);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&program), 0o755);
        assert_eq!(mode(&root.join("DEBIAN/postinst")), 0o755);
        let unit = root.join(WANTED).join("minivmm-agent.service");
        assert_eq!(fs::read_to_string(unit).unwrap(), UNIT);
        assert!(UNIT.contains("ExecStart=/usr/libexec/minivmm-agent\n"));
    }

    #[test]
    fn program_alone_can_be_started() {
        let directory = tempfile::tempdir().unwrap();
        let args = AgentArgs {
            output: directory.path().join("agent"),
            deb: false,
        };
        run(&args).unwrap();
        let output = Command::new(&args.output).arg("--help").output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.starts_with("Usage: minivmm-agent"), "{said}");
    }
}
