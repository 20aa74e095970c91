//! A guest of `--kernel`, followed in place of the native monitor, so that it ends in the same ways and with the same
//! status.
//!
//! At its end the guest is kept (`-no-shutdown`) until minivmm has looked at physical address 0x472, where a Linux that
//! panicked writes 0x1234 before its reset (`reboot=panic_warm`; `native_machine_emergency_restart` in
//! arch/x86/kernel/reboot.c). With `--reboot restart` a guest that has not panicked is then reset and goes on. The first signal presses the power button; a guest that has not powered off in time is
//! ended by `quit`, which writes the disks' caches. A second signal kills QEMU, and so does the end of its time after
//! `quit`. QMP is docs/interop/qmp-spec of QEMU.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::monitor::{Monitor, STATUS};
use crate::config::Reboot;
use crate::control::exit::Exit;
use crate::events::{Event, EventHub};

/// How long QEMU has to answer `quit`: one that hangs never does.
const ANSWER: Duration = Duration::from_secs(5);
/// How long QEMU may take to quit: it may have a disk's cache to write.
const QUIT_GRACE: Duration = Duration::from_secs(60);

/// How a guest is to begin and end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    /// How long it has to power off after a signal.
    pub grace: Duration,
    /// What its reboot does.
    pub reboot: Reboot,
    /// It is asked to use no more bytes of memory, if this says so.
    pub memory: Option<u64>,
}

/// The guest as QMP shows it.
#[derive(Debug)]
pub(super) struct Guest {
    monitor: Rc<RefCell<Monitor>>,
    events: Arc<EventHub>,
    end: Option<Exit>,
    signal: Option<i32>,
    terms: Terms,
    /// The reset that is under way, as clients get to know it.
    reset: Option<Event>,
    /// When its time, or that of QEMU, is [over](Self::be_late).
    pub deadline: Option<Instant>,
    /// Clients know of the guest's end: what QEMU says of it from then on is minivmm's doing.
    is_over: bool,
    /// QEMU has been sent `quit`.
    ending: bool,
    /// QEMU has to be killed.
    gone: bool,
}

impl Guest {
    /// One that QEMU has just started.
    pub fn new(monitor: Rc<RefCell<Monitor>>, events: Arc<EventHub>, terms: Terms) -> Self {
        let guest = Self {
            monitor,
            events,
            terms,
            reset: None,
            end: None,
            signal: None,
            deadline: None,
            is_over: false,
            ending: false,
            gone: false,
        };
        if let Some(bytes) = terms.memory {
            let mut monitor = guest.monitor.borrow_mut();
            monitor.command_in_turn("balloon", json!({"value": bytes}), "balloon");
            drop(monitor);
        }
        guest
    }

    /// How it has ended, if QEMU has not ended of itself.
    pub fn exit(self) -> Option<Exit> {
        self.end.or(self.signal.map(Exit::Signal))
    }

    /// Whether QEMU has to be killed.
    pub fn is_gone(&self) -> bool {
        self.gone
    }

    /// Sends a command, whose answer has the same `id`.
    fn command(&mut self, name: &str, arguments: Value, id: &str) {
        self.monitor.borrow_mut().command(name, arguments, id);
    }

    /// A signal that ends minivmm has come.
    pub fn signal(&mut self, signal: i32) {
        if self.signal.replace(signal).is_some() {
            self.gone = true;
            return;
        }
        log::info!("signal {signal}: pressing the guest's power button");
        self.command("system_powerdown", json!({}), "nothing");
        self.deadline = Some(Instant::now() + self.terms.grace);
    }

    /// The terminal's key ends it at once.
    pub fn end_from_terminal(&mut self) {
        self.end.get_or_insert(Exit::Terminal);
        self.end_qemu(ANSWER);
    }

    /// Its time is over.
    pub fn be_late(&mut self) {
        if self.ending {
            self.gone = true;
            return;
        }
        log::warn!("the guest has not powered off: sending QEMU `quit`");
        self.end_qemu(ANSWER);
    }

    /// Acts on what QEMU says, and returns whether clients get to know it if it is an event.
    pub fn message(&mut self, message: &Value) -> bool {
        match message["event"].as_str() {
            Some(event) => self.event(event, &message["data"]),
            None => {
                self.answer(message);
                false
            }
        }
    }

    fn event(&mut self, name: &str, data: &Value) -> bool {
        let was_over = self.is_over;
        match (name, data["reason"].as_str()) {
            // Linux tries several ways, until QEMU has stopped its CPUs.
            ("SHUTDOWN", Some("guest-reset")) if was_over => {}
            ("SHUTDOWN", Some("guest-reset")) => {
                // The panic flag of the BIOS data area, in words of two bytes. What it was, clients get to know then.
                let command = json!({"command-line": "xp /1hx 0x472"});
                self.command("human-monitor-command", command, "reset-flag");
                self.is_over = true;
                return false;
            }
            ("SHUTDOWN", Some("host-qmp-system-reset")) if self.restarts() => {
                if !was_over {
                    self.restart(false, "host-qmp-system-reset");
                }
                return false;
            }
            ("RESET", _) if self.reset.is_some() => self.has_been_reset(),
            // It goes on as if it had never stopped.
            ("RESUME", _) if was_over && !self.ending => self.is_over = false,
            ("SHUTDOWN", Some("guest-panic")) => self.quit(Exit::Panic),
            ("SHUTDOWN", Some("guest-shutdown")) => self.quit(Exit::PowerOff),
            // QEMU was asked to quit, by minivmm or another client, and does.
            ("SHUTDOWN", _) => self.end_qemu(QUIT_GRACE),
            _ => {}
        }
        self.is_over |= name == "SHUTDOWN";
        !was_over
    }

