//! `make demo`: two guests and a third host on one wire, their addresses, and the pings between them; then a command in a
//! guest of its own.

/// Of the tests' harness, what an example can use too.
#[allow(dead_code)] // The tests use more of it.
mod harness {
    pub mod assets;
    pub mod debian;
    pub mod elf;
    pub mod fsx;
    pub mod initramfs;
    pub mod linux;
    pub mod netns;
    pub mod patience;
    pub mod process;
    pub mod vm;
    pub use patience::PATIENCE;
}
mod lab;

use std::io::{BufRead, BufReader, Write};
use std::process::{ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use harness::assets::assets;
use harness::linux;
use harness::netns::{Netns, is_root};
use harness::process::Killed;
use harness::vm::{self, Vm};
use lab::Place;

/// The demo promises two minutes, and its build has taken some of them.
const LAB_LIMIT: Duration = Duration::from_secs(180);

fn main() -> ExitCode {
    let start = Instant::now();
    let place = lab::place();
    let ok = match place {
        Place::Lab => in_lab(),
        Place::InsideLab => return ExitCode::from(u8::from(!show())),
        Place::Here => is_root() && show(),
    };
    if !ok {
        eprintln!("\nThe demo failed, see above.");
        return ExitCode::FAILURE;
    }
    println!(
        "\nDone in {:.0} s; nothing of it remains. What it did:",
        start.elapsed().as_secs_f64()
    );
    if place == Place::Lab {
        println!(
            "  - booted QEMU's emulator with nested virtualisation, since this machine's KVM cannot run Linux;"
        );
    }
    println!(
        "  - made a wire (a veth pair) in network namespaces of its own, with a macvlan as the third host;"
    );
    println!(
        "  - started minivmm twice with Debian's stock cloud kernel, each with a macvtap on that wire;"
    );
    println!("  - let each of the three ping the other two, by IPv4 and IPv6;");
    println!("  - ran a command in a guest of its own, with this system's root below an overlay.");
    println!(
        "\nOn a real NIC, as root (the guest asks for an address by DHCP, then shows a shell):\n\n    \
         {minivmm} --kernel {kernel} --initrd {} --cmdline shell --macvtap eno1\n\n\
         A command on it, with that kernel and this system's files:\n\n    \
         {minivmm} run --kernel {kernel} --modules {} --macvtap eno1 -- COMMAND\n",
        linux::small_initrd().display(),
        assets().modules().display(),
        minivmm = vm::binary().display(),
        kernel = assets().bzimage().display(),
    );
    ExitCode::SUCCESS
}

/// Runs this program again in the lab, where [`show`] does the work.
fn in_lab() -> bool {
    println!(
        "This machine's KVM cannot run Linux: the demo runs in an emulated machine whose KVM can."
    );
    let program = std::env::current_exe().expect("/proc is mounted");
    let job = lab::machine::Job {
        program: &program,
        args: &[],
        deadline: Instant::now() + LAB_LIMIT,
        counted: false,
    };
    lab::machine::run_shown(&job)
}

/// The demo itself; returns whether all pings were answered, and the command was right.
fn show() -> bool {
    let (host, peer, far) = (Netns::new(), Netns::new(), Netns::new());
    host.veth("wire", &far, "end");
    peer.macvlan("peer0", &host, "wire");
    peer.address("peer0", "192.168.77.3/24");
    peer.address("peer0", "fd77::3/64");

    println!("\nTwo guests boot: minivmm --kernel bzImage --initrd guest.cpio --macvtap wire");
    let initrd = linux::small_initrd();
    let args = [
        "--initrd",
        initrd.to_str().expect("the cache's path is UTF-8"),
        "--macvtap",
        "wire",
    ];
    let start = Instant::now();
    let (mut a, mut b) = thread::scope(|scope| {
        let a = scope.spawn(|| guest(&host, &args, 1));
        let b = guest(&host, &args, 2);
        (a.join().expect("guest A boots"), b)
    });
    println!(
        "Both are up after {:.1} s.\n",
        start.elapsed().as_secs_f64()
    );

    let address = "cat /sys/class/net/eth0/address";
    println!(
        "  guest A      {}   192.168.77.1  fd77::1   (its macvtap's address)",
        a.run(address).trim()
    );
    println!(
        "  guest B      {}   192.168.77.2  fd77::2   (its macvtap's address)",
        b.run(address).trim()
    );
    println!(
        "  third host   {}   192.168.77.3  fd77::3\n",
        peer.mac("peer0")
    );

    let mut all = true;
    let mut report = |pair: &str, n: u8, ping: &mut dyn FnMut(&str) -> bool| {
        let v4 = ping(&format!("192.168.77.{n}"));
        let v6 = ping(&format!("fd77::{n}"));
        let word = |answered| if answered { "answers" } else { "NO ANSWER" };
        println!("  {pair:<26} IPv4 {:<10} IPv6 {}", word(v4), word(v6));
        all &= v4 && v6;
    };
    report("guest A    -> guest B", 2, &mut |to| {
        guest_pings(&mut a, to)
    });
    report("guest B    -> guest A", 1, &mut |to| {
        guest_pings(&mut b, to)
    });
    report("guest A    -> third host", 3, &mut |to| {
        guest_pings(&mut a, to)
    });
    report("third host -> guest A", 1, &mut |to| peer.pings(to, 3));
    report("guest B    -> third host", 3, &mut |to| {
        guest_pings(&mut b, to)
    });
    report("third host -> guest B", 2, &mut |to| peer.pings(to, 3));
    drop((a, b));
    all && command_runs(&host, &peer)
}

/// Runs a command in a guest that the third host pings; returns whether its output, its NIC and its status are right.
fn command_runs(host: &Netns, peer: &Netns) -> bool {
    let script =
        "echo \"$(uname -r) as root of $(cat /proc/sys/kernel/hostname)\"; read -r _; exit 7";
    println!("\nA command: minivmm run --macvtap wire,ip=192.168.77.4/24 -- sh -c '{script}'");
    let mut command = host.command(vm::binary());
    command.args(["run", "-q", "--macvtap", "wire,ip=192.168.77.4/24"]);
    command
        .args(["--name", "demo", "--kernel"])
        .arg(assets().bzimage());
    command.arg("--modules").arg(assets().modules());
    command.args(["--", "sh", "-c", script]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut run = Killed(command.spawn().expect("minivmm starts"));
    let (mut stdin, stdout) = (run.stdin.take(), run.stdout.take());
    let mut line = String::new();
    let said = stdout.map(|stdout| BufReader::new(stdout).read_line(&mut line));
    println!("  it says      {}", line.trim_end());
    let answers = peer.pings("192.168.77.4", 3);
    println!(
        "  third host -> its guest    IPv4 {}",
        if answers { "answers" } else { "NO ANSWER" }
    );
    // The command ends by this line.
    let asked = stdin.as_mut().map(|stdin| stdin.write_all(b"\n"));
    drop(stdin);
    let status = run.wait().ok().and_then(|status| status.code());
    println!(
        "  its status   {}",
        status.map_or("none".into(), |status| status.to_string())
    );
    matches!((said, asked), (Some(Ok(1..)), Some(Ok(())))) && answers && status == Some(7)
}

/// Boots a guest with the addresses 192.168.77.N and fd77::N.
fn guest(host: &Netns, args: &[&str], n: u8) -> Vm {
    let mut vm = linux::boot(Some(host), args);
    vm.run(&format!("ip link set eth0 up; ip addr add 192.168.77.{n}/24 dev eth0; ip addr add fd77::{n}/64 dev eth0"));
    vm
}

fn guest_pings(vm: &mut Vm, to: &str) -> bool {
    let ping = format!("for i in 1 2 3; do ping -q -c1 -W1 {to} && exit; done; exit 1");
    vm.try_run(&ping).status == 0
}
