//! `make bench`: minivmm beside other monitors, in one run. Its arguments are a part's name and that
//! part's own:
//!
//! | part | what it compares |
//! | --- | --- |
//! | `linux ROUNDS` | Linux guests, here or in the lab |

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
        ["linux", rounds] => match rounds.parse() {
            Ok(rounds) if rounds > 0 => linux::run(rounds),
            _ => refuse(&format!("{rounds:?} is no number of rounds")),
        },
        _ => refuse("usage: bench linux ROUNDS"),
    };
    if done {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn refuse(why: &str) -> bool {
    eprintln!("{why}");
    false
}
