//! The recipes of docs/recipes.md: what can be said of them without the services that they are for.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use harness::pypi;
use harness::vm::binary;
use tempfile::TempDir;

/// The status of a run without a kernel; that of a wrong command line is 2.
const NO_KERNEL: i32 = 125;

/// A file of this repository.
fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(file(path)).unwrap()
}

/// What the schema says of the file.
fn check(schema: &str, path: &Path) -> Output {
    let library = pypi::library("check-jsonschema", &["check-jsonschema==0.39.0"]);
    let mut check = Command::new("python3");
    check.env("PYTHONPATH", library);
    check.args(["-m", "check_jsonschema", "--builtin-schema", schema]);
    check.arg(path).output().unwrap()
}

#[test]
fn jobs_and_the_action_have_the_form_of_their_schemas() {
    for (schema, path) in [
        (
            "vendor.github-workflows",
            "resources/recipes/github-actions.yml",
        ),
        ("vendor.github-actions", "resources/action/action.yml"),
        ("vendor.gitlab-ci", "resources/recipes/gitlab-ci.yml"),
    ] {
        let output = check(schema, &file(path));
        assert!(output.status.success(), "{path}: {output:?}");
        // The check finds what is wrong.
        let directory = TempDir::new().unwrap();
        let wrong = directory.path().join("wrong.yml");
        let text = read(path).replace("script:", "skript:");
        let text = text.replace("steps:", "stepps:");
        fs::write(&wrong, text).unwrap();
        let output = check(schema, &wrong);
        assert!(!output.status.success(), "{path}: {output:?}");
    }
}

#[test]
fn options_of_jobs_are_those_of_minivmm() {
    let github = read("resources/recipes/github-actions.yml");
    let github = github.split_once("options: ").unwrap().1;
    let github = github.lines().next().unwrap();
    let gitlab = read("resources/recipes/gitlab-ci.yml");
    let gitlab = gitlab.split_once("./minivmm run ").unwrap().1;
    let gitlab = gitlab.split_once(" -- ").unwrap().0;
    let gitlab = gitlab.replace("\"$CI_PROJECT_DIR:$CI_PROJECT_DIR\"", ".:/src");
    let makefile = read("resources/recipes/Makefile");
    let makefile = makefile.split_once("$(MINIVMM) run ").unwrap().1;
    let makefile = makefile.split_once(" -- ").unwrap().0;
    let config = read("resources/recipes/cargo-config.toml");
    assert!(config.contains(r#"runner = ["minivmm", "run", "--"]"#));
    for options in [github, &gitlab, makefile] {
        let directory = TempDir::new().unwrap();
        let mut run = Command::new(binary());
        run.current_dir(directory.path()).arg("run");
        run.args(options.split_whitespace());
        let output = run
            .args(["--kernel", "/no/such", "--", "true"])
            .output()
            .unwrap();
        let status = output.status.code();
        assert_eq!(status, Some(NO_KERNEL), "{options}: {output:?}");
    }
}

#[test]
fn targets_of_the_kernel_tree_are_command_lines() {
    let mut run = Command::new(binary());
    run.args(["run", "--dry-run", "--file"]);
    let output = run
        .arg(file("resources/recipes/minivmm.toml"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let names: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# "))
        .collect();
    assert_eq!(names, ["built", "network", "host"]);
    let line = text.lines().nth(1).unwrap();
    assert!(
        line.starts_with("minivmm run --share=.:/src --workdir=/src"),
        "{line}"
    );
}

#[test]
fn target_of_make_passes_its_status_on() {
    let directory = TempDir::new().unwrap();
    for (program, succeeds) in [("true", true), ("false", false)] {
        let mut make = Command::new("make");
        make.current_dir(directory.path()).arg("-f");
        make.arg(file("resources/recipes/Makefile"));
        make.args([&format!("MINIVMM={program}"), "check-in-vm"]);
        let output = make.output().unwrap();
        assert_eq!(output.status.success(), succeeds, "{output:?}");
    }
}
