//! What in ARGS would clash with what minivmm adds.
//!
//! Only ARGS themselves are looked at, not what a `-readconfig` file brings; QEMU then complains itself.

use std::ffi::OsString;
use std::os::fd::RawFd;

use net::MacAddr;
use serde_json::Value;

use super::args::{has_option, option};

/// Why ARGS cannot be passed through.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConflictError {
    #[error("ARGS have {0:?}, but the id {1} is that of a --macvtap: use another id")]
    Id(String, String),
    #[error(
        "ARGS have {0:?}, but file descriptor {1} is one of those that minivmm gives to QEMU: use {2} or higher, as in `{2}<>/dev/tapN`"
    )]
    Descriptor(String, RawFd, RawFd),
    #[error(
        "ARGS have {0:?} without a usable mac=: give it and --macvtap the same one, as in mac=52:54:00:12:34:56"
    )]
    NoMac(String),
    #[error(
        "ARGS have {0:?}, but the macvtap's MAC address is {1}, and no other receives anything: give --macvtap the mac= of the device"
    )]
    Mac(String, MacAddr),
    #[error(
        "ARGS have {0:?}, but the macvtap gets a random MAC address, and no other receives anything: give --macvtap the same mac={1}"
    )]
    RandomMac(String, MacAddr),
    #[error(
        "ARGS have -set {0:?}, but a NIC has its macvtap's MAC address, since no other receives anything: give it to --macvtap as mac="
    )]
    SetMac(String),
    #[error("ARGS have {0:?}, so the key {1} of --macvtap belongs there")]
    Properties(String, String),
    #[error(
        "ARGS have -daemonize, but minivmm waits for QEMU, to clean up: put minivmm itself into the background"
    )]
    Daemon,
    #[error(
        "ARGS say what runs the guest's code (-accel, -enable-kvm), and --accel does too: choose one"
    )]
    Accel,
    #[error(
        "--share and --vsock need guest memory that other processes can map: add, with the size of -m, `-object \
         memory-backend-memfd,id=ram,size=SIZE,share=on -machine memory-backend=ram` to ARGS"
    )]
    PrivateMemory,
}

/// A `-device` of ARGS for a netdev of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OwnDevice {
    /// As given.
    pub text: String,
    pub mac: MacAddr,
}

impl OwnDevice {
    /// Whether it has the macvtap's address.
    pub fn check(&self, mac: MacAddr) -> Result<(), ConflictError> {
        if self.mac == mac {
            return Ok(());
        }
        Err(ConflictError::Mac(self.text.clone(), mac))
    }
}

/// Whether ARGS say themselves what runs the guest's code.
pub(super) fn chooses_accel(args: &[OsString]) -> bool {
    let of_machine = |pair: &[OsString]| {
        matches!(option(&pair[0]), Some("M" | "machine"))
            && get(&properties(&pair[1].to_string_lossy()), "accel").is_some()
    };
    has_option(args, &["accel", "enable-kvm"]) || args.windows(2).any(of_machine)
}

/// Whether ARGS have guest memory that other processes can map.
pub(super) fn shares_memory(args: &[OsString]) -> bool {
    values(args).any(|(name, value)| {
        let share = get(&properties(&value), "share").map(str::to_owned);
        name == "object"
            && share.is_some_and(|share| ["on", "yes", "true", "y"].contains(&share.as_str()))
    })
}

/// Checks ARGS against the ids that minivmm gives and the descriptors `fds` (which follow one another).
pub(super) fn check(args: &[OsString], ids: &[String], fds: &[RawFd]) -> Result<(), ConflictError> {
    if has_option(args, &["daemonize"]) {
        return Err(ConflictError::Daemon);
    }
    let devices = devices_of(args, ids);
    for (name, value) in values(args) {
        // Free text.
        if name == "append" {
            continue;
        }
        let properties = properties(&value);
        for (key, text) in &properties {
            let is_id = key == "id" && ids.contains(text);
            if is_id && matches!(name, "netdev" | "net" | "nic" | "device") {
                return Err(ConflictError::Id(value, text.clone()));
            }
            if name == "set" && sets_mac(key, ids.iter().chain(&devices)) {
                return Err(ConflictError::SetMac(value));
            }
        }
        if let Some(fd) = descriptors(&properties).find(|fd| fds.contains(fd)) {
            let free = fds.last().map_or(fd, |last| last + 1);
            return Err(ConflictError::Descriptor(value, fd, free));
        }
    }
    Ok(())
}

/// All descriptors that ARGS name.
pub(super) fn named(args: &[OsString]) -> Vec<RawFd> {
    let of_value = |(_, value): (&str, String)| {
        let properties = properties(&value);
        descriptors(&properties).collect::<Vec<_>>()
    };
    values(args).flat_map(of_value).collect()
}

