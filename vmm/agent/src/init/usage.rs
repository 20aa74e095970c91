//! How much of the machine the guest has used.

use std::fs::File;
use std::os::unix::fs::FileExt;

use agent_protocol::boot::Usage;

/// Looks how much memory is in use. A cgroup would count it without gaps, but with it the page cache, which grows to
/// whatever is free.
#[derive(Debug)]
pub struct Meter {
    /// None where it cannot be opened. They are open from the start: the command may unmount /proc.
    meminfo: Option<File>,
    vmstat: Option<File>,
    peak: u64,
    /// What was in use when the first was looked at.
    first: Option<u64>,
}

impl Meter {
    /// Reads /proc from now on.
    pub fn new() -> Self {
        let open = |path| File::open(path).ok();
        let mut meter = Self {
            meminfo: open("/proc/meminfo"),
            vmstat: open("/proc/vmstat"),
            peak: 0,
            first: None,
        };
        meter.sample();
        meter
    }

    /// Looks how much is in use now.
    pub fn sample(&mut self) {
        let Some(text) = self.meminfo.as_ref().and_then(read) else {
            return;
        };
        let field = |name| field(&text, name);
        let (Some(total), Some(available)) = (field("MemTotal:"), field("MemAvailable:")) else {
            return;
        };
        // In KiB.
        let used = total.saturating_sub(available) * 1024;
        self.peak = self.peak.max(used);
        self.first.get_or_insert(used);
    }

    /// What was used. `largest` is the most memory that one process had, in bytes: it may have come and gone between two looks.
    pub fn usage(&mut self, largest: u64) -> Usage {
        self.sample();
        let at_least = self.first.map_or(0, |first| first + largest);
        let vmstat = self.vmstat.as_ref().and_then(read);
        Usage {
            peak_memory: self.peak.max(at_least),
            oom_kills: vmstat
                .and_then(|text| field(&text, "oom_kill"))
                .unwrap_or(0),
        }
    }
}

/// Reads a file of /proc from its beginning.
fn read(file: &File) -> Option<String> {
    let mut bytes = vec![0; 16 << 10];
    let length = file.read_at(&mut bytes, 0).ok()?;
    bytes.truncate(length);
    String::from_utf8(bytes).ok()
}

/// The number that follows a name at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_ascii_whitespace);
    let mut words = lines.find_map(|mut words| (words.next()? == name).then_some(words))?;
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_names() {
        let text = "MemTotal:  16 kB\nMemAvailable:    12 kB\noom_killer 3\noom_kill 4\n";
        assert_eq!(field(text, "MemAvailable:"), Some(12));
        assert_eq!(field(text, "oom_kill"), Some(4));
        assert_eq!(field(text, "MemFree:"), None);
    }

    #[test]
    fn peak_has_the_largest_process_also_when_no_look_has_seen_it() {
        let mut meter = Meter::new();
        let first = meter.usage(0).peak_memory;
        assert!(first > 1 << 20);
        assert!(meter.usage(1 << 50).peak_memory > 1 << 50);
    }
}
