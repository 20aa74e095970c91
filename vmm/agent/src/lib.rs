//! The program `minivmm-agent`, which runs in guests of minivmm's.
//!
//! As the guest's first process it is its init. It is linked statically, so that it needs nothing of the guest's, and is a part of
//! the program minivmm: `vmm/build.rs` builds it.

/// Does what the command line says, and returns the exit status.
pub fn main() -> u8 {
    eprintln!("minivmm-agent: version {}", agent_protocol::VERSION);
    2
}
