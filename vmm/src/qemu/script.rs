//! `--dry-run`: what would be done, as a script for sh.

use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;

use net::{InterfaceAddress, MacAddr, MacvtapSpec, Mode};

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

/// The host's own link among its guests.
#[derive(Clone, Debug, Default)]
pub(super) struct HostLink<'a> {
    /// What it stands on; `None` for no such link.
    pub lower: Option<String>,
    pub addresses: &'a [InterfaceAddress],
}

/// The script; `command` is QEMU with its arguments.
pub(super) fn script(
    cards: &[ScriptCard],
    host_link: &HostLink<'_>,
    command: &[OsString],
) -> String {
    let mut made = String::new();
    let mut redirections = String::new();
    let mut names = Vec::new();
    for (n, card) in cards.iter().enumerate() {
        let link = match &card.origin {
            Origin::New { spec, mac, index } => {
                names.push(format!("tap{n}"));
                made += &new_macvtap(n, spec, *mac, *index);
                format!("\"$tap{n}\"")
            }
            Origin::Existing(link) => {
                made += &need_up("", &quote(link));
                quote(link)
            }
            Origin::Open(_) => String::new(),
        };
        redirect(&mut redirections, card, &link);
    }
    if let Some(lower) = &host_link.lower {
        names.push("host".into());
        made += &new_host_link(lower, host_link.addresses);
    }
    let text = command.iter().map(quote).collect::<Vec<_>>().join(" ");
    let stdin = stdin_number(cards);
    // dash knows descriptors of one digit alone.
    let shell = if stdin > 9 { "bash" } else { "sh" };
    let mut script = format!(
        "#!/bin/{shell}\n# What `minivmm qemu` would do; run it as root with {shell}. minivmm itself makes the macvtap in a network\n\
         # namespace of its own unless netns=host is given, so that nothing remains even after SIGKILL, and follows the\n\
         # guest of --kernel by QMP, to press its power button and to tell a panic from a reboot.\nset -eu\nqemu=\n"
    );
    // A variable that is not set yet stands for a link that is not there yet.
    for name in &names {
        let _ = writeln!(script, "{name}=");
    }
    script += "terminal=$(stty -g 2>/dev/null) || terminal=\nclean() {\n    [ -z \"$terminal\" ] || stty \"$terminal\"\n";
    for name in &names {
        let _ = writeln!(script, "    ip link delete \"${name}\" 2>/dev/null || :");
    }
    script += "}\nend() {\n    [ -z \"$qemu\" ] || { kill \"$qemu\" && wait \"$qemu\"; } 2>/dev/null || :\n    exit \"$1\"\n}\n\
         trap clean EXIT\ntrap 'end 129' HUP; trap 'end 130' INT; trap 'end 131' QUIT; trap 'end 143' TERM\n";
    script += &made;
    script += "# In the background, since a shell that waits for a program in the foreground is deaf to signals.\n";
    // A shell gives such a program /dev/null to read, and dash does so before it would take <&0.
    let _ = write!(
        script,
        "exec {stdin}<&0\n{text} <&{stdin} {stdin}<&-{redirections} &\nqemu=$!\n"
    );
    script + "status=0\nwait \"$qemu\" || status=$?\nexit \"$status\"\n"
}

/// A number for a copy of stdin, away from those of the cards and, as far as possible, of ARGS.
fn stdin_number(cards: &[ScriptCard]) -> RawFd {
    let taken = cards.iter().flat_map(|card| {
        let sources: &[RawFd] = match &card.origin {
            Origin::Open(sources) => sources,
            _ => &[],
        };
        card.numbers
            .fds
            .iter()
            .chain(&card.numbers.vhost)
            .chain(sources)
    });
    taken.max().map_or(9, |highest| 9.max(highest + 1))
}

