//! Opens a macvtap, prints what it is and the first frame it hears.
//!
//! `sudo cargo run -p net --example sniff -- eno1`

use std::error::Error;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::ExitCode;

use net::{Macvtap, MacvtapSpec};
use rustix::event::{PollFd, PollFlags};

/// A queue puts a header of this size before each frame, unless told otherwise (`struct virtio_net_hdr`).
const HEADER: usize = 10;

fn main() -> ExitCode {
    env_logger::init();
    let Err(error) = sniff() else {
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

fn sniff() -> Result<(), Box<dyn Error>> {
    let link = std::env::args()
        .nth(1)
        .ok_or("which network interface? Name it as the first argument")?;
    let macvtap = Macvtap::open(&MacvtapSpec::new(link.parse()?))?;
    println!(
        "{} on {}: MAC {}, MTU {}",
        macvtap.info().name.as_str(),
        macvtap.info().lower.as_str(),
        macvtap.info().mac,
        macvtap.info().mtu
    );

    let mut buffer = [0; 65_562];
    let length = read_when_ready(macvtap.queue(), &mut buffer)?;
    let frame = buffer[..length]
        .get(HEADER..)
        .ok_or("the queue gave a frame without a header")?;
    println!("first frame, {} bytes: {frame:02x?}", frame.len());
    Ok(())
}

fn read_when_ready(queue: BorrowedFd<'_>, buffer: &mut [u8]) -> rustix::io::Result<usize> {
    let mut ready = [PollFd::from_borrowed_fd(queue.as_fd(), PollFlags::IN)];
    rustix::event::poll(&mut ready, None)?;
    rustix::io::read(queue, buffer)
}
