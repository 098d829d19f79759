//! The document of one change, read no further than somebody asks.
//!
//! Most rules look at one attribute or at none. So the text that CouchDB sent is cut into its attributes once, where the first
//! one is asked for, and an attribute becomes a value only where a pattern or a selector tests it. Templates take texts as they
//! are: no number loses a digit on its way to a receiver.

use super::rule::js_string;
use crate::couch::Row;
use serde::de::{Deserialize, DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::cell::OnceCell;
use std::fmt;

pub struct Document<'r> {
    row: &'r Row,
    attributes: OnceCell<Vec<Attribute<'r>>>,
    whole: OnceCell<Value>,
}

struct Attribute<'r> {
    name: Cow<'r, str>,
    text: Cow<'r, str>,
    /// None where it is nested deeper than a reader's stack.
    value: OnceCell<Option<Value>>,
}

impl<'r> Document<'r> {
    pub fn of(row: &'r Row) -> Self {
        Self { row, attributes: OnceCell::new(), whole: OnceCell::new() }
    }

    pub fn row(&self) -> &'r Row {
        self.row
    }

    /// As CouchDB sent it. A row without one is told by its id and revision, as CouchDB tells a deletion.
    pub fn push_text(&self, out: &mut String) {
        match sent(self.row) {
            Some(text) => out.push_str(text),
            None => {
                out.push_str("{\"_id\":");
                push_json_string(out, &self.row.id);
                out.push_str(",\"_rev\":");
                push_json_string(out, self.row.rev());
                out.push_str(if self.row.deleted { ",\"_deleted\":true}" } else { "}" });
            }
        }
    }

    /// An attribute by name or dotted path, as JSON. One whose name has the dot in it wins over a path.
    pub fn text(&self, name: &str) -> Option<&str> {
        if let Some(attribute) = self.attribute(name) {
            return Some(&attribute.text);
        }
        let mut parts = name.split('.');
        let first = self.attribute(parts.next()?)?;
        parts.try_fold(first.text.as_ref(), member_text)
    }

    /// The same as a value.
    pub fn value(&self, name: &str) -> Option<&Value> {
        if let Some(attribute) = self.attribute(name) {
            return attribute.value();
        }
        let mut parts = name.split('.');
        let first = self.top(parts.next()?)?;
        parts.try_fold(first, member)
    }

    /// What a pattern of `if` is tested on; none where the attribute is null or missing. Of what a path leads through only its
    /// end becomes a value, unless it is one already.
    pub fn tested_text(&self, name: &str) -> Option<Cow<'_, str>> {
        let first =
            || name.split_once('.').filter(|_| self.attribute(name).is_none()).and_then(|(first, _)| self.attribute(first));
        match first().filter(|first| !matches!(first.value.get(), Some(Some(_)))) {
            None => tested(Cow::Borrowed(self.value(name)?)),
            Some(_) => tested(Cow::Owned(serde_json::from_str(self.text(name)?).ok()?)),
        }
    }

    /// Of its own attributes; a name that the text has twice comes twice.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.attributes.get_or_init(|| attributes(self.row)).iter().map(|attribute| attribute.name.as_ref())
    }

    /// An attribute by its own name, dots or not.
    pub fn top(&self, name: &str) -> Option<&Value> {
        self.attribute(name)?.value()
    }

    pub fn whole(&self) -> &Value {
        self.whole.get_or_init(|| {
            let mut text = String::new();
            self.push_text(&mut text);
            serde_json::from_str(&text).unwrap_or(Value::Null)
        })
    }

    fn attribute(&self, name: &str) -> Option<&Attribute<'r>> {
        // The last of a name wins, as in every reader of JSON; CouchDB stores no name twice.
        self.attributes.get_or_init(|| attributes(self.row)).iter().rev().find(|attribute| attribute.name == name)
    }
}

impl Attribute<'_> {
    fn value(&self) -> Option<&Value> {
        self.value.get_or_init(|| serde_json::from_str(&self.text).ok()).as_ref()
    }
}

