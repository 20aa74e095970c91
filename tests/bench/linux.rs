//! Linux guests of several monitors, side by side: Debian's cloud kernel with one CPU and 128 MiB.
//!
//! Where this machine's KVM runs Linux the times are the clock's. Elsewhere all run in the lab, whose
//! emulator then counts instructions, one a nanosecond: what is compared is work, without caches and
//! without a second CPU, and a run repeats to about 1 %.

mod disks;
pub mod monitors;
mod runs;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::assets::assets;
use crate::harness::iperf;
use crate::harness::linux;
use crate::harness::memory::{anonymous_memory, own_memory};
use crate::harness::netns::is_root;
use crate::harness::process::children;
use crate::harness::site::{Site, address, pings};
use crate::harness::vm::{self, Vm};
use crate::lab::{self, Place};
use crate::report::Table;
use disks::Disk;
use monitors::{Boot, Image, MAC, MONITORS, Monitor, WITH_DISKS};

/// The third host on the wire, see [`Site`].
const PEER: &str = "192.168.77.3";
/// For the whole run in the lab.
const LAB_LIMIT: Duration = Duration::from_secs(3600);

/// The tables: what from exec to the first line of /init takes, what a NIC and a monitor do, and what
/// a disk does, and what a command in a guest takes.
fn tables() -> [Table; 4] {
    [
        Table::new(
            "Exec to the first line of /init, ms",
            &[
                ("bzImage, own line", 0),
                ("vmlinux, own line", 0),
                ("bzImage, same line", 0),
                ("vmlinux, same line", 0),
                ("all messages", 0),
            ],
        ),
        Table::new(
            "The NIC, and what the monitor takes",
            &[
                ("ping, us", 0),
                ("TCP to it, Mbit/s", 0),
                ("from it, Mbit/s", 0),
                ("resident, kB", 0),
                ("anonymous, kB", 0),
            ],
        ),
        Table::new("A disk in the page cache, 4 KiB and 1 MiB", &disks::COLUMNS),
        Table::new("A command in a guest, ms", &runs::COLUMNS),
    ]
}
/// What is measured unless one is asked for by itself, as the disk and `run` have to be.
const PARTS: [&str; 2] = ["boot", "net"];
const BOOTS: usize = 0;
const TALKS: usize = 1;
const STORES: usize = 2;
const RUNS: usize = 3;

/// One round's figures of a monitor.
#[derive(Debug)]
struct Row {
    /// The table's number.
    table: usize,
    name: String,
    figures: Vec<Option<f64>>,
}

/// Where rows go.
type Report<'a> = &'a mut dyn FnMut(Row);

/// Measures `boot` or `net`, or both, `disk`, or `run`, in so many rounds, where Linux guests can run. The tables, and
/// whether all could be measured.
pub fn run(part: Option<&str>, rounds: usize) -> (Vec<Table>, bool) {
    let mut tables = tables();
    let mut add = |row: Row| {
        if let Some(table) = tables.get_mut(row.table) {
            table.add(&row.name, &row.figures);
        }
    };
    let done = match lab::place() {
        Place::Lab => in_lab(part, &mut add),
        // There is no other way out of the lab than a line of text.
        Place::InsideLab => measure(part, rounds, &mut |row| println!("{}", row.to_line())),
        Place::Here => measure(part, rounds, &mut add),
    };
    let with_rows = |table: &Table| table.rows().next().is_some();
    (tables.into_iter().filter(with_rows).collect(), done)
}

/// Runs this program again in the lab, for one round: what is counted repeats, and what is not says
/// little in any number of rounds. Each part has a lab of its own, as many at once as there is room
/// for: what each counts is its own.
fn in_lab(part: Option<&str>, report: Report) -> bool {
    println!(
        "This machine's KVM cannot run Linux: the guests run in an emulated machine whose KVM can."
    );
    let counted = lab::machine::counts();
    let clock = match counted {
        true => "Its clock counts instructions, one a nanosecond.",
        false => "Its times say little; `make lab-qemu` builds an emulator that counts.",
    };
    println!("{clock}");
    let parts = part.map_or(PARTS.to_vec(), |part| vec![part]);
    let (sender, rows) = mpsc::channel();
    thread::scope(|scope| {
        let start = |part| {
            let sender = sender.clone();
            scope.spawn(move || part_in_lab(part, counted, &sender))
        };
        let labs: Vec<_> = parts.into_iter().map(start).collect();
        drop(sender);
        rows.into_iter().for_each(report);
        let ended = labs.into_iter().map(|lab| lab.join().unwrap_or(false));
        let ended: Vec<bool> = ended.collect();
        !ended.contains(&false)
    })
}

