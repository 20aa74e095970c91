//! Firewall rules that go by the name of an interface whose addresses are about to move to another.
//!
//! The firewall's own programs list them. nft lists those of iptables-nft, too.

mod rules;

use std::ffi::OsString;
use std::io;
use std::process::Command;
use std::time::Duration;

use crate::child::{MOST, Program};
use rules::Rule;

/// How long a program may take; one with very large sets takes seconds.
const LIMIT: Duration = Duration::from_secs(5);
/// How many rules are named, and how much of each.
const SHOWN: usize = 5;
const WIDTH: usize = 120;
/// Where these programs are outside an ordinary user's PATH.
const ELSEWHERE: &str = "/usr/sbin:/sbin";

/// Warns of the rules in the caller's network namespace that go by the name `from` and not by `to`, where that is known.
pub(super) fn warn_of_rules(from: &str, to: Option<&str>) {
    let mut rules = Vec::new();
    let mut unknown = Vec::new();
    for listed in [
        list(&["nft", "-s", "list", "ruleset"], rules::of_nftables),
        list(&["iptables-legacy-save"], |text| {
            rules::of_iptables("iptables", text)
        }),
        list(&["ip6tables-legacy-save"], |text| {
            rules::of_iptables("ip6tables", text)
        }),
    ] {
        match listed {
            Ok(found) => rules.extend(found),
            Err(why) => unknown.push(why),
        }
    }
    if let Some(warning) = describe(&rules::only_for(&rules, from, to), from, to) {
        log::warn!("{warning}");
    }
    if !unknown.is_empty() {
        let why = unknown.join("; ");
        log::warn!("cannot list all firewall rules that match the name {from}: {why}");
    }
}

/// The rules that a program lists: none where it is not installed. An error says why they are not known.
fn list(words: &[&str], read: fn(&str) -> Vec<Rule>) -> Result<Vec<Rule>, String> {
    let line = words.join(" ");
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    command.env("PATH", search_path(std::env::var_os("PATH")));
    let output = match Program::new(command).output(b"", LIMIT) {
        Ok(output) => output,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            log::debug!("`{line}` is not asked for firewall rules: it is not installed");
            return Ok(Vec::new());
        }
        Err(error) => return Err(format!("`{line}`: {error}")),
    };
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let first = errors.lines().next().unwrap_or_default();
        return Err(format!("`{line}`: {}: {first}", output.status));
    }
    if output.stdout.len() >= MOST {
        return Err(format!("`{line}` says more than {MOST} bytes"));
    }
    Ok(read(&String::from_utf8_lossy(&output.stdout)))
}

/// Where programs are looked for.
fn search_path(own: Option<OsString>) -> OsString {
    match own {
        // An empty part would be the working directory.
        Some(mut path) if !path.is_empty() => {
            path.push(":");
            path.push(ELSEWHERE);
            path
        }
        _ => ELSEWHERE.into(),
    }
}

/// The warning, if there is something to warn of.
fn describe(rules: &[&Rule], from: &str, to: Option<&str>) -> Option<String> {
    if rules.is_empty() {
        return None;
    }
    let shown = rules.iter().take(SHOWN).map(|rule| shorten(&rule.text));
    let mut shown: Vec<_> = shown.map(|text| format!("`{text}`")).collect();
    if let Some(more @ 1..) = rules.len().checked_sub(SHOWN) {
        shown.push(format!("and {more} more"));
    }
    let to = to.unwrap_or("the macvlan");
    let shown = shown.join(", ");
    Some(format!(
        "what goes through {from} will go through {to}, and these firewall rules go by the name {from}: {shown}. \
         Repeat them for {to}, or let them name both"
    ))
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> Rule {
        rules::of_iptables("iptables", &format!("*filter\n{text}")).remove(0)
    }

    #[test]
    fn warning_names_some_rules_and_says_what_to_do() {
        assert_eq!(describe(&[], "eno1", None), None);
        let one = rule("-A INPUT -i eno1 -j DROP");
        let text = describe(&[&one], "eno1", Some("hosts")).unwrap();
        assert!(
            text.contains("`iptables -t filter -A INPUT -i eno1 -j DROP`. Repeat them for hosts")
        );
        let many = vec![&one; SHOWN + 2];
        let text = describe(&many, "eno1", None).unwrap();
        assert_eq!(text.matches("-j DROP`").count(), SHOWN, "{text}");
        assert!(
            text.contains(", and 2 more. Repeat them for the macvlan"),
            "{text}"
        );
        let text = describe(&many[..SHOWN], "eno1", None).unwrap();
        assert!(!text.contains("more"), "{text}");
    }

    #[test]
    fn rule_that_is_long_is_cut_between_characters() {
        let long = "é".repeat(WIDTH);
        assert_eq!(shorten(&long), long);
        assert_eq!(shorten(&(long.clone() + "x")), long + "…");
    }

    #[test]
    fn programs_are_looked_for_in_sbin_too_and_never_in_the_working_directory() {
        for (own, expected) in [
            (None, ELSEWHERE),
            (Some(""), ELSEWHERE),
            (Some("/bin"), "/bin:/usr/sbin:/sbin"),
        ] {
            assert_eq!(search_path(own.map(OsString::from)), expected);
        }
    }

    #[test]
    fn program_that_is_missing_leaves_no_doubt_and_one_that_fails_does() {
        let ask = |words| list(words, rules::of_nftables);
        assert!(ask(&["no-such-program-of-a-firewall"]).unwrap().is_empty());
        let why = ask(&["sh", "-c", "echo no permission >&2; exit 3"]).unwrap_err();
        assert!(why.contains("exit status: 3: no permission"), "{why}");
        let why = ask(&["head", "-c", "2M", "/dev/zero"]).unwrap_err();
        assert!(why.contains("says more than"), "{why}");
    }
}
