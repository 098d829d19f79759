//! `$change` and its like, in params and in the URL.
//!
//! A template is compiled when its rule is read; rendering copies texts. `$change` embeds the document's text as CouchDB sent
//! it, without parsing it.
//!
//! The original inserted values into the URL as they were. Here they are percent-encoded as one path segment or query value, so
//! that an id with `/`, `?`, `#`, `%` or a space stays one value and cannot turn the URL into another. A value of `.` or `..`,
//! which every URL parser would resolve as a step in the path, encoded or not, is encoded twice.

use super::rule::Rule;
use crate::couch::{Row, Seq};
use crate::vault::redact_text;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::Method;
use serde_json::{Map, Value};
use std::fmt;

/// RFC 3986's unreserved characters mean themselves everywhere in a URL.
const VALUE: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// A rule applied to one change. Its `Debug` shows neither params nor a password.
#[derive(Clone, PartialEq, Eq)]
pub struct Rendered {
    pub method: Method,
    pub url: String,
    /// The text of a JSON object, its members in the order in which the user wrote them.
    pub params: String,
}

impl fmt::Debug for Rendered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = redact_text(&self.url);
        f.debug_struct("Rendered").field("method", &self.method).field("url", &url).finish_non_exhaustive()
    }
}

pub fn render(rule: &Rule, db: &str, row: &Row) -> Rendered {
    let change = Change { db, row };
    Rendered { method: rule.method.clone(), url: rule.url_template.render(&change), params: rule.params_template.render(&change) }
}

/// The document of a change as text. A row without one is told by its id and revision, as CouchDB tells a deletion.
pub fn change_text(row: &Row) -> String {
    let mut text = String::new();
    push_change(&mut text, row);
    text
}

struct Change<'c> {
    db: &'c str,
    row: &'c Row,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variable {
    Change,
    ChangeId,
    ChangeRev,
    Seq,
    DbName,
}

impl Variable {
    /// `$seq` and `${seq}` are the same; anything else is no variable.
    fn parse(text: &str) -> Option<Self> {
        let name = text.strip_prefix('$')?;
        match name.strip_prefix('{').and_then(|name| name.strip_suffix('}')).unwrap_or(name) {
            "change" => Some(Variable::Change),
            "change.id" => Some(Variable::ChangeId),
            "change.rev" => Some(Variable::ChangeRev),
            "seq" => Some(Variable::Seq),
            "db_name" => Some(Variable::DbName),
            _ => None,
        }
    }

    fn push_json(self, out: &mut String, change: &Change<'_>) {
        match self {
            Variable::Change => push_change(out, change.row),
            Variable::ChangeId => push_json_string(out, &change.row.id),
            Variable::ChangeRev => push_json_string(out, change.row.rev()),
            Variable::Seq => match &change.row.seq {
                Seq::Number(number) => out.push_str(&number.to_string()),
                Seq::Text(text) => push_json_string(out, text),
            },
            Variable::DbName => push_json_string(out, change.db),
        }
    }

    fn push_encoded(self, out: &mut String, change: &Change<'_>) {
        match self {
            Variable::Change => push_value(out, &change_text(change.row)),
            Variable::ChangeId => push_value(out, &change.row.id),
            Variable::ChangeRev => push_value(out, change.row.rev()),
            Variable::Seq => push_value(out, &change.row.seq.as_query()),
            Variable::DbName => push_value(out, change.db),
        }
    }
}

fn push_change(out: &mut String, row: &Row) {
    match row.doc.as_ref().map(|doc| doc.get()).filter(|doc| doc.starts_with('{')) {
        Some(doc) => out.push_str(doc),
        None => {
            out.push_str("{\"_id\":");
            push_json_string(out, &row.id);
            out.push_str(",\"_rev\":");
            push_json_string(out, row.rev());
            out.push_str(if row.deleted { ",\"_deleted\":true}" } else { "}" });
        }
    }
}

fn push_json_string(out: &mut String, text: &str) {
    // Nothing to escape: almost every id, revision and seq.
    if text.bytes().all(|byte| byte >= b' ' && byte != b'"' && byte != b'\\') {
        out.push('"');
        out.push_str(text);
        out.push('"');
        return;
    }
    out.push_str(&Value::from(text).to_string());
}

fn push_value(out: &mut String, value: &str) {
    match value {
        "." => out.push_str("%252E"),
        ".." => out.push_str("%252E%252E"),
        _ => out.extend(utf8_percent_encode(value, VALUE)),
    }
}

#[derive(Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    Variable(Variable),
}

/// A list of pieces in which neighbouring texts are one.
#[derive(Clone, Default)]
struct Pieces(Vec<Piece>);

impl Pieces {
    fn push_text(&mut self, text: &str) {
        match self.0.last_mut() {
            Some(Piece::Text(last)) => last.push_str(text),
            _ => self.0.push(Piece::Text(text.to_string())),
        }
    }

