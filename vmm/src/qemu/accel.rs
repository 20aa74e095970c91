//! What runs the guest's code: KVM where QEMU really runs with it, else QEMU's translator.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::child::Program;
use crate::cli::Accel;
use crate::kvm::probe::{Privileged, probe};

/// The choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    Kvm,
    Tcg,
}

impl Engine {
    /// As in QEMU's `-accel`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// How long QEMU may take for a machine that does nothing, on a loaded host too.
const LIMIT: Duration = Duration::from_secs(20);

/// Settles `auto`, with a warning when KVM cannot be used.
pub(super) fn choose(wanted: Accel, qemu: &Path) -> Engine {
    let why = match wanted {
        Accel::Kvm => return Engine::Kvm,
        Accel::Tcg => return Engine::Tcg,
        Accel::Auto => match kvm_works(qemu) {
            Ok(()) => return Engine::Kvm,
            Err(why) => why,
        },
    };
    log::warn!("the guest runs by emulation (TCG), slowly: {why}");
    Engine::Tcg
}

/// Whether QEMU runs with KVM, else why not. The file's presence proves nothing: the KVM may emulate, may be forbidden,
/// or may lack what QEMU asks of it.
fn kvm_works(qemu: &Path) -> Result<(), String> {
    match probe() {
        Ok(Privileged::Native) => {}
        Ok(Privileged::Emulated { .. }) => {
            return Err("this machine's KVM emulates, and cannot run a stock Linux".into());
        }
        Err(error) => return Err(error.to_string()),
    }
    let mut trial = Command::new(qemu);
    trial.args(["-nodefaults", "-no-user-config", "-display", "none", "-S"]);
    trial.args(["-M", "q35", "-m", "16", "-cpu", "max", "-accel", "kvm"]);
    trial.args(["-monitor", "stdio"]);
    match Program::new(trial).output(b"quit\n", LIMIT) {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            let first = text.lines().next().unwrap_or("it says nothing");
            Err(format!("QEMU fails with KVM: {first}"))
        }
        Err(error) => Err(format!("QEMU cannot be tried with KVM: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engine_that_was_asked_for_is_taken_untried() {
        let nowhere = Path::new("/no/such/qemu");
        assert_eq!(choose(Accel::Kvm, nowhere), Engine::Kvm);
        assert_eq!(choose(Accel::Tcg, nowhere), Engine::Tcg);
    }

    #[test]
    fn engine_falls_back_when_qemu_does_not_run_with_kvm() {
        assert_eq!(choose(Accel::Auto, Path::new("/bin/false")), Engine::Tcg);
    }
}
