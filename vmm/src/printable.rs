//! Text that others have written, on its way to a terminal.

use std::borrow::Cow;

/// `text` as one line that a terminal shows and does not obey. The names of links, their aliases and what other users
/// write into the registry may hold any character: those that control a terminal, end a line or turn the direction of
/// what follows are written out, as in `\u{1b}`.
///
/// Whatever minivmm writes for people passes through here: the log, errors among it, and the reports of its subcommands.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(is_obeyed) {
        return Cow::Borrowed(text);
    }
    let mut line = String::with_capacity(text.len());
    for character in text.chars() {
        if is_obeyed(character) {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    Cow::Owned(line)
}

/// The same for JSON, which has an escape of its own and keeps the lines that it is laid out in.
pub fn printable_json(text: &str) -> String {
    let mut json = String::with_capacity(text.len());
    for character in text.chars() {
        if is_obeyed(character) && character != '\n' {
            // All of them are in the plane that four digits reach.
            json.push_str(&format!("\\u{:04x}", u32::from(character)));
        } else {
            json.push(character);
        }
    }
    json
}

/// Controls (ECMA-48's C0, DEL and C1), other ends of lines, and what changes the direction of writing (Unicode's
/// Bidi_Control).
fn is_obeyed(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}' | '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_is_left_alone() {
        for text in [
            "",
            "eno1",
            "`br0` is a bridge: use that",
            "Büro 東京 🙂",
            r"a\b\u{1b}",
        ] {
            assert!(matches!(printable(text), Cow::Borrowed(same) if same == text));
            assert_eq!(printable_json(text), text);
        }
    }

    #[test]
    fn what_a_terminal_would_obey_is_written_out() {
        for (text, line, json) in [
            ("\u{1b}[2Jx", r"\u{1b}[2Jx", r"\u001b[2Jx"),
            ("a\nb\tc\r", r"a\nb\tc\r", "a\nb\\u0009c\\u000d"),
            ("\u{7f}\u{9b}7m", r"\u{7f}\u{9b}7m", r"\u007f\u009b7m"),
            ("\u{202e}gnp.exe", r"\u{202e}gnp.exe", r"\u202egnp.exe"),
            ("ü\u{2028}\u{2069}", r"ü\u{2028}\u{2069}", r"ü\u2028\u2069"),
        ] {
            assert_eq!(printable(text), line);
            assert_eq!(printable_json(text), json);
        }
    }

    #[test]
    fn json_stays_what_it_was() {
        let name = "\u{1b}\u{9b}\u{202e}\u{2028}\n\\\"x";
        let json = serde_json::to_string_pretty(&[name]).unwrap();
        let read: Vec<String> = serde_json::from_str(&printable_json(&json)).unwrap();
        assert_eq!(read, [name]);
    }
}
