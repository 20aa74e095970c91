//! The commands that need the agent in a guest, as typed.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};

use super::Target;
use crate::config::ConfigError;

pub(super) const EXEC_HELP: &str = "\
The command gets its arguments as they are, without a shell. Its stdin, stdout and stderr are those of
minivmm, unless -t gives it a terminal, on which stdout and stderr are one. SIGINT, SIGTERM, SIGHUP,
SIGQUIT, SIGUSR1, SIGUSR2 and SIGWINCH are passed on to it; three of SIGINT and SIGTERM within a second
end minivmm. When minivmm ends before, it gets SIGHUP, and
SIGKILL if it goes on. What it leaves in the background goes on, and is not waited for.

Exit status:
  that of the command, and besides
  125    the VM or its agent cannot be reached, has ended, or cannot start a command
  126    the command cannot be run
  127    there is no such command
  128+N  signal N has ended the command

Examples:
  minivmm exec web -- systemctl status nginx
  minivmm exec -t web -- bash
  tar cf - site | minivmm exec --user www-data --workdir /var/www web -- tar xf -";

/// `minivmm exec`.
#[derive(Clone, Debug, Args)]
pub struct ExecArgs {
    /// The VM, or the path of a socket of --vsock: with a slash, as in ./vm.vsock
    #[arg(value_name = "NAME|PATH")]
    pub target: Target,

    /// Gives the command a terminal, of the size of the one that minivmm has
    #[arg(short, long = "tty")]
    pub terminal: bool,

    /// Who runs it, each by name or number; root by default
    #[arg(long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,

    /// Where it starts: an absolute path; the user's home by default
    #[arg(long, value_name = "PATH", value_parser = OsStringValueParser::new().try_map(absolute))]
    pub workdir: Option<PathBuf>,

    /// A variable of its environment, without a value the one of minivmm's. May be repeated
    #[arg(long, value_name = "NAME[=VALUE]", value_parser = OsStringValueParser::new().try_map(Variable::parse))]
    pub env: Vec<Variable>,

    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<OsString>,
}

fn absolute(path: OsString) -> Result<PathBuf, &'static str> {
    match path.as_bytes().first() {
        Some(b'/') => Ok(path.into()),
        _ => Err("a path in the guest is absolute"),
    }
}

/// `NAME=VALUE`, or one of this process's by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable(OsString);

impl Variable {
    pub(super) fn parse(text: OsString) -> Result<Self, &'static str> {
        match text.as_bytes().first() {
            None | Some(b'=') => Err("a variable has a name"),
            _ => Ok(Self(text)),
        }
    }

    /// `NAME=VALUE`; `None` if this process has none of the name.
    pub fn resolve(&self) -> Option<Vec<u8>> {
        let bytes = self.0.as_bytes();
        if bytes.contains(&b'=') {
            return Some(bytes.to_vec());
        }
        let value = std::env::var_os(OsStr::from_bytes(bytes))?;
        Some([bytes, b"=", &value.into_vec()].concat())
    }
}

pub(super) const CP_HELP: &str = "\
As with docker cp: a file goes to the path that is named, or into the directory that is there. So does a
directory, with all that is in it; with /. at its end only what is in it goes into one that is there.
Symbolic links stay links; devices, FIFOs and sockets are left out, with a warning. Paths in a guest
begin at its root directory. In a guest the copies have the owners of the originals, by number; on this
host they are yours.

Examples:
  minivmm cp web:/var/log/nginx .
  minivmm cp site/. web:/var/www";

/// `minivmm cp`.
#[derive(Clone, Debug, Args)]
pub struct CpArgs {
    /// What is copied
    #[arg(value_name = "[NAME:]SOURCE", value_parser = OsStringValueParser::new().try_map(CopyPath::parse))]
    pub source: CopyPath,

    /// Where it goes. One of both is in a VM, by its name; instead of the name also the path of a socket of
    /// --vsock, with a slash. A path of this host with a colon begins with ./
    #[arg(value_name = "[NAME:]TARGET", value_parser = OsStringValueParser::new().try_map(CopyPath::parse))]
    pub target: CopyPath,
}

/// A path of `minivmm cp`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyPath {
    /// On this host.
    Host(PathBuf),
    /// In a guest.
    Guest(Target, PathBuf),
}

impl CopyPath {
    fn parse(text: OsString) -> Result<Self, ConfigError> {
        let bytes = text.as_bytes();
        let colon = bytes.iter().position(|byte| *byte == b':');
        let Some((vm, path)) = colon.map(|colon| (&bytes[..colon], &bytes[colon + 1..])) else {
            return Ok(Self::Host(text.into()));
        };
        let is_path = vm.contains(&b'/');
        let socket = Path::new(OsStr::from_bytes(vm));
        if is_path && !fs::metadata(socket).is_ok_and(|it| it.file_type().is_socket()) {
            return Ok(Self::Host(text.into()));
        }
        let vm = match is_path {
            true => Target::Socket(socket.to_owned()),
            false => String::from_utf8_lossy(vm).parse()?,
        };
        Ok(Self::Guest(vm, OsStr::from_bytes(path).into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_have_a_value_or_that_of_this_process() {
        let resolved = |text: &str| Variable::parse(text.into()).map(|it| it.resolve());
        assert_eq!(resolved("A=b=c"), Ok(Some(b"A=b=c".to_vec())));
        assert_eq!(resolved("A="), Ok(Some(b"A=".to_vec())));
        assert_eq!(resolved("MINIVMM_NOT_SET"), Ok(None));
        let path = std::env::var_os("PATH").unwrap().into_vec();
        assert_eq!(resolved("PATH"), Ok(Some([b"PATH=", &path[..]].concat())));
        assert!(resolved("").is_err());
        assert!(resolved("=x").is_err());
    }
    #[test]
    fn paths_are_in_a_vm_by_its_name_or_socket_and_else_on_this_host() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("vsock");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let parse = |text: &str| CopyPath::parse(text.into());
        let host = |text: &str| Ok(CopyPath::Host(text.into()));
        for text in ["a", "/a/b", "./a:b", "/a:b", "a/b:c"] {
            assert_eq!(parse(text), host(text), "{text}");
        }
        let web = Target::Vm("web".parse().unwrap());
        assert_eq!(parse("web:/a:b"), Ok(CopyPath::Guest(web, "/a:b".into())));
        let text = format!("{}:/etc", socket.display());
        assert_eq!(
            parse(&text),
            Ok(CopyPath::Guest(Target::Socket(socket), "/etc".into()))
        );
        for text in [":/a", "a b:/c"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
