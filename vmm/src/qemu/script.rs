//! `--dry-run`: what would be done, as a script for sh.

use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;

use net::{InterfaceAddress, MacAddr, MacvtapSpec, Mode};

use super::nics::Numbers;
use crate::nic::acquire::VHOST_NET;

/// Where a NIC's queues come from.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    /// A new macvtap with this address and this interface index.
    New {
        spec: Box<MacvtapSpec>,
        mac: MacAddr,
        index: u32,
    },
    /// A macvtap that exists.
    Existing(String),
    /// Descriptors that the script's caller has opened, which keep their numbers.
    Open,
}

/// A NIC of the script.
#[derive(Clone, Debug)]
pub(super) struct ScriptNic {
    pub origin: Origin,
    pub numbers: Numbers,
}

/// The host's own link among its guests.
#[derive(Clone, Debug, Default)]
pub(super) struct HostLink<'a> {
    /// Its lower; `None` for no such link.
    pub lower: Option<String>,
    pub addresses: &'a [InterfaceAddress],
}

/// The script; `command` is QEMU with its arguments. QEMU runs in the foreground with the script's stdin, and what was
/// made is deleted after it.
pub(super) fn script(nics: &[ScriptNic], host_link: &HostLink<'_>, command: &[OsString]) -> String {
    let mut steps = String::new();
    let mut makes_links = false;
    for (n, nic) in nics.iter().enumerate() {
        let index = match &nic.origin {
            Origin::New { spec, mac, index } => {
                makes_links = true;
                steps += &new_macvtap(n, spec, *mac, *index);
                index.to_string()
            }
            Origin::Existing(link) => format!("\"$(cat /sys/class/net/{}/ifindex)\"", quote(link)),
            Origin::Open => String::new(),
        };
        steps += &open(nic, &index);
    }
    if let Some(lower) = &host_link.lower {
        makes_links = true;
        steps += &new_host_link(lower, host_link.addresses);
    }
    // dash knows descriptors of one digit alone.
    let shell = if highest(nics) > 9 { "bash" } else { "sh" };
    let mut script =
        format!("#!/bin/{shell}\n# What `minivmm qemu` does, by hand; run it as root.\nset -e\n");
    if makes_links {
        script += "links=\ndelete_links() { for link in $links; do ip link delete \"$link\"; done; }\n\
                   trap delete_links EXIT\ntrap exit HUP INT TERM\n";
    }
    script + &steps + &wrapped(command)
}

/// The highest number that the script opens.
fn highest(nics: &[ScriptNic]) -> RawFd {
    let numbers = nics.iter().flat_map(|nic| {
        let queues = nic.numbers.fds.iter();
        queues.chain(&nic.numbers.vhost)
    });
    numbers.copied().max().unwrap_or(0)
}

fn new_macvtap(n: usize, spec: &MacvtapSpec, mac: MacAddr, index: u32) -> String {
    let lower = quote(spec.link.as_str());
    let mode = spec.mode.unwrap_or(Mode::Bridge);
    let name = match (&spec.name, n) {
        (Some(name), _) => quote(name.as_str()),
        (None, 0) => "mvt$$".to_owned(),
        // Several links of one script need several names.
        (None, n) => format!("mvt$$x{n}"),
    };
    let (mut enter, mut netns) = (String::new(), "");
    if let Some(path) = &spec.lower_netns {
        enter = format!("nsenter --net={} ", quote(path));
        netns = " netns $$";
    }
    // The lower's in passthru mode, where it cannot be chosen at creation.
    let has_mac = mode != Mode::Passthru || spec.mac.is_some();
    let keys = [
        has_mac.then(|| format!(" address {mac}")),
        spec.mtu.map(|mtu| format!(" mtu {mtu}")),
        spec.tx_queue_len
            .map(|frames| format!(" txqueuelen {frames}")),
    ];
    let keys: String = keys.into_iter().flatten().collect();
    let bc_queue_len = spec
        .bc_queue_len
        .map(|frames| format!(" bcqueuelen {frames}"));
    let mut type_keys = bc_queue_len.unwrap_or_default();
    if !spec.source_macs.is_empty() {
        type_keys += " macaddr set";
    }
    for mac in &spec.source_macs {
        let _ = write!(type_keys, " {mac}");
    }
    format!(
        "tap={name}\n\
         {enter}ip link add link {lower} name \"$tap\" index {index}{keys}{netns} type macvtap mode {mode}{type_keys}\n\
         links=\"$links $tap\"\n\
         sysctl -eqw \"net/ipv6/conf/$tap/disable_ipv6=1\"\n\
         ip link set \"$tap\" allmulticast on up\n"
    )
}

