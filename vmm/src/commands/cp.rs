//! `minivmm cp`: copies between the host and a VM whose guest has the agent.

use crate::agent::{Agent, ConnectError, CopyError, copy_from, copy_to};
use crate::cli::{CopyPath, CpArgs};

/// Why nothing is copied.
#[derive(Debug, thiserror::Error)]
pub enum CpError {
    /// It copies between the host and a guest alone.
    #[error("one of both paths is in a VM, as in NAME:/etc/hosts, and the other on this host")]
    Sides,
    /// The agent cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It is not copied.
    #[error(transparent)]
    Copy(#[from] CopyError),
}

impl CpError {
    /// What to do about it.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Connect(error) | Self::Copy(CopyError::Connect(error)) => error.remedy(),
            _ => None,
        }
    }
}

/// Copies.
pub fn run(args: &CpArgs) -> Result<(), CpError> {
    match (&args.source, &args.target) {
        (CopyPath::Guest(vm, path), CopyPath::Host(to)) => copy_from(&Agent::of(vm)?, path, to)?,
        (CopyPath::Host(from), CopyPath::Guest(vm, path)) => copy_to(&Agent::of(vm)?, from, path)?,
        _ => return Err(CpError::Sides),
    }
    Ok(())
}
