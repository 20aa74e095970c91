//! The file of `minivmm run --file`: targets, each of which is a command line of `minivmm run`.
//!
//! The keys of a target are the options without their dashes, and the parser of the command line reads them. So an
//! option is known here as soon as it is there.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::{fs, io};

use clap::Args;
use clap::error::ContextKind;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{Cli, RunArgs};

/// The table whose keys all targets have that have none of their own.
const DEFAULTS: &str = "defaults";
/// The table of the targets.
const TARGETS: &str = "target";
/// The key of what runs.
const COMMAND: &str = "command";
/// The options that say what becomes of targets, and not what one is. A terminal is for one who types.
const OTHERS: [&str; 5] = ["file", "detach", "dry-run", "tty", "help"];

/// Why there are no targets.
#[derive(Debug, thiserror::Error)]
pub enum TargetsError {
    /// There is no such file.
    #[error("cannot read {0:?}")]
    Read(PathBuf, #[source] io::Error),
    /// What it says is wrong.
    #[error("{}:{line}: {text}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Which line of it, from 1.
        line: usize,
        /// What is wrong there.
        text: String,
    },
    /// It has no such target.
    #[error("{} has no target {name:?}, but {known}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        name: String,
        /// Those that it has.
        known: String,
    },
}

/// A target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunTarget {
    /// Its name.
    pub name: String,
    /// What stands behind `minivmm run`.
    pub words: Vec<String>,
}

/// Reads the targets of these names, in their order, or all in that of the file.
///
/// # Errors
///
/// See [`TargetsError`].
pub fn read_targets(path: &Path, names: &[String]) -> Result<Vec<RunTarget>, TargetsError> {
    let failed = |error| TargetsError::Read(path.to_owned(), error);
    let text = fs::read_to_string(path).map_err(failed)?;
    let all = parse(&text).map_err(|Wrong(at, text_of)| TargetsError::Line {
        path: path.to_owned(),
        line: 1 + text.as_bytes()[..at.min(text.len())]
            .iter()
            .filter(|byte| **byte == b'\n')
            .count(),
        text: text_of,
    })?;
    if names.is_empty() {
        return Ok(all);
    }
    let find = |name: &String| {
        let found = all.iter().find(|target| target.name == *name);
        found.cloned().ok_or_else(|| {
            let known: Vec<_> = all.iter().map(|target| &*target.name).collect();
            TargetsError::Missing {
                path: path.to_owned(),
                name: name.clone(),
                known: known.join(", "),
            }
        })
    };
    names.iter().map(find).collect()
}

/// Where something is wrong in the text, and what.
#[derive(Debug, PartialEq, Eq)]
struct Wrong(usize, String);

/// A key with its value: where it stands in the text, what it is called, and what it says.
type Key<'a> = (usize, &'a str, &'a DeValue<'a>);

fn parse(text: &str) -> Result<Vec<RunTarget>, Wrong> {
    let document = DeTable::parse(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        Wrong(at, error.message().to_owned())
    })?;
    let (mut defaults, mut targets) = (Vec::new(), Vec::new());
    for (at, key, value) in in_order(document.get_ref()) {
        match (key, value) {
            (DEFAULTS, DeValue::Table(table)) => defaults = in_order(table),
            (TARGETS, DeValue::Table(table)) => targets = in_order(table),
            _ => {
                let text = format!("{key:?} is neither [{DEFAULTS}] nor a [{TARGETS}.NAME]");
                return Err(Wrong(at, text));
            }
        }
    }
    // Those that every target replaces are looked at, too.
    words(&defaults)?;
    if targets.is_empty() {
        return Err(Wrong(
            0,
            format!("there is no target: begin one by [{TARGETS}.NAME]"),
        ));
    }
    let target = |(at, name, value): Key| {
        let DeValue::Table(table) = value else {
            return Err(Wrong(
                at,
                format!("a target is a table: [{TARGETS}.{name}]"),
            ));
        };
        let own = in_order(table);
        let is_replaced = |key: &Key| own.iter().any(|(_, own, _)| *own == key.1);
        let mut keys: Vec<_> = defaults
            .iter()
            .filter(|key| !is_replaced(key))
            .copied()
            .collect();
        keys.extend(&own);
        let words = words(&keys)?;
        check(&words, &keys, at)?;
        Ok(RunTarget {
            name: name.to_owned(),
            words,
        })
    };
    targets.into_iter().map(target).collect()
}