/// Opens a queue of the macvtap for each descriptor, and vhost-net.
fn open(nic: &ScriptNic, index: &str) -> String {
    let mut words = String::new();
    for fd in nic.numbers.fds.iter().filter(|_| !index.is_empty()) {
        let _ = write!(words, " {fd}<>/dev/tap{index}");
    }
    for fd in &nic.numbers.vhost {
        let _ = write!(words, " {fd}<>{VHOST_NET}");
    }
    if words.is_empty() {
        words
    } else {
        format!("exec{words}\n")
    }
}

fn new_host_link(lower: &str, addresses: &[InterfaceAddress]) -> String {
    let lower = quote(lower);
    let mut text = format!(
        "ip link add link {lower} name mvl$$ type macvlan mode bridge\nlinks=\"$links mvl$$\"\nip link set mvl$$ up\n"
    );
    for address in addresses {
        let usable = if address.ip().is_ipv6() { " nodad" } else { "" };
        let _ = writeln!(text, "ip address add {address} dev mvl$${usable}");
    }
    text
}

/// A command on lines of about 100 characters, each option together with its value.
fn wrapped(command: &[OsString]) -> String {
    let mut groups: Vec<String> = Vec::new();
    for word in command.iter().map(quote) {
        match groups.last_mut() {
            Some(group) if group.starts_with('-') && !word.starts_with('-') => {
                group.push(' ');
                *group += &word;
            }
            _ => groups.push(word),
        }
    }
    let mut text = String::new();
    let mut width = 0;
    for group in groups {
        if width > 0 && width + group.len() > 96 {
            text += "\\\n    ";
            width = 4;
        }
        width += group.len() + 1;
        text += &group;
        text.push(' ');
    }
    text.trim_end().to_owned() + "\n"
}

