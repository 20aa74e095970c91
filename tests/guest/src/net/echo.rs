//! The servers: ICMP echo (by smoltcp itself), UDP echo, TCP echo, sink and source.

use alloc::format;
use alloc::string::String;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::{tcp, udp};

use super::stream::Position;
use super::{Stack, with_stack};
use crate::options::Options;
use crate::serial::println;

/// The ports of the services, which are those of RFC 862, 863 and 864.
pub const ECHO: u16 = 7;
const SINK: u16 = 9;
const SOURCE: u16 = 19;
/// The datagram that ends it.
const QUIT: &[u8] = b"quit";

/// Serves until `quit` comes, or the time is over.
pub fn run(options: &Options) {
    with_stack("echo", options, |stack| serve(stack, options.bytes));
}

fn serve(stack: &mut Stack, source_bytes: u64) -> Result<String, String> {
    let udp = stack.add_udp();
    let bound = stack.sockets.get_mut::<udp::Socket<'_>>(udp).bind(ECHO);
    bound.map_err(|error| format!("bind: {error}"))?;
    let mut services = [
        Service::new(stack, ECHO),
        Service::new(stack, SINK),
        Service::new(stack, SOURCE),
    ];
    // Each listens: who connects as soon as this is read is not refused.
    for service in &mut services {
        service.step(stack, source_bytes);
    }
    println!("READY echo");
    let mut datagrams = 0;
    stack.poll_until(|stack| {
        for service in &mut services {
            service.step(stack, source_bytes);
        }
        echo_datagrams(stack.sockets.get_mut(udp), &mut datagrams).then_some(())
    })?;
    stack.linger(20);
    let connections: u32 = services.iter().map(|service| service.connections).sum();
    Ok(format!("datagrams={datagrams} connections={connections}"))
}

/// Sends what came back where it came from. True when it was the end.
pub fn echo_datagrams(socket: &mut udp::Socket<'_>, count: &mut u64) -> bool {
    while socket.can_send()
        && let Ok((data, from)) = socket.recv()
    {
        let (data, quit) = (data.to_vec(), data == QUIT);
        *count += 1;
        // A full send buffer loses a datagram, as UDP may.
        let _ = socket.send_slice(&data, from);
        if quit {
            return true;
        }
    }
    false
}

/// One TCP port and the connection that it serves, one after another.
struct Service {
    port: u16,
    socket: SocketHandle,
    position: Position,
    /// The sink's answer to its peer is out.
    answered: bool,
    /// The position of the first wrong byte that the sink got.
    wrong: Option<u64>,
    connections: u32,
}

impl Service {
    fn new(stack: &mut Stack, port: u16) -> Self {
        Self::fresh(port, stack.add_tcp())
    }

    fn step(&mut self, stack: &mut Stack, source_bytes: u64) {
        let socket = stack.sockets.get_mut::<tcp::Socket<'_>>(self.socket);
        if !socket.is_open() {
            // It fails only for a socket that is open, or port 0.
            let _ = socket.listen(self.port);
            *self = Self {
                connections: self.connections,
                ..Self::fresh(self.port, self.socket)
            };
            return;
        }
        if !socket.is_active() {
            return;
        }
        if self.position.0 == 0 && socket.may_send() && (socket.can_recv() || self.port == SOURCE) {
            self.connections += 1;
        }
        match self.port {
            ECHO => self.echo(socket),
            SINK => self.sink(socket),
            _ => self.source(socket, source_bytes),
        }
    }

    fn fresh(port: u16, socket: SocketHandle) -> Self {
        Self {
            port,
            socket,
            position: Position(0),
            answered: false,
            wrong: None,
            connections: 0,
        }
    }

    fn echo(&mut self, socket: &mut tcp::Socket<'_>) {
        let room = socket.send_capacity() - socket.send_queue();
        let data = socket.recv(|data| {
            let count = data.len().min(room);
            (count, data[..count].to_vec())
        });
        if let Ok(data) = data {
            self.position.0 += data.len() as u64;
            // There is room for all of it.
            let _ = socket.send_slice(&data);
        }
        if !socket.may_recv() && socket.may_send() && !socket.can_recv() {
            socket.close();
        }
    }

    fn sink(&mut self, socket: &mut tcp::Socket<'_>) {
        while socket.can_recv() {
            let result = socket.recv(|data| (data.len(), self.position.check(data)));
            if let Ok(Err(at)) = result {
                self.wrong.get_or_insert(at);
            }
        }
        if !socket.may_recv() && socket.may_send() && !self.answered {
            let answer = match self.wrong {
                None => format!("OK {}\n", self.position.0),
                Some(at) => format!("BAD {at}\n"),
            };
            // The send buffer is empty.
            let _ = socket.send_slice(answer.as_bytes());
            self.answered = true;
            socket.close();
        }
    }

    fn source(&mut self, socket: &mut tcp::Socket<'_>, bytes: u64) {
        send_stream(socket, &mut self.position, bytes);
        if self.position.0 == bytes && socket.may_send() {
            socket.close();
        }
    }
}

/// Puts as much of the stream's next bytes, up to `end`, into the socket as it takes.
pub fn send_stream(socket: &mut tcp::Socket<'_>, position: &mut Position, end: u64) {
    while socket.can_send() && position.0 < end {
        let sent = socket.send(|room| {
            let count = room.len().min((end - position.0).min(1 << 20) as usize);
            position.fill(&mut room[..count]);
            (count, count)
        });
        if !matches!(sent, Ok(1..)) {
            return;
        }
    }
}
