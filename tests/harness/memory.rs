//! How much memory a monitor takes.

use std::fs;

use super::process::children;

/// The resident memory of a monitor and its children in kB, the guest's left out (every mapping of
/// 64 MiB or more), and huge pages too, which the kernel makes as it likes.
pub fn own_memory(pid: u32) -> u64 {
    let children = children(pid).into_iter().map(own_memory);
    of_process(pid, "Rss:", |_| true) + children.sum::<u64>()
}

/// The same without the pages of programs and libraries, which are there as far as their code has run: what
/// a monitor and its children hold, if they grow.
pub fn held_memory(pid: u32) -> u64 {
    let children = children(pid).into_iter().map(held_memory);
    let is_held = |path: &str| !path.starts_with('/') || path.starts_with("/memfd:");
    of_process(pid, "Rss:", is_held) + children.sum::<u64>()
}

/// Of a monitor's own memory in kB what is its alone, and no file's.
pub fn anonymous_memory(pid: u32) -> u64 {
    of_process(pid, "Anonymous:", |_| true)
}

/// The memory of a process in kB, the guest's included; what several processes share is divided
/// among them.
pub fn proportional_memory(pid: u32) -> u64 {
    let sums = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = sums.lines().find_map(|line| line.strip_prefix("Pss:"));
    let size = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    size.unwrap_or(0)
}

/// The sum of a field of `smaps` in kB, of the mappings of these files: "" and "[heap]" are none.
fn of_process(pid: u32, name: &str, counts: impl Fn(&str) -> bool) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("the monitor runs");
    let field = |line: &str, name: &str| -> Option<u64> {
        line.strip_prefix(name)?
            .trim()
            .strip_suffix(" kB")?
            .trim()
            .parse()
            .ok()
    };
    let (mut counted, mut size, mut sum) = (false, 0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        // A mapping begins with its addresses, and has its file behind four more words.
        if words.next().is_some_and(|word| !word.ends_with(':')) {
            counted = counts(words.nth(4).unwrap_or_default());
        }
        size = field(line, "Size:").unwrap_or(size);
        let is_own = counted && size < 64 << 10;
        match (field(line, name), field(line, "AnonHugePages:")) {
            (Some(found), _) if is_own => sum += found,
            (_, Some(huge)) if is_own => sum -= huge,
            _ => {}
        }
    }
    sum
}