/// The keys of a table in the order of the text.
fn in_order<'a>(table: &'a DeTable<'a>) -> Vec<Key<'a>> {
    let key = |(key, value): (&'a Spanned<_>, &'a Spanned<DeValue<'a>>)| {
        let name: &std::borrow::Cow<'a, str> = key.get_ref();
        (key.span().start, &**name, value.get_ref())
    };
    let mut keys: Vec<_> = table.iter().map(key).collect();
    keys.sort_by_key(|(at, ..)| *at);
    keys
}

/// The command line of these keys.
fn words(keys: &[Key]) -> Result<Vec<String>, Wrong> {
    let parser = RunArgs::augment_args(clap::Command::new("run"));
    let known = parser.get_arguments().filter_map(clap::Arg::get_long);
    let known: Vec<_> = known.filter(|name| !OTHERS.contains(name)).collect();
    let (mut words, mut command) = (Vec::new(), Vec::new());
    for (at, key, value) in keys {
        let wrong = |text: String| Wrong(*at, text);
        if *key == COMMAND {
            command = command_of(value).map_err(wrong)?;
            continue;
        }
        if !known.contains(key) {
            let text = format!(
                "unknown key {key:?}: those of a target are {COMMAND:?} and {}",
                known.join(", ")
            );
            return Err(wrong(text));
        }
        match value {
            DeValue::Boolean(true) => words.push(format!("--{key}")),
            DeValue::Boolean(false) => {}
            DeValue::Array(values) => {
                for value in values {
                    let value = scalar(key, value.get_ref()).map_err(wrong)?;
                    words.push(format!("--{key}={value}"));
                }
            }
            value => words.push(format!("--{key}={}", scalar(key, value).map_err(wrong)?)),
        }
    }
    if !command.is_empty() {
        words.push("--".into());
        words.extend(command);
    }
    Ok(words)
}

/// A string is for a shell; words are the program and its arguments, as they are.
fn command_of(value: &DeValue) -> Result<Vec<String>, String> {
    match value {
        DeValue::String(line) => Ok(["sh", "-c", line].map(str::to_owned).into()),
        DeValue::Array(words) => {
            let word = |word: &Spanned<DeValue>| scalar(COMMAND, word.get_ref());
            words.iter().map(word).collect()
        }
        value => scalar(COMMAND, value).map(|word| vec![word]),
    }
}

fn scalar(key: &str, value: &DeValue) -> Result<String, String> {
    match value {
        DeValue::String(text) => Ok(text.clone().into_owned()),
        DeValue::Integer(number) if number.radix() == 10 => Ok(number.as_str().to_owned()),
        value => {
            let kind = value.type_str();
            Err(format!("{key} is of the type {kind}: write a string"))
        }
    }
}

