//! Follows a guest in QEMU in place of the native monitor, so that it ends in the same ways and with the same status.
//!
//! minivmm holds the other end of a QMP monitor of QEMU's. At its end the guest is kept (`-no-shutdown`) until minivmm
//! has looked at physical address 0x472, where a Linux that panicked writes 0x1234 before its reset
//! (`reboot=panic_warm`; `native_machine_emergency_restart` in arch/x86/kernel/reboot.c). The first signal presses the
//! power button; a guest that has not powered off in time is ended by `quit`, which writes the disks' caches. A
//! second signal kills QEMU, and so does the end of its time after `quit`. QMP is docs/interop/qmp-spec of QEMU.

use std::io::{self, BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::ExitStatus;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use signal_hook::consts::SIGCHLD;
use signal_hook::iterator::Signals;

use crate::child::Child;
use crate::control::exit::Exit;

/// How long QEMU has to answer `quit`: one that hangs never does.
const ANSWER: Duration = Duration::from_secs(5);
/// How long QEMU may take to quit: it may have a disk's cache to write.
const QUIT_GRACE: Duration = Duration::from_secs(60);
/// How often it is looked whether a QEMU that has closed its socket has ended.
const POLL: Duration = Duration::from_millis(20);

/// What the main thread waits for.
#[derive(Debug)]
enum News {
    Signal(i32),
    Message(Value),
    /// QEMU has closed the socket: it ends.
    Closed,
}

/// Follows QEMU to its end; `signals` has SIGCHLD too. The guest is asked to use no more than `memory` bytes, if that
/// says so, and has `grace` to power off after a signal. Without an [`Exit`] QEMU ended of itself: its status then counts.
pub(super) fn follow(
    mut child: Child,
    socket: UnixStream,
    mut signals: Signals,
    memory: Option<u64>,
    grace: Duration,
) -> io::Result<(Option<Exit>, ExitStatus)> {
    let (sender, news) = mpsc::channel();
    let (reader, handle, for_signals) = (socket.try_clone()?, signals.handle(), sender.clone());
    let read = move || read_messages(reader, &sender);
    let messages = thread::Builder::new().name("qmp".into()).spawn(read)?;
    let pass_on = move || {
        for signal in signals.forever() {
            if for_signals.send(News::Signal(signal)).is_err() {
                return;
            }
        }
    };
    let signals = thread::Builder::new()
        .name("signals".into())
        .spawn(pass_on)?;

    let mut guest = Guest::new(socket, grace);
    guest.command("qmp_capabilities", json!({}), "nothing");
    if let Some(bytes) = memory {
        guest.command("balloon", json!({"value": bytes}), "balloon");
    }
    let status = attend(&mut guest, &mut child, &news)?;
    drop(news);
    handle.close();
    // A helper of QEMU's may still hold the other end.
    let _ = guest.socket.shutdown(Shutdown::Both);
    let _ = (messages.join(), signals.join());
    Ok((guest.exit(), status))
}

/// Acts on the news until QEMU has ended. One that has closed its socket may still have long to go, and hang: signals
/// and the deadline count to the end.
fn attend(guest: &mut Guest, child: &mut Child, news: &Receiver<News>) -> io::Result<ExitStatus> {
    let mut closed = false;
    while !guest.gone {
        let patience = guest.deadline.map_or(Duration::MAX, |deadline| {
            deadline.saturating_duration_since(Instant::now())
        });
        let poll = if closed { POLL } else { Duration::MAX };
        match news.recv_timeout(patience.min(poll)) {
            // QEMU's end, or a stop of it.
            Ok(News::Signal(SIGCHLD)) => {}
            Ok(News::Signal(signal)) => guest.signal(signal),
            Ok(News::Message(message)) => guest.message(&message),
            Ok(News::Closed) | Err(RecvTimeoutError::Disconnected) => closed = true,
            Err(RecvTimeoutError::Timeout) if patience <= poll => guest.be_late(),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
    }
    child.kill()
}

fn read_messages(socket: UnixStream, news: &Sender<News>) {
    for line in BufReader::new(socket).lines().map_while(Result::ok) {
        if let Ok(message) = serde_json::from_str(&line) {
            // The receiver has ended: QEMU was killed.
            let _ = news.send(News::Message(message));
        }
    }
    let _ = news.send(News::Closed);
}

/// The guest as QMP shows it.
#[derive(Debug)]
struct Guest {
    socket: UnixStream,
    end: Option<Exit>,
    signal: Option<i32>,
    /// How long the guest has to power off after a signal.
    grace: Duration,
    deadline: Option<Instant>,
    /// QEMU has been sent `quit`.
    ending: bool,
    /// QEMU has to be killed.
    gone: bool,
}

impl Guest {
    fn new(socket: UnixStream, grace: Duration) -> Self {
        Self {
            socket,
            grace,
            end: None,
            signal: None,
            deadline: None,
            ending: false,
            gone: false,
        }
    }

    fn exit(self) -> Option<Exit> {
        self.end.or(self.signal.map(Exit::Signal))
    }

    /// Sends a command, whose answer has the same `id`.
    fn command(&mut self, name: &str, arguments: Value, id: &str) {
        let command = json!({"execute": name, "arguments": arguments, "id": id});
        // When QEMU has gone, the reader says so.
        let _ = self.socket.write_all(format!("{command}\n").as_bytes());
    }

    fn signal(&mut self, signal: i32) {
        if self.signal.replace(signal).is_some() {
            self.gone = true;
            return;
        }
        log::info!("signal {signal}: pressing the guest's power button");
        self.command("system_powerdown", json!({}), "nothing");
        self.deadline = Some(Instant::now() + self.grace);
    }

    /// Its time is over.
    fn be_late(&mut self) {
        if self.ending {
            self.gone = true;
            return;
        }
        log::warn!("the guest has not powered off: sending QEMU `quit`");
        self.end_qemu(ANSWER);
    }

    fn message(&mut self, message: &Value) {
        let (data, answer) = (&message["data"], &message["return"]);
        match (message["event"].as_str(), message["id"].as_str()) {
            (Some("SHUTDOWN"), _) => match data["reason"].as_str() {
                Some("guest-reset") => {
                    // The panic flag of the BIOS data area, in words of two bytes.
                    let command = json!({"command-line": "xp /1hx 0x472"});
                    self.command("human-monitor-command", command, "reset-flag");
                }
                Some("guest-panic") => self.quit(Exit::Panic),
                Some("guest-shutdown") => self.quit(Exit::PowerOff),
                // QEMU was asked to quit, by minivmm or another client, and does.
                _ => self.end_qemu(QUIT_GRACE),
            },
            (_, Some("balloon")) if message["error"].is_object() => {
                let why = &message["error"]["desc"];
                log::warn!("QEMU does not ask the guest to hold memory back: {why}");
            }
            (Some("STOP"), _) => self.command("query-status", json!({}), "status"),
            (_, Some("status")) if answer["status"] == "internal-error" => {
                self.quit(Exit::InternalError);
            }
            (_, Some("reset-flag")) => {
                let flag = answer.as_str().unwrap_or_default();
                self.quit(if flag.contains("0x1234") {
                    Exit::Panic
                } else {
                    Exit::Reboot
                });
            }
            _ => {}
        }
    }

    fn quit(&mut self, end: Exit) {
        self.end.get_or_insert(end);
        self.end_qemu(QUIT_GRACE);
    }

    fn end_qemu(&mut self, within: Duration) {
        self.ending = true;
        self.command("quit", json!({}), "nothing");
        self.deadline = Some(Instant::now() + within);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(10);

    /// How a guest ends after these messages, and the commands that they brought about.
    fn ended(messages: &[Value]) -> (Option<Exit>, String) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut guest = Guest::new(ours, GRACE);
        messages.iter().for_each(|message| guest.message(message));
        let exit = guest.exit();
        let mut sent = String::new();
        io::Read::read_to_string(&mut theirs, &mut sent).unwrap();
        (exit, sent)
    }

    fn shutdown(reason: &str) -> Value {
        json!({"event": "SHUTDOWN", "data": {"guest": true, "reason": reason}})
    }

    #[test]
    fn reset_with_the_flag_is_a_panic_and_without_a_reboot() {
        for (flag, exit) in [("0x1234", Exit::Panic), ("0x0000", Exit::Reboot)] {
            let text = format!("0000000000000472: {flag}\r\n");
            let answer = json!({"return": text, "id": "reset-flag"});
            let (end, sent) = ended(&[shutdown("guest-reset"), answer]);
            assert_eq!(end, Some(exit));
            assert!(sent.contains("xp /1hx 0x472"), "{sent}");
            assert!(sent.contains("quit"), "{sent}");
        }
    }

    #[test]
    fn power_off_and_internal_error_are_distinguished() {
        assert_eq!(ended(&[shutdown("guest-shutdown")]).0, Some(Exit::PowerOff));
        let answer = json!({"return": {"status": "internal-error"}, "id": "status"});
        let (end, sent) = ended(&[json!({"event": "STOP"}), answer]);
        assert!(matches!(end, Some(Exit::InternalError)));
        assert!(sent.contains("query-status"), "{sent}");
    }

    #[test]
    fn pause_by_the_user_is_no_end() {
        let answer = json!({"return": {"status": "paused"}, "id": "status"});
        assert_eq!(ended(&[json!({"event": "STOP"}), answer]).0, None);
    }

    #[test]
    fn first_signal_presses_the_button_and_the_second_kills() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut guest = Guest::new(ours, GRACE);
        guest.signal(15);
        assert!(guest.deadline.is_some() && !guest.gone);
        guest.signal(15);
        assert!(guest.gone);
        assert_eq!(guest.exit(), Some(Exit::Signal(15)));
    }

    #[test]
    fn guest_that_does_not_power_off_is_ended_by_quit_and_killed_last() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut guest = Guest::new(ours, GRACE);
        guest.signal(15);
        guest.be_late();
        let late = guest.deadline.expect("it has to answer");
        assert!(!guest.gone && late <= Instant::now() + ANSWER);
        // It writes its caches.
        guest.message(&shutdown("host-qmp-quit"));
        assert!(!guest.gone && guest.deadline > Some(late));
        guest.be_late();
        assert!(guest.gone);
        assert_eq!(guest.exit(), Some(Exit::Signal(15)));
        let mut sent = String::new();
        io::Read::read_to_string(&mut theirs, &mut sent).unwrap();
        let names: Vec<_> = sent
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["execute"].clone())
            .collect();
        assert_eq!(names, ["system_powerdown", "quit", "quit"]);
    }

    fn sleep(seconds: &str) -> Child {
        let mut command = std::process::Command::new("sleep");
        command.arg(seconds);
        crate::child::Program::new(command).spawn().unwrap()
    }

    /// A QEMU that runs for a minute after it has closed its socket, and its guest.
    fn deaf() -> (Guest, Child, Sender<News>, Receiver<News>) {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let child = sleep("60");
        let (sender, news) = mpsc::channel();
        sender.send(News::Closed).unwrap();
        (Guest::new(ours, GRACE), child, sender, news)
    }

    #[test]
    fn qemu_that_hangs_in_its_end_is_killed_by_the_second_signal() {
        let (mut guest, mut child, sender, news) = deaf();
        let start = Instant::now();
        let later = thread::spawn(move || {
            for signal in [15, 2] {
                thread::sleep(Duration::from_millis(100));
                sender.send(News::Signal(signal)).unwrap();
            }
            sender
        });
        attend(&mut guest, &mut child, &news).unwrap();
        assert!(
            start.elapsed() < GRACE,
            "the signal counts, not the deadline"
        );
        later.join().unwrap();
        assert_eq!(guest.exit(), Some(Exit::Signal(2)));
    }

    #[test]
    fn qemu_that_hangs_in_its_end_is_killed_at_the_deadline() {
        let (mut guest, mut child, _sender, news) = deaf();
        guest.message(&shutdown("guest-shutdown"));
        let deadline = guest.deadline.expect("quit sets one");
        assert!(deadline <= Instant::now() + QUIT_GRACE);
        guest.deadline = Some(Instant::now() + 5 * POLL);
        let start = Instant::now();
        attend(&mut guest, &mut child, &news).unwrap();
        assert!(start.elapsed() < GRACE);
        assert_eq!(guest.exit(), Some(Exit::PowerOff));
    }

    #[test]
    fn qemu_that_ends_soon_after_its_socket_is_waited_for() {
        let (mut guest, mut other, _sender, news) = deaf();
        other.kill().unwrap();
        let mut child = sleep("0.2");
        let status = attend(&mut guest, &mut child, &news).unwrap();
        assert!(status.success());
        assert_eq!(guest.exit(), None);
    }

    #[test]
    fn qemu_that_ends_while_a_helper_holds_its_socket_is_noticed() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let signals = Signals::new([SIGCHLD]).unwrap();
        let status = follow(sleep("0.2"), ours, signals, None, GRACE).unwrap();
        assert_eq!(status.0, None);
    }
}
