//! Rules as `nft list ruleset` and `iptables-save` print them, and those that are for one name only.

/// A rule, or a set that rules use.
#[derive(Debug)]
pub(super) struct Rule {
    /// Where it stands and what it says.
    pub text: String,
    /// The interfaces that it is for.
    names: Vec<Pattern>,
}

/// The name of an interface, or the beginning of names.
#[derive(Debug, PartialEq, Eq)]
struct Pattern {
    text: String,
    is_prefix: bool,
}

impl Pattern {
    fn matches(&self, name: &str) -> bool {
        name == self.text || self.is_prefix && name.starts_with(&self.text)
    }
}

impl Rule {
    fn is_for(&self, name: &str) -> bool {
        self.names.iter().any(|pattern| pattern.matches(name))
    }
}

/// The rules that are for `from` and not for `to`, unless there is the same rule for `to`.
pub(super) fn only_for<'a>(rules: &'a [Rule], from: &str, to: Option<&str>) -> Vec<&'a Rule> {
    let is_known = |rule: &Rule, to: &str| {
        let same = renamed(&rule.text, from, to);
        let is_repeated = same != rule.text && rules.iter().any(|other| other.text == same);
        rule.is_for(to) || is_repeated
    };
    let is_left = |rule: &&Rule| rule.is_for(from) && !to.is_some_and(|to| is_known(rule, to));
    rules.iter().filter(is_left).collect()
}

/// `text` with the word `from` replaced.
fn renamed(text: &str, from: &str, to: &str) -> String {
    let separates = |c: char| " \",{}".contains(c);
    let pieces = text.split_inclusive(separates);
    let replace = |piece: &str| match piece.strip_prefix(from) {
        Some(rest) if rest.chars().all(separates) => format!("{to}{rest}"),
        _ => piece.to_owned(),
    };
    pieces.map(replace).collect()
}

/// What `nft list ruleset` prints: blocks of tables, in them blocks of chains, sets and the like, in them statements,
/// which take several lines when sets in them are long.
pub(super) fn of_nftables(text: &str) -> Vec<Rule> {
    let mut rules = Vec::new();
    let mut blocks: Vec<&str> = Vec::new();
    let mut statement = String::new();
    for line in text.lines().map(str::trim) {
        if statement.is_empty() {
            match line.strip_suffix('{') {
                Some(block) if blocks.len() < 2 => blocks.push(block.trim_end()),
                _ if line == "}" => drop(blocks.pop()),
                _ => statement += line,
            }
        } else {
            statement = statement + " " + line;
        }
        if statement.is_empty() || is_open(&statement) {
            continue;
        }
        let text = std::mem::take(&mut statement);
        // What sees the frames of the lower itself goes on to see those of the macvlans on it.
        if !blocks
            .iter()
            .any(|block| block.starts_with("table netdev "))
        {
            let names = names_in_statement(&text);
            let words = blocks
                .iter()
                .filter_map(|block| Some(block.split_once(' ')?.1));
            let place = words.collect::<Vec<_>>().join(" ");
            let text = format!("{place}: {text}");
            rules.push(Rule { text, names });
        }
    }
    rules
}

/// Whether braces are open.
fn is_open(statement: &str) -> bool {
    let count = |brace| {
        let unquoted = statement.split('"').step_by(2);
        unquoted
            .map(|part| part.matches(brace).count())
            .sum::<usize>()
    };
    count('{') > count('}')
}

/// nft prints the names of interfaces as strings, which cannot have a quote in them.
fn names_in_statement(statement: &str) -> Vec<Pattern> {
    // Strings that are something else follow these words.
    const OTHERS: [&str; 3] = ["comment", "prefix", "name"];
    if let Some(devices) = statement.strip_prefix("devices = ") {
        // Older ones print a flow table's without quotes.
        let words = devices.split(|c: char| " \",{}".contains(c));
        return words
            .filter(|word| !word.is_empty())
            .map(nft_pattern)
            .collect();
    }
    let parts: Vec<_> = statement.split('"').collect();
    let is_below = |part: &&str| part.contains("hook ingress") || part.contains("hook egress");
    if parts.iter().step_by(2).any(is_below) {
        return Vec::new();
    }
    let strings = parts.chunks_exact(2).map(|pair| (pair[0], pair[1]));
    let is_name = |(before, _): &(&str, &str)| {
        let last = before.split_whitespace().last().unwrap_or_default();
        !OTHERS.contains(&last)
    };
    strings
        .filter(is_name)
        .map(|(_, name)| nft_pattern(name))
        .collect()
}

