//! Messages of vhost-user (docs/interop/vhost-user.rst of QEMU), right ones and others.

use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// The flags of a request: the version.
pub const REQUEST: u32 = 1;
/// The flags of a reply.
pub const REPLY: u32 = REQUEST | 1 << 2;

/// The requests of a front end.
pub mod code {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;

    /// Those that set up a queue, in the order of minivmm's front end.
    pub const QUEUE_SET_UP: [u32; 5] = [
        SET_VRING_NUM,
        SET_VRING_BASE,
        SET_VRING_ADDR,
        SET_VRING_CALL,
        SET_VRING_KICK,
    ];
}

/// A message.
pub fn message(code: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let header = [code, flags, body.len() as u32].map(u32::to_le_bytes);
    [&header.concat(), body].concat()
}

/// Sends bytes with descriptors. Where the other end has closed its socket, they are lost.
pub fn send(socket: &UnixStream, bytes: &[u8], fds: &[RawFd]) {
    if !bytes.is_empty() {
        let _ = socket.send_with_fds(&[bytes], fds);
    }
}
