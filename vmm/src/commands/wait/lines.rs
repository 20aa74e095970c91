//! The lines of a console, in which a regular expression is looked for.

use std::borrow::Cow;

use regex_lite::Regex;

/// The most of a line that is looked at: its end.
const LONGEST: usize = 4096;
/// Stands behind a line that has not ended yet, which may only be a part: `$` does not match there.
const UNFINISHED: &str = "\u{fffe}\u{fffe}";

/// Looks for an expression in each line, and in the last before it has ended: a prompt never does.
#[derive(Debug)]
pub(super) struct Lines<'a> {
    regex: &'a Regex,
    line: Vec<u8>,
    /// The last line with text in it.
    last: Vec<u8>,
}

impl<'a> Lines<'a> {
    pub fn new(regex: &'a Regex) -> Self {
        Self {
            regex,
            line: Vec::new(),
            last: Vec::new(),
        }
    }

    /// Takes what has come, wherever it is cut, and returns whether the expression was found.
    pub fn find_in(&mut self, bytes: &[u8]) -> bool {
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.line.extend(piece);
            self.line.drain(..self.line.len().saturating_sub(LONGEST));
            let (text, has_ended) = match self.line.strip_suffix(b"\n") {
                Some(text) => (text.strip_suffix(b"\r").unwrap_or(text), true),
                None => (&self.line[..], false),
            };
            // What is not UTF-8 is U+FFFD.
            let mut text = String::from_utf8_lossy(text);
            if !has_ended {
                text.to_mut().push_str(UNFINISHED);
            }
            if self.regex.is_match(&text) {
                return true;
            }
            if has_ended {
                self.remember();
                self.line.clear();
            }
        }
        self.remember();
        false
    }

    /// The last line with text in it.
    pub fn last(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(self.last.trim_ascii())
    }

    fn remember(&mut self) {
        if !self.line.trim_ascii().is_empty() {
            self.last.clone_from(&self.line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_found(regex: &str, pieces: &[&[u8]]) -> bool {
        let regex = Regex::new(regex).unwrap();
        let mut lines = Lines::new(&regex);
        pieces.iter().any(|piece| lines.find_in(piece))
    }

    #[test]
    fn expression_is_found_however_the_text_is_cut() {
        let text = b"boot\r\nlogin: ready\r\n";
        for size in 1..text.len() {
            let pieces: Vec<_> = text.chunks(size).collect();
            for regex in ["^boot$", "log.n", "ready$", "^login: ready$"] {
                assert!(is_found(regex, &pieces), "{regex} in {size}s");
            }
            for regex in ["^ready", "boot.login", "boo$", "(?s)boot.*login"] {
                assert!(!is_found(regex, &pieces), "{regex} in {size}s");
            }
        }
    }

    #[test]
    fn line_that_has_not_ended_is_looked_at_but_for_its_end() {
        assert!(is_found("login: ", &[b"login: "]));
        assert!(!is_found("^OK$", &[b"OK", b"AY\n"]));
        assert!(is_found("^OK$", &[b"OK", b"\n"]));
    }

    #[test]
    fn bytes_of_any_kind_and_endless_lines_do_no_harm() {
        assert!(is_found("ready", &[b"\xff\xc3", b"\x00 ready"]));
        assert!(is_found("caf\u{e9}", &["caf\u{e9}".as_bytes()]));
        let regex = Regex::new("x{9}y").unwrap();
        let mut lines = Lines::new(&regex);
        for _ in 0..100 {
            assert!(!lines.find_in(&[b'x'; 1000]));
        }
        assert!(lines.line.len() <= LONGEST);
        assert!(lines.find_in(b"y"));
    }

    #[test]
    fn last_line_is_the_last_with_text() {
        let regex = Regex::new("never").unwrap();
        let mut lines = Lines::new(&regex);
        assert_eq!(lines.last(), "");
        lines.find_in(b"one\r\ntwo\r\n\r\n");
        assert_eq!(lines.last(), "two");
        lines.find_in(b"login: ");
        assert_eq!(lines.last(), "login:");
    }
}
