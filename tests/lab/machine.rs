//! The outer virtual machine: QEMU's emulator with nested SVM, Debian's kernel, an initramfs with the program to run.

use std::env;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::CpuSet;

use crate::harness::assets::{Assets, assets, cache_dir, generic, one_of};
use crate::harness::debian;
use crate::harness::elf::elf;
use crate::harness::fsx;
use crate::harness::initramfs::{Archive, GUEST_TOOLS, SHARE_TOOLS, find};
use crate::harness::vm;

/// What runs in the lab: a test binary or the demo.
#[derive(Debug)]
pub struct Job<'a> {
    /// The program on this machine; it is copied into the lab together with its libraries.
    pub program: &'a Path,
    /// Its arguments.
    pub args: &'a [String],
    /// When it is given up.
    pub deadline: Instant,
    /// Whether the lab's clock counts instructions, see [`counts`].
    pub counted: bool,
}

/// How long a living lab is silent at most, on a busy host too: its init shows a sign of life every 2 s.
const SILENCE: Duration = Duration::from_secs(120);
/// The same for one whose clock counts instructions: each second of it takes many.
const COUNTED_SILENCE: Duration = Duration::from_secs(600);
/// How long a program in it writes no line at most: a test that hangs fails by itself before.
const QUIET: Duration = Duration::from_secs(600);

/// The machine. Without XSAVE, since QEMU's nested SVM lets a guest's XSETBV through to the lab's own register. With one CPU,
/// since two emulated at once hang far more often.
const MACHINE: &str =
    "-M q35 -smp 1 -m 5G -nodefaults -no-user-config -no-reboot -display none -nic none";
const CPU: &str = "-accel tcg -cpu max,+svm,-xsave";

/// With a clock that counts instructions, one a nanosecond, and stands still at no time. Without ERMS
/// and FSRM: each byte of a `rep movsb`, with which Linux copies then, would count as one.
const COUNTING_CPU: &str = "-accel tcg,thread=single -icount shift=0,sleep=off \
    -cpu max,+svm,-xsave,-erms,-fsrm";

/// Its kernel's command line. On a busy host the timer's interrupts may be too late for the kernel's check.
const CMDLINE: &str = "console=ttyS0 no_timer_check quiet panic=-1 mitigations=off tsc=reliable";

const MODULES: &[&str] = &[
    "kvm-amd",
    "macvlan",
    "macvtap",
    "tun",
    "veth",
    "dummy",
    "bridge",
    "bonding",
    "8021q",
    "vrf",
    "vhost_net",
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "dm-mod",
    "loop",
];

impl Job<'_> {
    /// Whether the program itself runs QEMU, as the tests of `minivmm qemu` and the benchmark do.
    fn wants_qemu(&self) -> bool {
        self.is("qemu-") || self.is("bench")
    }

    /// Whether it boots Debian's kernel for all machines too.
    fn wants_generic(&self) -> bool {
        self.is("net_device-")
    }

    /// Whether it boots the freestanding guest.
    fn wants_freestanding(&self) -> bool {
        self.is("hostile-") || self.is("library-")
    }

    /// Whether it boots the Debian that has a disk.
    fn wants_debian(&self) -> bool {
        self.is("debian-")
    }

    /// Whether it makes and examines disks.
    fn wants_disks(&self) -> bool {
        self.wants_debian() || self.is("linux_disks-")
    }

    /// Whether it shares directories with its guests.
    fn wants_shares(&self) -> bool {
        self.is("linux_shares-")
    }

    /// Whether its guests have user networks.
    fn wants_user_net(&self) -> bool {
        self.wants_debian() || self.is("linux-") || self.measures("run")
    }

    /// Whether fio runs in its guests.
    fn wants_fio(&self) -> bool {
        self.measures("disk")
    }

    /// Whether it is this part of the benchmark.
    fn measures(&self, part: &str) -> bool {
        self.is("bench") && self.args.iter().any(|arg| arg == part)
    }

    fn is(&self, name: &str) -> bool {
        let program = self.program.file_name().unwrap_or_default();
        program.to_string_lossy().starts_with(name)
    }
}

