//! Texts on the kernel's console.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::iter;

/// Priority "critical": it is shown also with `quiet` on the kernel's command line.
const PRIORITY: &str = "<2>";

/// An error with its causes.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = iter::successors(Some(error), |error| (*error).source());
    let texts: Vec<String> = causes.map(|error| error.to_string()).collect();
    texts.join(": ")
}

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
