//! What the guest's memory is made of, as the kernel shows it in minivmm's `smaps`.

use super::harness::assets::lock;
use super::*;

const HUGE: u64 = 2 << 20;
const HUGETLB: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// A mapping.
#[derive(Debug)]
struct Mapping {
    start: u64,
    size: u64,
    /// As in Documentation/filesystems/proc.rst.
    flags: Vec<String>,
    page_kib: u64,
}

/// The mappings of a guest that runs with these arguments.
fn mappings(args: &[&str]) -> Vec<Mapping> {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("guest");
    Tiny::Echo.write(&kernel);
    let mut command = Command::new(binary());
    command.arg("--kernel").arg(kernel).args(args);
    command.stdin(Stdio::piped()).env_remove("RUST_LOG");
    let mut vm = Vm::spawn(command);
    vm.wait_for("ready\n");
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", vm.pid())).unwrap();
    vm.send(tiny::POWER_OFF);
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());

    let mut found: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
        match (first, found.last_mut()) {
            ("KernelPageSize:", Some(last)) => {
                last.page_kib = rest.trim().trim_end_matches(" kB").parse().unwrap();
            }
            ("VmFlags:", Some(last)) => {
                last.flags = rest.split_whitespace().map(str::to_owned).collect();
            }
            _ if first.ends_with(':') => {}
            _ => {
                let (start, end) = first.split_once('-').unwrap();
                let [start, end] = [start, end].map(|n| u64::from_str_radix(n, 16).unwrap());
                found.push(Mapping {
                    start,
                    size: end - start,
                    flags: Vec::new(),
                    page_kib: 0,
                });
            }
        }
    }
    found
}

/// The only mapping of this size.
#[track_caller]
fn of_size(mappings: &[Mapping], mib: u64) -> &Mapping {
    let mut found = mappings.iter().filter(|m| m.size == mib << 20);
    let one = found
        .next()
        .unwrap_or_else(|| panic!("no {mib} MiB: {mappings:#x?}"));
    assert!(found.next().is_none(), "{mappings:#x?}");
    one
}

kvm_test!(memory_may_be_huge_pages_and_is_in_no_core_dump, || {
    let has_huge_pages = Path::new("/sys/kernel/mm/transparent_hugepage").exists();
    // The last has a region on both sides of the hole.
    for (memory, regions) in [("64M", &[64][..]), ("77M", &[77]), ("3301M", &[3072, 229])] {
        let mappings = mappings(&["--memory", memory]);
        for &mib in regions {
            let mapping = of_size(&mappings, mib);
            assert!(
                mapping.start.is_multiple_of(HUGE),
                "{memory}: {mapping:#x?}"
            );
            let is = |flag: &str| mapping.flags.iter().any(|f| f == flag);
            assert!(is("dd"), "{memory}: {mapping:#x?}");
            assert_eq!(is("hg"), has_huge_pages, "{memory}: {mapping:#x?}");
        }
    }
});

/// Lets the kernel make so many more huge pages on demand, and takes that back when dropped.
struct Allowance {
    path: String,
    before: u64,
    /// The host has one number for all: who changes it does so alone.
    _alone: fs::File,
}

impl Allowance {
    fn more(pages: u64) -> Self {
        let alone = lock("hugepages.lock");
        let path = format!("{HUGETLB}/nr_overcommit_hugepages");
        let before: u64 = fs::read_to_string(&path).unwrap().trim().parse().unwrap();
        fs::write(&path, (before + pages).to_string()).unwrap();
        Self {
            path,
            before,
            _alone: alone,
        }
    }
}

impl Drop for Allowance {
    fn drop(&mut self) {
        let _ = fs::write(&self.path, self.before.to_string());
    }
}

guest_test!(memory_of_huge_pages_is_that_and_in_no_core_dump, || {
    let _allowance = Allowance::more(40);
    // The kernel's mapping ends with a whole page, the guest's memory where it was asked to.
    for (memory, mib) in [("64M", 64), ("65M", 66)] {
        let mappings = mappings(&["--hugepages", "--memory", memory]);
        let mapping = of_size(&mappings, mib);
        assert_eq!(mapping.page_kib, HUGE >> 10, "{memory}: {mapping:#x?}");
        for flag in ["ht", "dd"] {
            assert!(
                mapping.flags.iter().any(|f| f == flag),
                "{memory}: {mapping:#x?}"
            );
        }
    }
});

guest_test!(memory_of_huge_pages_can_be_shared, || {
    let _allowance = Allowance::more(70);
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("hello"), "of the host").unwrap();
    let share = format!("{}:src", directory.path().display());
    // The file ends with a whole page, the guest's memory where it was asked to.
    for memory in ["128M", "129M"] {
        let mut command = Command::new(binary());
        command.arg("--kernel").arg(elf()).stdin(Stdio::null());
        command.args(["--hugepages", "--memory", memory, "--share", &share]);
        command.args(["--cmdline", "guest.mode=share"]);
        let console = guest::succeed(Vm::spawn(command));
        assert!(console.contains("READ of the host\n"), "{console}");
    }
});
