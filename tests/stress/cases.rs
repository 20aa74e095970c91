//! What comes of a run, by chance.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// Numbers that differ from seed to seed (xorshift64).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    pub fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}

/// Who gets SIGKILL.
#[derive(Clone, Copy, Debug)]
pub enum Victim {
    /// `minivmm run`.
    Run,
    /// The VM's process.
    Vm,
    /// Both at once.
    Both,
    /// A process that the VM's process has started: QEMU, a file server, passt, or what guards them.
    Below,
}

/// What comes of a run.
#[derive(Clone, Copy, Debug)]
pub enum Case {
    Exit(u8),
    Signal(u8),
    NotFound,
    NotExecutable,
    Timeout,
    Panic,
    Reboot,
    PowerOff,
    Killed(Victim),
}

impl Case {
    pub fn random(random: &mut Random) -> Self {
        match random.below(20) {
            0..5 => Self::Exit(random.below(256) as u8),
            5..7 => Self::Signal(random.pick(&[1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15])),
            7 => random.pick(&[Self::NotFound, Self::NotExecutable]),
            8 => Self::Timeout,
            9 => random.pick(&[Self::Panic, Self::Reboot, Self::PowerOff]),
            10..14 => Self::Killed(Victim::Run),
            14..17 => Self::Killed(Victim::Vm),
            17..19 => Self::Killed(Victim::Both),
            _ => Self::Killed(Victim::Below),
        }
    }

    pub fn command(self) -> Vec<String> {
        let sysrq = |key| format!("cat; echo {key} > /proc/sysrq-trigger; sleep 1000");
        let script = match self {
            Self::NotFound => return vec!["/nonexistent".into()],
            Self::NotExecutable => return vec!["/etc/passwd".into()],
            Self::Exit(status) => format!("cat; echo error >&2; exit {status}"),
            Self::Signal(signal) => format!("cat; kill -{signal} $$"),
            Self::Timeout => "cat; exec sleep 1000".into(),
            Self::Panic => sysrq('c'),
            Self::Reboot => sysrq('b'),
            Self::PowerOff => sysrq('o'),
            Self::Killed(_) => "cat; exit 37".into(),
        };
        vec!["sh".into(), "-c".into(), script]
    }

    /// The status and the reason that the run may have: of one of whom a process is killed either that, or its command's, as
    /// long as it had come that far.
    fn expected(self) -> Vec<(u8, &'static str)> {
        match self {
            Self::Exit(status) => vec![(status, "exited")],
            Self::Signal(signal) => vec![(128 + signal, "signal")],
            Self::NotFound => vec![(127, "not-found")],
            Self::NotExecutable => vec![(126, "not-executable")],
            Self::Timeout => vec![(124, "timeout")],
            Self::Panic => vec![(125, "panic")],
            Self::Reboot => vec![(125, "reboot")],
            Self::PowerOff => vec![(125, "power-off")],
            Self::Killed(Victim::Run | Victim::Both) => vec![(37, "exited")],
            Self::Killed(Victim::Vm) => vec![(125, "killed"), (37, "exited")],
            // QEMU, a file server, or what the command can do without.
            Self::Killed(Victim::Below) => vec![
                (125, "start"),
                (125, "crash"),
                (125, "share"),
                (37, "exited"),
            ],
        }
    }

    /// Whether it may end so.
    pub fn allows(self, status: ExitStatus, reason: &str) -> bool {
        match (status.code(), self) {
            (Some(code), _) => {
                let mut expected = self.expected().into_iter();
                expected.any(|(status, why)| i32::from(status) == code && why == reason)
            }
            (None, Self::Killed(Victim::Run | Victim::Both)) => status.signal() == Some(9),
            (None, _) => false,
        }
    }

    /// What it is called in the list of all.
    pub fn kind(self) -> String {
        let text = format!("{self:?}");
        match self {
            Self::Exit(_) | Self::Signal(_) => text.split('(').take(1).collect(),
            _ => text,
        }
    }
}
