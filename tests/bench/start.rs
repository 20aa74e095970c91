//! How soon a guest runs: exec to the freestanding guest's first byte on its console, and exec to the
//! first KVM_RUN with a distribution's kernel, whether it can run here or not.

use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::harness::assets::assets;
use crate::harness::process::Killed;
use crate::linux::monitors::{Boot, Image, MONITORS};

use super::monitors;
use super::native::Effort;
use super::report::Table;
use super::wire::Wire;

/// As large as a small distribution's initrd.
const INITRD: usize = 10 << 20;
/// The number that the child's seccomp descriptor gets.
const LISTENER: RawFd = 199;
/// Not in the crate `libc` (linux/kvm.h).
const KVM_RUN: u32 = 0xae80;

/// Measures both.
pub fn run(effort: Effort) -> Vec<Table> {
    let rounds = if effort.quick { 9 } else { 25 };
    let images = [Image::Vmlinux, Image::BzImage];
    let mut tables = vec![first_bytes(effort, rounds)];
    tables.extend(images.map(|image| first_runs(image, rounds)));
    tables
}

fn first_bytes(effort: Effort, rounds: usize) -> Table {
    let title = "exec to the guest's first byte";
    eprintln!("{title}");
    let mut table = Table::new(title, &[("ms", 1)]);
    let wire = Wire::new();
    for round in 0..rounds {
        // QEMU's q35 begins with firmware, which takes seconds on a KVM that emulates it.
        let monitors = monitors::all(effort.quick).into_iter();
        for monitor in monitors.filter(|monitor| !monitor.has_firmware() || round < 3) {
            table.add(
                &monitor.name,
                &[first_byte(monitor.command(None, "mode=hello"))],
            );
            let name = format!("{}, with a NIC", monitor.name);
            let time = if monitor.is_ours() {
                // It makes its macvtap itself.
                let mut command = monitor.command(None, "mode=hello");
                command.args(["--macvtap", "lower,backend=user"]);
                wire.host.enter(|| first_byte(command))
            } else {
                let tap = wire.macvtap(1);
                first_byte(monitor.command(Some(&tap), "mode=hello"))
            };
            table.add(&name, &[time]);
        }
    }
    table
}

/// Milliseconds from its start to the first byte that it writes.
fn first_byte(mut command: Command) -> Option<f64> {
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let start = Instant::now();
    let mut child = Killed(command.spawn().ok()?);
    child.stdout.take()?.read_exact(&mut [0]).ok()?;
    Some(start.elapsed().as_secs_f64() * 1000.0)
}

fn first_runs(image: Image, rounds: usize) -> Table {
    let title = format!(
        "exec to the first KVM_RUN, {} and an initrd of 10 MB",
        image.name()
    );
    eprintln!("{title}");
    let mut table = Table::new(title, &[("ms", 1)]);
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (initrd, config) = (dir.path().join("initrd"), dir.path().join("config"));
    std::fs::write(&initrd, vec![0x5a; INITRD]).expect("room for it");
    let kernel = match image {
        Image::Vmlinux => assets().vmlinux(),
        Image::BzImage => assets().bzimage(),
    };
    // Without a NIC ways to move frames are all the same.
    let monitors = MONITORS.iter().filter(|monitor| {
        let takes = monitor.program.images.contains(&image);
        takes && !monitor.has_vhost && !monitor.name.ends_with("mmio")
    });
    for _ in 0..rounds {
        for monitor in monitors.clone() {
            let boot = Boot {
                kernel: &kernel,
                initrd: &initrd,
                line: monitor.program.line,
                memory: "128M",
                disk: Path::new(""),
                config: &config,
            };
            std::fs::File::create(&config)
                .and_then(|mut file| write!(file, "{}", monitor.config(&boot)))
                .expect("room for it");
            let Some(program) = monitor.path() else {
                continue;
            };
            let args = monitor.args_without_nic(&boot);
            // QEMU 7.2 cannot set a register of `host` on every KVM, and this guest never runs.
            let args = args.iter().map(|arg| match arg.as_str() {
                "host" => "qemu64",
                other => other,
            });
            let mut command = Command::new(program);
            command.args(args);
            table.add(monitor.name, &[first_run(command)]);
        }
    }
    table
}

/// Milliseconds from its start to its first KVM_RUN; none where it ends before.
fn first_run(mut command: Command) -> Option<f64> {
    command.stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: the closure makes system calls alone, on memory of its own.
    unsafe { command.pre_exec(stop_at_first_run) };
    let start = Instant::now();
    let child = Killed(command.spawn().ok()?);
    let listener = listener(&child).ok()?;
    let limit = Timespec {
        tv_sec: 10,
        tv_nsec: 0,
    };
    let mut events = [PollFd::new(&listener, PollFlags::IN)];
    poll(&mut events, Some(&limit)).ok()?;
    let came = events[0].revents().contains(PollFlags::IN);
    came.then(|| start.elapsed().as_secs_f64() * 1000.0)
}

/// The descriptor by which the kernel reports what [`stop_at_first_run`] stops.
fn listener(child: &Child) -> io::Result<OwnedFd> {
    let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    Ok(pidfd_getfd(process, LISTENER, PidfdGetfdFlags::empty())?)
}

/// Has the kernel stop this process and its threads in KVM_RUN (seccomp_unotify(2)), which costs the
/// rest next to nothing: no tracer is asked.
fn stop_at_first_run() -> io::Result<()> {
    let op = |code: u32, jump_if_not: u8, value: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: jump_if_not,
        k: value,
    };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let give = libc::BPF_RET | libc::BPF_K;
    // In seccomp_data: the call's number, and the low half of its second argument.
    let mut filter = [
        op(load, 0, 0),
        op(equal, 3, libc::SYS_ioctl as u32),
        op(load, 0, 24),
        op(equal, 1, KVM_RUN),
        op(give, 0, libc::SECCOMP_RET_USER_NOTIF),
        op(give, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the call reads the program, which points to the filter; both outlive it.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and has no other owner. It is closed at exec, its duplicate not.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
    // SAFETY: dup2 takes numbers; nothing else has this one.
    let done = unsafe { libc::dup2(std::os::fd::AsRawFd::as_raw_fd(&fd), LISTENER) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
