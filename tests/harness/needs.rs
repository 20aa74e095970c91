//! Tests by what they need. Each names itself once: `guest_test!(subject_condition_outcome, || {
//! ... });`
//!
//! | macro | what the test needs, and where it runs |
//! | --- | --- |
//! | `kvm_test!` | `/dev/kvm` |
//! | `root_test!` | root, for namespaces (`netns.rs`) |
//! | `guest_test!` | both, for a freestanding guest on this machine; not in the lab |
//! | `transports_test!` | the same, once with each transport; its body takes the [`Net`] |
//! | `lab_test!` | a Linux guest, on this machine's KVM or in the lab; the file has `mod lab;` |
//!
//! Where something is missing the test writes NOT TESTED on stderr, and fails where `CI` is set
//! (`skip.rs`).

use super::guest::{Net, Transport};
use super::{netns, skip, vm};

macro_rules! kvm_test {
    ($name:ident, $body:expr) => {
        #[test]
        fn $name() {
            $crate::harness::needs::with_kvm($body);
        }
    };
}

macro_rules! guest_test {
    ($name:ident, $body:expr) => {
        #[test]
        fn $name() {
            $crate::harness::needs::with_guests($body);
        }
    };
}

macro_rules! transports_test {
    ($name:ident, $body:expr) => {
        fn $name(transport: $crate::harness::guest::Transport) {
            $crate::harness::needs::with_net(transport, $body);
        }

        mod $name {
            use crate::harness::guest::Transport;

            #[test]
            fn on_mmio() {
                super::$name(Transport::Mmio);
            }

            #[test]
            fn on_pci() {
                super::$name(Transport::Pci);
            }
        }
    };
}

macro_rules! lab_test {
    ($name:ident, $body:expr) => {
        #[test]
        fn $name() {
            $crate::lab::test(stringify!($name), $body);
        }
    };
}

pub(crate) use {guest_test, kvm_test, lab_test, transports_test};

/// Runs a test's body where there is a KVM for us; once, not in the lab too.
pub fn with_kvm(body: impl FnOnce()) {
    if !vm::in_lab() && skip::has_kvm() {
        body();
    }
}

/// Runs a test's body where freestanding guests can be started over a network made by the test. The
/// lab is for what cannot run out here.
pub fn with_guests(body: impl FnOnce()) {
    if !vm::in_lab() && netns::is_root() && skip::has_kvm() {
        body();
    }
}

/// Runs a test's body with a network whose guests have this transport.
pub fn with_net(transport: Transport, body: impl FnOnce(Net)) {
    with_guests(|| body(Net::with(transport)));
}
