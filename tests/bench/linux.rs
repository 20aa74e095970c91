//! Linux guests: minivmm's NIC on each transport with each backend, and QEMU's on the same kind of
//! macvtap, side by side in one run, several times.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::harness::assets::assets;
use crate::harness::iperf;
use crate::harness::linux;
use crate::harness::memory::own_memory;
use crate::harness::netns::is_root;
use crate::harness::site::{Site, address, pings};
use crate::harness::vm::{self, Vm};
use crate::lab::{self, Place};

/// What is compared: a name, and the arguments.
const SETUPS: &[(&str, &[&str])] = &[
    (
        "pci, vhost-net",
        &["--transport", "pci", "--macvtap", "wire,backend=vhost"],
    ),
    (
        "pci, own threads",
        &["--transport", "pci", "--macvtap", "wire,backend=user"],
    ),
    (
        "mmio, vhost-net",
        &["--transport", "mmio", "--macvtap", "wire,backend=vhost"],
    ),
    (
        "mmio, own threads",
        &["--transport", "mmio", "--macvtap", "wire,backend=user"],
    ),
    (
        "QEMU q35, vhost-net",
        &["qemu", "--accel", "kvm", "--macvtap", "wire,vhost=on"],
    ),
    (
        "QEMU q35, own thread",
        &["qemu", "--accel", "kvm", "--macvtap", "wire,vhost=off"],
    ),
];

/// What is measured of each: its name, and how many decimals make sense.
const FIGURES: [(&str, usize); 5] = [
    ("to init, ms", 0),
    ("ping, us", 0),
    ("sends, Gbit/s", 2),
    ("receives, Gbit/s", 2),
    ("memory, MiB", 1),
];
type Sample = [f64; FIGURES.len()];

/// The third host on the wire, see [`Site`].
const PEER: &str = "192.168.77.3";
/// For the whole run in the lab.
const LAB_LIMIT: Duration = Duration::from_secs(3600);

/// Compares the setups in so many rounds, where Linux guests can run; whether it came to a result.
pub fn run(rounds: usize) -> bool {
    match lab::place() {
        Place::Lab => in_lab(rounds),
        Place::InsideLab | Place::Here => is_root() && compare(rounds),
    }
}

/// Runs this program again in the lab.
fn in_lab(rounds: usize) -> bool {
    println!(
        "This machine's KVM cannot run Linux: everything runs in an emulated machine whose KVM can. The figures then show \
         that it works, and not how fast it is."
    );
    let program = std::env::current_exe().expect("/proc is mounted");
    let job = lab::machine::Job {
        program: &program,
        args: &["linux".to_owned(), rounds.to_string()],
        deadline: Instant::now() + LAB_LIMIT,
    };
    lab::machine::run_shown(&job)
}

/// Measures everything that can be had here, each setup once a round, and prints medians and
/// spreads.
fn compare(rounds: usize) -> bool {
    let has_vhost = Path::new("/dev/vhost-net").exists();
    let has_qemu = Command::new("qemu-system-x86_64")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok();
    let can = |(name, args): &&(&str, &[&str])| {
        let can = (has_vhost || !name.ends_with("vhost-net")) && (has_qemu || args[0] != "qemu");
        if !can {
            println!("{name}: not here");
        }
        can
    };
    let setups: Vec<_> = SETUPS.iter().filter(can).collect();
    let mut samples = vec![Vec::<Sample>::new(); setups.len()];
    for round in 1..=rounds {
        for ((name, args), samples) in setups.iter().zip(&mut samples) {
            println!("round {round} of {rounds}: {name}");
            samples.push(measure(args));
        }
    }
    println!("\nMedians (least-most):\n");
    print!("{:<22}", "");
    FIGURES.iter().for_each(|(name, _)| print!("{name:>23}"));
    println!();
    for ((name, _), samples) in setups.iter().zip(&samples) {
        print!("{name:<22}");
        for (figure, (_, decimals)) in FIGURES.iter().enumerate() {
            let mut values: Vec<_> = samples.iter().map(|sample| sample[figure]).collect();
            values.sort_by(f64::total_cmp);
            let (Some(least), Some(most)) = (values.first(), values.last()) else {
                continue;
            };
            let median = values[values.len() / 2];
            let text = format!("{median:.decimals$} ({least:.decimals$}-{most:.decimals$})");
            print!("{text:>23}");
        }
        println!();
    }
    true
}

/// Boots a guest with one CPU and 256 MiB, and lets it talk to the third host.
fn measure(args: &[&str]) -> Sample {
    let site = Site::new();
    let mut command = site.host.command(vm::binary());
    command.args(args).args(["--memory", "256M", "--kernel"]);
    command.arg(assets().bzimage()).arg("--initrd");
    command.arg(linux::initrd()).stdin(Stdio::piped());
    let start = Instant::now();
    let mut vm = Vm::spawn(command);
    vm.wait_for("GUEST init");
    let init = start.elapsed();
    vm.wait_for("GUEST ready\n");
    address(&mut vm, "eth0", 11);
    assert!(pings(&mut vm, PEER), "{}", vm.transcript());
    // min/avg/max
    let ping = vm.try_run(&format!("ping -q -c 300 -i 0.01 {PEER}"));
    let times = ping.text.rsplit(" = ").next().unwrap_or_default();
    let average = times.split('/').nth(1).and_then(|text| text.parse().ok());
    let average: f64 = average.unwrap_or_else(|| panic!("{}", ping.text));
    let memory = own_memory(vm.pid());
    let _server = iperf::serve(&site.peer);
    let mut rate = |reverse: &str| {
        let output = vm.try_run(&format!("iperf3 -f m -c {PEER} -t 3 {reverse}"));
        mbits(&output.text).unwrap_or_else(|| panic!("{}", output.text)) / 1000.0
    };
    let (sends, receives) = (rate(""), rate("-R"));
    [
        init.as_secs_f64() * 1000.0,
        average * 1000.0,
        sends,
        receives,
        memory as f64 / 1024.0,
    ]
}

/// The receiver's rate in what iperf3 writes.
fn mbits(text: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.ends_with("receiver"))?;
    let (before, _) = line.split_once(" Mbits/sec")?;
    before.rsplit(' ').next()?.parse().ok()
}