    fn answer(&mut self, message: &Value) {
        let answer = &message["return"];
        match message["id"].as_str() {
            Some("balloon") if message["error"].is_object() => {
                let why = &message["error"]["desc"];
                log::warn!("QEMU does not ask the guest to hold memory back: {why}");
            }
            Some(STATUS) if answer["status"] == "internal-error" => {
                self.publish_end(Exit::InternalError);
            }
            Some("reset-flag") => {
                let flag = answer.as_str().unwrap_or_default();
                match flag.contains("0x1234") {
                    true => self.publish_end(Exit::Panic),
                    false if self.restarts() => self.restart(true, "guest-reset"),
                    false => self.publish_end(Exit::Reboot),
                }
            }
            Some("restart") if message["error"].is_object() => {
                let why = &message["error"]["desc"];
                log::warn!("QEMU cannot restart the guest, which ends instead: {why}");
                self.publish_end(Exit::Reboot);
            }
            Some("restart") => {
                self.command("system_reset", json!({}), "nothing");
                self.command("set-action", json!({"reboot": "shutdown"}), "nothing");
            }
            _ => {}
        }
    }

    /// Whether a reset has it begin again: not if it was to power off.
    fn restarts(&self) -> bool {
        self.terms.reboot == Reboot::Restart && self.signal.is_none()
    }

    /// Has QEMU reset the guest, which stands still for that. Until QEMU allows resets (6.0 has the command), it would
    /// stop the guest again for `system_reset`.
    fn restart(&mut self, guest: bool, reason: &'static str) {
        self.is_over = true;
        self.reset = Some(Event::Reset { guest, reason });
        self.command("set-action", json!({"reboot": "reset"}), "restart");
    }

    fn has_been_reset(&mut self) {
        if self.signal.is_some() {
            return self.publish_end(Exit::Reboot);
        }
        if let Some(event) = self.reset.take() {
            log::info!("the guest restarts");
            self.events.publish(event);
        }
        self.command("cont", json!({}), "nothing");
    }

