//! What streams to a guest carry, and how long they take: the services of the freestanding guest's modes
//! `echo` and `vsock`, by TCP and by Unix sockets.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::native::Effort;
use super::report::Column;
use super::usage::Usage;

/// What [`measure`] returns.
pub const COLUMNS: [Column; 7] = [
    ("to it, MB/s", 0),
    ("CPU us/MB", 0),
    ("from it, MB/s", 0),
    ("CPU us/MB ", 0),
    ("round trip p50, us", 1),
    ("p99, us", 0),
    ("connect and one, us", 0),
];
/// No service takes longer for an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How much is written and read at a time.
const BLOCK: usize = 256 << 10;
/// What a source has that is read for a time: more than that.
pub const ENDLESS: u64 = 1 << 40;

/// A service of the guest's, by its port (RFC 862, 863, 864).
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(u16)]
pub enum Service {
    /// Sends back what comes.
    Echo = 7,
    /// Says at the end how much it was.
    Sink = 9,
    /// Sends.
    Source = 19,
}

/// All of them.
pub const SERVICES: [Service; 3] = [Service::Echo, Service::Sink, Service::Source];

/// A connection whose halves end one by one.
pub trait Stream: Read + Write + Send {
    /// Ends the half that is written.
    ///
    /// # Errors
    ///
    /// The connection is gone.
    fn end(&self) -> io::Result<()>;

    /// Bounds how long a read or a write takes.
    ///
    /// # Errors
    ///
    /// None that is known.
    fn bound(&self, patience: Duration) -> io::Result<()>;
}

impl Stream for TcpStream {
    fn end(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }

    fn bound(&self, patience: Duration) -> io::Result<()> {
        self.set_nodelay(true)?;
        self.set_read_timeout(Some(patience))?;
        self.set_write_timeout(Some(patience))
    }
}

impl Stream for UnixStream {
    fn end(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }

    fn bound(&self, patience: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(patience))?;
        self.set_write_timeout(Some(patience))
    }
}

/// Connects to a service.
pub type Connect<'a> = &'a dyn Fn(Service) -> io::Result<Box<dyn Stream>>;

/// Moves a stream one way for a time. Returns how many bytes, and how long that took.
type Flood = fn(Box<dyn Stream>, Duration) -> io::Result<(u64, Duration)>;

/// Measures all that there is of one guest, whose monitor is this process; the CPU time of none
/// without.
pub fn measure(
    connect: Connect<'_>,
    monitor: Option<u32>,
    effort: Effort,
) -> [Option<f64>; COLUMNS.len()] {
    let time = if effort.quick {
        effort.flood / 2
    } else {
        effort.flood
    };
    let pids: Vec<u32> = monitor.into_iter().collect();
    let flood = |flood: Flood, service| {
        let usage = Usage::of_families(&pids);
        let done = connect(service).and_then(|stream| flood(stream, time));
        let (bytes, time) = done.unwrap_or_else(|why| panic!("{service:?}: {why}"));
        let usage = Usage::of_families(&pids).since(usage);
        let megabytes = bytes as f64 / 1e6;
        let cpu = monitor.map(|_| usage.cpu * 1e6 / megabytes);
        (Some(megabytes / time.as_secs_f64()), cpu)
    };
    let (to, cpu_to) = flood(fill, Service::Sink);
    let (from, cpu_from) = flood(drain, Service::Source);
    let trips = connect(Service::Echo).and_then(|stream| round_trips(stream, effort.pings));
    let trips = trips.unwrap_or_else(|why| panic!("round trips: {why}"));
    let at = |share: usize| Some(trips[trips.len() * share / 100].as_secs_f64() * 1e6);
    let connected = connections(connect, effort.pings / 50);
    let connected = connected.map(|time| time.as_secs_f64() * 1e6);
    [to, cpu_to, from, cpu_from, at(50), at(99), connected]
}

