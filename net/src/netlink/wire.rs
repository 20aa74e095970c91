//! Netlink messages and their attributes as bytes. Nothing here fails: an impossible length ends an iteration.

use std::io;

/// Size of the header before each message (`struct nlmsghdr`).
const MESSAGE_HEADER: usize = 16;

/// Size of the header before each attribute (`struct nlattr`).
const ATTRIBUTE_HEADER: usize = 4;

/// Messages and attributes begin at multiples of this.
const ALIGNMENT: usize = 4;

/// One message of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message<'a> {
    /// What it is about: one of `RTM_*`, or of `NLMSG_*` for netlink's own.
    pub kind: u16,
    /// Of `NLM_F_*`.
    pub flags: u16,
    /// That of the request which it answers.
    pub sequence: u32,
    pub body: &'a [u8],
}

impl Message<'_> {
    /// For the last message of an answer, how the request ended. None when more is to come.
    pub(crate) fn outcome(&self) -> Option<io::Result<()>> {
        let code = u32_of(self.body).map_or(0, u32::cast_signed);
        let refusal = || io::Error::from_raw_os_error(code.saturating_neg());
        match i32::from(self.kind) {
            // An acknowledgement has the code 0; not every dump ends with one.
            libc::NLMSG_ERROR | libc::NLMSG_DONE if code == 0 => Some(Ok(())),
            libc::NLMSG_ERROR | libc::NLMSG_DONE => Some(Err(refusal())),
            libc::NLMSG_OVERRUN => Some(Err(io::Error::from_raw_os_error(libc::ENOBUFS))),
            _ => None,
        }
    }
}

/// The messages of a datagram.
#[derive(Clone, Debug)]
pub(crate) struct Messages<'a>(pub &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let length = u32_of(self.0)? as usize;
        let (header, body) = self.0.get(..length)?.split_at_checked(MESSAGE_HEADER)?;
        self.0 = rest(self.0, length);
        Some(Message {
            kind: u16_of(&header[4..])?,
            flags: u16_of(&header[6..])?,
            sequence: u32_of(&header[8..])?,
            body,
        })
    }
}

/// One attribute of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attribute<'a> {
    /// With the flags NLA_F_NESTED and NLA_F_NET_BYTEORDER.
    pub raw_kind: u16,
    pub value: &'a [u8],
}

impl<'a> Attribute<'a> {
    /// What it is about, a number of its message's own.
    pub(crate) const fn kind(&self) -> u16 {
        self.raw_kind & libc::NLA_TYPE_MASK as u16
    }

    /// The attributes that it consists of.
    pub(crate) const fn nested(&self) -> Attributes<'a> {
        Attributes(self.value)
    }

    /// Its text, which the kernel ends with a zero byte. What is not UTF-8 shows as U+FFFD.
    pub(crate) fn text(&self) -> String {
        let end = self.value.iter().position(|byte| *byte == 0);
        String::from_utf8_lossy(&self.value[..end.unwrap_or(self.value.len())]).into_owned()
    }
}

/// The attributes after a message's own header, or in another attribute.
#[derive(Clone, Debug)]
pub(crate) struct Attributes<'a>(pub &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = Attribute<'a>;

    fn next(&mut self) -> Option<Attribute<'a>> {
        let length = usize::from(u16_of(self.0)?);
        let (header, value) = self.0.get(..length)?.split_at_checked(ATTRIBUTE_HEADER)?;
        self.0 = rest(self.0, length);
        Some(Attribute {
            raw_kind: u16_of(&header[2..])?,
            value,
        })
    }
}

fn rest(bytes: &[u8], length: usize) -> &[u8] {
    bytes
        .get(length.next_multiple_of(ALIGNMENT)..)
        .unwrap_or_default()
}

/// A message to the kernel, which is the first and only one of its datagram.
pub(crate) fn request(kind: u16, flags: i32, sequence: u32, body: &[u8]) -> Vec<u8> {
    let length = (MESSAGE_HEADER + body.len()) as u32;
    let flags = (libc::NLM_F_REQUEST | flags) as u16;
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    // The kernel knows whose socket it is.
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend(body);
    bytes
}

/// The bytes of an attribute.
pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = (ATTRIBUTE_HEADER + value.len()) as u16;
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    bytes
}

/// The number that `bytes` begin with.
pub(crate) fn u32_of(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().copied().map(u32::from_ne_bytes)
}

/// The number that `bytes` begin with.
pub(crate) fn u16_of(bytes: &[u8]) -> Option<u16> {
    bytes.first_chunk().copied().map(u16::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn message_that_was_written_is_read_back() {
        let body = attribute(7, &[1, 2, 3, 4, 5]);
        let bytes = request(libc::RTM_GETLINK, libc::NLM_F_DUMP, 5, &body);
        let messages: Vec<_> = Messages(&bytes).collect();
        let [message] = messages[..] else {
            panic!("one message: {messages:?}");
        };
        assert_eq!(message.kind, libc::RTM_GETLINK);
        let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
        assert_eq!(i32::from(message.flags), flags);
        assert_eq!(message.sequence, 5);
        let attributes: Vec<_> = Attributes(message.body).collect();
        assert_eq!(attributes.len(), 1);
        assert_eq!(attributes[0].kind(), 7);
        assert_eq!(attributes[0].value, [1, 2, 3, 4, 5]);
    }

    #[test]
    fn lengths_that_cannot_be_end_the_walk() {
        for length in [0, 1, 3, 9, u16::MAX] {
            let mut bytes = attribute(1, b"1234");
            let mut bad = attribute(2, b"1234");
            bad[..2].copy_from_slice(&length.to_ne_bytes());
            bytes.extend(bad);
            assert_eq!(Attributes(&bytes).count(), 1, "{length}");
        }
        for length in [0, 1, 15, 17, u32::MAX] {
            let mut bytes = request(1, 0, 1, &[]);
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(Messages(&bytes).count(), 0, "{length}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_walked_to_an_end(bytes in vec(any::<u8>(), 0..300)) {
            let found: usize = Messages(&bytes).map(|message| 16 + message.body.len()).sum();
            prop_assert!(found <= bytes.len());
            for message in Messages(&bytes) {
                let _ = message.outcome();
            }
            let found: usize = Attributes(&bytes).map(|one| 4 + one.value.len()).sum();
            prop_assert!(found <= bytes.len());
            for attribute in Attributes(&bytes) {
                let _ = (attribute.text(), attribute.nested().count());
            }
        }
    }
}
