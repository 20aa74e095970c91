//! Texts on the kernel's console.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::iter;

/// Priority "critical": it is shown also with `quiet` on the kernel's command line.
const PRIORITY: &str = "<2>";

/// Writes an error with its causes into the kernel's log, which the console shows.
pub fn say(error: &(dyn Error + 'static)) {
    let causes = iter::successors(Some(error), |error| (*error).source());
    let text: Vec<String> = causes.map(|error| error.to_string()).collect();
    let line = format!("minivmm-agent: {}", text.join(": "));
    // A file system without /dev, or a kernel without a log.
    let logged = File::options()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut log| log.write_all(format!("{PRIORITY}{line}\n").as_bytes()));
    if logged.is_err() {
        eprintln!("{line}");
    }
}
