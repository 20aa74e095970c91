//! Requests to the kernel and its answers. rtnetlink's own parser reads none of them: one attribute that it rejects would
//! hide a whole link, or leave a request without an answer.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{RecvFlags, SendFlags};

use super::wire::{Message, Messages, request};

/// How long the kernel may take for one answer. Every change of any link of the machine, in any namespace, waits for the
/// same lock (RTNL), which some drivers hold for seconds.
pub(super) const LIMIT: Duration = Duration::from_secs(10);

/// How often a dump is requested until no change interrupts it.
const TRIES: u32 = 20;

/// The kernel puts up to 32 KiB of a dump in a datagram, and a single message may be longer.
const BUFFER: usize = 64 * 1024;

/// The number of all requests on a socket.
const SEQUENCE: u32 = 1;

/// One message to the kernel.
#[derive(Debug)]
pub(super) struct Request {
    /// Of `RTM_*`.
    pub kind: u16,
    /// Of `NLM_F_*`, besides NLM_F_REQUEST.
    pub flags: i32,
    /// The header of that kind of message, and attributes.
    pub body: Vec<u8>,
}

/// Asks the network namespace of the calling thread, and returns what `parse` makes of the messages that come.
///
/// # Errors
///
/// The kernel's refusal; TimedOut after [`LIMIT`]; and when changes interrupted every dump.
pub(super) fn ask<T>(request: Request, parse: impl Fn(&[u8]) -> Option<T>) -> io::Result<Vec<T>> {
    // A socket for each request: the answer to a failed one is never taken for that to the next.
    ask_by(open_socket, request, parse)
}

fn ask_by<T, S: AsFd>(
    mut open: impl FnMut() -> io::Result<S>,
    request: Request,
    parse: impl Fn(&[u8]) -> Option<T>,
) -> io::Result<Vec<T>> {
    let request = [request];
    for _ in 0..TRIES {
        match exchange(open()?.as_fd(), &request, &parse) {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other(format!(
        "changes have interrupted the kernel's list {TRIES} times"
    )))
}

/// Has changes made by one datagram, in the network namespace of the calling thread. The kernel handles it in one go, and
/// goes on after one that it refuses; the first refusal is the error.
pub(super) fn change(requests: &[Request]) -> io::Result<()> {
    exchange(open_socket()?.as_fd(), requests, |_| None::<()>).map(drop)
}

pub(super) fn timed_out() -> io::Error {
    let text = format!(
        "the kernel has not answered within {} s: something holds its network configuration (RTNL), a driver perhaps",
        LIMIT.as_secs()
    );
    io::Error::new(io::ErrorKind::TimedOut, text)
}

/// A socket that only the kernel can send to.
fn open_socket() -> io::Result<Socket> {
    let socket = Socket::new(NETLINK_ROUTE)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    // It makes the kernel (4.20 or newer) check a request, and leave out of a dump what was not requested.
    if let Err(error) = socket.set_netlink_get_strict_chk(true) {
        log::debug!("the kernel does not check requests strictly: {error}");
    }
    sockopt::set_socket_timeout(&socket, Timeout::Recv, Some(LIMIT))?;
    Ok(socket)
}

/// Requests in one datagram and all of their answers; None when these may have gaps.
fn exchange<T>(
    socket: BorrowedFd<'_>,
    requests: &[Request],
    parse: impl Fn(&[u8]) -> Option<T>,
) -> io::Result<Option<Vec<T>>> {
    let bytes: Vec<u8> = requests
        .iter()
        .flat_map(|one| request(one.kind, one.flags, SEQUENCE, &one.body))
        .collect();
    rustix::net::send(socket, &bytes, SendFlags::NOSIGNAL)?;
    let (mut found, mut result, mut outcomes) = (Vec::new(), Ok(()), 0);
    let mut is_whole = true;
    let mut buffer = Vec::new();
    while outcomes < requests.len() {
        receive(socket, &mut buffer).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => timed_out(),
            _ => error,
        })?;
        for message in Messages(&buffer).filter(|message| message.sequence == SEQUENCE) {
            is_whole &= !is_interrupted(&message);
            match message.outcome() {
                Some(outcome) => {
                    outcomes += 1;
                    result = result.and(outcome);
                }
                // RTM_GETLINK is answered with RTM_NEWLINK, two less, and so on.
                None if requests.iter().any(|one| message.kind + 2 == one.kind) => {
                    found.extend(parse(message.body));
                }
                None => {}
            }
        }
    }
    result?;
    Ok(is_whole.then_some(found))
}

/// Whether what a dump lists changed meanwhile: it may have left something out.
pub(crate) fn is_interrupted(message: &Message<'_>) -> bool {
    i32::from(message.flags) & libc::NLM_F_DUMP_INTR != 0
}

