//! The NIC driven by the virtio-drivers crate: no offloads, frames of one buffer each.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::transport::SomeTransport;

use super::FRAME;
use crate::virtio::by_crate::{Identity, transport};
use crate::virtio::device::VirtioDevice;
use crate::virtio::net::HEADER;

const QUEUE_SIZE: usize = 128;
const BUFFER: usize = 2048;

type Buffer = Box<[u8; BUFFER]>;

/// The NIC and its buffers, by the token that the crate gave for each.
pub struct CrateNic {
    raw: VirtIONetRaw<Identity, SomeTransport<'static>, QUEUE_SIZE>,
    receiving: [Option<Buffer>; QUEUE_SIZE],
    sending: [Option<(Buffer, usize)>; QUEUE_SIZE],
    spare: Vec<Buffer>,
}

impl CrateNic {
    /// Brings the device up and gives it buffers to receive into.
    pub fn start(nic: VirtioDevice) -> Result<Self, String> {
        let raw = VirtIONetRaw::new(transport(nic)?)
            .map_err(|error| format!("virtio-drivers: {error}"))?;
        let mut nic = Self {
            raw,
            receiving: [const { None }; QUEUE_SIZE],
            sending: [const { None }; QUEUE_SIZE],
            spare: Vec::new(),
        };
        for _ in 0..QUEUE_SIZE {
            nic.receive_into(Box::new([0; BUFFER]))
                .map_err(|error| format!("virtio-drivers: {error}"))?;
        }
        Ok(nic)
    }

    /// Its address.
    pub fn mac(&self) -> [u8; 6] {
        self.raw.mac_address()
    }

    /// Acknowledges an interrupt. True when there was one.
    pub fn acknowledge_interrupt(&mut self) -> bool {
        !self.raw.ack_interrupt().is_empty()
    }

    /// The next received frame.
    pub fn take(&mut self) -> Option<Vec<u8>> {
        let token = self.raw.poll_receive()?;
        let mut buffer = self.receiving[usize::from(token)].take()?;
        // SAFETY: it is the buffer that was begun with this token.
        let done = unsafe { self.raw.receive_complete(token, &mut buffer[..]) };
        let frame = done
            .ok()
            .and_then(|(start, length)| Some(buffer.get(start..start + length)?.to_vec()));
        // The queue has just got room for one, and the buffer's size is right: it cannot be
        // refused.
        let _ = self.receive_into(buffer);
        frame
    }

    /// Whether frames are on their way out, as of the last [`CrateNic::can_send`].
    pub fn is_sending(&self) -> bool {
        self.sending.iter().any(Option::is_some)
    }

    /// Whether a frame can be sent now.
    pub fn can_send(&mut self) -> bool {
        while let Some(token) = self.raw.poll_transmit() {
            let Some((buffer, length)) = self.sending[usize::from(token)].take() else {
                return false;
            };
            // SAFETY: it is the buffer that was begun with this token.
            let _ = unsafe { self.raw.transmit_complete(token, &buffer[..length]) };
            self.spare.push(buffer);
        }
        self.raw.can_send()
    }

    /// Sends a frame that `fill` writes. It is lost when there is no room, see
    /// [`CrateNic::can_send`].
    pub fn send<R>(&mut self, length: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        assert!(length <= FRAME, "a frame of {length} bytes");
        let mut buffer = self.spare.pop().unwrap_or_else(|| Box::new([0; BUFFER]));
        let end = HEADER + length;
        buffer[..HEADER].fill(0);
        let result = fill(&mut buffer[HEADER..end]);
        // SAFETY: the buffer rests in `sending`, untouched, until the device has completed it.
        if let Ok(token) = unsafe { self.raw.transmit_begin(&buffer[..end]) } {
            self.sending[usize::from(token)] = Some((buffer, end));
        }
        result
    }

    fn receive_into(&mut self, mut buffer: Buffer) -> virtio_drivers::Result {
        // SAFETY: the buffer rests in `receiving`, untouched, until the device has completed it.
        let token = unsafe { self.raw.receive_begin(&mut buffer[..])? };
        self.receiving[usize::from(token)] = Some(buffer);
        Ok(())
    }
}
