//! The device status field and the order in which a driver may set it (virtio 1.2, 2.1 and 3.1).

use bitflags::bitflags;
use serde::{Deserialize, Serialize};

bitflags! {
    /// The device status field (virtio 1.2, 2.1).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
    pub struct Status: u8 {
        /// The guest has found the device.
        const ACKNOWLEDGE = 1;
        /// The guest has a driver for it.
        const DRIVER = 2;
        /// The driver is ready.
        const DRIVER_OK = 4;
        /// Both sides agree on the features.
        const FEATURES_OK = 8;
        /// The device met an error that only a reset cures.
        const DEVICE_NEEDS_RESET = 64;
        /// The driver has given up.
        const FAILED = 128;
    }
}

/// What a write to the status field asks the transport to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing but to remember the new status.
    Set(Status),
    /// Check the features; FEATURES_OK stays only when they can be had.
    CheckFeatures(Status),
    /// Start the device.
    Activate(Status),
    /// Go back to the state of a fresh device.
    Reset,
    /// The order is wrong: the status stays as it was.
    Refuse,
}

impl Status {
    /// What it means that the driver writes `value` while the status is `self`.
    pub fn written(self, value: u8) -> Step {
        if value == 0 {
            return Step::Reset;
        }
        let new = Status::from_bits_truncate(value) - Status::DEVICE_NEEDS_RESET;
        // Bits are only ever added (2.1.1); a failed or broken device waits for its reset.
        if !new.contains(self - Status::DEVICE_NEEDS_RESET) || self.contains(Status::FAILED) {
            return Step::Refuse;
        }
        let added = new - self;
        let in_order = |bit, before| !new.contains(bit) || new.contains(before);
        if !in_order(Status::DRIVER, Status::ACKNOWLEDGE)
            || !in_order(Status::FEATURES_OK, Status::DRIVER)
            || !in_order(Status::DRIVER_OK, Status::FEATURES_OK)
        {
            return Step::Refuse;
        }
        // FEATURES_OK has to be read back before DRIVER_OK (3.1.1), so never both in one write.
        match (
            added.contains(Status::FEATURES_OK),
            added.contains(Status::DRIVER_OK),
        ) {
            (true, true) => Step::Refuse,
            (true, false) => Step::CheckFeatures(new),
            (false, true) => Step::Activate(new),
            (false, false) => Step::Set(new),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACK: Status = Status::ACKNOWLEDGE;
    const DRV: Status = ACK.union(Status::DRIVER);
    const FEA: Status = DRV.union(Status::FEATURES_OK);
    const RUN: Status = FEA.union(Status::DRIVER_OK);

    #[test]
    fn status_written_in_order_proceeds() {
        assert_eq!(Status::empty().written(1), Step::Set(ACK));
        assert_eq!(ACK.written(3), Step::Set(DRV));
        assert_eq!(DRV.written(11), Step::CheckFeatures(FEA));
        assert_eq!(FEA.written(15), Step::Activate(RUN));
        assert_eq!(RUN.written(15), Step::Set(RUN));
        assert_eq!(RUN.written(0), Step::Reset);
    }

    #[test]
    fn status_written_out_of_order_is_refused() {
        for (status, value) in [
            (Status::empty(), 2), // DRIVER without ACKNOWLEDGE
            (ACK, 9),             // FEATURES_OK without DRIVER
            (DRV, 7),             // DRIVER_OK without FEATURES_OK
            (DRV, 15),            // both at once
            (RUN, 7),             // taking a bit back
            (ACK | Status::FAILED, 3 | 128),
        ] {
            assert_eq!(status.written(value), Step::Refuse, "{status:?} <- {value}");
        }
    }

    #[test]
    fn status_needs_reset_cannot_be_set_or_cleared_by_the_driver() {
        assert_eq!(ACK.written(1 | 64 | 2), Step::Set(DRV));
        assert_eq!((RUN | Status::DEVICE_NEEDS_RESET).written(0), Step::Reset);
    }
}
