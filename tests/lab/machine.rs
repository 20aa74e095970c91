//! The outer virtual machine: QEMU's emulator with nested SVM, Debian's kernel, an initramfs with the program to run.

use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::assets::{Assets, assets, generic, one_of};
use crate::harness::elf::elf;
use crate::harness::initramfs::{Archive, GUEST_TOOLS, find};
use crate::harness::retry::{Layer, retry};
use crate::harness::vm;

/// What runs in the lab: a test binary or the demo.
#[derive(Debug)]
pub struct Job<'a> {
    /// The program on this machine; it is copied into the lab together with its libraries.
    pub program: &'a Path,
    /// Its arguments.
    pub args: &'a [String],
    /// Tests that are not to be run again.
    pub done: Vec<String>,
    /// When it is given up.
    pub deadline: Instant,
}

/// How the lab ended without the program.
#[derive(Debug)]
pub enum Failure {
    /// It has shown no sign of life for [`SILENCE`], or the program none for [`QUIET`], or its kernel has crashed: QEMU's
    /// bug, which hangs a guest of the lab more often, can hit the lab itself. Its console's text.
    Emulator(String),
    /// In another way, which this text tells.
    Other(String),
}

impl Failure {
    /// What the emulator may be to blame for.
    pub fn of_emulator(&self) -> Option<String> {
        match self {
            Self::Emulator(console) => Some(console.clone()),
            Self::Other(_) => None,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Emulator(console) => write!(f, "it hung or crashed; its console:\n{console}"),
            Self::Other(why) => f.write_str(why),
        }
    }
}

/// How long a living lab is silent at most: its init shows a sign of life every 2 s.
const SILENCE: Duration = Duration::from_secs(40);
/// How long a program in it writes no line at most.
const QUIET: Duration = Duration::from_secs(180);
/// What a kernel that crashes writes on its console.
const CRASHES: &[&str] = &[
    "Kernel panic",
    "BUG: ",
    "Oops: ",
    "general protection fault",
];

/// The machine. Without XSAVE, since QEMU's nested SVM lets a guest's XSETBV through to the lab's own register. With one CPU,
/// since interrupts between two of them hit QEMU's bug much more often, and two emulated at once have one of their own.
const MACHINE: &str = "-accel tcg -cpu max,+svm,-xsave -M q35 -smp 1 -m 5G \
    -nodefaults -no-user-config -no-reboot -display none -nic none";

/// Its kernel's command line. Without huge pages: minivmm asks for them for its guests, and with nested pages of 2 MiB the
/// emulator hangs within a minute or two.
const CMDLINE: &str =
    "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable transparent_hugepage=never";

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
        self.is("hostile-")
    }

    fn is(&self, name: &str) -> bool {
        let program = self.program.file_name().unwrap_or_default();
        program.to_string_lossy().starts_with(name)
    }
}

/// Programs that tests run in the lab, and their packages.
const LAB_TOOLS: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("dnsmasq", "dnsmasq-base"),
    ("kexec", "kexec-tools"),
];

/// What QEMU reads for a PC whose kernel is given, where Debian has it.
const FIRMWARE: &[&str] = &[
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
];

/// Runs the job in a lab of its own, hands each line of its output to `line`, and returns the program's exit status.
///
/// # Errors
///
/// How the lab ended without one.
pub fn run(job: &Job, mut line: impl FnMut(&str)) -> Result<i32, Failure> {
    let failed = |what: &str, error| Failure::Other(format!("{what}: {error}"));
    let _lock = one_of("lab.lock", most_at_once());
    let temp = tempfile::tempdir().map_err(|e| failed("cannot make a temporary directory", e))?;
    let initrd = temp.path().join("initrd");
    fs::write(&initrd, initramfs(job, assets()))
        .map_err(|e| failed("cannot write the lab's ramdisk", e))?;
    let console = temp.path().join("console");
    let mut qemu = Qemu::start(&assets().bzimage(), &initrd, &console).map_err(Failure::Other)?;
    let lines = qemu.lines();
    let text = || {
        let text = fs::read(&console).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
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
            Err(RecvTimeoutError::Disconnected)
                if CRASHES.iter().any(|word| text().contains(word)) =>
            {
                return Err(Failure::Emulator(text()));
            }
            Err(RecvTimeoutError::Disconnected) => {
                let why = format!("the lab ended early; its console:\n{}", text());
                return Err(Failure::Other(why));
            }
        }
        let len = fs::metadata(&console).map_or(0, |file| file.len());
        if len != last_sign.0 {
            last_sign = (len, Instant::now());
        }
        if last_sign.1.elapsed() > SILENCE || last_line.elapsed() > QUIET {
            return Err(Failure::Emulator(text()));
        }
        if Instant::now() > job.deadline {
            let why = format!("the lab took too long; its console:\n{}", text());
            return Err(Failure::Other(why));
        }
    }
}

