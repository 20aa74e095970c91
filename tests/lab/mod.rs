//! Where tests with a Linux guest run: here, if this machine's KVM can run Linux; else in the lab.
//!
//! The lab is a virtual machine of QEMU's emulator (no KVM needed) with nested SVM, and Debian's kernel, in which a
//! real hardware-style `/dev/kvm` works. It runs the same test binary with the same filters. Each test out here waits
//! for its counterpart inside and reports that one's result and output as its own.
//!
//! - this file: [`test()`], and the collection of results from the lab's output
//! - `machine`: QEMU and what the lab is made of
#![allow(dead_code)] // The demo uses the machine alone.

pub mod machine;

use std::collections::BTreeMap;
use std::env;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Condvar, Mutex, Once, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use vmm::probe::{Privileged, probe};

use crate::harness::netns;
use crate::harness::vm::in_lab;

/// When the tests in the lab are given up.
const LIMIT: Duration = Duration::from_secs(30 * 60);

/// Where a Linux guest can run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Place {
    /// On this machine's KVM.
    Here,
    /// On this machine's KVM, which is the lab's.
    InsideLab,
    /// Only in a lab that is still to be booted.
    Lab,
}

/// Finds out where Linux guests can run. `MINIVMM_LAB` in the environment asks for the lab where it would not be needed.
pub fn place() -> Place {
    static PLACE: OnceLock<Place> = OnceLock::new();
    *PLACE.get_or_init(|| {
        if in_lab() {
            Place::InsideLab
        } else if env::var_os("MINIVMM_LAB").is_none() && matches!(probe(), Ok(Privileged::Native))
        {
            Place::Here
        } else {
            Place::Lab
        }
    })
}

/// Runs a test's body where Linux guests can run. `name` has to be the test function's.
pub fn test(name: &str, body: impl Fn()) {
    match place() {
        Place::Here => {
            if netns::is_root() {
                body();
            }
        }
        Place::InsideLab => {
            println!("\nLAB begin {name}");
            let result = catch_unwind(AssertUnwindSafe(&body));
            println!(
                "\nLAB end {name} {}",
                if result.is_ok() { "ok" } else { "FAILED" }
            );
            if let Err(panic) = result {
                resume_unwind(panic);
            }
        }
        Place::Lab => {
            static STARTED: Once = Once::new();
            STARTED.call_once(|| drop(thread::spawn(|| LAB.run())));
            let outcome = LAB.wait(name);
            println!("{}", outcome.output);
            assert!(outcome.passed, "{name} failed in the lab, see above");
        }
    }
}

static LAB: Lab = Lab {
    state: Mutex::new(State {
        outcomes: BTreeMap::new(),
        end: None,
    }),
    changed: Condvar::new(),
};

struct Lab {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    outcomes: BTreeMap<String, Outcome>,
    /// How the lab ended.
    end: Option<String>,
}

struct Outcome {
    passed: bool,
    output: String,
}

impl Lab {
    /// Boots the lab and collects its results, to its end.
    fn run(&self) {
        let program = env::current_exe().expect("/proc is mounted");
        let mut args = filters(env::args().skip(1));
        args.extend(["--nocapture".to_owned(), "--test-threads=1".to_owned()]);
        say("this machine's KVM cannot run Linux: booting the lab");
        let mut collector = Collector {
            lab: self,
            start: Instant::now(),
            tests: 0,
            current: None,
            last: None,
        };
        let job = machine::Job {
            program: &program,
            args: &args,
            deadline: Instant::now() + LIMIT,
            counted: false,
        };
        // A panic here has to reach whoever waits for a result.
        let run = AssertUnwindSafe(|| machine::run(&job, |line| collector.line(line)));
        let end = match catch_unwind(run) {
            Ok(Ok(status)) => format!("it ended with status {status}"),
            Ok(Err(failure)) => failure,
            Err(panic) => panic.downcast_ref::<String>().cloned().unwrap_or_default(),
        };
        collector.finish(end);
    }

    /// Waits for the result of a test.
    fn wait(&self, name: &str) -> Outcome {
        let mut state = self.state.lock().expect("no holder panics");
        loop {
            if let Some(outcome) = state.outcomes.remove(name) {
                return outcome;
            }
            if let Some(end) = &state.end {
                return Outcome {
                    passed: false,
                    output: format!("no result from the lab: {end}"),
                };
            }
            state = self.changed.wait(state).expect("no holder panics");
        }
    }

    fn publish(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().expect("no holder panics"));
        self.changed.notify_all();
    }
}

/// Makes results of the lab's output.
struct Collector<'a> {
    lab: &'a Lab,
    start: Instant,
    tests: u32,
    /// The test that runs, since when, and its output so far.
    current: Option<(String, Instant, String)>,
    /// The test that ended last. It is held back until the next begins or the lab ends, since this process may end,
    /// without the closing summary, as soon as its last test has a result.
    last: Option<(String, Outcome)>,
}

impl Collector<'_> {
    fn line(&mut self, line: &str) {
        if let Some((_, name)) = line.split_once("LAB begin ") {
            self.publish_last();
            self.current = Some((name.to_owned(), Instant::now(), String::new()));
        } else if let Some(verdict) = line.strip_prefix("LAB end ") {
            if let Some((name, start, output)) = self.current.take() {
                let passed = verdict == format!("{name} ok");
                self.tests += 1;
                let result = if passed { "ok" } else { "FAILED" };
                say(&format!(
                    "{name} ... {result} ({:.1} s)",
                    start.elapsed().as_secs_f64()
                ));
                self.last = Some((name, Outcome { passed, output }));
            }
        } else {
            if line.starts_with("NOT TESTED: ") {
                say(line);
            }
            if let Some((_, _, output)) = &mut self.current {
                output.push_str(line);
                output.push('\n');
            }
        }
    }

    fn publish_last(&mut self) {
        if let Some((name, outcome)) = self.last.take() {
            self.lab
                .publish(|state| drop(state.outcomes.insert(name, outcome)));
        }
    }

    fn finish(mut self, end: String) {
        let (tests, seconds) = (self.tests, self.start.elapsed().as_secs());
        say(&format!("{tests} tests in {seconds} s; {end}"));
        self.publish_last();
        let output = self
            .current
            .take()
            .map(|(name, _, output)| format!("\n{name} ran:\n{output}"));
        self.lab
            .publish(|state| state.end = Some(end + &output.unwrap_or_default()));
    }
}

/// Writes to stderr directly, which is not captured with the test's output.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "lab: {text}");
}

/// Of the test binary's arguments, those that choose tests.
fn filters(args: impl Iterator<Item = String>) -> Vec<String> {
    const WITH_VALUE: &[&str] = &[
        "--color",
        "--format",
        "--logfile",
        "--report-time",
        "--shuffle-seed",
        "--test-threads",
        "-Z",
    ];
    let mut chosen = Vec::new();
    let mut args = args.peekable();
    while let Some(arg) = args.next() {
        if arg == "--skip" {
            chosen.push(arg);
            chosen.extend(args.next());
        } else if WITH_VALUE.contains(&arg.as_str()) {
            args.next();
        } else if !arg.starts_with('-')
            || arg.starts_with("--skip=")
            || ["--exact", "--ignored", "--include-ignored"].contains(&arg.as_str())
        {
            chosen.push(arg);
        }
    }
    chosen
}