/// The ids of the devices in ARGS that use a netdev of ours.
fn devices_of(args: &[OsString], netdevs: &[String]) -> Vec<String> {
    let id = |(name, text): (&str, String)| {
        let properties = properties(&text);
        let netdev = get(&properties, "netdev").filter(|_| name == "device")?;
        let is_ours = netdevs.iter().any(|ours| ours == netdev);
        get(&properties, "id")
            .filter(|_| is_ours)
            .map(str::to_owned)
    };
    values(args).filter_map(id).collect()
}

/// Whether the key of a `-set`, as in `device.ID.mac`, is the MAC address of one of these devices.
fn sets_mac<'a>(key: &str, mut ids: impl Iterator<Item = &'a String>) -> bool {
    let id = key
        .strip_prefix("device.")
        .and_then(|key| key.strip_suffix(".mac"));
    id.is_some_and(|id| ids.any(|ours| ours == id))
}

/// The device of ARGS for a netdev of ours, if there is one.
pub(super) fn own_device(args: &[OsString], id: &str) -> Result<Option<OwnDevice>, ConflictError> {
    for (name, text) in values(args) {
        let properties = properties(&text);
        if !matches!(name, "device" | "net") || get(&properties, "netdev") != Some(id) {
            continue;
        }
        let key = if name == "net" { "macaddr" } else { "mac" };
        return match get(&properties, key).and_then(|mac| mac.parse().ok()) {
            Some(mac) => Ok(Some(OwnDevice { text, mac })),
            None => Err(ConflictError::NoMac(text)),
        };
    }
    Ok(None)
}

/// Each word with the option before it (the empty name when there is none).
fn values(args: &[OsString]) -> impl Iterator<Item = (&str, String)> {
    let before = std::iter::once("").chain(args.iter().map(|arg| option(arg).unwrap_or_default()));
    before
        .zip(args)
        .filter(|(_, arg)| option(arg).is_none())
        .map(|(name, arg)| (name, arg.to_string_lossy().into_owned()))
}

/// The descriptors that properties name.
fn descriptors(properties: &[(String, String)]) -> impl Iterator<Item = RawFd> {
    let is_fd = |address: &str| {
        let kind = format!("{address}type");
        properties
            .iter()
            .any(|(key, value)| *key == kind && value == "fd")
    };
    properties.iter().flat_map(move |(key, value)| {
        let last = key.rsplit('.').next().unwrap_or_default();
        let numbers = match last {
            "fd" | "fds" | "vhostfd" | "vhostfds" | "sock_fd" => Some(value.as_str()),
            // A socket's address, as in addr.type=fd,addr.str=3.
            "str" if is_fd(key.trim_end_matches("str")) => Some(value.as_str()),
            _ => ["/dev/fd/", "/proc/self/fd/", "fd:"]
                .iter()
                .find_map(|prefix| value.strip_prefix(prefix)),
        };
        let numbers = numbers.unwrap_or_default().split(':');
        numbers.filter_map(|fd| fd.parse().ok())
    })
}

/// Reads `a,b=c,d=e`, where two commas mean one in a value, or a JSON object, whose objects' members become keys
/// with dots, as in the other form. A word without a value has the empty key.
fn properties(text: &str) -> Vec<(String, String)> {
    if let Ok(object @ Value::Object(_)) = serde_json::from_str(text) {
        let mut properties = Vec::new();
        flatten(String::new(), object, &mut properties);
        return properties;
    }
    // A comma that is part of a value becomes a character that no property has.
    text.replace(",,", "\0")
        .split(',')
        .map(|part| part.split_once('=').unwrap_or(("", part)))
        .map(|(key, value)| (key.to_owned(), value.replace('\0', ",")))
        .collect()
}

/// The value of a key.
fn get<'a>(properties: &'a [(String, String)], key: &str) -> Option<&'a str> {
    let mut found = properties.iter().filter(|(given, _)| given == key);
    found.next().map(|(_, value)| value.as_str())
}