/// A word for sh. Bytes that are no UTF-8 are left to printf, so that the script itself can be shown and copied.
fn quote(word: impl AsRef<OsStr>) -> String {
    let word = word.as_ref().as_bytes();
    let plain = |c: &u8| c.is_ascii_alphanumeric() || b"-_./,:=+@%".contains(c);
    let mut text = String::new();
    for chunk in word.utf8_chunks() {
        let valid = chunk.valid();
        if valid.bytes().all(|c| plain(&c)) {
            text += valid;
        } else {
            let _ = write!(text, "'{}'", valid.replace('\'', r"'\''"));
        }
        if !chunk.invalid().is_empty() {
            text += "\"$(printf '";
            for byte in chunk.invalid() {
                let _ = write!(text, "\\{byte:03o}");
            }
            text += "')\"";
        }
    }
    if text.is_empty() { "''".into() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nic(text: &str, fds: Vec<RawFd>) -> ScriptNic {
        ScriptNic {
            origin: Origin::New {
                spec: Box::new(crate::config::parse_macvtap(text).unwrap()),
                mac: "52:54:00:12:34:56".parse().unwrap(),
                index: 1_000_000,
            },
            numbers: Numbers { fds, vhost: vec![] },
        }
    }

    #[test]
    fn word_for_sh_is_quoted_only_when_it_has_to_be() {
        for (word, quoted) in [
            ("-M", "-M"),
            ("tap,id=macvtap0,fd=3", "tap,id=macvtap0,fd=3"),
            ("console=ttyS0 quiet", "'console=ttyS0 quiet'"),
            ("it's", r"'it'\''s'"),
            ("", "''"),
            ("$HOME", "'$HOME'"),
            ("~x", "'~x'"),
        ] {
            assert_eq!(quote(word), quoted);
        }
    }

    #[test]
    fn word_of_any_bytes_comes_back_from_sh() {
        let bytes: Vec<u8> = (1..=255).chain(*b"\xff\n\xc3").collect();
        let word = OsStr::from_bytes(&bytes);
        for shell in ["sh", "bash"] {
            let mut command = std::process::Command::new(shell);
            command.args(["-c", &format!("printf %s {}", quote(word))]);
            assert_eq!(command.output().unwrap().stdout, bytes, "{shell}");
        }
    }

    #[test]
    fn script_is_what_a_person_would_type() {
        let nics = [
            nic("eno1,mtu=1400,mode=private", vec![3]),
            nic("eno2,name=second,queues=2", vec![4, 5]),
        ];
        let command = ["qemu", "-append", "a b"].map(OsString::from);
        let expected = "\
#!/bin/sh
# What `minivmm qemu` does, by hand; run it as root.
set -e
links=
delete_links() { for link in $links; do ip link delete \"$link\"; done; }
trap delete_links EXIT
trap exit HUP INT TERM
tap=mvt$$
ip link add link eno1 name \"$tap\" index 1000000 address 52:54:00:12:34:56 mtu 1400 type macvtap mode private
links=\"$links $tap\"
sysctl -eqw \"net/ipv6/conf/$tap/disable_ipv6=1\"
ip link set \"$tap\" allmulticast on up
exec 3<>/dev/tap1000000
tap=second
ip link add link eno2 name \"$tap\" index 1000000 address 52:54:00:12:34:56 type macvtap mode bridge
links=\"$links $tap\"
sysctl -eqw \"net/ipv6/conf/$tap/disable_ipv6=1\"
ip link set \"$tap\" allmulticast on up
exec 4<>/dev/tap1000000 5<>/dev/tap1000000
qemu -append 'a b'
";
        assert_eq!(script(&nics, &HostLink::default(), &command), expected);
    }

    #[test]
    fn script_in_source_mode_lists_the_senders() {
        let (one, other) = ("02:00:00:00:00:01", "02:00:00:00:00:02");
        let spec = format!("eno1,mode=source,bcqueuelen=9,source-mac={one},source-mac={other}");
        let text = script(
            &[nic(&spec, vec![3])],
            &HostLink::default(),
            &["qemu".into()],
        );
        let keys = format!("type macvtap mode source bcqueuelen 9 macaddr set {one} {other}\n");
        assert!(text.contains(&keys), "{text}");
    }

    #[test]
    fn script_of_an_existing_macvtap_makes_and_deletes_nothing() {
        let nic = ScriptNic {
            origin: Origin::Existing("mt0".into()),
            numbers: Numbers {
                fds: vec![3],
                vhost: vec![4],
            },
        };
        let text = script(&[nic], &HostLink::default(), &["qemu".into()]);
        let steps = text.split_once("set -e\n").map(|(_, steps)| steps);
        let expected =
            "exec 3<>/dev/tap\"$(cat /sys/class/net/mt0/ifindex)\" 4<>/dev/vhost-net\nqemu\n";
        assert_eq!(steps, Some(expected), "{text}");
    }

    #[test]
    fn script_of_an_open_queue_leaves_it_as_it_is() {
        let nic = ScriptNic {
            origin: Origin::Open,
            numbers: Numbers {
                fds: vec![7],
                vhost: vec![],
            },
        };
        let text = script(&[nic], &HostLink::default(), &["qemu".into()]);
        assert!(text.ends_with("set -e\nqemu\n"), "{text}");
    }

    #[test]
    fn script_hands_on_stdin_and_the_status() {
        for shell in ["sh", "bash"] {
            let text = script(
                &[],
                &HostLink::default(),
                &["sh", "-c", "read -r n; exit $n"].map(OsString::from),
            );
            let (reader, mut writer) = std::io::pipe().unwrap();
            std::io::Write::write_all(&mut writer, b"7\n").unwrap();
            let mut command = std::process::Command::new(shell);
            command.args(["-c", &text]).stdin(reader);
            assert_eq!(command.status().unwrap().code(), Some(7), "{shell}");
        }
    }

    #[test]
    fn long_command_is_several_lines_and_the_same_words() {
        let words: Vec<_> = (0..60).map(|n| format!("-word '{n}'")).collect();
        let mut command = ["printf", "%s\n"].map(OsString::from).to_vec();
        command.extend(words.iter().map(OsString::from));
        let text = script(&[], &HostLink::default(), &command);
        assert!(text.lines().all(|line| line.len() <= 100), "{text}");
        let output = std::process::Command::new("sh")
            .args(["-c", &text])
            .output();
        let output = String::from_utf8(output.unwrap().stdout).unwrap();
        assert_eq!(output.lines().collect::<Vec<_>>(), words);
    }

    #[test]
    fn script_makes_the_hosts_link_and_deletes_it() {
        let addresses = ["10.0.0.1/24", "fd00::1/64"].map(|text| text.parse().unwrap());
        let host_link = HostLink {
            lower: Some("eno1".into()),
            addresses: &addresses,
        };
        let text = script(&[nic("eno1", vec![3])], &host_link, &["qemu".into()]);
        let steps = "ip link add link eno1 name mvl$$ type macvlan mode bridge\nlinks=\"$links mvl$$\"\n\
                     ip link set mvl$$ up\nip address add 10.0.0.1/24 dev mvl$$\n\
                     ip address add fd00::1/64 dev mvl$$ nodad\nqemu\n";
        assert!(text.ends_with(steps), "{text}");
    }

    #[test]
    fn script_with_many_descriptors_is_for_bash() {
        let text = script(
            &[nic("eno1", (3..11).collect())],
            &HostLink::default(),
            &["qemu".into()],
        );
        assert!(text.starts_with("#!/bin/bash"));
    }
}