/// Runs a job that is no test, shows its output, and runs it again when it fails, a few times. Returns whether it succeeded.
pub fn run_shown(job: &Job) -> bool {
    let shown = || match run(job, |line| println!("{line}"))? {
        0 => Ok(()),
        status => Err(Failure::Emulator(format!("it ended with status {status}"))),
    };
    retry(Layer::Lab, Failure::of_emulator, shown)
        .inspect_err(|failure| eprintln!("{failure}"))
        .is_ok()
}

/// More labs than CPUs would only slow each other down, into their limits; and each takes [`MACHINE`]'s memory.
fn most_at_once() -> u32 {
    let cpus = thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
    let info = rustix::system::sysinfo();
    let memory = info
        .totalram
        .saturating_mul(u64::from(info.mem_unit.max(1)));
    cpus.min(memory / (6 << 30)).max(1) as u32
}

fn initramfs(job: &Job, assets: &Assets) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.base(include_bytes!("../../resources/lab-init"));
    archive.modules(&assets.modules(), MODULES);
    // dnsmasq wants to know who it is.
    archive.bytes("/etc/passwd", b"root:x:0:0::/root:/bin/sh\n", 0o644);
    archive.bytes("/etc/group", b"root:x:0:\n", 0o644);
    archive.program(&vm::binary(), "/lab/bin/minivmm");
    archive.program(job.program, "/lab/bin/job");
    for (program, package) in LAB_TOOLS.iter().chain(GUEST_TOOLS) {
        archive.program(&find(program, package), &format!("/lab/bin/{program}"));
    }
    if job.wants_qemu() {
        let qemu = find("qemu-system-x86_64", "qemu-system-x86");
        // At its own place: it looks for its firmware from there.
        archive.program(&qemu, "/usr/bin/qemu-system-x86_64");
        for file in FIRMWARE {
            archive.file(Path::new(file), file);
        }
    }
    kernel(&mut archive, assets, "linux");
    if job.wants_generic() {
        kernel(&mut archive, generic(), "linux-generic");
    }
    if job.wants_freestanding() {
        archive.file(elf(), "/lab/cache/guest");
    }
    let quoted: Vec<_> = job
        .args
        .iter()
        .map(|arg| format!("'{}'", arg.replace('\'', r"'\''")))
        .collect();
    let script = format!(
        "export MINIVMM_IN_LAB=1 MINIVMM_BIN=/lab/bin/minivmm MINIVMM_CACHE=/lab/cache MINIVMM_LAB_DONE={}\ncd /lab\n\
         exec job {}\n",
        job.done.join(","),
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

/// The emulator; killed when dropped, and by the kernel when the thread that started it ends.
struct Qemu {
    child: Child,
}

impl Qemu {
    fn start(kernel: &Path, initrd: &Path, console: &Path) -> Result<Self, String> {
        let qemu = find("qemu-system-x86_64", "qemu-system-x86");
        let mut command = Command::new(find("setpriv", "util-linux"));
        command.args(["--pdeathsig", "KILL"]).arg(qemu);
        command.args(MACHINE.split_whitespace());
        command.arg("-kernel").arg(kernel);
        command.arg("-initrd").arg(initrd);
        command.args(["-append", CMDLINE]);
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
