//! `make bench`: minivmm beside other monitors, in one run. Its arguments are a part's name and that
//! part's own:
//!
//! | part | what it compares |
//! | --- | --- |
//! | `linux [boot or net] ROUNDS` | Linux guests, here or in the lab |

/// Of the tests' harness, what an example can use too.
#[allow(dead_code)] // The tests use more of it.
#[path = "../harness"]
mod harness {
    pub mod assets;
    pub mod elf;
    pub mod initramfs;
    pub mod iperf;
    pub mod linux;
    pub mod memory;
    pub mod netns;
    pub mod patience;
    pub mod process;
    pub mod site;
    pub mod vm;
    pub use patience::{PATIENCE, eventually};
}
#[path = "../lab/mod.rs"]
mod lab;
mod linux;

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["linux", rounds] => with_rounds(rounds, |rounds| linux::run(None, rounds)),
        ["linux", part @ ("boot" | "net"), rounds] => {
            with_rounds(rounds, |rounds| linux::run(Some(part), rounds))
        }
        _ => refuse("usage: bench linux [boot|net] ROUNDS"),
    };
    if done {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn with_rounds(rounds: &str, run: impl FnOnce(usize) -> bool) -> bool {
    match rounds.parse() {
        Ok(rounds) if rounds > 0 => run(rounds),
        _ => refuse(&format!("{rounds:?} is no number of rounds")),
    }
}

fn refuse(why: &str) -> bool {
    eprintln!("{why}");
    false
}