/// Runs one part in a lab. Whether it is complete.
fn part_in_lab(part: &str, counted: bool, rows: &mpsc::Sender<Row>) -> bool {
    let job = lab::machine::Job {
        program: &std::env::current_exe().expect("/proc is mounted"),
        args: &["linux", part, "1"].map(str::to_owned),
        deadline: Instant::now() + LAB_LIMIT,
        counted,
    };
    let status = lab::machine::run(&job, |line| match Row::from_line(line) {
        Some(row) => {
            println!("{}, {part}: measured", row.name);
            // The receiver outlives all senders.
            let _ = rows.send(row);
        }
        None => println!("{line}"),
    });
    match status {
        Ok(0) => return true,
        Ok(status) => eprintln!("the lab's bench ended with status {status}"),
        Err(failure) => eprintln!("{failure}"),
    }
    false
}

/// What a line that carries a row out of the lab begins with.
const MARK: &str = "ROW";

impl Row {
    fn to_line(&self) -> String {
        let figure = |figure: &Option<f64>| figure.map_or("-".to_owned(), |f| f.to_string());
        let figures: Vec<_> = self.figures.iter().map(figure).collect();
        let start = [MARK, &self.table.to_string(), &self.name].join("\t");
        [start, figures.join("\t")].join("\t")
    }

    fn from_line(line: &str) -> Option<Self> {
        let mut parts = line.split('\t');
        if parts.next()? != MARK {
            return None;
        }
        Some(Self {
            table: parts.next()?.parse().ok()?,
            name: parts.next()?.to_owned(),
            figures: parts.map(|figure| figure.parse().ok()).collect(),
        })
    }
}

/// Measures whatever is here.
fn measure(part: Option<&str>, rounds: usize, report: Report) -> bool {
    if !is_root() {
        return false;
    }
    if part == Some("run") {
        runs::measure(rounds, report);
        return true;
    }
    let has_vhost = Path::new("/dev/vhost-net").exists();
    let is_here = |monitor: &&Monitor| {
        let is_here = monitor.path().is_some() && (has_vhost || !monitor.has_vhost);
        if !is_here {
            println!("{}: not here", monitor.name);
        }
        is_here
    };
    let here = |monitors: &'static [Monitor]| -> Vec<&Monitor> {
        monitors.iter().filter(is_here).collect()
    };
    let bench = Bench {
        site: Site::new(),
        config: tempfile::NamedTempFile::new()
            .expect("there is room in /tmp")
            .into_temp_path()
            .to_path_buf(),
    };
    if part == Some("disk") {
        let (disk, monitors) = (Disk::new(), here(WITH_DISKS));
        for _ in 0..rounds {
            for monitor in &monitors {
                bench.stores(monitor, &disk, report);
            }
        }
        return true;
    }
    let monitors = here(MONITORS);
    for _ in 0..rounds {
        if part != Some("net") {
            bench.boots(&monitors, report);
        }
        if part != Some("boot") {
            monitors
                .iter()
                .filter(|monitor| monitor.has_nic())
                .for_each(|monitor| bench.talks(monitor, report));
        }
    }
    true
}

/// What the command line says besides.
const QUIET: &str = "quiet";
/// Without the self-tests of the kernel's crypto, which are most of a small guest's boot.
const NO_TESTS: &str = "cryptomgr.notests";
/// Every message of the kernel on the console.
const LOUD: &str = "loglevel=7";

/// Where the guests are.
struct Bench {
    site: Site,
    /// For monitors that are configured by a file.
    config: PathBuf,
}

impl Bench {
    /// How long each takes from exec to the first line of /init: with the command line that it or
    /// its documentation gives a guest, and all with minivmm's and without self-tests.
    fn boots(&self, monitors: &[&Monitor], report: Report) {
        let mut whole = None;
        for monitor in monitors.iter().filter(|monitor| !monitor.has_vhost) {
            let mut figures = Vec::new();
            let mut times = |image: Image, line: &str| {
                let taken = monitor.program.images.contains(&image);
                let booted = taken.then(|| self.boot(monitor, image, &linux::small_initrd(), line));
                figures.push(booted.as_ref().map(|(_, took)| took.as_secs_f64() * 1000.0));
                booted.map(|(vm, _)| vm)
            };
            let own = format!("{} {QUIET}", monitor.program.line);
            for image in [Image::BzImage, Image::Vmlinux] {
                if let Some(mut vm) = times(image, own.trim()) {
                    whole.get_or_insert_with(|| {
                        vm.wait_for("GUEST ready\n");
                        vm.run("cat /proc/cmdline").trim().to_owned()
                    });
                    end(vm);
                }
            }
            let same = match (monitor.is_ours(), &whole) {
                (false, Some(whole)) => format!("{whole} {NO_TESTS}"),
                _ => format!("{QUIET} {NO_TESTS}"),
            };
            for image in [Image::BzImage, Image::Vmlinux] {
                times(image, &same).into_iter().for_each(end);
            }
            let loud = format!("{same} {LOUD}");
            let first = monitor.program.images[0];
            times(first, &loud).into_iter().for_each(end);
            report(Row {
                table: BOOTS,
                name: monitor.name.to_owned(),
                figures,
            });
        }
    }