fn tested(value: Cow<'_, Value>) -> Option<Cow<'_, str>> {
    match value {
        Cow::Borrowed(Value::Null) | Cow::Owned(Value::Null) => None,
        Cow::Borrowed(Value::String(text)) => Some(Cow::Borrowed(text)),
        Cow::Owned(Value::String(text)) => Some(Cow::Owned(text)),
        value => Some(Cow::Owned(js_string(&value))),
    }
}

/// What is within a value, by a name or an array's index.
pub fn member<'v>(value: &'v Value, name: &str) -> Option<&'v Value> {
    match value {
        Value::Object(members) => members.get(name),
        Value::Array(items) => items.get(name.parse::<usize>().ok()?),
        _ => None,
    }
}

fn member_text<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    match text.bytes().next()? {
        b'{' => serde_json::from_str::<Members>(text).ok()?.0.into_iter().rev().find(|(known, _)| known == name).map(|(_, t)| t),
        b'[' => serde_json::from_str::<Vec<&RawValue>>(text).ok()?.get(name.parse::<usize>().ok()?).map(|item| item.get()),
        _ => None,
    }
}

fn sent(row: &Row) -> Option<&str> {
    row.doc.as_ref().map(|doc| doc.get()).filter(|doc| doc.starts_with('{'))
}

fn attributes(row: &Row) -> Vec<Attribute<'_>> {
    match sent(row).map(serde_json::from_str::<Members>) {
        Some(Ok(Members(members))) => members.into_iter().map(|(name, text)| Attribute::new(name, Cow::Borrowed(text))).collect(),
        // The text was read as JSON with its row: it has members.
        Some(Err(_)) => Vec::new(),
        None => {
            let quoted = |text: &str| {
                let mut out = String::with_capacity(text.len() + 2);
                push_json_string(&mut out, text);
                Cow::Owned(out)
            };
            let mut told = vec![
                Attribute::new(Cow::Borrowed("_id"), quoted(&row.id)),
                Attribute::new(Cow::Borrowed("_rev"), quoted(row.rev())),
            ];
            if row.deleted {
                told.push(Attribute::new(Cow::Borrowed("_deleted"), Cow::Borrowed("true")));
            }
            told
        }
    }
}

impl<'r> Attribute<'r> {
    fn new(name: Cow<'r, str>, text: Cow<'r, str>) -> Self {
        Self { name, text, value: OnceCell::new() }
    }
}

pub fn push_json_string(out: &mut String, text: &str) {
    // Nothing to escape: almost every id, revision and seq.
    if text.bytes().all(|byte| byte >= b' ' && byte != b'"' && byte != b'\\') {
        out.push('"');
        out.push_str(text);
        out.push('"');
        return;
    }
    out.push_str(&Value::from(text).to_string());
}

/// An object's members, their values unread.
struct Members<'t>(Vec<(Cow<'t, str>, &'t str)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MembersVisitor)
    }
}

struct MembersVisitor;

impl<'de> Visitor<'de> for MembersVisitor {
    type Value = Members<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
        let mut members = Vec::with_capacity(16);
        while let Some(name) = map.next_key_seed(Name)? {
            members.push((name, map.next_value::<&'de RawValue>()?.get()));
        }
        Ok(Members(members))
    }
}

/// Borrowed where nothing in it was escaped, which serde's own `Cow` never is.
struct Name;

impl<'de> DeserializeSeed<'de> for Name {
    type Value = Cow<'de, str>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Cow<'de, str>, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for Name {
    type Value = Cow<'de, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_borrowed_str<E>(self, name: &'de str) -> Result<Cow<'de, str>, E> {
        Ok(Cow::Borrowed(name))
    }

