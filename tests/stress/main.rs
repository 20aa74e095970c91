//! `make stress`: `minivmm run` many times over, in turn or at once, with each kind of end, and with SIGKILL at any moment.
//!
//!     stress [--runs N] [--jobs N] [--seed N]
//!
//! Each run's status, reason and output are compared with what its command is known to do. After each run, or after those that went on
//! at once, nothing may be there that was not there before: processes, mounts, links, sockets, cgroups, device nodes, and files in
//! /tmp, /run and /dev/shm. So that nothing else on the host is seen, or comes to harm, all of it has namespaces of its own.

/// Of the tests' harness, what an example can use too.
#[allow(dead_code)] // The tests use more of it.
#[path = "../harness"]
mod harness {
    pub mod assets;
    pub mod patience;
    pub mod process;
    pub use patience::{PATIENCE, eventually};
}
mod cases;
mod snapshot;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cases::{Case, Random, Victim};
use harness::assets::{Assets, assets};
use harness::process::{Killed, children_left};
use rustix::process::{Pid, Signal, kill_process};
use snapshot::{left, snapshot};

const USAGE: &str = "usage: stress [--runs N] [--jobs N] [--seed N]";

/// What is inside of the namespaces: empty directories for what may be left, and a link for macvtaps.
const ENTER: &str = "mount -t tmpfs tmp /tmp && mkdir /tmp/cgroup && mount --rbind /sys/fs/cgroup /tmp/cgroup && \
    mount -t sysfs sys /sys && mount --move /tmp/cgroup /sys/fs/cgroup && rmdir /tmp/cgroup && \
    mount -t tmpfs run /run && mount -t tmpfs shm /dev/shm && \
    ip link set lo up && ip link add lower type veth peer name far && ip link set far up && ip link set lower up && exec \"$@\"";

/// Longer than the longest run takes where thirty share two processors.
const LONGEST: Duration = Duration::from_secs(1200);
/// More than a pipe holds.
const INPUT: usize = 100_000;

struct Options {
    runs: u64,
    jobs: u64,
    seed: u64,
    /// Inside of the namespaces.
    is_inside: bool,
}

fn main() -> ExitCode {
    let Some(options) = options() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    if !options.is_inside {
        // Fetched outside, where there is a network.
        assets();
        let error = enter(&options);
        eprintln!("cannot run unshare: {error}");
        return ExitCode::FAILURE;
    }
    // The first process of a namespace is ended by no signal that it does not ask for.
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let ends = Arc::new(AtomicBool::new(true));
        signal_hook::flag::register_conditional_shutdown(signal, 130, ends).expect("a handler");
    }
    match Stress::new(&options).run() {
        0 => ExitCode::SUCCESS,
        wrong => {
            println!("{wrong} of {} runs went wrong, see above", options.runs);
            ExitCode::FAILURE
        }
    }
}

fn options() -> Option<Options> {
    let mut options = Options {
        runs: 50,
        jobs: 1,
        seed: u64::from(std::process::id()),
        is_inside: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match &word[..] {
            "--inside" => options.is_inside = true,
            "--runs" => options.runs = words.next()?.parse().ok()?,
            "--jobs" => options.jobs = words.next()?.parse().ok().filter(|jobs| *jobs > 0)?,
            "--seed" => options.seed = words.next()?.parse().ok()?,
            _ => return None,
        }
    }
    Some(options)
}

/// Becomes the same program in namespaces of its own. It returns when that fails.
fn enter(options: &Options) -> io::Error {
    let number = |number: u64| number.to_string();
    Command::new("unshare")
        .args([
            "--mount",
            "--net",
            "--ipc",
            "--pid",
            "--fork",
            "--kill-child",
        ])
        .args(["--mount-proc", "sh", "-c", ENTER, "sh"])
        .arg(fs::canonicalize("/proc/self/exe").expect("this program is a file"))
        .args(["--inside", "--runs", &number(options.runs)])
        .args([
            "--jobs",
            &number(options.jobs),
            "--seed",
            &number(options.seed),
        ])
        .env_remove("XDG_RUNTIME_DIR")
        .env_remove("RUST_LOG")
        .exec()
}

struct Stress {
    assets: &'static Assets,
    runs: u64,
    jobs: u64,
    random: Random,
    /// How long the last run took of which no process was killed, in milliseconds.
    took: AtomicU64,
}