    fn uses(&self, variable: Variable) -> bool {
        self.0.contains(&Piece::Variable(variable))
    }

    fn render(&self, change: &Change<'_>, push: fn(Variable, &mut String, &Change<'_>)) -> String {
        let mut out = String::with_capacity(256);
        for piece in &self.0 {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Variable(variable) => push(*variable, &mut out, change),
            }
        }
        out
    }
}

/// A URL in which `${…}` stands for a value; an unknown name stays as it is.
#[derive(Clone, Default)]
pub struct UrlTemplate(Pieces);

impl UrlTemplate {
    pub fn parse(url: &str) -> Self {
        let mut pieces = Pieces::default();
        for part in url_parts(url) {
            match Variable::parse(part) {
                Some(variable) => pieces.0.push(Piece::Variable(variable)),
                None => pieces.push_text(part),
            }
        }
        Self(pieces)
    }

    pub fn needs_doc(&self) -> bool {
        self.0.uses(Variable::Change)
    }

    pub fn needs_seq(&self) -> bool {
        self.0.uses(Variable::Seq)
    }

    /// With a value that is good everywhere in a URL, a port too: for checking the rest.
    pub fn sample(&self) -> String {
        self.0.render(&Change { db: "", row: &empty_row() }, |_, out, _| out.push('1'))
    }

    fn render(&self, change: &Change<'_>) -> String {
        self.0.render(change, Variable::push_encoded)
    }
}

fn empty_row() -> Row {
    Row { seq: Seq::zero(), id: String::new(), changes: Vec::new(), deleted: false, doc: None }
}

/// The original cut a URL before each `${` and after each `}`, and took a whole part for a variable with braces or without.
fn url_parts(url: &str) -> impl Iterator<Item = &str> {
    url.split_inclusive('}').flat_map(|part| {
        let mut rest = Some(part);
        std::iter::from_fn(move || {
            let text = rest.take()?;
            let cut = text.char_indices().skip(1).map(|(at, _)| at).find(|at| text[*at..].starts_with("${"));
            match cut {
                Some(at) => {
                    let (first, others) = text.split_at(at);
                    rest = Some(others);
                    Some(first)
                }
                None => Some(text),
            }
        })
    })
}

/// Params in which a whole string may be a variable; everything else passes as it is.
#[derive(Clone)]
pub struct ParamsTemplate(Pieces);

impl ParamsTemplate {
    pub fn parse(params: &Map<String, Value>) -> Self {
        let mut pieces = Pieces::default();
        pieces.push_text("{");
        for (at, (name, value)) in params.iter().enumerate() {
            let comma = if at > 0 { "," } else { "" };
            pieces.push_text(&format!("{comma}{}:", Value::from(name.as_str())));
            match value.as_str().and_then(Variable::parse) {
                Some(variable) => pieces.0.push(Piece::Variable(variable)),
                None => pieces.push_text(&value.to_string()),
            }
        }
        pieces.push_text("}");
        Self(pieces)
    }

    pub fn needs_doc(&self) -> bool {
        self.0.uses(Variable::Change)
    }

    pub fn needs_seq(&self) -> bool {
        self.0.uses(Variable::Seq)
    }