fn nft_pattern(string: &str) -> Pattern {
    // The name of an interface may end with an asterisk, too.
    let beginning = string
        .strip_suffix('*')
        .filter(|text| !text.ends_with('\\'));
    Pattern {
        text: beginning.unwrap_or(string).replace("\\*", "*"),
        is_prefix: beginning.is_some(),
    }
}

/// What `iptables-save` prints, as arguments of `program`.
pub(super) fn of_iptables(program: &str, text: &str) -> Vec<Rule> {
    let mut rules = Vec::new();
    let mut table = "";
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if line.starts_with("-A ") {
            rules.push(Rule {
                text: format!("{program} -t {table} {line}"),
                names: names_in_arguments(line),
            });
        }
    }
    rules
}

fn names_in_arguments(line: &str) -> Vec<Pattern> {
    let unquoted = without_strings(line);
    let words: Vec<_> = unquoted.split(' ').collect();
    let pairs = words.windows(2);
    let names = pairs.filter(|pair| ["-i", "-o"].contains(&pair[0]));
    names
        .map(|pair| {
            let beginning = pair[1].strip_suffix('+');
            Pattern {
                text: beginning.unwrap_or(pair[1]).to_owned(),
                is_prefix: beginning.is_some(),
            }
        })
        .collect()
}

/// Strings, as of comments, are quoted when they have spaces.
fn without_strings(line: &str) -> String {
    let mut rest = String::new();
    let mut is_quoted = false;
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' if is_quoted => drop(characters.next()),
            '"' => is_quoted = !is_quoted,
            _ if is_quoted => {}
            _ => rest.push(character),
        }
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As nft 1.0.6 prints it, but for the flow tables.
    const NFTABLES: &str = r#"table inet filter {
	comment "about eno1"
	set lans {
		type ifname
		flags interval
		elements = { "eno1",
			     "eth*" }
	}

	set addresses {
		type ipv4_addr
		elements = { 10.0.0.1 comment "eno1", 10.0.0.2 comment "eno1 {",
			     10.0.0.3 }
	}

	map m {
		type ifname : verdict
		elements = { "lo" : accept,
			     "eno1" : drop }
	}

	flowtable old {
		hook ingress priority filter
		devices = { eno1, eno2 }
	}

	flowtable new {
		hook ingress priority filter
		devices = { "eno1" }
	}

	chain eno1 {
	}

	chain below {
		type filter hook ingress device "eno1" priority filter; policy accept;
	}

	chain input {
		type filter hook input priority filter; policy accept;
		iifname "eno1" tcp dport 22 accept comment "ssh on eno1"
		iif "eno1" accept
		iifname { "eth0", "eth1", "eno1", "eth2" } accept
		iifname "eno*" accept
		iifname "eno\*" accept
		iifname "eno10" accept
		iifname "e" accept
		oifname != "eno1" drop
		ip saddr 10.0.0.1 counter comment "eno1"
		iifname @lans accept
		log prefix "eno1" accept
		counter name "eno1" jump eno1
		iifname . ip saddr { "eno1" . 10.0.0.1 } accept
		iifname vmap { "lo" : accept, "eno1" : jump eno1 }
	}
}
table netdev eno1 {
	chain ingress {
		type filter hook ingress device "eno1" priority filter; policy accept;
		iifname "eno1" accept
	}
}
table ip nat {
	chain postrouting {
		oifname "eno1" masquerade
	}
}
"#;

    const IPTABLES: &str = r#"# Generated by iptables-save v1.8.9