impl Stress {
    fn new(options: &Options) -> Self {
        println!("seed {}", options.seed);
        Self {
            assets: assets(),
            runs: options.runs,
            jobs: options.jobs,
            random: Random(options.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            took: AtomicU64::new(0),
        }
    }

    /// Runs all; how many went wrong.
    fn run(mut self) -> u64 {
        // The first makes the directories that stay, and shows how long one takes.
        let first = Job {
            number: 0,
            case: Case::Exit(0),
            random: self.random.below(u64::MAX),
        };
        if let Err(why) = self.job(first) {
            println!("the first run failed: {why}");
            return self.runs;
        }
        let before = snapshot();
        let (mut done, mut wrong) = (0, 0);
        let mut kinds = BTreeMap::<_, u64>::new();
        let begun = Instant::now();
        while done < self.runs {
            let jobs: Vec<_> = (done..self.runs.min(done + self.jobs))
                .map(|number| Job {
                    number,
                    case: Case::random(&mut self.random),
                    random: self.random.below(u64::MAX) | 1,
                })
                .collect();
            done += jobs.len() as u64;
            for job in &jobs {
                *kinds.entry(job.case.kind()).or_default() += 1;
            }
            let leaves = jobs
                .iter()
                .any(|job| matches!(job.case, Case::Killed(Victim::Both)));
            let failed: Vec<String> = thread::scope(|scope| {
                let this = &self;
                let threads: Vec<_> = jobs
                    .iter()
                    .map(|job| scope.spawn(move || this.job(*job)))
                    .collect();
                threads
                    .into_iter()
                    .filter_map(|thread| thread.join().expect("no panic").err())
                    .collect()
            });
            wrong += failed.len() as u64;
            failed.iter().for_each(|why| println!("{why}"));
            if let Some(left) = left(&before, leaves) {
                println!("after {jobs:?} there is left: {left}");
                // Else each later run would be blamed for it.
                return wrong + 1;
            }
            if done % 50 < jobs.len() as u64 {
                println!(
                    "{done} runs in {} s, {wrong} wrong",
                    begun.elapsed().as_secs()
                );
            }
        }
        println!(
            "{kinds:?}\n{done} runs, {} at once: {wrong} wrong, nothing left",
            self.jobs
        );
        wrong
    }

    /// Runs one; what is wrong with it.
    fn job(&self, job: Job) -> Result<(), String> {
        let mut random = Random(job.random | 1);
        let begun = Instant::now();
        let result = PathBuf::from(format!("/tmp/result-{}", job.number));
        let mut child = self.start(job.case, &result, &mut random);
        let (mut stdout, mut stderr) = (
            child.stdout.take().expect("piped"),
            child.stderr.take().expect("piped"),
        );
        let mut stdin = child.stdin.take().expect("piped");
        let input: Vec<u8> = (0..INPUT).map(|_| random.below(256) as u8).collect();
        let moment = Duration::from_millis(random.below(self.took.load(Ordering::Relaxed).max(1)));
        let (status, killed, output, log) = thread::scope(|scope| {
            // It breaks where the command reads nothing.
            scope.spawn(|| stdin.write_all(&input).map(|()| drop(stdin)));
            let output = scope.spawn(move || read(&mut stdout));
            let log = scope.spawn(move || String::from_utf8_lossy(&read(&mut stderr)).into_owned());
            let killed = match job.case {
                Case::Killed(victim) => kill(victim, &mut child, moment, &mut random),
                _ => Vec::new(),
            };
            let status = end(&mut child);
            (
                status,
                killed,
                output.join().expect("no panic"),
                log.join().expect("no panic"),
            )
        });
        if !matches!(job.case, Case::Killed(_) | Case::Timeout) {
            self.took
                .store(begun.elapsed().as_millis() as u64, Ordering::Relaxed);
        }
        let report = fs::read(&result).unwrap_or_default();
        let _ = fs::remove_file(&result);
        let report: serde_json::Value = serde_json::from_slice(&report).unwrap_or_default();
        let reason = report["reason"].as_str().unwrap_or_default();
        let is_whole = match reason {
            "exited" | "signal" => output == input,
            _ => input.starts_with(&output),
        };
        match status.is_some_and(|status| job.case.allows(status, reason)) && is_whole {
            true => Ok(()),
            false => Err(format!(
                "run {}, {:?} (killed after {moment:?}: {killed:?}): {status:?}, reason {reason:?}, {} of {INPUT} bytes, stderr:\n{log}",
                job.number,
                job.case,
                output.len()
            )),
        }
    }

    fn start(&self, case: Case, result: &Path, random: &mut Random) -> Killed {
        let mut command =
            Command::new(std::env::var_os("MINIVMM_BIN").expect("make stress sets it"));
        command
            .args(["run", "--memory", "256M", "--kernel"])
            .arg(self.assets.bzimage());
        command
            .arg("--modules")
            .arg(self.assets.modules())
            .arg("--result")
            .arg(result);
        command.args(random.pick(&[
            &[][..],
            &["--share", "/usr:/mnt/usr:ro"],
            &["--macvtap", "lower,ip=10.77.0.2/24"],
            &["--user-net", "ip=none"],
        ]));
        if matches!(case, Case::Timeout) {
            command.args(["--timeout", "1s"]);
        }
        command.arg("--").args(case.command()).current_dir("/");
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Killed(command.spawn().expect("minivmm starts"))
    }
}

#[derive(Clone, Copy, Debug)]
struct Job {
    number: u64,
    case: Case,
    random: u64,
}

fn read(from: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).expect("a pipe can be read");
    bytes
}

/// Waits for the end; none is one that does not come.
fn end(child: &mut Killed) -> Option<ExitStatus> {
    let begun = Instant::now();
    loop {
        match child.try_wait().expect("its parent may wait") {
            None if begun.elapsed() < LONGEST => thread::sleep(Duration::from_millis(20)),
            None => {
                let _ = child.kill();
                return None;
            }
            status => return status,
        }
    }
}

/// Kills at the moment, if all is still there then; who was killed.
fn kill(victim: Victim, child: &mut Killed, moment: Duration, random: &mut Random) -> Vec<u32> {
    thread::sleep(moment);
    // As long as it is not waited for its number is its own.
    if child.try_wait().expect("its parent may wait").is_some() {
        return Vec::new();
    }
    let run = child.id();
    let vms = children_left(run).unwrap_or_default();
    let victims = match victim {
        Victim::Run => vec![run],
        Victim::Vm => vms,
        Victim::Both => [vms, vec![run]].concat(),
        Victim::Below => {
            let below: Vec<_> = vms
                .into_iter()
                .filter_map(children_left)
                .flatten()
                .collect();
            below
                .get(random.below(below.len().max(1) as u64) as usize)
                .copied()
                .into_iter()
                .collect()
        }
    };
    for pid in &victims {
        // One that has ended meanwhile is no one else: numbers of a young namespace are not used again so soon.
        let _ = kill_process(Pid::from_raw(*pid as i32).expect("not 0"), Signal::KILL);
    }
    victims
}
