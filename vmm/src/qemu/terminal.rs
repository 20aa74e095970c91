//! The terminal as it was before QEMU: QEMU makes it raw and non-blocking, and gives it back only when it ends by itself.

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::tty::{give_back_when_killed, may_read, standard};

/// Gives the terminal back when dropped.
#[derive(Debug)]
pub(super) struct SavedTerminal {
    settings: Option<Termios>,
    flags: [Option<OFlags>; 3],
}

impl SavedTerminal {
    /// Remembers the settings, if stdin is a terminal, and the flags.
    pub fn save() -> Self {
        if let Err(error) = give_back_when_killed() {
            log::debug!("cannot catch the signals that kill: {error}");
        }
        Self {
            settings: tcgetattr(stdin()).ok(),
            flags: standard().map(|fd| fcntl_getfl(fd).ok()),
        }
    }
}

impl Drop for SavedTerminal {
    fn drop(&mut self) {
        for (fd, flags) in standard().into_iter().zip(self.flags) {
            if let Some(flags) = flags {
                let _ = fcntl_setfl(fd, flags);
            }
        }
        // A job in the background would be stopped for it; the terminal is another's then.
        if let (Some(settings), true) = (&self.settings, may_read()) {
            let _ = tcsetattr(stdin(), OptionalActions::Now, settings);
        }
    }
}
