//! `$change` and its like, in params and in the URL.
//!
//! A template is compiled when its rule is read; rendering copies texts. `$change` embeds the document's text as CouchDB sent
//! it, and `$change.doc.<path>` a piece of it, without parsing either.
//!
//! The original inserted values into the URL as they were. Here they are percent-encoded as one path segment or query value, so
//! that an id with `/`, `?`, `#`, `%` or a space stays one value and cannot turn the URL into another. A value of `.` or `..`,
//! which every URL parser would resolve as a step in the path, encoded or not, is encoded twice. A document's attributes may
//! not stand where they choose the host, or where an empty one would take a segment out of the path.

use super::document::{Document, push_json_string};
use super::rule::Rule;
use crate::couch::{Row, Seq};
use crate::vault::redact_text;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::Method;
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::fmt;
use url::{Position, Url};

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

pub fn render(rule: &Rule, db: &str, doc: &Document<'_>) -> Rendered {
    let change = Change { db, doc };
    Rendered { method: rule.method.clone(), url: rule.url_template.render(&change), params: rule.params_template.render(&change) }
}

struct Change<'c, 'r> {
    db: &'c str,
    doc: &'c Document<'r>,
}

impl Change<'_, '_> {
    fn row(&self) -> &Row {
        self.doc.row()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Variable {
    Change,
    ChangeId,
    ChangeRev,
    Deleted,
    Seq,
    DbName,
    Attribute(Box<Attribute>),
}

/// `change.doc.<name>`, with what stands for a missing or null one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Attribute {
    name: String,
    default_json: String,
    default_text: String,
}

impl Variable {
    /// `$seq` and `${seq}` are the same; anything else is no variable.
    fn parse(text: &str) -> Option<Self> {
        let name = text.strip_prefix('$')?;
        match name.strip_prefix('{').and_then(|name| name.strip_suffix('}')).unwrap_or(name) {
            "change" => Some(Variable::Change),
            "change.id" => Some(Variable::ChangeId),
            "change.rev" => Some(Variable::ChangeRev),
            "change.deleted" => Some(Variable::Deleted),
            "seq" | "change.seq" => Some(Variable::Seq),
            "db_name" => Some(Variable::DbName),
            name => Attribute::parse(name).map(|attribute| Variable::Attribute(Box::new(attribute))),
        }
    }

    /// In a URL the original's names need no braces in some places. Ours always do: what was a text stays one.
    fn parse_in_url(part: &str) -> Option<Self> {
        let is_ours = ["$change.doc.", "$change.deleted", "$change.seq"].iter().any(|name| part.starts_with(name));
        if is_ours { None } else { Self::parse(part) }
    }

    fn push_json(&self, out: &mut String, change: &Change<'_, '_>) {
        match self {
            Variable::Change => change.doc.push_text(out),
            Variable::ChangeId => push_json_string(out, &change.row().id),
            Variable::ChangeRev => push_json_string(out, change.row().rev()),
            Variable::Deleted => out.push_str(bool_text(change.row().deleted)),
            Variable::Seq => match &change.row().seq {
                Seq::Number(number) => out.push_str(&number.to_string()),
                Seq::Text(text) => push_json_string(out, text),
            },
            Variable::DbName => push_json_string(out, change.db),
            Variable::Attribute(attribute) => out.push_str(attribute.of(change.doc).unwrap_or(&attribute.default_json)),
        }
    }