    fn render(&self, change: &Change<'_>) -> String {
        self.0.render(change, Variable::push_json)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn row(id: &str) -> Row {
        serde_json::from_value(json!({
            "seq": "123-xyz", "id": id, "changes": [{"rev": "1-a"}], "doc": {"_id": id, "_rev": "1-a", "thing": "jam"}
        }))
        .expect("a row")
    }

    fn params(params: &Value, row: &Row) -> String {
        ParamsTemplate::parse(params.as_object().expect("an object")).render(&Change { db: "test_db1", row })
    }

    fn url(template: &str, db: &str, row: &Row) -> String {
        UrlTemplate::parse(template).render(&Change { db, row })
    }

    #[test]
    fn params_take_variables_as_whole_strings() {
        let rendered = params(
            &json!({
                "foo": "{{bar}}", "badvar": "$unknownvar", "change": "${change}", "nottokenized": "${db_name}-${seq}",
                "changeid": "$change.id", "changerev": "$change.rev", "db_name": "$db_name", "seq": "$seq", "braced": "${change.id}"
            }),
            &row("1"),
        );
        let expected = json!({
            "foo": "{{bar}}", "badvar": "$unknownvar", "change": {"_id": "1", "_rev": "1-a", "thing": "jam"},
            "nottokenized": "${db_name}-${seq}", "changeid": "1", "changerev": "1-a", "db_name": "test_db1", "seq": "123-xyz",
            "braced": "1"
        });
        assert_eq!(serde_json::from_str::<Value>(&rendered).unwrap(), expected);
        assert!(rendered.starts_with(r#"{"foo":"{{bar}}","badvar":"#), "the user's order: {rendered}");
    }

    #[test]
    fn bug_9_params_that_are_no_strings_pass_through() {
        let given = json!({"n": 1, "b": true, "nul": null, "list": ["$seq", 2], "map": {"x": "$change"}});
        assert_eq!(serde_json::from_str::<Value>(&params(&given, &row("1"))).unwrap(), given);
        assert_eq!(params(&json!({}), &row("1")), "{}");
    }

    #[test]
    fn a_documents_text_is_embedded_untouched() {
        let text = r#"{"seq":7,"id":"x","changes":[{"rev":"2-b"}],"doc":{"_id":"x", "big":1234567890123456789012.50, "a":1,"_rev":"2-b"}}"#;
        let row: Row = serde_json::from_str(text).unwrap();
        assert_eq!(
            params(&json!({"c": "$change", "s": "$seq"}), &row),
            r#"{"c":{"_id":"x", "big":1234567890123456789012.50, "a":1,"_rev":"2-b"},"s":7}"#
        );
    }

    #[test]
    fn a_deleted_row_without_document_still_says_what_was_deleted() {
        let row: Row =
            serde_json::from_value(json!({"seq": 1, "id": "x\"y", "changes": [{"rev": "2-b"}], "deleted": true, "doc": null}))
                .unwrap();
        assert_eq!(params(&json!({"c": "$change"}), &row), r#"{"c":{"_id":"x\"y","_rev":"2-b","_deleted":true}}"#);
    }

    #[test]
    fn urls_take_variables_anywhere() {
        for (template, expected) in [
            (
                "https://user@example.com/mon_${db_name}/${seq}/${change.id}-${change.rev}",
                "https://user@example.com/mon_test_db1/123-xyz/1-1-a",
            ),
            ("https://h/${unknown}/x", "https://h/${unknown}/x"),
            ("https://h/$seq", "https://h/$seq"),
            ("https://h/${db_name}$seq", "https://h/test_db1123-xyz"),
            ("https://h/{a}${seq}", "https://h/{a}123-xyz"),
            ("https://h/${a${seq}", "https://h/${a123-xyz"),
            ("${db_name}", "test_db1"),
            ("https://h/é/${", "https://h/é/${"),
            (
                "https://h/?d=${change}",
                "https://h/?d=%7B%22_id%22%3A%221%22%2C%22_rev%22%3A%221-a%22%2C%22thing%22%3A%22jam%22%7D",
            ),
        ] {
            assert_eq!(url(template, "test_db1", &row("1")), expected);
        }
    }

    #[test]
    fn a_value_cannot_break_the_url() {
        for (id, expected) in [
            ("a/b", "a%2Fb"),
            ("a?b#c", "a%3Fb%23c"),
            ("a b%", "a%20b%25"),
            ("..", "%252E%252E"),
            (".", "%252E"),
            ("../..", "..%2F.."),
            ("ö@\\", "%C3%B6%40%5C"),
        ] {
            assert_eq!(url("https://h/x/${change.id}/y", "db", &row(id)), format!("https://h/x/{expected}/y"));
        }
    }

    #[test]
    fn only_the_whole_document_needs_it() {
        for (template, needs) in
            [("$change", true), ("${change}", true), ("$change.id", false), ("$seq", false), ("$db_name", false)]
        {
            let given = json!({"p": template});
            assert_eq!(ParamsTemplate::parse(given.as_object().unwrap()).needs_doc(), needs, "{template}");
        }
        assert!(UrlTemplate::parse("http://h/${change}").needs_doc());
        assert!(!UrlTemplate::parse("http://h/${change.id}").needs_doc());
    }

    proptest! {
        #[test]
        fn whatever_the_id_the_path_keeps_its_segments(id in "\\PC{1,20}") {
            let parsed = url::Url::parse(&url("https://h/x/${change.id}/y?q=${change.id}", "db", &row(&id))).unwrap();
            let segments: Vec<&str> = parsed.path_segments().unwrap().collect();
            prop_assert_eq!(segments.len(), 3);
            if id != "." && id != ".." {
                let decoded = percent_encoding::percent_decode_str(segments[1]).decode_utf8_lossy();
                prop_assert_eq!(decoded, id.as_str());
            }
            prop_assert!(parsed.fragment().is_none());
        }

        #[test]
        fn params_are_json_whatever_the_names(name in "\\PC{0,10}", value in "\\PC{0,10}", id in "(?s).{0,10}") {
            let rendered = params(&json!({name.clone(): value.clone(), "\u{1}id": "$change.id"}), &row(&id));
            let parsed: Value = serde_json::from_str(&rendered).unwrap();
            prop_assert_eq!(&parsed["\u{1}id"], &json!(id));
        }
    }
}