/// A test that a link is up: no frame passes one that is down, and the kernel does not say so.
fn need_up(enter: &str, link: &str) -> String {
    format!(
        "[ -n \"$({enter}ip link show up dev {link})\" ] || {{ echo {link} is down: frames would vanish in it >&2; exit 1; }}\n"
    )
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
    text += &need_up(&enter, &lower);
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

fn new_host_link(lower: &str, addresses: &[InterfaceAddress]) -> String {
    let lower = quote(lower);
    let mut text = format!(
        "ip link add link {lower} name mvl$$ type macvlan mode bridge\nhost=mvl$$\nip link set \"$host\" up\n"
    );
    for address in addresses {
        let usable = if address.ip().is_ipv6() { " nodad" } else { "" };
        let _ = writeln!(text, "ip address add {address} dev \"$host\"{usable}");
    }
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
    fn script_makes_the_link_and_deletes_it() {
        let command = ["qemu", "-append", "a b"].map(OsString::from);
        let text = script(
            &[card("eno1,mtu=1400,mode=private", vec![3])],
            &HostLink::default(),
            &command,
        );
        for line in [
            "#!/bin/sh",
            "tap0=mvt$$",
            "ip link add link eno1 name mvt$$ index 1000000 address 52:54:00:12:34:56 mtu 1400 type macvtap mode private",
            "ip link set \"$tap0\" up",
            "    ip link delete \"$tap0\" 2>/dev/null || :",
            "qemu -append 'a b' <&9 9<&- \\",
            "    3<>\"/dev/tap$(cat /sys/class/net/\"$tap0\"/ifindex)\" &",
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
        let text = script(&[card], &HostLink::default(), &["qemu".into()]);
        assert!(!text.contains("ip link add"), "{text}");
        assert!(!text.contains("ip link delete"), "{text}");
        assert!(text.contains("ip link show up dev mt0"), "{text}");
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
        assert!(
            script(&[card], &HostLink::default(), &["qemu".into()])
                .contains("\nqemu <&9 9<&- 3<&7 &\n")
        );
    }

    #[test]
    fn script_ends_its_program_at_once_by_a_signal() {
        use std::process::{Command, Stdio};

        use nix::sys::signal::{Signal, kill};

        for shell in ["sh", "bash"] {
            let text = script(
                &[],
                &HostLink::default(),
                &["sleep", "60"].map(OsString::from),
            );
            let mut command = Command::new(shell);
            command.args(["-c", &text]).stdin(Stdio::null());
            command.stdout(Stdio::piped());
            let start = std::time::Instant::now();
            let mut child = command.spawn().unwrap();
            std::thread::sleep(std::time::Duration::from_millis(300));
            kill(crate::child::pid(&child), Signal::SIGTERM).unwrap();
            assert_eq!(child.wait().unwrap().code(), Some(143), "{shell}");
            // At end of file nobody has it open any more.
            let mut stdout = child.stdout.take().unwrap();
            std::io::Read::read_to_end(&mut stdout, &mut Vec::new()).unwrap();
            assert!(start.elapsed().as_secs() < 30, "{shell}");
        }
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
    fn script_of_two_cards_with_two_queues_numbers_all_descriptors() {
        let cards = [
            card("eno1,queues=2", vec![3, 4]),
            card("eno2,queues=2", vec![5, 6]),
        ];
        let text = script(&cards, &HostLink::default(), &["qemu".into()]);
        for (fd, tap) in [(3, "tap0"), (4, "tap0"), (5, "tap1"), (6, "tap1")] {
            let line = format!("    {fd}<>\"/dev/tap$(cat /sys/class/net/\"${tap}\"/ifindex)\"");
            assert!(text.contains(&line), "{line}\n{text}");
        }
        assert!(text.contains("tap1=mvt$$x1\n"), "{text}");
    }

    #[test]
    fn script_makes_the_hosts_link_and_deletes_it() {
        let addresses = ["10.0.0.1/24", "fd00::1/64"].map(|text| text.parse().unwrap());
        let host_link = HostLink {
            lower: Some("eno1".into()),
            addresses: &addresses,
        };
        let text = script(&[card("eno1", vec![3])], &host_link, &["qemu".into()]);
        for line in [
            "ip link add link eno1 name mvl$$ type macvlan mode bridge",
            "ip address add 10.0.0.1/24 dev \"$host\"",
            "ip address add fd00::1/64 dev \"$host\" nodad",
            "    ip link delete \"$host\" 2>/dev/null || :",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    #[test]
    fn script_with_many_descriptors_is_for_bash() {
        let text = script(
            &[card("eno1", (3..11).collect())],
            &HostLink::default(),
            &["qemu".into()],
        );
        assert!(text.starts_with("#!/bin/bash"));
    }
}
