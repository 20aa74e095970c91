//! `--dry-run`: what would be done, as a script for sh.

use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::os::fd::RawFd;

use net::{MacAddr, MacvtapSpec, Mode};

use super::nics::{Numbers, VHOST_NET};

/// Where a card's queues come from.
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
    /// Descriptors that the script's caller has opened.
    Open(Vec<RawFd>),
}

/// A card of the script.
#[derive(Clone, Debug)]
pub(super) struct ScriptCard {
    pub origin: Origin,
    pub numbers: Numbers,
}

/// The script; `command` is QEMU with its arguments.
pub(super) fn script(cards: &[ScriptCard], command: &[OsString]) -> String {
    let mut made = String::new();
    let mut redirections = String::new();
    let mut names = Vec::new();
    for (n, card) in cards.iter().enumerate() {
        let link = match &card.origin {
            Origin::New { spec, mac, index } => {
                names.push(format!("\"$tap{n}\""));
                made += &new_macvtap(n, spec, *mac, *index);
                format!("\"$tap{n}\"")
            }
            Origin::Existing(link) => quote(link),
            Origin::Open(_) => String::new(),
        };
        redirect(&mut redirections, card, &link);
    }
    let text = command.iter().map(quote).collect::<Vec<_>>().join(" ");
    // dash knows descriptors of one digit alone.
    let highest = cards
        .iter()
        .flat_map(|card| card.numbers.fds.iter().chain(&card.numbers.vhost))
        .max();
    let shell = if highest > Some(&9) { "bash" } else { "sh" };
    let mut script = format!(
        "#!/bin/{shell}\n# What `minivmm qemu` would do; run it as root with {shell}. minivmm itself makes the macvtap in a network\n\
         # namespace of its own unless netns=host is given, so that nothing remains even after SIGKILL, and follows the\n\
         # guest of --kernel by QMP, to press its power button and to tell a panic from a reboot.\nset -eu\n"
    );
    if !names.is_empty() {
        let delete: String = names
            .iter()
            .map(|name| format!("ip link delete {name} 2>/dev/null || :; "))
            .collect();
        // A variable that is not set yet stands for a link that is not there yet.
        for n in (0..cards.len()).filter(|n| names.contains(&format!("\"$tap{n}\""))) {
            let _ = writeln!(script, "tap{n}=");
        }
        let _ = writeln!(script, "trap '{}' EXIT", delete.trim_end_matches("; "));
        script += "trap 'exit 129' HUP; trap 'exit 130' INT; trap 'exit 143' TERM\n";
    }
    script + &made + &text + &redirections + "\n"
}

fn new_macvtap(n: usize, spec: &MacvtapSpec, mac: MacAddr, index: u32) -> String {
    let (tap, lower) = (format!("\"$tap{n}\""), quote(spec.link.as_str()));
    let mode = spec.mode.unwrap_or(Mode::Bridge);
    let mut text = String::new();
    let name = spec
        .name
        .as_ref()
        .map_or(format!("mvt$${}", letter(n)), |name| quote(name.as_str()));
    let (mut enter, mut netns) = (String::new(), "");
    if let Some(path) = &spec.lower_netns {
        enter = format!("nsenter --net={} ", quote(path));
        netns = " netns $$";
    }
    let mut keys = String::new();
    // The lower's in passthru mode, where it cannot be chosen at creation.
    if mode != Mode::Passthru || spec.mac.is_some() {
        let _ = write!(keys, " address {mac}");
    }
    if let Some(mtu) = spec.mtu {
        let _ = write!(keys, " mtu {mtu}");
    }
    if let Some(frames) = spec.tx_queue_len {
        let _ = write!(keys, " txqueuelen {frames}");
    }
    let mut type_keys = String::new();
    if let Some(frames) = spec.bc_queue_len {
        let _ = write!(type_keys, " bcqueuelen {frames}");
    }
    let _ = write!(
        text,
        "# The high index makes /dev/tapN unique: low ones repeat in each network namespace.\n\
         {enter}ip link add link {lower} name {name} index {index}{keys}{netns} type macvtap mode {mode}{type_keys}\n\
         tap{n}={name}\n\
         ip link set {tap} allmulticast on\n\
         [ ! -e \"/proc/sys/net/ipv6/conf/$tap{n}/disable_ipv6\" ] || echo 1 >\"/proc/sys/net/ipv6/conf/$tap{n}/disable_ipv6\"\n\
         ip link set {tap} up\n"
    );
    text
}

/// Several links of one script need several names.
fn letter(n: usize) -> String {
    if n == 0 {
        String::new()
    } else {
        format!("x{n}")
    }
}

fn redirect(text: &mut String, card: &ScriptCard, link: &str) {
    for (i, fd) in card.numbers.fds.iter().enumerate() {
        let _ = match &card.origin {
            // A duplicate: to open /dev/fd/N would make another queue of it.
            Origin::Open(sources) => write!(text, " {fd}<&{}", sources[i]),
            _ => write!(
                text,
                " \\\n    {fd}<>\"/dev/tap$(cat /sys/class/net/{link}/ifindex)\""
            ),
        };
    }
    for fd in &card.numbers.vhost {
        let _ = write!(text, " {fd}<>{VHOST_NET}");
    }
}

/// A word for sh.
fn quote(word: impl AsRef<OsStr>) -> String {
    let word = word.as_ref().to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,:=+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.into_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(text: &str, fds: Vec<RawFd>) -> ScriptCard {
        ScriptCard {
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
    fn script_makes_the_link_and_deletes_it() {
        let command = ["qemu", "-append", "a b"].map(OsString::from);
        let text = script(&[card("eno1,mtu=1400,mode=private", vec![3])], &command);
        for line in [
            "#!/bin/sh",
            "tap0=mvt$$",
            "ip link add link eno1 name mvt$$ index 1000000 address 52:54:00:12:34:56 mtu 1400 type macvtap mode private",
            "ip link set \"$tap0\" up",
            "trap 'ip link delete \"$tap0\" 2>/dev/null || :' EXIT",
            "qemu -append 'a b' \\",
            "    3<>\"/dev/tap$(cat /sys/class/net/\"$tap0\"/ifindex)\"",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    #[test]
    fn script_of_an_existing_macvtap_makes_and_deletes_nothing() {
        let card = ScriptCard {
            origin: Origin::Existing("mt0".into()),
            numbers: Numbers {
                fds: vec![3],
                vhost: vec![4],
            },
        };
        let text = script(&[card], &["qemu".into()]);
        assert!(!text.contains("ip link"), "{text}");
        assert!(
            text.contains("3<>\"/dev/tap$(cat /sys/class/net/mt0/ifindex)\" 4<>/dev/vhost-net")
        );
    }

    #[test]
    fn script_of_an_open_queue_duplicates_it() {
        let card = ScriptCard {
            origin: Origin::Open(vec![7]),
            numbers: Numbers {
                fds: vec![3],
                vhost: vec![],
            },
        };
        assert!(script(&[card], &["qemu".into()]).ends_with("\nqemu 3<&7\n"));
    }

    #[test]
    fn script_with_many_descriptors_is_for_bash() {
        let text = script(&[card("eno1", (3..11).collect())], &["qemu".into()]);
        assert!(text.starts_with("#!/bin/bash"));
    }
}
