//! The header of each packet (virtio 1.2, 5.10.6).
//!
//! The crate virtio-vsock reads packets from descriptor chains of its own kind, with the data in one
//! piece, and its header has no public fields: a [`Queue`](crate::virtio::Queue) gives iovecs, of as
//! many pieces as the driver likes.

/// Bytes of a header.
pub const LEN: usize = 44;

/// The host's CID.
pub const HOST_CID: u64 = 2;
/// The only type of socket that is offered: a stream.
pub const STREAM: u16 = 1;

/// A connection is asked for.
pub const REQUEST: u16 = 1;
/// It is accepted.
pub const RESPONSE: u16 = 2;
/// It is refused, or ends at once.
pub const RST: u16 = 3;
/// The sender will not receive or send any more, as the flags say.
pub const SHUTDOWN: u16 = 4;
/// Data.
pub const RW: u16 = 5;
/// How much the sender can take.
pub const CREDIT_UPDATE: u16 = 6;
/// The same is asked for.
pub const CREDIT_REQUEST: u16 = 7;

/// Flag of [`SHUTDOWN`]: the sender receives no more.
pub const NO_RECEIVE: u32 = 1;
/// Flag of [`SHUTDOWN`]: the sender sends no more.
pub const NO_SEND: u32 = 2;
/// Both of them.
pub const CLOSED: u32 = NO_RECEIVE | NO_SEND;

/// The header of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Who sends it.
    pub src_cid: u64,
    /// Who is to have it.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// Bytes of data that follow.
    pub len: u32,
    /// The type of socket.
    pub kind: u16,
    /// What it is about.
    pub op: u16,
    /// Flags of [`SHUTDOWN`].
    pub flags: u32,
    /// Bytes that the sender can hold of this connection.
    pub buf_alloc: u32,
    /// Bytes of this connection that the sender has passed on.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads what a driver has written.
    pub fn from_bytes(bytes: &[u8; LEN]) -> Self {
        let half = |at| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let long = |at| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Self {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: half(28),
            op: half(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }

    /// As a driver reads it.
    pub fn to_bytes(self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// What refuses this packet.
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: RST,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_laid_out_as_in_the_specification() {
        let bytes: [u8; LEN] = std::array::from_fn(|n| n as u8);
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.dst_cid, 0x0f0e_0d0c_0b0a_0908);
        assert_eq!(
            (header.src_port, header.dst_port),
            (0x1312_1110, 0x1716_1514)
        );
        assert_eq!(header.len, 0x1b1a_1918);
        assert_eq!((header.kind, header.op), (0x1d1c, 0x1f1e));
        assert_eq!(header.flags, 0x2322_2120);
        assert_eq!(
            (header.buf_alloc, header.fwd_cnt),
            (0x2726_2524, 0x2b2a_2928)
        );
        assert_eq!(header.to_bytes(), bytes);
    }
}