    fn push_encoded(&self, out: &mut String, change: &Change<'_, '_>) {
        match self {
            Variable::Change => {
                let mut text = String::new();
                change.doc.push_text(&mut text);
                push_value(out, &text);
            }
            Variable::ChangeId => push_value(out, &change.row().id),
            Variable::ChangeRev => push_value(out, change.row().rev()),
            Variable::Deleted => out.push_str(bool_text(change.row().deleted)),
            Variable::Seq => push_value(out, &change.row().seq.as_query()),
            Variable::DbName => push_value(out, change.db),
            Variable::Attribute(attribute) => match attribute.of(change.doc) {
                Some(json) => push_value(out, &plain(json)),
                None => push_value(out, &attribute.default_text),
            },
        }
    }
}

impl Attribute {
    fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix("change.doc.")?;
        let (name, default) = rest.split_once(":-").map_or((rest, None), |(name, default)| (name, Some(default)));
        if name.is_empty() {
            return None;
        }
        let default_json = match default {
            None => String::from("null"),
            Some(default) => match serde_json::from_str::<Value>(default) {
                Ok(_) => default.trim().to_string(),
                Err(_) => Value::from(default).to_string(),
            },
        };
        let default_text = if default_json == "null" { String::new() } else { plain(&default_json).into_owned() };
        Some(Self { name: name.to_string(), default_json, default_text })
    }

    fn of<'d>(&self, doc: &'d Document<'_>) -> Option<&'d str> {
        doc.text(&self.name).filter(|text| *text != "null")
    }
}

/// A JSON text's content as it stands in a sentence: a string without its quotes, anything else as it is.
fn plain(json: &str) -> Cow<'_, str> {
    match json.starts_with('"') {
        true => serde_json::from_str::<String>(json).map_or(Cow::Borrowed(json), Cow::Owned),
        false => Cow::Borrowed(json),
    }
}

fn bool_text(value: bool) -> &'static str {
    if value { "true" } else { "false" }
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

    fn any(&self, fits: fn(&Variable) -> bool) -> bool {
        self.0.iter().any(|piece| matches!(piece, Piece::Variable(variable) if fits(variable)))
    }

    fn needs_doc(&self) -> bool {
        self.any(|variable| matches!(variable, Variable::Change | Variable::Attribute(_)))
    }

    fn needs_seq(&self) -> bool {
        self.any(|variable| *variable == Variable::Seq)
    }

    fn render(&self, mut push: impl FnMut(&Variable, &mut String)) -> String {
        let mut out = String::with_capacity(256);
        for piece in &self.0 {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Variable(variable) => push(variable, &mut out),
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
            match Variable::parse_in_url(part) {
                Some(variable) => pieces.0.push(Piece::Variable(variable)),
                None => pieces.push_text(part),
            }
        }
        Self(pieces)
    }

    pub fn needs_doc(&self) -> bool {
        self.0.needs_doc()
    }

    pub fn needs_seq(&self) -> bool {
        self.0.needs_seq()
    }

    /// True where two changes of one database may have different URLs.
    pub fn is_of_one_change(&self) -> bool {
        self.0.any(|variable| *variable != Variable::DbName)
    }

    /// With a value that is good everywhere in a URL, a port too: for checking the rest.
    pub fn sample(&self) -> String {
        self.sample_with("1")
    }

    fn sample_with(&self, attribute: &str) -> String {
        self.0.render(|variable, out| {
            out.push_str(if matches!(variable, Variable::Attribute(_)) { attribute } else { "1" });
        })
    }

    /// `host:port`, where it is the same for every change.
    pub fn lane(&self) -> Option<String> {
        let of = |value: &str| {
            let url = Url::parse(&self.0.render(|_, out| out.push_str(value))).ok()?;
            crate::rules::rule::lane(&url)
        };
        of("1").filter(|lane| of("2").as_ref() == Some(lane))
    }

    pub fn has_user(&self) -> bool {
        Url::parse(&self.sample()).is_ok_and(|url| !url.username().is_empty() || url.password().is_some())
    }

    /// What is wrong with where a document's attributes stand.
    pub fn objection(&self) -> Option<&'static str> {
        let parsed = |attribute| Url::parse(&self.sample_with(attribute)).ok();
        // A sample that is no URL was complained about before.
        let sample = parsed("1")?;
        let origin = |url: &Url| url[..Position::BeforePath].to_string();
        let segments = |url: &Url| url.path().split('/').count();
        let (Some(other), Some(empty)) = (parsed("2"), parsed("")) else { return Some(HOST_OF_DOCUMENT) };
        if [&other, &empty].into_iter().any(|url| origin(url) != origin(&sample)) {
            return Some(HOST_OF_DOCUMENT);
        }
        (segments(&empty) != segments(&sample)).then_some("would become another path where an attribute of the document is empty")
    }

    fn render(&self, change: &Change<'_, '_>) -> String {
        self.0.render(|variable, out| variable.push_encoded(out, change))
    }
}

