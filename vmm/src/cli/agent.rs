//! The commands that need the agent in a guest, as typed.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};

use super::Target;

pub(super) const EXEC_HELP: &str = "\
The command gets its arguments as they are, without a shell. Its stdin, stdout and stderr are those of
minivmm, unless -t gives it a terminal, on which stdout and stderr are one. SIGINT, SIGTERM, SIGHUP,
SIGQUIT, SIGUSR1, SIGUSR2 and SIGWINCH are passed on to it. When minivmm ends before, it gets SIGHUP, and
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
}