*nat
:POSTROUTING ACCEPT [0:0]
-A POSTROUTING -o eno1 -j MASQUERADE
COMMIT
*filter
:eno1 - [0:0]
-A INPUT -i eno1 -p tcp -m comment --comment "a \" -o eno9 b" -j ACCEPT
-A INPUT -i eno+ -j ACCEPT
-A INPUT ! -i eno10 -j ACCEPT
-A INPUT -i + -j ACCEPT
-A INPUT -m comment --comment "to -i eno1 only" -j eno1
-A INPUT -m comment --comment eno1 -j eno1
COMMIT
"#;

    fn left(rules: &[Rule], from: &str, to: Option<&str>) -> Vec<String> {
        let left = only_for(rules, from, to).into_iter();
        left.map(|rule| rule.text.clone()).collect()
    }

    #[test]
    fn nft_rules_of_a_name_are_found_in_statements_sets_and_maps() {
        let rules = of_nftables(NFTABLES);
        let expected = [
            r#"inet filter lans: elements = { "eno1", "eth*" }"#,
            r#"inet filter m: elements = { "lo" : accept, "eno1" : drop }"#,
            "inet filter old: devices = { eno1, eno2 }",
            r#"inet filter new: devices = { "eno1" }"#,
            r#"inet filter input: iifname "eno1" tcp dport 22 accept comment "ssh on eno1""#,
            r#"inet filter input: iif "eno1" accept"#,
            r#"inet filter input: iifname { "eth0", "eth1", "eno1", "eth2" } accept"#,
            r#"inet filter input: iifname "eno*" accept"#,
            r#"inet filter input: oifname != "eno1" drop"#,
            r#"inet filter input: iifname . ip saddr { "eno1" . 10.0.0.1 } accept"#,
            r#"inet filter input: iifname vmap { "lo" : accept, "eno1" : jump eno1 }"#,
            r#"ip nat postrouting: oifname "eno1" masquerade"#,
        ];
        assert_eq!(left(&rules, "eno1", None), expected);
        let expected = [
            r#"inet filter input: iifname "eno*" accept"#,
            r#"inet filter input: iifname "eno\*" accept"#,
        ];
        assert_eq!(left(&rules, "eno*", None), expected);
        assert_eq!(left(&rules, "eth7", None).len(), 1);
        assert!(left(&rules, "wlan0", None).is_empty());
        assert!(of_nftables("").is_empty());
    }

    #[test]
    fn iptables_rules_of_a_name_are_found_and_comments_are_none() {
        let rules = of_iptables("iptables", IPTABLES);
        let filter = "iptables -t filter -A INPUT";
        let expected = [
            "iptables -t nat -A POSTROUTING -o eno1 -j MASQUERADE".to_owned(),
            format!(r#"{filter} -i eno1 -p tcp -m comment --comment "a \" -o eno9 b" -j ACCEPT"#),
            format!("{filter} -i eno+ -j ACCEPT"),
            format!("{filter} -i + -j ACCEPT"),
        ];
        assert_eq!(left(&rules, "eno1", None), expected);
        // What matches every name is no loss where the new one is known.
        assert_eq!(left(&rules, "eno1", Some("hosts")), expected[..3]);
    }

    #[test]
    fn rule_that_is_for_the_new_name_too_is_left_out() {
        let table =
            |rules: &str| of_nftables(&format!("table ip t {{\nchain c {{\n{rules}\n}}\n}}\n"));
        for rules in [
            r#"iifname { "eno1", "hosts" } accept"#,
            "iifname \"eno1\" accept\niifname \"hosts\" accept",
            "iifname { \"eno1\", \"lo\" } accept\niifname { \"hosts\", \"lo\" } accept",
        ] {
            let rules = table(rules);
            assert!(left(&rules, "eno1", Some("hosts")).is_empty(), "{rules:?}");
            assert_eq!(left(&rules, "eno1", Some("other")).len(), 1, "{rules:?}");
            assert_eq!(left(&rules, "eno1", None).len(), 1, "{rules:?}");
        }
        let wild = table(r#"iifname "eno*" accept"#);
        assert!(left(&wild, "eno1", Some("eno1-host")).is_empty());
        let other = table("iifname \"eno1\" accept\niifname \"hosts\" drop\nip saddr 10.0.0.1");
        assert_eq!(left(&other, "eno1", Some("hosts")).len(), 1);
        let legacy = of_iptables(
            "iptables",
            "*filter\n-A INPUT -i eno1 -j DROP\n-A INPUT -i hosts -j DROP\n",
        );
        assert!(left(&legacy, "eno1", Some("hosts")).is_empty());
    }
}
