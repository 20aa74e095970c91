//! Second tries, for what the lab's emulator breaks: in this one place, and counted.
//!
//! QEMU's emulation of nested SVM has a bug (`helper_vmrun` leaves `exception_index` set, so that an interrupt may be
//! delivered twice). It hangs about one boot of a Linux in 13 inside the lab, and makes a guest that runs, or the lab
//! itself, hang or crash now and then. What fails is therefore tried again, in the lab and nowhere else. Every failed try
//! is one line that begins with [`MARK`] in the lab and with `lab: retry` in the log of the suite.

use std::io::Write;

use super::vm::in_lab;

/// Begins a line of the lab's output that reports a failed try.
pub const MARK: &str = "LAB retry ";

/// What may be tried again.
#[derive(Clone, Copy, Debug)]
pub enum Layer {
    /// A guest's boot: it falls silent or ends before its init writes.
    Boot,
    /// A test: a guest that hangs shows as whatever the test looks at next.
    Test,
    /// The lab as a whole: it falls silent, or its kernel crashes.
    Lab,
}

impl Layer {
    /// Failures in a row before we, and not the emulator, are to blame.
    fn tries(self) -> u32 {
        match self {
            Self::Boot => 3,
            Self::Test | Self::Lab => 4,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Test => "test",
            Self::Lab => "lab",
        }
    }
}

/// Tries until it succeeds, or fails in a way that `reason` does not put down to the emulator, or too often.
pub fn retry<T, E>(
    layer: Layer,
    reason: impl Fn(&E) -> Option<String>,
    mut attempt: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    for n in 1..layer.tries() {
        let result = attempt();
        let Err(Some(why)) = result.as_ref().map_err(&reason) else {
            return result;
        };
        let last = why.trim_end().lines().next_back().unwrap_or_default();
        report(&format!("{}, failed try {n}: {last}", layer.name()));
    }
    attempt()
}

/// Reports something that is tried again. Inside the lab the line goes out with the program's output, which the suite
/// outside reads.
pub fn report(line: &str) {
    if in_lab() {
        println!("\n{MARK}{line}");
    } else {
        let _ = writeln!(std::io::stderr(), "lab: retry of a {line}");
    }
}