/// Programs that every lab has, the demo's too, and their packages.
const LAB_TOOLS: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("dnsmasq", "dnsmasq-base"),
    ("kexec", "kexec-tools"),
];

/// The same, of labs that examine disks.
const DISK_TOOLS: &[(&str, &str)] = &[
    ("debugfs", "e2fsprogs"),
    ("dmsetup", "dmsetup"),
    ("e2fsck", "e2fsprogs"),
    ("mke2fs", "e2fsprogs"),
    ("qemu-img", "qemu-utils"),
];

/// The same, of labs that reach an installed system.
const REACH_TOOLS: &[(&str, &str)] = &[
    ("git", "git"),
    ("socat", "socat"),
    ("ssh", "openssh-client"),
];

/// What QEMU reads for a machine whose kernel is given, where Debian has it.
const FIRMWARE: &[&str] = &[
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/seabios/bios-microvm.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
    "/usr/share/qemu/pvh.bin",
];

/// Other monitors, for the benchmark: where they are in `$BENCH_PEERS`, a directory, or on PATH.
pub const PEERS: [&str; 4] = ["cloud-hypervisor", "firecracker", "crosvm", "lkvm"];

/// A program in `$BENCH_PEERS` or on PATH.
pub fn peer(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let peers = env::var_os("BENCH_PEERS").map(PathBuf::from);
    let dirs = peers.into_iter().chain(env::split_paths(&path));
    dirs.map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Runs the job in a lab of its own, passes each line of its output to `line`, and returns the program's exit status.
///
/// # Errors
///
/// How the lab ended without one.
pub fn run(job: &Job, mut line: impl FnMut(&str)) -> Result<i32, String> {
    let failed = |what: &str, error| format!("{what}: {error}");
    let cpus = allowed_cpus().map_err(|e| failed("cannot ask for the allowed CPUs", e))?;
    let (slot, _lock) = one_of("lab.lock", most_at_once(cpus.len()));
    let temp = tempfile::tempdir().map_err(|e| failed("cannot make a temporary directory", e))?;
    let initrd = temp.path().join("initrd");
    fs::write(&initrd, initramfs(job, assets()))
        .map_err(|e| failed("cannot write the lab's ramdisk", e))?;
    let console = temp.path().join("console");
    let (cpu, silence) = match job.counted {
        true => (COUNTING_CPU, COUNTED_SILENCE),
        false => (CPU, SILENCE),
    };
    let mut qemu = Qemu::start(cpus[slot], cpu, &assets().bzimage(), &initrd, &console)?;
    let lines = qemu.lines();
    let ended = |how: &str| {
        let text = fs::read(&console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        format!("the lab {how}; its console:\n{text}")
    };
    let (mut last_sign, mut last_line) = ((0, Instant::now()), Instant::now());
    loop {
        match lines.recv_timeout(Duration::from_secs(1)) {
            Ok(text) => match text
                .strip_prefix("LAB exit ")
                .and_then(|status| status.parse().ok())
            {
                Some(status) => return Ok(status),
                None => {
                    last_line = Instant::now();
                    line(&text);
                }
            },
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(ended("ended early")),
        }
        let len = fs::metadata(&console).map_or(0, |file| file.len());
        if len != last_sign.0 {
            last_sign = (len, Instant::now());
        }
        if last_sign.1.elapsed() > silence || last_line.elapsed() > QUIET {
            return Err(ended("fell silent"));
        }
        if Instant::now() > job.deadline {
            return Err(ended("took too long"));
        }
    }
}

/// Runs a job that is no test, and shows its output. Returns whether it succeeded.
pub fn run_shown(job: &Job) -> bool {
    run(job, |line| println!("{line}")).unwrap_or_else(|failure| {
        eprintln!("{failure}");
        1
    }) == 0
}

/// Whether a lab's clock can count instructions: guests of the distribution's QEMU hang then.
pub fn counts() -> bool {
    own_qemu().is_some()
}

/// The QEMU that `make lab-qemu` has built, see resources/lab-qemu.
fn own_qemu() -> Option<PathBuf> {
    let path = cache_dir().join("lab-qemu/qemu-system-x86_64");
    path.exists().then_some(path)
}

/// The CPUs that this process may use.
fn allowed_cpus() -> io::Result<Vec<usize>> {
    let set = rustix::thread::sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU)
        .filter(|&cpu| set.is_set(cpu))
        .collect())
}

