//! Texts on the kernel's console.

use std::fs::File;
use std::io::Write;

/// Priority "critical": it is shown also with `quiet` on the kernel's command line.
const PRIORITY: &str = "<2>";

/// Writes a text into the kernel's log, which the console shows.
pub fn say_text(text: &str) {
    let text = format!("minivmm-agent: {}", text.replace('\n', " "));
    // A file system without /dev, or a kernel without a log.
    let logged = File::options()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut log| log.write_all(format!("{PRIORITY}{text}\n").as_bytes()));
    if logged.is_err() {
        eprintln!("{text}");
    }
}
