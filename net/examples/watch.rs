//! Shows who shares the wire of a network interface, and then what happens to it and to them, until it is gone.
//!
//! `cargo run -p net --example watch -- eno1`

use std::error::Error;
use std::os::fd::AsFd;
use std::process::ExitCode;

use net::{LinkChange, LinkWatch, inventory};
use rustix::event::{PollFd, PollFlags};

fn main() -> ExitCode {
    env_logger::init();
    let Err(error) = watch() else {
        return ExitCode::SUCCESS;
    };
    // What was tried, why it failed, and what to do about it.
    let mut cause: Option<&dyn Error> = Some(&*error);
    while let Some(error) = cause {
        eprintln!("{error}");
        cause = error.source();
    }
    if let Some(remedy) = net::remedy(&*error) {
        eprintln!("{remedy}");
    }
    ExitCode::FAILURE
}

fn watch() -> Result<(), Box<dyn Error>> {
    let link = std::env::args()
        .nth(1)
        .ok_or("which network interface? Name it as the first argument")?;
    let found = inventory(Some(&link.parse()?))?;
    let lower = found
        .first()
        .ok_or("it sits in another network namespace")?;
    println!(
        "{link}, MTU {}, carries {}",
        lower.mtu.unwrap_or(0),
        lower.uppers.len()
    );
    for upper in &lower.uppers {
        let mac = upper
            .mac
            .map_or_else(|| "without a MAC".to_owned(), |mac| mac.to_string());
        let (kind, mode) = (upper.kind.as_str(), upper.mode.unwrap_or("unknown"));
        let carrier = if upper.carrier { "up" } else { "no carrier" };
        println!("  {}: {kind} in {mode} mode, {mac}, {carrier}", upper.name);
    }

    let mut indexes: Vec<u32> = lower.uppers.iter().map(|upper| upper.index).collect();
    indexes.push(lower.index);
    let mut watch = LinkWatch::new(&indexes)?;
    loop {
        while let Some(event) = watch.next()? {
            println!("{}: {:?}", event.name, event.change);
            if event.index == lower.index && event.change == LinkChange::Deleted {
                return Ok(());
            }
        }
        let fd = watch.as_fd();
        rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], None)?;
    }
}