/// One lab a CPU, and each takes [`MACHINE`]'s memory.
fn most_at_once(cpus: usize) -> usize {
    let info = rustix::system::sysinfo();
    let memory = info
        .totalram
        .saturating_mul(u64::from(info.mem_unit.max(1)));
    cpus.min((memory / (6 << 30)) as usize).max(1)
}

fn initramfs(job: &Job, assets: &Assets) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.base(include_bytes!("../../resources/lab-init"));
    archive.modules(&assets.modules(), MODULES);
    // dnsmasq and ssh want to know who they are, and passt who it becomes.
    let users = b"root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n";
    archive.bytes("/etc/passwd", users, 0o644);
    archive.bytes("/etc/group", b"root:x:0:\nnogroup:x:65534:\n", 0o644);
    // A test has another one mounted on it.
    archive.bytes("/etc/resolv.conf", b"", 0o644);
    archive.program(&vm::binary(), "/lab/bin/minivmm");
    archive.program(job.program, "/lab/bin/job");
    for (program, package) in LAB_TOOLS.iter().chain(GUEST_TOOLS) {
        archive.program(&find(program, package), &format!("/lab/bin/{program}"));
    }
    for (program, package) in DISK_TOOLS.iter().filter(|_| job.wants_disks()) {
        archive.program(&find(program, package), &format!("/lab/bin/{program}"));
    }
    for (program, package) in REACH_TOOLS.iter().filter(|_| job.wants_debian()) {
        archive.program(&find(program, package), &format!("/lab/bin/{program}"));
    }
    for (program, package) in SHARE_TOOLS.iter().filter(|_| job.wants_shares()) {
        archive.program(&find(program, package), &format!("/lab/bin/{program}"));
    }
    if job.wants_shares() {
        let to = format!("/lab/cache/{}/{}", fsx::DIR, fsx::PROGRAM);
        archive.program(&fsx::fsx(), &to);
    }
    if job.wants_user_net() {
        archive.program(&find("passt", "passt"), "/lab/bin/passt");
    }
    if job.wants_fio() {
        archive.program(&find("fio", "fio"), "/lab/bin/fio");
    }
    if job.wants_qemu() {
        let qemu = find("qemu-system-x86_64", "qemu-system-x86");
        // At its own place: it looks for its firmware from there.
        archive.program(&qemu, "/usr/bin/qemu-system-x86_64");
        for file in FIRMWARE {
            archive.file(Path::new(file), file);
        }
    }
    for name in PEERS.iter().filter(|_| job.is("bench")) {
        if let Some(program) = peer(name) {
            archive.program(&program, &format!("/lab/bin/{name}"));
        }
    }
    kernel(&mut archive, assets, "linux");
    if job.wants_generic() {
        kernel(&mut archive, generic(), "linux-generic");
    }
    if job.wants_freestanding() {
        archive.file(elf(), "/lab/cache/guest");
    }
    for name in debian::FILES.iter().filter(|_| job.wants_debian()) {
        let to = format!("/lab/cache/{}/{name}", debian::NAME);
        archive.file(&debian::debian().file(name), &to);
    }
    let quoted: Vec<_> = job
        .args
        .iter()
        .map(|arg| format!("'{}'", arg.replace('\'', r"'\''")))
        .collect();
    // Of the environment what asks for more than usual.
    let kills = env::var("MINIVMM_KILLS");
    let kills = kills.map_or_else(|_| String::new(), |n| format!(" MINIVMM_KILLS='{n}'"));
    let script = format!(
        "export MINIVMM_IN_LAB=1 MINIVMM_BIN=/lab/bin/minivmm MINIVMM_CACHE=/lab/cache{kills}\n\
         cd /lab\nexec job {}\n",
        quoted.join(" ")
    );
    archive.bytes("/lab/run", script.as_bytes(), 0o755);
    archive.finish()
}

