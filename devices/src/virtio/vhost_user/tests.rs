use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::VhostUserVirtioFeatures;

use super::*;
use crate::virtio::VIRTIO_F_VERSION_1;

/// How long a server of these tests has: those that reply do so at once.
const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(50);

pub const GET_FEATURES: u32 = 1;
pub const GET_VRING_BASE: u32 = 11;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
pub const SET_VRING_NUM: u32 = 8;
const SET_PROTOCOL_FEATURES: u32 = 16;
pub const SET_DEVICE_STATE_FD: u32 = 42;
pub const CHECK_DEVICE_STATE: u32 = 43;

pub const REQUIRED: Protocol = Protocol::REPLY_ACK.union(Protocol::MQ);
const FEATURES: u64 = VIRTIO_F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// What a server does with one kind of requests in place of the usual.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// It replies this number.
    Says(u64),
    /// It does not reply.
    Hangs,
    /// It replies with a piece, and no more.
    Stops,
    /// It replies with garbage.
    Raves,
    /// It hangs up.
    Ends,
}

/// A server that does nothing but reply; the requests that it gets can be received.
pub fn serve(fault: Option<(u32, Fault)>) -> (UnixStream, Receiver<u32>) {
    let (ours, mut its) = UnixStream::pair().unwrap();
    let (sender, requests) = channel();
    thread::spawn(move || {
        let mut acknowledges = false;
        let mut header = [0; 12];
        while its.read_exact(&mut header).is_ok() {
            let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
            let (code, flags, len) = (word(0), word(4), word(8));
            let mut body = vec![0; len as usize];
            its.read_exact(&mut body).unwrap();
            // The test may have seen enough.
            let _ = sender.send(code);
            let usual = match code {
                GET_FEATURES => Some(FEATURES),
                GET_PROTOCOL_FEATURES => Some((REQUIRED | Protocol::DEVICE_STATE).bits()),
                // It needs no file of its own.
                SET_DEVICE_STATE_FD => Some(0x100),
                CHECK_DEVICE_STATE => Some(0),
                GET_QUEUE_NUM => Some(2),
                // The index of the queue, and 0.
                GET_VRING_BASE => Some(u64::from_ne_bytes(body.try_into().unwrap())),
                _ => (acknowledges && flags & 8 != 0).then_some(0),
            };
            acknowledges |= code == SET_PROTOCOL_FEATURES;
            let fault = fault.filter(|fault| fault.0 == code);
            let reply = |head: [u32; 3], value: u64| {
                let mut bytes = head.map(u32::to_ne_bytes).concat();
                bytes.extend_from_slice(&value.to_ne_bytes());
                bytes
            };
            let bytes = match (fault.map(|fault| fault.1), usual) {
                (Some(Fault::Says(value)), _) => reply([code, 5, 8], value),
                (Some(Fault::Hangs), _) => continue,
                (Some(Fault::Stops), _) => reply([code, 5, 8], 0)[..14].to_vec(),
                (Some(Fault::Raves), _) => reply([code + 1, 5, 8], 0),
                (Some(Fault::Ends), _) => return,
                (None, Some(value)) => reply([code, 5, 8], value),
                (None, None) => continue,
            };
            its.write_all(&bytes).unwrap();
        }
    });
    (ours, requests)
}

fn connect(fault: Option<(u32, Fault)>, limit: Duration) -> Result<FrontEnd, String> {
    let (socket, _) = serve(fault);
    let connected = FrontEnd::connect(socket, limit, 0, (2, 16), None);
    connected.map_err(|error| {
        let cause = std::error::Error::source(&error);
        let cause = cause.map_or(String::new(), |cause| format!(": {cause}"));
        format!("{error}{cause}")
    })
}

#[test]
fn server_that_has_what_is_needed_is_agreed_with() {
    let front_end = connect(None, LONG).unwrap();
    assert!(!front_end.is_dead());
    assert_eq!(front_end.features(), VIRTIO_F_VERSION_1);
}

#[test]
fn server_that_lacks_something_is_refused_by_name() {
    for (request, value, lacks) in [
        (GET_FEATURES, 0, "virtio 1.0"),
        (GET_FEATURES, VIRTIO_F_VERSION_1, "protocol features"),
        (GET_PROTOCOL_FEATURES, 0, "acknowledgements"),
        (GET_QUEUE_NUM, 1, "queues that are enough"),
    ] {
        let error = connect(Some((request, Fault::Says(value))), LONG).unwrap_err();
        assert!(error.contains(lacks), "{error}");
    }
}

#[test]
fn server_that_does_not_reply_is_given_up() {
    for fault in [Fault::Hangs, Fault::Stops] {
        let start = Instant::now();
        let error = connect(Some((GET_QUEUE_NUM, fault)), SHORT).unwrap_err();
        let what = "does not say how many queues it has: it has not replied in 50ms";
        assert!(error.contains(what), "{error}");
        assert!(start.elapsed() >= SHORT);
    }
}

#[test]
fn server_that_replies_garbage_or_ends_is_given_up() {
    for (fault, what) in [
        (
            Fault::Raves,
            "its reply to GET_QUEUE_NUM is another message",
        ),
        (Fault::Ends, "unexpected end of file"),
    ] {
        let error = connect(Some((GET_QUEUE_NUM, fault)), LONG).unwrap_err();
        assert!(error.contains(what), "{error}");
    }
}