/// Receives one datagram into `buffer`, however long it is, and returns its sender if that is a netlink socket.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<SocketAddrNetlink>> {
    buffer.resize(BUFFER.max(buffer.len()), 0);
    let look = RecvFlags::PEEK | RecvFlags::TRUNC;
    let (_, length, _) = retry(|| rustix::net::recvfrom(socket, &mut buffer[..], look))?;
    buffer.resize(BUFFER.max(length), 0);
    let (_, length, sender) =
        retry(|| rustix::net::recvfrom(socket, &mut buffer[..], RecvFlags::empty()))?;
    buffer.truncate(length);
    Ok(sender.and_then(|sender| sender.try_into().ok()))
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::thread::JoinHandle;

    use rustix::net::{AddressFamily, SocketFlags, SocketType};

    use super::*;

    const DUMP: i32 = libc::NLM_F_DUMP;

    fn asked() -> Request {
        Request {
            kind: libc::RTM_GETLINK,
            flags: DUMP,
            body: vec![0; 16],
        }
    }

    fn message(kind: u16, flags: i32, body: &[u8]) -> Vec<u8> {
        request(kind, flags, SEQUENCE, body)
    }

    fn link(number: u8) -> Vec<u8> {
        message(libc::RTM_NEWLINK, libc::NLM_F_MULTI, &[number; 16])
    }

    fn end(kind: i32, code: i32) -> Vec<u8> {
        message(kind as u16, libc::NLM_F_MULTI, &code.to_ne_bytes())
    }

    /// A socket whose other end answers the first request with these datagrams, and then waits for its end.
    fn kernel(answers: Vec<Vec<u8>>) -> (OwnedFd, JoinHandle<()>) {
        let kind = SocketType::SEQPACKET;
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
        let kernel = std::thread::spawn(move || {
            let mut buffer = Vec::new();
            receive(theirs.as_fd(), &mut buffer).unwrap();
            assert_eq!(Messages(&buffer).count(), 1);
            for answer in answers {
                rustix::net::send(&theirs, &answer, SendFlags::NOSIGNAL).unwrap();
            }
            receive(theirs.as_fd(), &mut buffer).unwrap();
        });
        (ours, kernel)
    }

    /// What is understood when the requests are answered so, one after the other.
    fn ask_kernels(requests: Vec<Vec<Vec<u8>>>) -> io::Result<Vec<u8>> {
        ask_patiently(Duration::from_secs(60), requests)
    }

    fn ask_patiently(limit: Duration, requests: Vec<Vec<Vec<u8>>>) -> io::Result<Vec<u8>> {
        let (sockets, kernels): (Vec<_>, Vec<_>) = requests.into_iter().map(kernel).unzip();
        let mut sockets = sockets.into_iter();
        let open = || {
            let none = || io::Error::other("one request too many");
            let socket = sockets.next().ok_or_else(none)?;
            sockopt::set_socket_timeout(&socket, Timeout::Recv, Some(limit))?;
            Ok(socket)
        };
        let found = ask_by(open, asked(), |body| body.first().copied());
        drop(sockets);
        kernels
            .into_iter()
            .for_each(|kernel| kernel.join().unwrap());
        found
    }

    #[test]
    fn answer_in_several_datagrams_is_read_to_its_end() {
        let first = [link(1), link(2)].concat();
        let other = message(libc::RTM_NEWADDR, libc::NLM_F_MULTI, &[9; 16]);
        let last = [other, link(3), end(libc::NLMSG_DONE, 0)].concat();
        assert_eq!(ask_kernels(vec![vec![first, last]]).unwrap(), [1, 2, 3]);
    }

    #[test]
    fn message_longer_than_the_buffer_is_read_whole() {
        let alias = vec![7; 2 * BUFFER];
        let long = message(libc::RTM_NEWLINK, 0, &alias);
        let answers = vec![long, end(libc::NLMSG_DONE, 0)];
        assert_eq!(ask_kernels(vec![answers]).unwrap(), [7]);
    }

    #[test]
    fn answer_to_another_request_is_passed_over() {
        let mut other = link(1);
        other[8..12].copy_from_slice(&77_u32.to_ne_bytes());
        let answers = vec![other, link(2), end(libc::NLMSG_DONE, 0)];
        assert_eq!(ask_kernels(vec![answers]).unwrap(), [2]);
    }

    #[test]
    fn refusal_is_its_error_number_wherever_it_comes() {
        for kind in [libc::NLMSG_ERROR, libc::NLMSG_DONE] {
            let answers = vec![link(1), end(kind, -libc::EPERM)];
            let error = ask_kernels(vec![answers]).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        }
    }

    #[test]
    fn dump_that_was_interrupted_is_asked_for_again() {
        let mut gaps = link(1);
        gaps[6] |= libc::NLM_F_DUMP_INTR as u8;
        let interrupted = vec![gaps, end(libc::NLMSG_DONE, 0)];
        let lost = vec![link(4), message(libc::NLMSG_OVERRUN as u16, 0, &[])];
        let whole = vec![link(2), end(libc::NLMSG_DONE, 0)];
        let found = ask_kernels(vec![interrupted.clone(), lost, whole]).unwrap();
        assert_eq!(found, [2]);

        let always = vec![interrupted; TRIES as usize];
        let error = ask_kernels(always).unwrap_err();
        assert!(error.to_string().contains("interrupted"), "{error}");
    }

    #[test]
    fn kernel_that_does_not_answer_is_named_with_the_limit() {
        for answers in [vec![], vec![link(1)]] {
            let limit = Duration::from_millis(10);
            let error = ask_patiently(limit, vec![answers]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert!(error.to_string().contains("within 10 s"), "{error}");
        }
    }
}
