//! The terminal of the programs of `minivmm net open`: root's stays root's.

use std::io::{Read, Write};
use std::sync::{Arc, Mutex};

use rustix::process::{kill_process, test_kill_process};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcgetwinsize, tcsetwinsize};

use super::harness::process::Killed;
use super::harness::pty::Pty;
use super::*;

/// A terminal of root's with a session on it.
struct Screen {
    pty: Pty,
    child: Killed,
    shown: Arc<Mutex<String>>,
}

impl Screen {
    /// Starts `minivmm net open lower --user USER -- sh -c SCRIPT` there, as a shell does by
    /// `line`.
    fn start(place: &Place, line: &str, script: &str) -> Self {
        let pty = Pty::new();
        let mut size = tcgetwinsize(&pty.terminal).unwrap();
        (size.ws_row, size.ws_col) = (33, 77);
        tcsetwinsize(&pty.terminal, size).unwrap();
        let way = ["bash", "-c", line, "bash"];
        let args = ["lower", "--user", USER, "--", "bash", "-c", script];
        let child = pty.start(&mut place.open_by(&way, &args));
        let shown = Arc::new(Mutex::new(String::new()));
        let (mut output, more) = (pty.keyboard.try_clone().unwrap(), Arc::clone(&shown));
        // Ends with the terminal's other side.
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..count]);
                more.lock().unwrap().push_str(&text);
            }
        });
        Self { pty, child, shown }
    }

    fn shown(&self) -> String {
        self.shown.lock().unwrap().clone()
    }

    #[track_caller]
    fn wait_for(&self, text: &str) {
        let is_shown = eventually(|| self.shown().contains(text));
        assert!(is_shown, "no {text:?} in {:?}", self.shown());
    }

    /// The number after `name=`.
    #[track_caller]
    fn number(&self, name: &str) -> u32 {
        let found = || {
            let shown = self.shown();
            let (_, rest) = shown.split_once(&format!("{name}="))?;
            let (number, _) = rest.split_once(|c: char| !c.is_ascii_digit())?;
            number.parse().ok()
        };
        assert!(eventually(|| found().is_some()), "{name}: {}", self.shown());
        found().unwrap()
    }

    fn type_keys(&mut self, keys: &str) {
        self.pty.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    fn is_raw(&self) -> bool {
        let settings = tcgetattr(&self.pty.terminal).unwrap();
        !settings.local_modes.contains(LocalModes::ICANON)
    }

    fn size(&mut self, rows: u16) {
        let size = tcgetwinsize(&self.pty.terminal).unwrap();
        let size = Winsize {
            ws_row: rows,
            ..size
        };
        tcsetwinsize(&self.pty.terminal, size).unwrap();
    }

    #[track_caller]
    fn assert_ends(&mut self, status: i32) {
        let mut ended = None;
        let has_ended = eventually(|| {
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        });
        assert!(has_ended, "{}", self.shown());
        assert_eq!(ended.unwrap().code(), Some(status), "{}", self.shown());
        assert!(!self.is_raw(), "the terminal is as before");
    }
}

/// A field of /proc/PID/stat, counted as in proc(5).
fn stat(pid: u32, field: usize) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, rest) = text.rsplit_once(')').unwrap();
    rest.split_whitespace().nth(field - 3).unwrap().to_owned()
}

/// The terminal's number, as in /proc/PID/stat.
fn number_of(terminal: &OwnedFd) -> String {
    let device = rustix::fs::fstat(terminal).unwrap().st_rdev;
    let (major, minor) = (libc::major(device), libc::minor(device));
    (((minor & 0xfff00) << 12) | (major << 8) | (minor & 0xff)).to_string()
}

const TTY: usize = 7;
const SESSION: usize = 6;

guest_test!(program_of_another_user_gets_its_own_terminal, || {
    let place = Place::new();
    // The shell types what root's shell would read by TIOCSTI, once the program has ended.
    let script = "trap 'echo interrupted' INT; echo pid=$$ size=$(stty size); \
                  perl -e 'ioctl(STDIN, 0x5412, $_) for split //, \"injected\\n\"' 2>/dev/null; \
                  while read -r line || [ $? -gt 128 ]; do echo \"<$line> $(stty size)\"; [ \"$line\" = end ] && exit 7; done";
    let mut screen = Screen::start(&place, "\"$@\"; read -t 1 line; exit $?$line", script);
    let pid = screen.number("pid");
    screen.wait_for("size=33 77");
    let outer = number_of(&screen.pty.terminal);
    assert_ne!(stat(pid, TTY), outer, "the controlling terminal is root's");
    assert_ne!(stat(pid, TTY), "0", "job control takes one");
    assert_ne!(stat(pid, SESSION), screen.child.id().to_string());
    let owner = fs::metadata(format!("/proc/{pid}/fd/0")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&owner), USER_ID);
    screen.type_keys("hello\r");
    screen.wait_for("<hello> 33 77\r\n");
    screen.size(44);
    let mut asked = 0;
    let is_resized = eventually(|| {
        screen.type_keys("size\r");
        asked += 1;
        screen.shown().contains("<size> 44 77")
    });
    assert!(is_resized, "{}", screen.shown());
    // A bash that is interrupted while it reads what is in $( ) does not run its trap.
    let has_answered = eventually(|| screen.shown().matches("<size> ").count() == asked);
    assert!(has_answered, "{}", screen.shown());
    screen.type_keys("\x03");
    screen.wait_for("interrupted");
    screen.type_keys("end\r");
    // No line came to root's shell: read ends by its limit (above 128).
    screen.assert_ends(142);
});