/// Puts a kernel for guests into the lab's cache.
fn kernel(archive: &mut Archive, assets: &Assets, name: &str) {
    let cache = format!("/lab/cache/{name}");
    archive.file(&assets.bzimage(), &format!("{cache}/bzImage"));
    archive.file(&assets.vmlinux(), &format!("{cache}/vmlinux"));
    let modules = fs::read_dir(assets.modules())
        .into_iter()
        .flatten()
        .flatten();
    for module in modules {
        let name = module.file_name();
        let to = format!("{cache}/modules/{}", name.to_string_lossy());
        archive.file(&module.path(), &to);
    }
}

/// The rate of this machine's time stamp counter, and so of the lab's, in kHz. Linux would measure it by the PIT, and on a
/// busy host its result is a fraction of that now and then: the lab's clock then runs several times too fast.
fn tsc_khz() -> u64 {
    // The host may take the processor away between the two clocks: of several looks the quickest counts.
    let look = || {
        let looks = [(); 16].map(|()| {
            let (before, now, after) = (ticks(), Instant::now(), ticks());
            (after - before, before, now)
        });
        let (_, ticks, now) = looks.into_iter().min().expect("there are some");
        (ticks, now)
    };
    let (first, start) = look();
    thread::sleep(Duration::from_millis(50));
    let (last, end) = look();
    u64::try_from(u128::from(last - first) * 1_000_000 / (end - start).as_nanos()).expect("a rate")
}

fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, which Linux lets programs use.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// The emulator; killed when dropped, and by the kernel when the thread that started it ends.
struct Qemu {
    child: Child,
}

impl Qemu {
    /// On one CPU of the host alone: QEMU's nested SVM changes the CPU's interrupt requests at each exit of a guest without
    /// the lock (`helper_vmrun` and `cpu_vmexit` of 7.2 and 10.0), and another thread's request that falls between its read
    /// and its write is lost. A lab whose timer interrupt is lost never wakes up. Threads that share a CPU cannot do that:
    /// the change is a single instruction.
    fn start(
        host_cpu: usize,
        cpu: &str,
        kernel: &Path,
        initrd: &Path,
        console: &Path,
    ) -> Result<Self, String> {
        let qemu = own_qemu().unwrap_or_else(|| find("qemu-system-x86_64", "qemu-system-x86"));
        let mut command = Command::new(find("setpriv", "util-linux"));
        command.args(["--pdeathsig", "KILL"]);
        command.arg(find("taskset", "util-linux"));
        command
            .args(["--cpu-list", &host_cpu.to_string()])
            .arg(qemu);
        command.args(MACHINE.split_whitespace());
        command.args(cpu.split_whitespace());
        command.arg("-kernel").arg(kernel);
        command.arg("-initrd").arg(initrd);
        let tsc = match cpu {
            CPU => format!(" tsc_early_khz={}", tsc_khz()),
            _ => String::new(),
        };
        command.args(["-append", &format!("{CMDLINE}{tsc}")]);
        // The kernel's console, and what the job writes.
        let file = format!("file:{}", console.display());
        command.args(["-serial", &file, "-serial", "stdio"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let child = command
            .spawn()
            .map_err(|e| format!("cannot run {command:?}: {e}"))?;
        Ok(Self { child })
    }

    /// The lines that the second serial port writes.
    fn lines(&mut self) -> mpsc::Receiver<String> {
        let (sender, receiver) = mpsc::channel();
        let stdout = self.child.stdout.take().expect("stdout is piped");
        thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line)
                    .trim_end_matches('\r')
                    .to_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        receiver
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