    /// An end that QEMU has no event for.
    fn publish_end(&mut self, end: Exit) {
        self.is_over = true;
        for event in Event::of_exit(&end) {
            self.events.publish(event);
        }
        self.quit(end);
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
    use std::io::{ErrorKind, Read};
    use std::os::unix::net::UnixStream;

    use super::*;

    const TERMS: Terms = Terms {
        grace: Duration::from_secs(10),
        reboot: Reboot::Exit,
        memory: None,
    };

    /// A guest, and QEMU's end of its monitor.
    fn guest() -> (Guest, UnixStream, Arc<EventHub>) {
        guest_by(TERMS)
    }

    fn guest_by(terms: Terms) -> (Guest, UnixStream, Arc<EventHub>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let monitor = Rc::new(RefCell::new(Monitor::new(ours, "running").unwrap()));
        let hub = Arc::new(EventHub::default());
        let guest = Guest::new(monitor, Arc::clone(&hub), terms);
        (guest, theirs, hub)
    }

    /// The commands that QEMU has got, but for the question whether the guest runs.
    fn sent(mut theirs: UnixStream) -> Vec<Value> {
        theirs.set_nonblocking(true).unwrap();
        let mut bytes = Vec::new();
        let end = theirs.read_to_end(&mut bytes).map_err(|error| error.kind());
        assert!(matches!(end, Ok(_) | Err(ErrorKind::WouldBlock)));
        let commands = serde_json::Deserializer::from_slice(&bytes).into_iter();
        let commands = commands.map(Result::<Value, _>::unwrap);
        commands.filter(|c| c["id"] != "run-state").collect()
    }

    /// How a guest ends after these messages, the commands that they brought about, and the events that clients get
    /// besides those of QEMU's.
    fn ended(messages: &[Value]) -> (Option<Exit>, Vec<Value>, Vec<Event>) {
        ended_by(TERMS, messages)
    }

    fn ended_by(terms: Terms, messages: &[Value]) -> (Option<Exit>, Vec<Value>, Vec<Event>) {
        let (mut guest, theirs, hub) = guest_by(terms);
        let own = hub.subscribe().unwrap();
        for message in messages {
            guest.message(message);
        }
        let own = own.take().0.into_iter().map(|stamped| stamped.event);
        (guest.exit(), sent(theirs), own.collect())
    }

    fn shutdown(reason: &str) -> Value {
        json!({"event": "SHUTDOWN", "data": {"guest": true, "reason": reason}})
    }

    #[test]
    fn reset_with_the_flag_is_a_panic_and_without_a_reboot() {
        for (flag, exit) in [("0x1234", Exit::Panic), ("0x0000", Exit::Reboot)] {
            let text = format!("0000000000000472: {flag}\r\n");
            let answer = json!({"return": text, "id": "reset-flag"});
            let (end, sent, events) = ended(&[shutdown("guest-reset"), answer]);
            assert_eq!(sent[1]["arguments"]["command-line"], "xp /1hx 0x472");
            assert_eq!(sent[2]["execute"], "quit");
            assert_eq!(events, Event::of_exit(&exit));
            assert_eq!(end, Some(exit));
        }
    }

    const RESTART: Terms = Terms {
        reboot: Reboot::Restart,
        ..TERMS
    };

    #[test]
    fn guest_that_restarts_is_reset_and_goes_on_unless_it_has_panicked() {
        let flag = |flag| json!({"return": format!("0472: {flag}"), "id": "reset-flag"});
        let messages = [
            shutdown("guest-reset"),
            shutdown("guest-reset"),
            json!({"event": "STOP"}),
            flag("0x0000"),
            json!({"return": {}, "id": "restart"}),
            json!({"event": "RESET", "data": {"guest": false, "reason": "host-qmp-system-reset"}}),
            json!({"event": "RESUME"}),
        ];
        let (end, sent, events) = ended_by(RESTART, &messages);
        assert_eq!(end, None);
        let names: Vec<_> = sent[2..].iter().map(|c| c["execute"].clone()).collect();
        assert_eq!(names, ["set-action", "system_reset", "set-action", "cont"]);
        let reason = "guest-reset";
        assert_eq!(
            events,
            [Event::Reset {
                guest: true,
                reason
            }]
        );
        // Of all these a client sees that one alone, and then again all.
        let (mut guest, _theirs, _) = guest_by(RESTART);
        assert!(messages.iter().all(|message| !guest.message(message)));
        assert!(guest.message(&json!({"event": "STOP"})));

        let (end, ..) = ended_by(RESTART, &[shutdown("guest-reset"), flag("0x1234")]);
        assert_eq!(end, Some(Exit::Panic));
    }

    #[test]
    fn guest_that_cannot_restart_ends() {
        let unknown = json!({"error": {"desc": "no set-action"}, "id": "restart"});
        let (end, ..) = ended_by(RESTART, &[shutdown("host-qmp-system-reset"), unknown]);
        assert_eq!(end, Some(Exit::Reboot));
        // It was to power off.
        let (mut guest, _theirs, _) = guest_by(RESTART);
        guest.signal(15);
        guest.message(&shutdown("guest-reset"));
        guest.message(&json!({"return": "0472: 0x0000", "id": "reset-flag"}));
        assert_eq!(guest.exit(), Some(Exit::Reboot));
    }

    #[test]
    fn power_off_and_internal_error_are_distinguished() {
        let (end, _, events) = ended(&[shutdown("guest-shutdown")]);
        assert_eq!((end, events), (Some(Exit::PowerOff), vec![]));
        let answer = json!({"return": {"status": "internal-error"}, "id": STATUS});
        let (end, _, events) = ended(&[json!({"event": "STOP"}), answer]);
        assert_eq!(end, Some(Exit::InternalError));
        assert_eq!(events, Event::of_exit(&Exit::InternalError));
    }

    #[test]
    fn pause_by_the_user_is_no_end() {
        let answer = json!({"return": {"status": "paused"}, "id": STATUS});
        assert_eq!(ended(&[json!({"event": "STOP"}), answer]).0, None);
    }

    #[test]
    fn clients_get_no_event_after_the_end_and_no_answer_to_a_command_of_minivmms() {
        let (mut guest, _theirs, _) = guest();
        let stop = json!({"event": "STOP"});
        assert!(guest.message(&stop));
        assert!(!guest.message(&json!({"return": {}, "id": "nothing"})));
        assert!(guest.message(&shutdown("guest-shutdown")));
        // QEMU is kept until minivmm has it quit.
        assert!(!guest.message(&stop));
        assert!(!guest.message(&shutdown("host-qmp-quit")));
    }

    #[test]
    fn first_signal_presses_the_button_and_the_second_kills() {
        let (mut guest, _theirs, _) = guest();
        guest.signal(15);
        assert!(guest.deadline.is_some() && !guest.gone);
        guest.signal(15);
        assert!(guest.gone);
        assert_eq!(guest.exit(), Some(Exit::Signal(15)));
    }

    #[test]
    fn guest_that_does_not_power_off_is_ended_by_quit_and_killed_last() {
        let (mut guest, theirs, _) = guest();
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
        let names: Vec<_> = sent(theirs).iter().map(|c| c["execute"].clone()).collect();
        let expected = ["qmp_capabilities", "system_powerdown", "quit", "quit"];
        assert_eq!(names, expected);
    }
}