guest_test!(program_on_its_own_terminal_stops_with_minivmm, || {
    let place = Place::new();
    // A shell with job control says when its job has stopped.
    let line = "set -m; \"$@\"; echo stopped; read; fg >/dev/null; exit $?";
    let script =
        "echo pid=$$; while read -r line; do echo \"<$line>\"; [ \"$line\" = end ] && exit 7; done";
    let mut screen = Screen::start(&place, line, script);
    let pid = screen.number("pid");
    assert!(eventually(|| screen.is_raw()));
    screen.type_keys("\x1a");
    screen.wait_for("stopped");
    assert!(!screen.is_raw(), "root's shell has its terminal back");
    assert_eq!(stat(pid, 3), "T");
    screen.type_keys("\r");
    assert!(eventually(|| screen.is_raw()), "{}", screen.shown());
    screen.type_keys("again\r");
    screen.wait_for("<again>");
    screen.type_keys("end\r");
    screen.assert_ends(7);
});

guest_test!(program_on_a_terminal_of_its_own_ends_with_minivmm, || {
    let place = Place::new();
    // minivmm as the leader of the session, and as its job.
    for (line, signal) in [
        ("exec \"$@\"", Signal::KILL),
        ("exec \"$@\"", Signal::TERM),
        ("echo $$ >/dev/null; \"$@\"", Signal::KILL),
    ] {
        let script =
            "trap '' HUP; sh -c 'trap \"\" HUP; exec sleep 1000' & echo pid=$! own=$$; wait";
        let screen = Screen::start(&place, line, script);
        let programs = [screen.number("pid"), screen.number("own")];
        let minivmm = parent_minivmm(programs[1]);
        kill_process(minivmm, signal).unwrap();
        assert!(
            eventually(|| test_kill_process(minivmm).is_err()
                || !is_running(minivmm.as_raw_nonzero().get() as u32)),
            "minivmm ends"
        );
        // What a terminated program leaves is its own, as everywhere.
        let ended = if signal == Signal::KILL {
            &programs[..]
        } else {
            &programs[1..]
        };
        for &pid in ended {
            assert!(
                eventually(|| !is_running(pid)),
                "{signal:?} {pid} of {programs:?}"
            );
        }
        let _ = kill_process(Pid::from_raw(programs[0] as i32).unwrap(), Signal::KILL);
    }
});

guest_test!(stopped_program_on_its_own_terminal_ends_with_us, || {
    let place = Place::new();
    let line = "set -m; \"$@\"; echo stopped; read";
    let mut screen = Screen::start(&place, line, "echo pid=$$; read");
    let pid = screen.number("pid");
    assert!(eventually(|| screen.is_raw()));
    screen.type_keys("\x1a");
    screen.wait_for("stopped");
    kill_process(parent_minivmm(pid), Signal::KILL).unwrap();
    assert!(eventually(|| !is_running(pid)));
});

guest_test!(output_on_its_own_terminal_comes_whole_and_unchanged, || {
    let place = Place::new();
    // More than a terminal holds, and the last of it just before the end.
    let script = "stty -opost; echo begin=; seq 1 20000; printf 'last\\nline='; exit 7";
    let mut screen = Screen::start(&place, "\"$@\"; status=$?; echo over; exit $status", script);
    screen.wait_for("over");
    let shown = screen.shown();
    let (_, shown) = shown.split_once("begin=\n").expect("no carriage return");
    let numbers: String = (1..=20_000).map(|number| format!("{number}\n")).collect();
    assert!(shown.starts_with(&numbers), "{}", shown.len());
    assert_eq!(&shown[numbers.len()..], "last\nline=over\r\n");
    screen.assert_ends(7);
});

guest_test!(program_keeps_its_pipe_and_gets_a_terminal_besides, || {
    let place = Place::new();
    let script = "read -r line; [ -t 0 ] || echo piped=$line; [ -t 1 ] && tty <&1; read -ra stat </proc/$$/stat; \
                  echo tty=${stat[6]}; read -r </dev/tty; exit 7";
    let mut screen = Screen::start(&place, "echo some | \"$@\"; exit $?", script);
    screen.wait_for("piped=some");
    assert_ne!(
        screen.number("tty").to_string(),
        number_of(&screen.pty.terminal)
    );
    // Its keys are the shell's: Ctrl-C is minivmm's, which passes it on.
    screen.type_keys("\x03");
    screen.assert_ends(130);
});

/// The minivmm that a program was started by.
fn parent_minivmm(mut pid: u32) -> Pid {
    let name = |pid: u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
    while name(pid).trim() != "minivmm" {
        pid = stat(pid, 4).parse().unwrap();
    }
    Pid::from_raw(pid as i32).unwrap()
}

guest_test!(program_without_a_terminal_cannot_open_roots, || {
    let place = Place::new();
    for line in ["exec \"$@\"", "\"$@\"; exit $?"] {
        let files = place.path("output");
        let line = format!("exec </dev/null >{} 2>&1; {line}", files.display());
        let script =
            "read -ra stat </proc/$$/stat; echo tty=${stat[6]}; : </dev/tty && exit 1; exit 7";
        let mut screen = Screen::start(&place, &line, script);
        screen.assert_ends(7);
        let shown = fs::read_to_string(&files).unwrap();
        assert!(shown.contains("tty=0\n"), "{shown}");
    }
});

guest_test!(program_of_the_terminals_own_user_keeps_it, || {
    let place = Place::new();
    let line = format!("chown {USER_ID} $(tty); exec \"$@\"");
    let script = "read -ra stat </proc/$$/stat; echo tty=${stat[6]}; exit 7";
    let mut screen = Screen::start(&place, &line, script);
    let outer = number_of(&screen.pty.terminal);
    assert_eq!(screen.number("tty").to_string(), outer);
    screen.assert_ends(7);
});
