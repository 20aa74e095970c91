//! The program `minivmm`.

use std::process::ExitCode;

fn main() -> ExitCode {
    // SAFETY: nothing has been opened yet: what is open was passed to this process.
    unsafe { vmm::program::main() }
}