    fn visit_str<E>(self, name: &str) -> Result<Cow<'de, str>, E> {
        Ok(Cow::Owned(name.to_string()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn row(doc: &str) -> Row {
        serde_json::from_str(&format!(r#"{{"seq":1,"id":"x","changes":[{{"rev":"1-a"}}],"doc":{doc}}}"#)).expect("a row")
    }

    #[test]
    fn attributes_are_found_by_name_and_by_path() {
        let text = r#"{"_id":"x", "a.b":"dotted","a":{"b":"deep","c":[10,{"d": 1.50}]},"n":123456789012345678901.50,
            "esc\"aped":1,"twice":1,"twice":2,"nul":null,"":"empty"}"#;
        let row = row(text);
        let doc = Document::of(&row);
        for (name, expected) in [
            ("_id", Some(r#""x""#)),
            ("a.b", Some(r#""dotted""#)),
            ("a.c.0", Some("10")),
            ("a.c.1.d", Some("1.50")),
            ("a.c", Some(r#"[10,{"d": 1.50}]"#)),
            ("a.c.2", None),
            ("a.c.x", None),
            ("a.c.-1", None),
            ("n", Some("123456789012345678901.50")),
            ("n.x", None),
            ("_id.0", None),
            ("esc\"aped", Some("1")),
            ("twice", Some("2")),
            ("nul", Some("null")),
            ("nul.x", None),
            ("missing", None),
            ("", Some(r#""empty""#)),
            (".", None),
        ] {
            assert_eq!(doc.text(name), expected, "{name}");
            assert_eq!(doc.value(name).cloned(), expected.map(|text| serde_json::from_str(text).unwrap()), "{name}");
        }
    }

    #[test]
    fn a_row_without_a_document_is_told_by_id_and_revision() {
        let mut gone = row("null");
        gone.id = String::from("x\"y");
        gone.deleted = true;
        let doc = Document::of(&gone);
        assert_eq!(doc.text("_id"), Some(r#""x\"y""#));
        assert_eq!(doc.value("_rev"), Some(&json!("1-a")));
        assert_eq!(doc.whole(), &json!({"_id": "x\"y", "_rev": "1-a", "_deleted": true}));
        gone.deleted = false;
        assert_eq!(Document::of(&gone).text("_deleted"), None);
    }

    #[test]
    fn an_attribute_nested_without_end_is_missing_and_its_neighbours_are_not() {
        let row = row(&format!(r#"{{"deep":{}{},"type":"post"}}"#, "[".repeat(5000), "]".repeat(5000)));
        let doc = Document::of(&row);
        assert_eq!(doc.value("type"), Some(&json!("post")));
        assert_eq!(doc.value("deep"), None);
        assert_eq!(doc.text("deep").map(str::len), Some(10_000));
        assert!(doc.whole().is_null());
    }

    fn a_value() -> impl Strategy<Value = String> {
        prop_oneof!["-?[1-9][0-9]{0,20}", Just(r#"{"a":[1,"x"],"b":null}"#.to_string()), Just(r#""t\u0000é""#.to_string())]
    }

    proptest! {
        #[test]
        fn texts_values_and_a_whole_reading_agree(
            members in prop::collection::vec(("[a-c.]{0,3}", a_value()), 0..6),
            name in "[a-c.01]{0,5}",
        ) {
            let body: Vec<String> = members.iter().map(|(name, text)| format!("{}:{text}", Value::from(name.as_str()))).collect();
            let row = row(&format!("{{{}}}", body.join(", ")));
            let doc = Document::of(&row);
            let whole: Value = serde_json::from_str(row.doc.as_ref().unwrap().get()).unwrap();
            let expected = whole.get(name.as_str()).or_else(|| name.split('.').try_fold(&whole, member));
            prop_assert_eq!(doc.value(&name), expected);
            let read = doc.text(&name).map(|text| serde_json::from_str::<Value>(text).unwrap());
            prop_assert_eq!(read.as_ref(), expected);
            prop_assert_eq!(doc.whole(), &whole);
            let tested = expected.and_then(|value| tested(Cow::Borrowed(value)));
            prop_assert_eq!(doc.tested_text(&name), tested.clone());
            let unread = Document::of(&row);
            prop_assert_eq!(unread.tested_text(&name), tested);
        }
    }
}
