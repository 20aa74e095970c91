//! How much memory a monitor takes.

use std::fs;

/// The resident memory of a monitor and its children in kB, the guest's left out (every mapping of
/// 64 MiB or more), and huge pages too, which the kernel makes as it likes.
pub fn own_memory(pid: u32) -> u64 {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.unwrap_or_default();
    let children = children
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok());
    of_process(pid) + children.map(own_memory).sum::<u64>()
}

fn of_process(pid: u32) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("the monitor runs");
    let field = |line: &str, name: &str| -> Option<u64> {
        line.strip_prefix(name)?
            .trim()
            .strip_suffix(" kB")?
            .trim()
            .parse()
            .ok()
    };
    let (mut size, mut sum) = (0, 0);
    for line in smaps.lines() {
        size = field(line, "Size:").unwrap_or(size);
        let is_own = size < 64 << 10;
        match (field(line, "Rss:"), field(line, "AnonHugePages:")) {
            (Some(resident), _) if is_own => sum += resident,
            (_, Some(huge)) if is_own => sum -= huge,
            _ => {}
        }
    }
    sum
}
