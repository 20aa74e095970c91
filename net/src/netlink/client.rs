//! Requests to the kernel and its answers. rtnetlink's own parser reads none of them: one attribute that it rejects would
//! hide a whole link, or leave a request without an answer.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};
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

/// A socket that speaks to the kernel, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Client<S = Socket> {
    socket: S,
    /// The number of the last requests: an answer to earlier ones, which have failed, is passed over.
    sequence: AtomicU32,
}

impl Client {
    pub(super) fn open() -> io::Result<Self> {
        open_socket().map(Self::over)
    }
}

impl<S: AsFd> Client<S> {
    fn over(socket: S) -> Self {
        Self {
            socket,
            sequence: AtomicU32::new(0),
        }
    }

    /// Asks, and returns what `parse` makes of the messages that come.
    ///
    /// # Errors
    ///
    /// The kernel's refusal; TimedOut after [`LIMIT`]; and when changes interrupted every dump.
    pub(super) fn ask<T>(
        &self,
        request: Request,
        parse: impl Fn(&[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        let request = [request];
        for _ in 0..TRIES {
            match self.exchange(&request, &parse) {
                Ok(Some(found)) => return Ok(found),
                Ok(None) => {}
                // Some of it was lost; and the rest, which is still coming, keeps the kernel from another one.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EBUSY)) => {
                }
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other(format!(
            "changes have interrupted the kernel's list {TRIES} times"
        )))
    }

    /// Has changes made by one datagram. The kernel handles it in one go, and goes on after one that it refuses; the first
    /// refusal is the error.
    pub(super) fn change(&self, requests: &[Request]) -> io::Result<()> {
        self.exchange(requests, |_| None::<()>).map(drop)
    }

    /// Requests in one datagram and all of their answers; None when these may have gaps.
    fn exchange<T>(
        &self,
        requests: &[Request],
        parse: impl Fn(&[u8]) -> Option<T>,
    ) -> io::Result<Option<Vec<T>>> {
        let socket = self.socket.as_fd();
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        let bytes: Vec<u8> = requests
            .iter()
            .flat_map(|one| request(one.kind, one.flags, sequence, &one.body))
            .collect();
        rustix::net::send(socket, &bytes, SendFlags::NOSIGNAL)?;
        let (mut found, mut result, mut outcomes) = (Vec::new(), Ok(()), 0);
        let mut is_whole = true;
        let mut buffer = Vec::new();
        while outcomes < requests.len() {
            let received = receive(socket, &mut buffer).map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => timed_out(),
                _ => error,
            });
            for message in Messages(received?.0).filter(|message| message.sequence == sequence) {
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

/// Whether what a dump lists changed meanwhile: it may have left something out.
pub(crate) fn is_interrupted(message: &Message<'_>) -> bool {
    i32::from(message.flags) & libc::NLM_F_DUMP_INTR != 0
}

/// Receives one datagram into `buffer`, however long it is, and returns it, and its sender if that is a netlink socket.
pub(crate) fn receive<'a>(
    socket: BorrowedFd<'_>,
    buffer: &'a mut Vec<u8>,
) -> io::Result<(&'a [u8], Option<SocketAddrNetlink>)> {
    grow(buffer, BUFFER);
    let look = RecvFlags::PEEK | RecvFlags::TRUNC;
    let (_, length, _) = retry(|| rustix::net::recvfrom(socket, &mut buffer[..], look))?;
    grow(buffer, length);
    let (_, length, sender) =
        retry(|| rustix::net::recvfrom(socket, &mut buffer[..], RecvFlags::empty()))?;
    let sender = sender.and_then(|sender| sender.try_into().ok());
    Ok((&buffer[..length], sender))
}

/// A new buffer is zero without being touched, as one that is extended is not.
fn grow(buffer: &mut Vec<u8>, length: usize) {
    if buffer.len() < length {
        *buffer = vec![0; length];
    }
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

    /// An answer, which gets the number of its request when it is sent.
    fn message(kind: u16, flags: i32, body: &[u8]) -> Vec<u8> {
        request(kind, flags, 0, body)
    }

    fn link(number: u8) -> Vec<u8> {
        message(libc::RTM_NEWLINK, libc::NLM_F_MULTI, &[number; 16])
    }

    fn end(kind: i32, code: i32) -> Vec<u8> {
        message(kind as u16, libc::NLM_F_MULTI, &code.to_ne_bytes())
    }

    /// A client of a kernel that answers each request with these datagrams, one after the other.
    fn client(requests: Vec<Vec<Vec<u8>>>) -> (Client<OwnedFd>, JoinHandle<()>) {
        let kind = SocketType::SEQPACKET;
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
        let kernel = std::thread::spawn(move || {
            let mut buffer = Vec::new();
            for answers in requests {
                let (bytes, _) = receive(theirs.as_fd(), &mut buffer).unwrap();
                let requests: Vec<_> = Messages(bytes).collect();
                let [request] = requests[..] else {
                    panic!("one request: {requests:?}");
                };
                for mut answer in answers {
                    number(&mut answer, request.sequence);
                    rustix::net::send(&theirs, &answer, SendFlags::NOSIGNAL).unwrap();
                }
            }
            let (more, _) = receive(theirs.as_fd(), &mut buffer).unwrap();
            assert!(more.is_empty());
        });
        (Client::over(ours), kernel)
    }

    /// Has the messages of a datagram that have no number yet answer the request with this one.
    fn number(datagram: &mut [u8], sequence: u32) {
        let mut at = 0;
        while let Some(length) = datagram.get(at..).and_then(crate::netlink::wire::u32_of) {
            let place = &mut datagram[at + 8..at + 12];
            if place == [0; 4] {
                place.copy_from_slice(&sequence.to_ne_bytes());
            }
            at += (length as usize).next_multiple_of(4);
        }
    }

    /// What is understood when the requests are answered so, one after the other.
    fn ask_kernels(requests: Vec<Vec<Vec<u8>>>) -> io::Result<Vec<u8>> {
        ask_patiently(Duration::from_secs(60), requests)
    }

    fn ask_patiently(limit: Duration, requests: Vec<Vec<Vec<u8>>>) -> io::Result<Vec<u8>> {
        let (client, kernel) = client(requests);
        sockopt::set_socket_timeout(&client.socket, Timeout::Recv, Some(limit))?;
        let found = client.ask(asked(), |body| body.first().copied());
        drop(client);
        kernel.join().unwrap();
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