const HOST_OF_DOCUMENT: &str = "must not take its host or user from a document";

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
        self.0.needs_doc()
    }

    pub fn needs_seq(&self) -> bool {
        self.0.needs_seq()
    }

    fn render(&self, change: &Change<'_, '_>) -> String {
        self.0.render(|variable, out| variable.push_json(out, change))
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
        ParamsTemplate::parse(params.as_object().expect("an object")).render(&Change { db: "test_db1", doc: &Document::of(row) })
    }

    fn url(template: &str, db: &str, row: &Row) -> String {
        UrlTemplate::parse(template).render(&Change { db, doc: &Document::of(row) })
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
        for (template, doc, seq) in [
            ("$change.doc.a", true, false),
            ("$change.doc.a:-1", true, false),
            ("$change.deleted", false, false),
            ("$change.seq", false, true),
        ] {
            let given = ParamsTemplate::parse(json!({"p": template}).as_object().unwrap());
            assert_eq!((given.needs_doc(), given.needs_seq()), (doc, seq), "{template}");
            let braced = UrlTemplate::parse(&format!("http://h/{}", template.replace('$', "${") + "}"));
            assert_eq!((braced.needs_doc(), braced.needs_seq()), (doc, seq), "{template}");
        }
        assert!(UrlTemplate::parse("http://h/${change}").needs_doc());
        assert!(!UrlTemplate::parse("http://h/${change.id}").needs_doc());
    }

    fn row_with(doc: &Value) -> Row {
        let row = json!({"seq": "9-z", "id": "x", "changes": [{"rev": "1-a"}], "doc": doc});
        // From text, as it comes from CouchDB.
        serde_json::from_str(&row.to_string()).expect("a row")
    }

    #[test]
    fn attributes_of_the_document_keep_their_types() {
        let row = row_with(&json!({
            "_id": "x", "title": "A \"b\"", "n": 5, "yes": true, "nul": null, "list": [1, {"deep": "z"}], "a.b": "dotted", "a": {"b": "c"}
        }));
        for (template, expected) in [
            ("$change.doc.title", json!("A \"b\"")),
            ("${change.doc.title}", json!("A \"b\"")),
            ("$change.doc.n", json!(5)),
            ("$change.doc.yes", json!(true)),
            ("$change.doc.nul", json!(null)),
            ("$change.doc.missing", json!(null)),
            ("$change.doc.list", json!([1, {"deep": "z"}])),
            ("$change.doc.list.1.deep", json!("z")),
            ("$change.doc.list.7", json!(null)),
            ("$change.doc.a.b", json!("dotted")),
            ("$change.doc.n:-6", json!(5)),
            ("$change.doc.missing:-untitled", json!("untitled")),
            ("$change.doc.nul:-untitled", json!("untitled")),
            ("${change.doc.missing:-untitled}", json!("untitled")),
            ("$change.doc.missing:-", json!("")),
            ("$change.doc.missing:-7", json!(7)),
            ("$change.doc.missing:- 7 ", json!(7)),
            ("$change.doc.missing:-\"7\"", json!("7")),
            ("$change.doc.missing:-{\"a\":[1]}", json!({"a": [1]})),
            ("${change.doc.missing:-{\"a\":[1]}}", json!({"a": [1]})),
            ("$change.doc.missing:-{a", json!("{a")),
            ("$change.doc.missing:-a:-b", json!("a:-b")),
            ("$change.deleted", json!(false)),
            ("$change.seq", json!("9-z")),
            // Not ours: they stay as they are.
            ("$change.doc", json!("$change.doc")),
            ("$change.doc.", json!("$change.doc.")),
            ("$change.doc.:-x", json!("$change.doc.:-x")),
            ("$change.id:-x", json!("$change.id:-x")),
            (" $change.doc.title", json!(" $change.doc.title")),
            ("$change.document", json!("$change.document")),
        ] {
            let rendered = params(&json!({"p": template, "after": 1}), &row);
            assert_eq!(serde_json::from_str::<Value>(&rendered).unwrap(), json!({"p": expected, "after": 1}), "{template}");
        }
    }

    #[test]
    fn a_number_keeps_its_digits_and_a_piece_its_spelling() {
        let text =
            r#"{"seq":1,"id":"x","changes":[],"deleted":true,"doc":{"n":12345678901234567890.10, "o" : { "b": 1, "a":2}}}"#;
        let row: Row = serde_json::from_str(text).unwrap();
        let given = json!({"n": "$change.doc.n", "o": "$change.doc.o", "d": "$change.deleted"});
        assert_eq!(params(&given, &row), r#"{"n":12345678901234567890.10,"o":{ "b": 1, "a":2},"d":true}"#);
        assert_eq!(
            url("http://h/?n=${change.doc.n}&d=${change.deleted}", "db", &row),
            "http://h/?n=12345678901234567890.10&d=true"
        );
    }

    #[test]
    fn attributes_of_the_document_are_text_in_a_url() {
        let row = row_with(&json!({"s": "a/b ?", "n": 1.5, "nul": null, "list": [1, "x"], "dots": "..", "lone": "x"}));
        for (template, expected) in [
            ("http://h/${change.doc.s}/y", "http://h/a%2Fb%20%3F/y"),
            ("http://h/${change.doc.n}", "http://h/1.5"),
            ("http://h/?q=${change.doc.list}", "http://h/?q=%5B1%2C%22x%22%5D"),
            ("http://h/${change.doc.dots}/y", "http://h/%252E%252E/y"),
            ("http://h/?q=${change.doc.nul}&r=${change.doc.missing}", "http://h/?q=&r="),
            ("http://h/${change.doc.missing:-un titled}", "http://h/un%20titled"),
            ("http://h/${change.doc.missing:-\"7\"}", "http://h/7"),
            ("http://h/${change.doc.missing:-null}x", "http://h/x"),
            ("http://h/${change.doc.s:-{\"a\":1}}", "http://h/a%2Fb%20%3F}"),
            ("http://h/${change.seq}/${change.deleted}", "http://h/9-z/false"),
            // Without braces they are none, wherever they stand.
            ("http://h/${db_name}$change.doc.s", "http://h/db$change.doc.s"),
            ("http://h/${db_name}$change.deleted", "http://h/db$change.deleted"),
            ("http://h/${db_name}$change.seq", "http://h/db$change.seq"),
            ("http://h/${change.doc}/${change.doc.}", "http://h/${change.doc}/${change.doc.}"),
        ] {
            assert_eq!(url(template, "db", &row), expected);
        }
        let surrogate: Row = serde_json::from_str(r#"{"seq":1,"id":"x","changes":[],"doc":{"s":"\ud800/"}}"#).unwrap();
        assert_eq!(url("http://h/${change.doc.s}", "db", &surrogate), "http://h/%22%5Cud800%2F%22");
    }

    #[test]
    fn a_lane_is_known_where_no_variable_is_in_it() {
        for (template, expected) in [
            ("http://api.example.com/${change.id}", Some("api.example.com:80")),
            ("https://user@API.example.com:8443/?a=${db_name}", Some("api.example.com:8443")),
            ("http://${db_name}.example.com/", None),
            ("http://h:80${db_name}/", None),
        ] {
            assert_eq!(UrlTemplate::parse(template).lane().as_deref(), expected, "{template}");
        }
    }

    #[test]
    fn a_document_may_not_choose_the_host_nor_shorten_the_path() {
        let (host, path) = ("must not take its host or user from a document", "would become another path");
        for (template, expected) in [
            ("http://h/${change.doc.a}", None),
            ("http://h/${change.doc.a}/${change.doc.b}?x=${change.doc.c}#${change.doc.d}", None),
            ("http://${db_name}.h/${change.id}/${change.doc.a}", None),
            ("http://h/x/.${change.doc.a}", None),
            ("http://h/x/..${change.doc.a}y", None),
            ("http://${change.doc.a}/", Some(host)),
            ("http://${change.doc.a:-h}.example.com/", Some(host)),
            ("http://h:${change.doc.a}/", Some(host)),
            ("http://h${change.doc.a}", Some(host)),
            ("http://${change.doc.a}@h/", Some(host)),
            ("http://u:${change.doc.a}@h/", Some(host)),
            ("http:/${change.doc.a}/x", Some(host)),
            ("http://h/.${change.doc.a}/x", Some(path)),
            ("http://h/x/.${change.doc.a}./y", Some(path)),
            ("http://h/x/..${change.doc.a}${change.doc.b}/y", Some(path)),
            ("http://h/x/%2e${change.doc.a}%2E", Some(path)),
        ] {
            let objection = UrlTemplate::parse(template).objection();
            let fits = |wanted: &str| objection.is_some_and(|objection| objection.contains(wanted));
            assert!(expected.map_or(objection.is_none(), fits), "{template}: {objection:?}");
        }
    }

    #[test]
    fn a_url_of_one_change_is_known() {
        for (template, expected) in [
            ("http://h/x", false),
            ("http://h/${db_name}", false),
            ("http://h/${change.id}", true),
            ("http://h/${seq}", true),
            ("http://h/${change.doc.a}", true),
            ("http://h/${unknown}", false),
        ] {
            assert_eq!(UrlTemplate::parse(template).is_of_one_change(), expected, "{template}");
        }
    }

    /// What a URL is made of, its values aside.
    fn shape(url: &str) -> (String, usize, Vec<String>, bool) {
        let url = url::Url::parse(url).expect("a URL");
        let names = url.query_pairs().map(|(name, _)| name.into_owned()).collect();
        (url[..Position::BeforePath].to_string(), url.path().split('/').count(), names, url.fragment().is_some())
    }

    fn any_value() -> impl Strategy<Value = Value> {
        prop_oneof![
            "(?s).{0,12}".prop_map(Value::from),
            "[./?#%@:&=\\\\ \r\n2e{}$\"]{0,8}".prop_map(Value::from),
            Just(Value::Null),
            any::<i64>().prop_map(Value::from),
            prop::collection::vec("[./?#\"]{0,3}", 0..3).prop_map(Value::from),
            prop::collection::btree_map("[a./?#\"]{0,3}", any::<bool>(), 0..3).prop_map(|map| json!(map)),
        ]
    }

    proptest! {
        #[test]
        fn no_attribute_turns_the_url_into_another(a in any_value(), b in any_value()) {
            let template = "https://u@h:81/x/${change.doc.a}/y/${change.doc.b.1}-${change.doc.b}?q=${change.doc.a}&r=${change.doc.b}#${change.doc.a}";
            prop_assert!(UrlTemplate::parse(template).objection().is_none());
            let of = |a: &Value, b: &Value| url(template, "db", &row_with(&json!({"a": a, "b": b})));
            prop_assert_eq!(shape(&of(&a, &b)), shape(&of(&json!("1"), &json!("2"))));
        }

        #[test]
        fn no_attribute_breaks_the_json(a in any_value(), name in "\\PC{0,6}") {
            let rendered = params(&json!({name.clone(): "$change.doc.a", "\u{1}after": "$change.doc.a.a"}), &row_with(&json!({"a": a})));
            let parsed: Value = serde_json::from_str(&rendered).unwrap();
            prop_assert_eq!(parsed.as_object().map(Map::len), Some(2));
            prop_assert_eq!(&parsed[name.as_str()], &a);
        }

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
