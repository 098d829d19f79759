//! Tables and texts for a terminal: what users wrote may hold anything, and reaches it as plain characters only (pure).

use serde_json::Value;

/// A name or a URL that is longer takes the room of all others.
const CELL_CHARS_MAX: usize = 60;

/// Rows that come in portions: a column may get wider from portion to portion, and never narrower.
pub(super) struct Table<const COLUMNS: usize> {
    widths: [usize; COLUMNS],
    head: Option<[String; COLUMNS]>,
}

impl<const COLUMNS: usize> Table<COLUMNS> {
    pub fn new(head: [&str; COLUMNS]) -> Self {
        Self { widths: [0; COLUMNS], head: Some(head.map(String::from)) }
    }

    /// With the head before the first ones.
    pub fn lines(&mut self, rows: &[[String; COLUMNS]]) -> Vec<String> {
        let head = self.head.take();
        let all: Vec<&[String; COLUMNS]> = head.iter().chain(rows).collect();
        for row in &all {
            for (width, cell) in self.widths.iter_mut().zip(*row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let line = |row: &&[String; COLUMNS]| {
            let cells = row.iter().zip(self.widths).map(|(cell, width)| format!("{cell:<width$}"));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_string()
        };
        all.iter().map(line).collect()
    }
}

/// Ends a cell that is too long with an ellipsis.
pub(super) fn cut(text: &str) -> String {
    match text.chars().count() > CELL_CHARS_MAX {
        true => text.chars().take(CELL_CHARS_MAX - 1).chain(['…']).collect(),
        false => text.to_string(),
    }
}

/// A text that stays on its line and moves nothing.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if is_plain(c) { c } else { ' ' }).collect()
}

/// JSON, where such a character can be written as what it is.
pub(super) fn printable_json(doc: &Value, is_pretty: bool) -> String {
    let text = match is_pretty {
        true => serde_json::to_string_pretty(doc),
        false => serde_json::to_string(doc),
    };
    let mut out = String::new();
    for c in text.unwrap_or_default().chars() {
        // Outside of strings there is nothing but ASCII, and inside of them no control character of ASCII but DEL.
        match is_plain(c) || c == '\n' {
            true => out.push(c),
            false => c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}"))),
        }
    }
    out
}

/// Control characters, and those that turn the direction of what follows.
fn is_plain(c: char) -> bool {
    !c.is_control() && !matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn rows_come_in_portions_under_one_head() {
        let mut table = Table::new(["name", "n"]);
        let row = |name: &str, n: &str| [name.to_string(), n.to_string()];
        assert_eq!(table.lines(&[row("ab", "1")]), ["name  n", "ab    1"]);
        assert_eq!(table.lines(&[row("abcdef", "22"), row("ä", "")]), ["abcdef  22", "ä"]);
        assert_eq!(table.lines(&[row("a", "3")]), ["a       3"]);
    }

    #[test]
    fn a_long_cell_is_cut() {
        assert_eq!(cut("short"), "short");
        assert_eq!(cut(&"é".repeat(61)), format!("{}…", "é".repeat(59)));
    }

    proptest! {
        #[test]
        fn nothing_reaches_a_terminal_but_plain_characters(text: String) {
            let text = format!("{text}\u{1b}[2J\u{9b}\u{7f}\u{202e}\r\n");
            let cell = printable(&text);
            prop_assert!(cell.chars().all(is_plain));
            let doc = json!({ "_id": text, "list": [text] });
            for is_pretty in [false, true] {
                let shown = printable_json(&doc, is_pretty);
                prop_assert!(shown.chars().all(|c| is_plain(c) || is_pretty && c == '\n'));
                prop_assert_eq!(&serde_json::from_str::<Value>(&shown).expect("JSON"), &doc, "and it is the same document");
            }
        }
    }
}