    /// How a guest and the third host get on, and what memory its monitor takes beside the guest's.
    fn talks(&self, monitor: &Monitor, report: Report) {
        let line = format!("{} {QUIET} {NO_TESTS}", monitor.program.line);
        let initrd = linux::initrd();
        let (mut vm, _) = self.boot(monitor, monitor.program.images[0], &initrd, line.trim());
        vm.wait_for("GUEST ready\n");
        address(&mut vm, "eth0", 11);
        assert!(pings(&mut vm, PEER), "{}", vm.transcript());
        // min/avg/max
        let ping = vm.try_run(&format!("ping -q -c 100 -i 0.01 {PEER}"));
        let times = ping.text.rsplit(" = ").next().unwrap_or_default();
        let average = times.split('/').nth(1);
        let average = average.and_then(|text| text.parse::<f64>().ok());
        let mut figures = vec![average.map(|ms| ms * 1000.0)];
        let _server = iperf::serve(&self.site.peer);
        // A second of the lab's takes a minute; what is counted repeats after a quarter, too.
        let length = match lab::place() {
            Place::InsideLab => "-n 128M",
            Place::Lab | Place::Here => "-t 3",
        };
        for reverse in ["-R", ""] {
            let output = vm.try_run(&format!("iperf3 -f m -c {PEER} {length} {reverse}"));
            figures.push(mbits(&output.text));
        }
        let pid = leaf(vm.pid());
        figures.push(Some(own_memory(pid) as f64));
        figures.push(Some(anonymous_memory(pid) as f64));
        report(Row {
            table: TALKS,
            name: monitor.name.to_owned(),
            figures,
        });
        end(vm);
    }

    /// What the guest's disk does.
    fn stores(&self, monitor: &Monitor, disk: &Disk, report: Report) {
        let line = format!("{} {QUIET} {NO_TESTS}", monitor.program.line);
        let boot = Boot {
            kernel: &assets().bzimage(),
            initrd: &disk.initrd(),
            line: line.trim(),
            memory: "512M",
            disk: &disk.image(),
            config: &self.config,
        };
        let (mut vm, _) = self.start(monitor, &boot);
        vm.wait_for("GUEST ready\n");
        report(Row {
            table: STORES,
            name: monitor.name.to_owned(),
            figures: disk.measure(&mut vm),
        });
        end(vm);
    }

    /// Boots a guest, and measures how long it takes from the monitor's exec to the first line of /init.
    fn boot(&self, monitor: &Monitor, image: Image, initrd: &Path, line: &str) -> (Vm, Duration) {
        let kernel = match image {
            Image::BzImage => assets().bzimage(),
            Image::Vmlinux => assets().vmlinux(),
        };
        let boot = Boot {
            kernel: &kernel,
            initrd,
            line,
            memory: "128M",
            disk: Path::new(""),
            config: &self.config,
        };
        let booted = self.start(monitor, &boot);
        // Whoever waits for a row sees that something goes on.
        println!("{}, {}: /init runs", monitor.name, image.name());
        booted
    }

    /// Starts a monitor, and waits for its guest's first line.
    fn start(&self, monitor: &Monitor, boot: &Boot) -> (Vm, Duration) {
        fs::write(&self.config, monitor.config(boot).to_string()).expect("there is room in /tmp");
        let mut command = match monitor.takes_queue() {
            true => {
                let mut command = self.site.host.command(vm::binary());
                command.args(["net", "open", &format!("wire,mac={MAC}"), "--", "sh"]);
                command
            }
            false => self.site.host.command("sh"),
        };
        // The macvtap of others than minivmm is there before the clock runs.
        command.args(["-c", r#"echo BENCH ready; read -r go; exec "$@""#, "sh"]);
        command
            .arg(monitor.path().expect("it is here"))
            .args(monitor.args(boot));
        command.stdin(Stdio::piped());
        let mut vm = Vm::spawn(command);
        vm.wait_for("BENCH ready\n");
        let start = Instant::now();
        vm.send("go\n");
        vm.wait_for("GUEST init");
        (vm, start.elapsed())
    }
}

/// The last of a process's children's children, or the process itself: a monitor under others.
fn leaf(pid: u32) -> u32 {
    children(pid).last().map_or(pid, |&child| leaf(child))
}

/// Ends a guest by killing its monitor.
fn end(mut vm: Vm) {
    let monitor = i32::try_from(leaf(vm.pid())).ok().and_then(Pid::from_raw);
    let monitor = monitor.expect("it is a process");
    kill_process(monitor, Signal::KILL).expect("it runs");
    vm.wait_exit();
}

/// The receiver's rate in what iperf3 writes.
fn mbits(text: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.ends_with("receiver"))?;
    let (before, _) = line.split_once(" Mbits/sec")?;
    before.rsplit(' ').next()?.parse().ok()
}