fn flatten(key: String, value: Value, properties: &mut Vec<(String, String)>) {
    let below = |name: &str| match key.as_str() {
        "" => name.to_owned(),
        key => format!("{key}.{name}"),
    };
    match value {
        Value::Object(members) => members
            .into_iter()
            .for_each(|(name, member)| flatten(below(&name), member, properties)),
        Value::Array(members) => (0..)
            .zip(members)
            .for_each(|(n, member): (u32, _)| flatten(below(&n.to_string()), member, properties)),
        Value::String(text) => properties.push((key, text)),
        other => properties.push((key, other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(text: &str) -> Vec<OsString> {
        text.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn memory_of_args_is_shared_where_its_object_says_so() {
        for (text, is_shared) in [
            ("-m 1G", false),
            ("-object memory-backend-memfd,id=ram,size=1G,share=on", true),
            (
                "-object memory-backend-file,id=ram,size=1G,share=off",
                false,
            ),
            (
                r#"-object {"qom-type":"memory-backend-memfd","share":true}"#,
                true,
            ),
            ("-device something,share=on", false),
        ] {
            assert_eq!(shares_memory(&args(text)), is_shared, "{text}");
        }
    }

    fn checked(text: &str) -> Result<(), ConflictError> {
        check(&args(text), &["macvtap0".into(), "nic2".into()], &[3, 4])
    }

    #[test]
    fn args_of_the_classic_command_pass() {
        checked(
            "-M q35 -cpu host -enable-kvm -smp 4 -m 4G -nodefaults -drive if=pflash,file=/usr/share/OVMF/OVMF_CODE.fd \
             -serial mon:stdio -chardev socket,id=qmp,path=/tmp/q,server=on,wait=off -mon chardev=qmp,mode=control \
             -netdev user,id=net0,hostfwd=tcp::2222-:22 -device virtio-net-pci,netdev=net0,bus=pcie.0,addr=0x3 \
             -append fd=3,id=macvtap0 -netdev tap,id=other,fd=5 -incoming fd:7",
        )
        .unwrap();
    }

    #[test]
    fn args_with_an_id_in_use_are_refused() {
        for text in [
            "-netdev user,id=macvtap0",
            "--netdev user,id=macvtap0",
            "-nic user,id=macvtap0",
            "-device virtio-rng-pci,id=nic2",
            r#"-netdev {"type":"user","id":"macvtap0"}"#,
        ] {
            let error = checked(text).unwrap_err();
            assert!(matches!(error, ConflictError::Id(..)), "{text}: {error}");
        }
    }

    #[test]
    fn args_with_a_descriptor_in_use_are_refused() {
        for text in [
            "-netdev tap,id=x,fd=3",
            "-netdev tap,id=x,fds=9:4",
            "-netdev tap,id=x,fd=9,vhostfd=4",
            "-add-fd fd=3,set=1",
            "-chardev socket,id=s,fd=4",
            "-drive file=/dev/fd/3",
            "-incoming fd:3",
            "/proc/self/fd/4",
            r#"-netdev {"type":"tap","id":"x","fd":"3"}"#,
            "-netdev stream,id=x,addr.type=fd,addr.str=3",
            "-netdev dgram,id=x,local.type=fd,local.str=4",
            r#"-netdev {"type":"stream","id":"x","addr":{"type":"fd","str":"3"}}"#,
            r#"-blockdev {"driver":"raw","file":{"driver":"file","filename":"/dev/fd/4"}}"#,
            "-fsdev proxy,id=x,sock_fd=3",
        ] {
            let error = checked(text).unwrap_err();
            assert!(
                matches!(error, ConflictError::Descriptor(_, _, 5)),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn args_with_a_string_that_is_no_descriptor_pass() {
        checked("-netdev stream,id=x,addr.type=unix,addr.str=3 -device x,str=3").unwrap();
    }

    #[test]
    fn args_that_set_another_address_are_refused() {
        for text in [
            "-set device.nic2.mac=52:54:00:12:34:56",
            "-device e1000e,netdev=macvtap0,id=own,mac=52:54:00:12:34:56 -set device.own.mac=52:54:00:12:34:57",
        ] {
            let error = checked(text).unwrap_err();
            assert!(matches!(error, ConflictError::SetMac(_)), "{text}: {error}");
        }
        checked("-set device.other.mac=52:54:00:12:34:56 -set device.nic2.romfile=").unwrap();
    }

    #[test]
    fn args_with_a_descriptor_in_use_and_no_nic_name_none() {
        let error = check(&args("-add-fd fd=3,set=1"), &[], &[3]).unwrap_err();
        assert!(!error.to_string().contains("--macvtap"), "{error}");
    }

    #[test]
    fn args_with_daemonize_are_refused() {
        assert_eq!(checked("-daemonize"), Err(ConflictError::Daemon));
    }

    #[test]
    fn device_of_ours_needs_the_macvtaps_address() {
        let text = "-device e1000e,netdev=macvtap0,mac=52:54:00:12:34:56";
        let device = own_device(&args(text), "macvtap0").unwrap().unwrap();
        device.check("52:54:00:12:34:56".parse().unwrap()).unwrap();
        let other = "52:54:00:12:34:57".parse().unwrap();
        assert!(matches!(
            device.check(other),
            Err(ConflictError::Mac(_, mac)) if mac == other
        ));
        assert_eq!(own_device(&args(text), "macvtap1"), Ok(None));
        let without = own_device(&args("-device e1000e,netdev=macvtap0"), "macvtap0");
        assert!(matches!(without, Err(ConflictError::NoMac(_))));
    }

    #[test]
    fn accel_in_args_is_seen_in_each_spelling() {
        for text in [
            "-enable-kvm",
            "-accel tcg",
            "--accel kvm",
            "-M q35,accel=kvm",
        ] {
            assert!(chooses_accel(&args(text)), "{text}");
        }
        assert!(!chooses_accel(&args("-M q35 -cpu host")));
    }

    #[test]
    fn properties_with_two_commas_have_one() {
        assert_eq!(
            properties("file,path=a,,b,id=c"),
            [("", "file"), ("path", "a,b"), ("id", "c")].map(|(k, v)| (k.to_owned(), v.to_owned()))
        );
    }
}
