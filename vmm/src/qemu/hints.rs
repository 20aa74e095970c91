//! QEMU's stderr: shown as it is, and searched for failures whose remedy is known.

use std::io::{self, BufRead, BufReader};
use std::process::ChildStderr;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use crate::log_writer;

const NO_QUEUE: &str = "a descriptor in -netdev tap is no tap queue, or its interface is gone; open one as by `9<>/dev/tapN`";

/// Words that stand in one line of QEMU's, and what to do about it.
const KNOWN: &[(&[&str], &str)] = &[
    (&["tap", "Unable to query TUNGETIFF"], NO_QUEUE),
    (
        &["netdev", "tap", "Invalid argument"],
        "a descriptor in -netdev tap is no tap queue; /dev/tapN has to be that of this network namespace, and \
         script=, downscript= and ifname= never go with fd=",
    ),
    (
        &["TUNSETOFFLOAD ioctl() failed"],
        "the kernel's macvtap lacks an offload that the guest's driver chose: add guest_ufo=off, or \
         guest_tso4=off,guest_tso6=off,guest_ufo=off, to --macvtap",
    ),
    (&["TUNSETVNETHDRSZ ioctl() failed"], NO_QUEUE),
    (&["TUNGETVNETHDRSZ ioctl() failed"], NO_QUEUE),
    (&["TUNGETIFF ioctl() failed"], NO_QUEUE),
    (
        &["failed to set MSR"],
        "this KVM lacks a register that QEMU sets: try -cpu host,-arch-capabilities, -cpu qemu64, or --accel tcg",
    ),
    (
        &["OVMF", "No such file"],
        "UEFI's firmware is not there: apt install ovmf, and see /usr/share/OVMF for the names (newer ones end in _4M.fd)",
    ),
    (
        &["unable to map backing store for guest RAM"],
        "too few huge pages are free: set them aside in \
         /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages, or omit --hugepages",
    ),
    (
        &["failed to resize memfd"],
        "QEMU takes whole huge pages alone: give --memory a multiple of 2M, or omit --hugepages",
    ),
    (
        &["could not load PC BIOS"],
        "the firmware of -bios is not there: for UEFI apt install ovmf, whose file is /usr/share/ovmf/OVMF.fd",
    ),
    (
        &["Could not access KVM kernel module"],
        "there is no KVM for this user: `minivmm doctor` says why; without -enable-kvm, and with --accel tcg, the guest \
         runs slowly",
    ),
    (
        &["vhost", "could not be initialized"],
        "vhost-net does not work here: `modprobe vhost_net`, or vhost=off in --macvtap",
    ),
    (
        &["lock", "Is another process using the image"],
        "another guest of minivmm or QEMU, or qemu-img, has this image open: end it, or give this guest ephemeral=on or an \
         overlay (qemu-img create -b)",
    ),
    (
        &["io_uring", "not supported in this build"],
        "this QEMU is built without io_uring: omit io=uring",
    ),
    (
        &["opengl is not available"],
        "this QEMU, or this host, has no OpenGL: use -display none or gtk, and virtio-gpu without gl",
    ),
    (
        &["egl", "render node"],
        "there is no graphics card for -display egl-headless (/dev/dri/renderD128): use -display none, and virtio-gpu without gl",
    ),
    (
        &["gtk initialization failed"],
        "there is no desktop to show a window on: -display none, or -vnc :0",
    ),
];

/// What is known about a line, if anything.
fn hint(line: &str) -> Option<&'static str> {
    KNOWN
        .iter()
        .find(|(words, _)| words.iter().all(|word| line.contains(word)))
        .map(|(_, hint)| *hint)
}

/// Copies QEMU's stderr to the log until its end.
#[derive(Debug)]
pub(super) struct Relay(Receiver<&'static str>);

impl Relay {
    /// Starts a thread for it.
    pub fn start(stderr: ChildStderr) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let copy = move || {
            let mut lines = BufReader::new(stderr);
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                let text = String::from_utf8_lossy(&line);
                log_writer::write(&text);
                if let Some(hint) = hint(&text) {
                    let _ = sender.send(hint);
                }
                line.clear();
            }
        };
        thread::Builder::new().name("stderr".into()).spawn(copy)?;
        Ok(Self(receiver))
    }

    /// The first hint, once QEMU has ended. A helper of QEMU's may hold its stderr open: it is not waited for long.
    pub fn hint(self) -> Option<&'static str> {
        const PATIENCE: Duration = Duration::from_secs(1);
        let first = self.0.recv_timeout(PATIENCE).ok();
        // The rest of what QEMU wrote is shown before anything else is.
        while first.is_some() && self.0.recv_timeout(PATIENCE).is_ok() {}
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_are_found_in_qemus_own_words() {
        for (line, expected) in [
            (
                "TUNSETOFFLOAD ioctl() failed: Invalid argument",
                "guest_tso4=off",
            ),
            (
                "qemu-system-x86_64: failed to resize memfd to 68157440: Invalid argument",
                "a multiple of 2M",
            ),
            (
                "qemu-system-x86_64: unable to map backing store for guest RAM: Cannot allocate memory",
                "nr_hugepages",
            ),
            (
                "TUNSETVNETHDRSZ ioctl() failed: Invalid argument. Exiting.",
                "no tap queue",
            ),
            (
                "TUNGETIFF ioctl() failed: Inappropriate ioctl for device",
                "no tap queue",
            ),
            (
                "qemu-system-x86_64: -netdev tap,id=own,fd=0: Unable to query TUNGETIFF on FD 0: Invalid argument",
                "no tap queue",
            ),
            (
                "qemu-system-x86_64: error: failed to set MSR 0x10a to 0x69",
                "-arch-capabilities",
            ),
            ("qemu: could not load PC BIOS 'OVMF.fd'", "apt install ovmf"),
            (
                "qemu-system-x86_64: Could not open '/usr/share/OVMF/OVMF_CODE.fd': No such file or directory",
                "apt install ovmf",
            ),
            (
                "Could not access KVM kernel module: No such file or directory",
                "minivmm doctor",
            ),
        ] {
            assert!(
                hint(line).is_some_and(|hint| hint.contains(expected)),
                "{line}"
            );
        }
        assert_eq!(hint("qemu-system-x86_64: warning: something else"), None);
    }
}
