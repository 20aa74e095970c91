//! The program `minivmm-agent`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(agent::main())
}
