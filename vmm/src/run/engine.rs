//! What runs the guest's code: KVM natively, or QEMU's translator where KVM cannot run Linux.

use std::time::Duration;

use super::RunError;
use crate::config::Engine;
use crate::control::exit::chain;
use crate::kvm::probe::{Privileged, probe};

/// How the VM's process runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Natively, by KVM.
    Kvm,
    /// In QEMU, by emulation.
    Tcg,
}

impl Mode {
    /// Settles what was asked for, with a warning where the guest is emulated without that.
    ///
    /// # Errors
    ///
    /// KVM cannot do what it must.
    pub fn choose(wanted: Engine) -> Result<Self, RunError> {
        if wanted == Engine::Tcg {
            return Ok(Self::Tcg);
        }
        let why = match kvm() {
            Ok(()) => return Ok(Self::Kvm),
            Err(why) => why,
        };
        if wanted == Engine::Kvm {
            return Err(RunError::NoKvm(why));
        }
        log::warn!("QEMU runs the guest by emulation (TCG), slowly: {why}");
        Ok(Self::Tcg)
    }

    /// As in QEMU's `-accel`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// How much longer all may take than natively.
    pub fn scale(self, natively: Duration) -> Duration {
        match self {
            Self::Kvm => natively,
            Self::Tcg => natively * 10,
        }
    }
}

/// Whether KVM can run Linux, else why not.
fn kvm() -> Result<(), String> {
    match probe() {
        Ok(Privileged::Native) => Ok(()),
        Ok(Privileged::Emulated { .. }) => {
            Err("this machine's KVM emulates privileged code, and cannot run a stock Linux".into())
        }
        Err(error) => Err(chain(&error)),
    }
}
