//! What `minivmm run -- true` costs beside the same kernel with an init that powers off at once, and where that goes. Both have
//! the memory that `run` gives; the root is that of the machine that measures.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;
use tempfile::TempDir;

use super::{RUNS, Report, Row};
use crate::harness::assets::assets;
use crate::harness::initramfs::Archive;
use crate::harness::netns::Netns;
use crate::harness::process::Killed;
use crate::harness::tiny;
use crate::harness::vm::binary;
use crate::report::Column;

/// All of it, from exec to the end of `minivmm`; what that is more than the kernel alone; and its parts.
pub const COLUMNS: [Column; 12] = [
    ("all", 1),
    ("more than the kernel alone", 1),
    ("plan", 1),
    ("VM's start", 1),
    ("kernel", 1),
    ("modules", 1),
    ("connection", 1),
    ("root", 1),
    ("network", 1),
    ("ready", 1),
    ("command", 1),
    ("power-off, exit", 1),
];
/// The memory of `run`'s guests, unless another size is asked for.
const MEMORY: &str = "1G";
/// `reboot(LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_POWER_OFF)`, in machine code.
const POWER_OFF: &[u8] = &[
    0xbf, 0xad, 0xde, 0xe1, 0xfe, // mov edi, 0xfee1dead
    0xbe, 0x69, 0x19, 0x12, 0x28, // mov esi, 0x28121969
    0xba, 0xdc, 0xfe, 0x21, 0x43, // mov edx, 0x4321fedc
    0xb8, 0xa9, 0x00, 0x00, 0x00, // mov eax, SYS_reboot
    0x0f, 0x05, // syscall
    0xeb, 0xfe, // jmp to itself
];

/// Measures so many rounds.
pub fn measure(rounds: usize, report: Report) {
    let place = TempDir::new().expect("there is room in /tmp");
    let host = Netns::new();
    for _ in 0..rounds {
        let alone = host.enter(|| kernel_alone(place.path()));
        report(row("kernel alone", alone, None, &[]));
        for (name, options) in [("run", &[][..]), ("run --user-net", &["--user-net"])] {
            let result = place.path().join("result.json");
            let all = host.enter(|| run(&result, options));
            let text = fs::read(&result).expect("there is a report");
            let result: Value = serde_json::from_slice(&text).expect("it is JSON");
            report(row(name, all, Some(alone), &parts(&result, all)));
        }
    }
}

fn row(name: &str, all: f64, alone: Option<f64>, parts: &[Option<f64>]) -> Row {
    let mut figures = vec![Some(all), alone.map(|alone| all - alone)];
    figures.extend(parts);
    figures.resize(COLUMNS.len(), None);
    println!("{name}: measured");
    Row {
        table: RUNS,
        name: name.to_owned(),
        figures,
    }
}

/// The kernel with an init that powers off, in ms.
fn kernel_alone(place: &Path) -> f64 {
    let initrd = place.join("initrd");
    let mut archive = Archive::new();
    archive.bytes("/init", &tiny::elf(POWER_OFF, 0), 0o755);
    fs::write(&initrd, archive.finish()).expect("there is room in /tmp");
    let mut command = Command::new(binary());
    command.arg("--kernel").arg(assets().bzimage());
    command.arg("--initrd").arg(initrd);
    command.args(["-q", "--memory", MEMORY, "--cmdline", "quiet"]);
    timed(command)
}

/// `minivmm run -- true`, in ms.
fn run(result: &Path, options: &[&str]) -> f64 {
    let mut command = Command::new(binary());
    command.args(["run", "--accel", "kvm", "--kernel"]);
    command.arg(assets().bzimage()).arg("--modules");
    command.arg(assets().modules()).args(options);
    command.arg("--result").arg(result).args(["--", "true"]);
    timed(command)
}

/// Milliseconds from the start of a program to its end.
fn timed(mut command: Command) -> f64 {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let start = Instant::now();
    let mut child = Killed(command.spawn().expect("it starts"));
    let status = child.wait().expect("it is a child");
    let took = start.elapsed();
    assert!(status.success(), "{command:?}: {status}");
    took.as_secs_f64() * 1000.0
}

/// The columns after the first two, from what the run reports and how long it took in all.
fn parts(result: &Value, all: f64) -> Vec<Option<f64>> {
    let at = |list: &str, name: &str| {
        let mut stages = result[list].as_array()?.iter();
        let stage = stages.find(|stage| stage["name"] == name)?;
        Some(stage["at"].as_f64()? * 1000.0)
    };
    let host = |name: &str| at("stages", name);
    let guest = |name: &str| at("guest-stages", name);
    // The guest's clock began some time after its first instruction.
    let connected = || Some((host("init")? - host("running")?, guest("connected")?));
    let kernel = || connected().and_then(|(whole, at)| Some(whole - (at - guest("init")?)));
    let between = |from: Option<f64>, to: Option<f64>| Some(to? - from?);
    vec![
        host("planned"),
        between(host("planned"), host("running")),
        kernel(),
        between(guest("init"), guest("modules")),
        between(guest("modules"), guest("connected")),
        between(guest("connected"), guest("root")),
        between(guest("root"), guest("network")),
        between(host("ready"), host("command")),
        between(host("command"), host("ended")),
        between(host("ended"), Some(all)),
    ]
}
