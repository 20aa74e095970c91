use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use devices::bus::BusDevice;
use devices::irq::IrqLine;
use event_manager::{EventManager, SubscriberOps};
use tempfile::TempDir;

use super::super::transcript::{HISTORY, MOST_BEHIND};
use super::*;

/// How long a test waits for what has to come.
const PATIENCE: Duration = Duration::from_secs(120);

/// A console that a thread serves, whose guest is the test.
struct Served {
    transcript: Arc<Transcript>,
    serial: Arc<Mutex<Serial>>,
    path: PathBuf,
    has_ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<usize>>,
    _directory: TempDir,
}

impl Served {
    fn start() -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("console.sock");
        let transcript = Arc::new(Transcript::new().unwrap());
        let irq = IrqLine::new().unwrap();
        let serial = Arc::new(Mutex::new(Serial::new(irq, Box::new(io::sink()))));
        let input = Box::new(ToSerial::new(Arc::clone(&serial)).unwrap());
        let listener = Listener::bind(&path).unwrap();
        let server = Server::new(listener, Arc::clone(&transcript), input);
        let has_ended = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&has_ended);
        // The control thread, in short. Returns how often it woke up.
        let thread = thread::spawn(move || {
            let mut events = EventManager::<Server>::new().unwrap();
            let id = events.add_subscriber(server);
            let mut wake_ups = 0;
            while !is_over.load(Ordering::SeqCst) {
                wake_ups += events.run_with_timeout(10).unwrap();
            }
            events.remove_subscriber(id).unwrap().finish();
            wake_ups
        });
        Self {
            transcript,
            serial,
            path,
            has_ended,
            thread: Some(thread),
            _directory: directory,
        }
    }

    fn connect(&self) -> UnixStream {
        let client = UnixStream::connect(&self.path).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.set_write_timeout(Some(PATIENCE)).unwrap();
        client
    }

    /// A client that has what was said before.
    fn attach(&self, before: &str) -> UnixStream {
        let mut client = self.connect();
        assert_eq!(read(&mut client, before.len()), before);
        client
    }

    /// Ends it, and returns how often its thread woke up.
    fn end(&mut self) -> usize {
        self.has_ended.store(true, Ordering::SeqCst);
        self.thread
            .take()
            .map_or(0, |thread| thread.join().unwrap())
    }

    /// What the guest reads, up to so many bytes.
    fn guest_reads(&self, length: usize) -> Vec<u8> {
        let mut serial = self.serial.lock().unwrap();
        let mut all = Vec::new();
        let mut register = |offset| {
            let mut byte = [0];
            serial.read(offset, &mut byte);
            byte[0]
        };
        while all.len() < length && register(5) & 1 != 0 {
            all.push(register(0));
        }
        all
    }

    /// What the guest reads as soon as there is so much.
    fn guest_awaits(&self, length: usize) -> Vec<u8> {
        let mut all = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        while all.len() < length && Instant::now() < deadline {
            all.extend(self.guest_reads(length - all.len()));
        }
        all
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.has_ended.store(true, Ordering::SeqCst);
    }
}

fn read(client: &mut UnixStream, length: usize) -> String {
    let mut bytes = vec![0; length];
    client.read_exact(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

/// What comes until the connection's end.
fn rest(client: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    // A connection that is closed with input on its way ends so.
    match client.read_to_end(&mut all) {
        Err(error) if error.kind() != io::ErrorKind::ConnectionReset => panic!("{error}"),
        _ => all,
    }
}

#[test]
fn clients_get_what_was_said_and_what_follows() {
    let mut served = Served::start();
    served.transcript.push(b"before");
    let mut clients = [served.attach("before"), served.attach("before")];
    served.transcript.push(b"after");
    for client in &mut clients {
        assert_eq!(read(client, 5), "after");
    }
    served.transcript.push(b"last words");
    let mut late = served.connect();
    served.end();
    for client in &mut clients {
        assert_eq!(rest(client), b"last words");
    }
    assert_eq!(rest(&mut late), b"beforeafterlast words");
    assert!(UnixStream::connect(&served.path).is_err());
}

#[test]
fn client_that_closes_its_side_gets_what_was_said_until_then() {
    let served = Served::start();
    served.transcript.push(&[b'x'; 2 * HISTORY]);
    let mut client = served.connect();
    client.write_all(b"its last").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rest(&mut client), [b'x'; HISTORY]);
    assert_eq!(served.guest_awaits(8), b"its last");
}

#[test]
fn client_that_never_reads_is_disconnected_and_holds_up_no_other() {
    let served = Served::start();
    served.transcript.push(b"hi");
    let (mut idle, mut reader) = (served.attach("hi"), served.attach("hi"));
    let mut said = 0;
    // More than its socket and the transcript hold.
    let socket = rustix::net::sockopt::socket_send_buffer_size(&idle).unwrap();
    while said < 4 * (MOST_BEHIND + socket) {
        served.transcript.push(&[b'x'; 1000]);
        said += 1000;
        assert_eq!(read(&mut reader, 1000), "x".repeat(1000));
    }
    assert!(rest(&mut idle).len() < said);
    served.transcript.push(b"end");
    assert_eq!(read(&mut reader, 3), "end");
}

#[test]
fn input_that_the_guest_does_not_read_waits_in_its_clients_socket() {
    let mut served = Served::start();
    served.transcript.push(b"hi");
    let mut silent = served.attach("hi");
    let mut talker = served.attach("hi");
    let sent: Vec<u8> = (0..1 << 20).map(|n| (n % 251) as u8).collect();
    let copy = sent.clone();
    let sender = thread::spawn(move || talker.write_all(&copy).map(|()| talker));
    // What the guest says reaches the others meanwhile.
    served.transcript.push(b"still here");
    assert_eq!(read(&mut silent, 10), "still here");
    assert!(served.guest_awaits(sent.len()) == sent);
    let talker = sender.join().unwrap().unwrap();
    assert_eq!(served.guest_reads(1), b"");
    (&talker).write_all(b"more").unwrap();
    assert_eq!(served.guest_awaits(4), b"more");
    // One for each time that the client filled the port, about; not one for each byte.
    let wake_ups = served.end();
    assert!(wake_ups < 20_000, "{wake_ups}");
}

#[test]
fn clients_that_stay_are_limited_and_those_that_go_leave_nothing() {
    let served = Served::start();
    served.transcript.push(b"hi");
    for _ in 0..10_000 {
        drop(UnixStream::connect(&served.path));
    }
    // The last of them may not be gone yet.
    let deadline = Instant::now() + PATIENCE;
    let mut stay: Vec<UnixStream> = Vec::new();
    while stay.len() < MOST_CLIENTS && Instant::now() < deadline {
        let mut client = served.connect();
        let mut hi = [0; 2];
        if client.read_exact(&mut hi).is_ok() {
            stay.push(client);
        }
    }
    assert_eq!(stay.len(), MOST_CLIENTS);
    assert_eq!(rest(&mut served.connect()), b"");
    served.transcript.push(b"!");
    for client in &mut stay {
        assert_eq!(read(client, 1), "!");
    }
}

#[test]
fn console_without_a_client_wakes_nobody() {
    let mut served = Served::start();
    for _ in 0..1000 {
        served.transcript.push(b"x");
    }
    assert_eq!(served.end(), 0);
}
