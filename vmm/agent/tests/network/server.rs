//! A DHCP server that says what a test wants, true or not.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::netns::Netns;

pub const DISCOVER: u8 = 1;
pub const OFFER: u8 = 2;
pub const REQUEST: u8 = 3;
pub const ACK: u8 = 5;
pub const NAK: u8 = 6;
pub const RELEASE: u8 = 7;

/// A message of a client's.
#[derive(Clone, Debug)]
pub struct Message {
    pub kind: u8,
    /// The address that it says it has.
    pub client: Ipv4Addr,
    bytes: Vec<u8>,
}

/// What the server says to a message.
#[derive(Clone, Debug)]
pub struct Answer {
    pub kind: u8,
    /// The address for the client.
    pub address: [u8; 4],
    /// The options besides the kind, as they are on the wire.
    pub options: Vec<u8>,
}

/// The options that each lease has: server, mask, router, and the time in seconds.
pub fn usual(seconds: u32) -> Vec<u8> {
    let time = [&[51, 4][..], &seconds.to_be_bytes()].concat();
    let fixed = [
        54, 4, 10, 77, 0, 1, 1, 4, 255, 255, 255, 0, 3, 4, 10, 77, 0, 1,
    ];
    [&fixed[..], &time].concat()
}

/// Answers a DISCOVER with an offer and a REQUEST with an acknowledgement, of this address and these options.
pub fn grant(message: &Message, address: [u8; 4], options: &[u8]) -> Option<Answer> {
    let kind = match message.kind {
        DISCOVER => OFFER,
        REQUEST => ACK,
        _ => return None,
    };
    let options = options.to_vec();
    Some(Answer {
        kind,
        address,
        options,
    })
}

/// A server in a thread. It ends with this value.
pub struct Server {
    seen: Arc<Mutex<Vec<Message>>>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts one on the one link of a namespace, which has the address 10.77.0.1.
    pub fn start(
        netns: &Netns,
        mut answer: impl FnMut(&Message) -> Option<Answer> + Send + 'static,
    ) -> Self {
        let socket = netns.enter(|| UdpSocket::bind("0.0.0.0:67").unwrap());
        socket.set_broadcast(true).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let ended = Arc::new(AtomicBool::new(false));
        let (all, end) = (Arc::clone(&seen), Arc::clone(&ended));
        let thread = thread::spawn(move || {
            let mut buffer = [0; 2048];
            while !end.load(Ordering::Relaxed) {
                let Ok((length, _)) = socket.recv_from(&mut buffer) else {
                    continue;
                };
                let message = Message::read(&buffer[..length]);
                all.lock().unwrap().push(message.clone());
                if let Some(answer) = answer(&message) {
                    let answer = message.answer(&answer);
                    socket.send_to(&answer, (Ipv4Addr::BROADCAST, 68)).unwrap();
                }
            }
        });
        let thread = Some(thread);
        Self {
            seen,
            ended,
            thread,
        }
    }

    /// How many messages it has got that are like this.
    pub fn count(&self, fits: impl Fn(&Message) -> bool) -> usize {
        let seen = self.seen.lock().unwrap();
        seen.iter().filter(|message| fits(message)).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        if !thread::panicking() {
            ended.unwrap();
        }
    }
}

impl Message {
    fn read(bytes: &[u8]) -> Self {
        let mut options = &bytes[240..];
        let kind = loop {
            match options {
                [53, 1, kind, ..] => break *kind,
                [_, length, rest @ ..] => options = &rest[usize::from(*length)..],
                _ => panic!("no kind: {bytes:?}"),
            }
        };
        Self {
            kind,
            client: <[u8; 4]>::try_from(&bytes[12..16]).unwrap().into(),
            bytes: bytes.to_vec(),
        }
    }

    /// An answer to it, in bytes.
    fn answer(&self, answer: &Answer) -> Vec<u8> {
        let mut bytes = self.bytes[..240].to_vec();
        bytes[0] = 2;
        bytes[16..20].copy_from_slice(&answer.address);
        bytes.extend([53, 1, answer.kind]);
        bytes.extend(&answer.options);
        bytes.push(255);
        bytes
    }
}