/// Has the parser of the command line look at the words; what it says is at the key that it names, or at the target.
fn check(words: &[String], keys: &[Key], target: usize) -> Result<(), Wrong> {
    let line = ["minivmm", "run"].into_iter().map(OsString::from);
    let Err(error) = Cli::read(line.chain(words.iter().map(OsString::from))) else {
        return Ok(());
    };
    let argument = error.get(ContextKind::InvalidArg).map(ToString::to_string);
    let is_named = |key: &&Key| {
        let argument = argument.as_deref().and_then(|text| text.strip_prefix("--"));
        argument.and_then(|text| text.split([' ', '=', '[']).next()) == Some(key.1)
    };
    let at = keys.iter().find(is_named).map_or(target, |(at, ..)| *at);
    let text = error.to_string();
    let text = text.split("\n\n").next().unwrap_or_default();
    let text = text.trim_start_matches("error: ").split_whitespace();
    Err(Wrong(at, text.collect::<Vec<_>>().join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words_of(text: &str) -> Vec<Vec<String>> {
        let targets = parse(text).unwrap();
        targets.into_iter().map(|target| target.words).collect()
    }

    #[test]
    fn target_is_a_command_line_in_the_order_of_the_file() {
        let text = r#"
            [defaults]
            share = [".:/src", "/data:/data:ro"]
            timeout = "10m"
            user-net = true

            [target.zeta]
            user-net = false
            macvtap = "a"
            command = ["make", "-C", "/src"]

            [target."6.12"]
            kernel = "bzImage"
            cpus = 2
            timeout = "5s"
            cmdline = "--x=y"
            command = "make check | tee log"
        "#;
        let targets = parse(text).unwrap();
        assert_eq!(targets[0].name, "zeta");
        assert_eq!(targets[1].name, "6.12");
        let shares = ["--share=.:/src", "--share=/data:/data:ro"];
        let first = [
            &shares[..],
            &["--timeout=10m", "--macvtap=a", "--", "make", "-C", "/src"],
        ];
        assert_eq!(targets[0].words, first.concat());
        let second = [
            &shares[..],
            &["--user-net", "--kernel=bzImage", "--cpus=2", "--timeout=5s"],
            &["--cmdline=--x=y", "--", "sh", "-c", "make check | tee log"],
        ];
        assert_eq!(targets[1].words, second.concat());
    }

    #[test]
    fn nics_keep_their_order() {
        let text = "[target.a]\nuser-net = true\nmacvtap = ['x', 'y']\ncommand = 'true'";
        assert_eq!(
            words_of(text)[0][..3],
            ["--user-net", "--macvtap=x", "--macvtap=y"]
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let cases = [
            (
                "[target.a]\ncommand = 'a'\nkernell = 'b'",
                3,
                "unknown key \"kernell\"",
            ),
            (
                "[target.a]\ncommand = 'a'\n\nmemory = 'lots'",
                4,
                "invalid value 'lots' for '--memory <SIZE>'",
            ),
            (
                "[target.a]\nmemory = '1G'\n[target.b]\nkernel = 'k'",
                1,
                "required",
            ),
            (
                "[target.a]\ncommand = 'a'\nkernel = true",
                3,
                "a value is required",
            ),
            ("[target.a]\ncommand = 'a'\nconsole = 'x'", 3, "'--console'"),
            (
                "[target.a]\ncommand = 'a'\nkernel = ['a', 'b']",
                3,
                "cannot be used multiple times",
            ),
            (
                "[target.a]\ncommand = 'a'\nmemory = 1.5",
                3,
                "is of the type float",
            ),
            (
                "[target.a]\ncommand = 'a'\nshare = [[1]]",
                3,
                "is of the type array",
            ),
            (
                "[target.a]\ncommand = { a = 1 }",
                2,
                "command is of the type table",
            ),
            ("[target.a]\ncommand = 'a'\ntty = true", 3, "unknown key"),
            (
                "[target.a]\ncommand = 'a'\n'kernel=x' = 'y'",
                3,
                "unknown key",
            ),
            (
                "[target.a]\ncommand = 'a'\n[defaults]\nhelp = true",
                4,
                "unknown key",
            ),
            (
                "[target.a]\ncommand = 'a'\ncommand = 'b'",
                3,
                "duplicate key",
            ),
            ("[target.a]\n[targets.b]", 2, "\"targets\" is neither"),
            ("target = 1", 1, "neither"),
            ("[target]\na = 1", 2, "a target is a table"),
            ("[defaults]\ncpus = 2", 1, "there is no target"),
            ("[target.a\n", 1, ""),
        ];
        for (text, line, expected) in cases {
            let Wrong(at, why) = parse(text).expect_err(text);
            let found = 1 + text[..at].matches('\n').count();
            assert_eq!(found, line, "{text}: {why}");
            assert!(why.contains(expected), "{text}: {why}");
            assert!(!why.contains('\n'), "{why}");
        }
    }

    #[test]
    fn targets_are_chosen_by_their_names() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("minivmm.toml");
        fs::write(&path, "[target.a]\ncommand='a'\n[target.b]\ncommand='b'\n").unwrap();
        let read = |names: &[&str]| {
            let names: Vec<_> = names.iter().map(|name| name.to_string()).collect();
            let targets = read_targets(&path, &names)?;
            Ok::<_, TargetsError>(targets.into_iter().map(|it| it.name).collect::<Vec<_>>())
        };
        assert_eq!(read(&[]).unwrap(), ["a", "b"]);
        assert_eq!(read(&["b", "a"]).unwrap(), ["b", "a"]);
        let error = read(&["c"]).unwrap_err().to_string();
        assert!(error.ends_with("has no target \"c\", but a, b"), "{error}");
        fs::write(&path, "\n[target.a]\nx = 1\n").unwrap();
        let error = read(&[]).unwrap_err().to_string();
        assert!(error.contains("minivmm.toml:3: unknown key"), "{error}");
    }
}