/// Writes for a time, and waits for the word that all of it has come. Returns how much, and the time.
fn fill(mut stream: Box<dyn Stream>, time: Duration) -> io::Result<(u64, Duration)> {
    let (start, mut bytes) = (Instant::now(), 0_u64);
    let mut block = vec![0; BLOCK];
    while start.elapsed() < time {
        put(bytes, &mut block);
        stream.write_all(&block)?;
        bytes += block.len() as u64;
    }
    stream.end()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let elapsed = start.elapsed();
    match answer == format!("OK {bytes}\n") {
        true => Ok((bytes, elapsed)),
        false => Err(io::Error::other(format!("{bytes} bytes, {answer:?}"))),
    }
}

/// Writes the bytes of the stream from a position on that the guest checks
/// (`tests/guest/src/net/stream.rs`).
fn put(position: u64, block: &mut [u8]) {
    const STEP: u32 = 0x9e37_79b9;
    let mut product = (position as u32).wrapping_mul(STEP);
    for byte in block {
        *byte = (product >> 24) as u8;
        product = product.wrapping_add(STEP);
    }
}

/// Reads for a time.
fn drain(mut stream: Box<dyn Stream>, time: Duration) -> io::Result<(u64, Duration)> {
    // passt up to Debian 12's completes a connection to the guest only when something was said.
    stream.write_all(b"\n")?;
    let mut block = vec![0; BLOCK];
    let mut bytes = stream.read(&mut block[..1])? as u64;
    let start = Instant::now();
    while start.elapsed() < time {
        match stream.read(&mut block)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => bytes += count as u64,
        }
    }
    Ok((bytes, start.elapsed()))
}

/// How long a byte is away, the shortest first.
fn round_trips(mut stream: Box<dyn Stream>, count: usize) -> io::Result<Vec<Duration>> {
    let mut trips = Vec::with_capacity(count);
    for _ in 0..count {
        let start = Instant::now();
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
        trips.push(start.elapsed());
    }
    stream.end()?;
    trips.sort();
    Ok(trips)
}

/// The median of how long it takes to connect and to get a byte back. A guest that does not listen
/// again yet is asked again.
fn connections(connect: Connect<'_>, count: usize) -> Option<Duration> {
    let mut times: Vec<Duration> = Vec::with_capacity(count);
    let end = Instant::now() + PATIENCE;
    while times.len() < count && Instant::now() < end {
        let start = Instant::now();
        let answered = connect(Service::Echo).and_then(|mut stream| {
            stream.write_all(&[1])?;
            stream.read_exact(&mut [0])?;
            Ok((start.elapsed(), stream))
        });
        if let Ok((time, mut stream)) = answered {
            times.push(time);
            // The next one comes when this one has ended.
            let _ = stream.end().and_then(|()| stream.read(&mut [0]));
        }
    }
    times.sort();
    times.get(times.len() / 2).copied()
}

/// A connection that is bounded.
///
/// # Errors
///
/// None that is known.
pub fn bounded(stream: impl Stream + 'static) -> io::Result<Box<dyn Stream>> {
    stream.bound(PATIENCE)?;
    Ok(Box::new(stream))
}

/// Is a service, without a guest, until the other side ends the connection.
pub fn serve(service: Service, mut stream: impl Stream) {
    let mut block = vec![0; BLOCK];
    let mut bytes = 0;
    while let Ok(count @ 1..) = stream.read(&mut block) {
        bytes += count;
        let answered = match service {
            Service::Sink => Ok(()),
            Service::Echo => stream.write_all(&block[..count]),
            // The first thing that was said began it.
            Service::Source => loop {
                if let Err(why) = stream.write_all(&block) {
                    break Err(why);
                }
            },
        };
        if answered.is_err() {
            return;
        }
    }
    if service == Service::Sink {
        // Who is gone does not want to know.
        let _ = stream.write_all(format!("OK {bytes}\n").as_bytes());
    }
}
