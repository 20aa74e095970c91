//! The guest as the side that connects: a source for the peer's sink, and the other way round.

use alloc::format;
use alloc::string::{String, ToString};

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;

use super::echo::send_stream;
use super::stream::Position;
use super::{Stack, with_stack};
use crate::cpu;
use crate::options::Options;

const SINK: u16 = 9;
const SOURCE: u16 = 19;
const LOCAL_PORT: u16 = 49_152;

/// Sends the stream and waits for the peer's verdict, `OK n`.
pub fn source(options: &Options) {
    with_stack("tcp-source", options, |stack| {
        let start = cpu::now();
        let socket = connect(stack, options, SINK)?;
        let mut position = Position(0);
        stack.poll_until(|stack| {
            let (socket, _) = stack.tcp(socket);
            send_stream(socket, &mut position, options.bytes);
            (position.0 == options.bytes).then(|| socket.close())
        })?;
        let mut answer = [0; 32];
        let length = stack.poll_until(|stack| {
            let (socket, _) = stack.tcp(socket);
            match socket.recv_slice(&mut answer) {
                Ok(0) => None,
                Ok(length) => Some(length),
                // The peer closed or reset without a word.
                Err(_) => Some(0),
            }
        })?;
        let micros = (cpu::now() - start).total_micros();
        stack.linger(20);
        let answer = core::str::from_utf8(&answer[..length])
            .unwrap_or("?")
            .trim();
        if answer != format!("OK {}", options.bytes) {
            return Err(format!("the peer answered {answer:?}"));
        }
        Ok(format!("bytes={} us={micros}", options.bytes))
    });
}

/// Receives the stream until the peer closes.
pub fn sink(options: &Options) {
    with_stack("tcp-sink", options, |stack| {
        let start = cpu::now();
        let socket = connect(stack, options, SOURCE)?;
        let mut position = Position(0);
        let end = stack.poll_until(|stack| {
            let (socket, _) = stack.tcp(socket);
            while socket.can_recv() {
                if let Ok(Err(at)) = socket.recv(|data| (data.len(), position.check(data))) {
                    return Some(Err(format!("byte {at} is wrong")));
                }
            }
            (!socket.may_recv()).then(|| {
                socket.close();
                Ok(())
            })
        })?;
        end?;
        let micros = (cpu::now() - start).total_micros();
        stack.linger(20);
        Ok(format!("bytes={} us={micros}", position.0))
    });
}

/// Connects to the peer, and waits until the connection is there.
fn connect(stack: &mut Stack, options: &Options, port: u16) -> Result<SocketHandle, String> {
    let remote = (options.peer()?, options.port.unwrap_or(port));
    let handle = stack.add_tcp();
    let local_port = LOCAL_PORT + (cpu::now().total_micros() % 10_000) as u16;
    let (socket, context) = stack.tcp(handle);
    socket
        .connect(context, remote, local_port)
        .map_err(|error| format!("connect: {error}"))?;
    let state = stack.poll_until(|stack| match stack.tcp(handle).0.state() {
        tcp::State::SynSent => None,
        state => Some(state),
    })?;
    match state {
        tcp::State::Closed => Err("the peer refused the connection".to_string()),
        _ => Ok(handle),
    }
}
