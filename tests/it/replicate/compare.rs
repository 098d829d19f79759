//! Whether two databases hold the same: every leaf of every document, byte for byte.

use crate::support::Couch;
use crate::support::couch::{encode, encode_id};
use futures_util::stream::{self, StreamExt};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Documents that are read at once, each with its attachments.
const AT_ONCE: usize = 8;
/// Documents that are held at once.
const CHUNK: usize = 200;
const DIFFERENCES_SHOWN: usize = 5;

/// A database of a server.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    pub couch: &'a Couch,
    pub db: &'a str,
}

/// Id ▶ its leaves, and whether it is deleted.
pub type LeafSets = BTreeMap<String, (BTreeSet<String>, bool)>;

pub async fn leaf_sets(place: Place<'_>) -> LeafSets {
    let page = place.couch.changes(place.db, "style=all_docs").await;
    let rows = page["results"].as_array().expect("rows");
    let set = |row: &Value| {
        let revs = row["changes"].as_array().expect("changes").iter();
        let revs = revs.map(|change| change["rev"].as_str().expect("a revision").to_string()).collect();
        (row["id"].as_str().expect("an id").to_string(), (revs, row["deleted"] == true))
    };
    let sets: LeafSets = rows.iter().map(set).collect();
    assert_eq!(sets.len(), rows.len(), "an id has one row");
    sets
}

/// Panics with what differs: every document is read from each of them by `open_revs=all`.
pub async fn assert_same(expected: Place<'_>, found: &[Place<'_>], when: &str) {
    assert_same_trees(expected, found, when, canonical).await;
}

/// As far as two servers of different kinds can hold the same: the same leaves with the same history, texts, numbers to a
/// double's precision and attachments; not how an attachment is kept and since when.
pub async fn assert_same_documents(expected: Place<'_>, found: Place<'_>, when: &str) {
    assert_same_trees(expected, &[found], when, portable).await;
}

async fn assert_same_trees(expected: Place<'_>, found: &[Place<'_>], when: &str, shown: fn(&str) -> String) {
    let sets = leaf_sets(expected).await;
    for place in found {
        same_leaf_sets(&sets, &leaf_sets(*place).await, &format!("{when}: {}", place.db));
    }
    let ids: Vec<&String> = sets.keys().collect();
    for chunk in ids.chunks(CHUNK) {
        let wanted = trees(expected, chunk, shown).await;
        for place in found {
            let differing = differing(&wanted, &trees(*place, chunk, shown).await);
            show(&differing, &format!("{when}: {}", place.db));
        }
    }
}

pub fn same_leaf_sets(expected: &LeafSets, found: &LeafSets, when: &str) {
    let ids: BTreeSet<&String> = expected.keys().chain(found.keys()).collect();
    let differing = ids.into_iter().filter(|id| expected.get(*id) != found.get(*id));
    let told = |id: &String| format!("the leaves of {id:?}: {:?}, found {:?}", expected.get(id), found.get(id));
    show(&differing.map(told).collect::<Vec<_>>(), when);
}

/// Panics unless every leaf of `source` is known in `target`, whatever else that has.
pub async fn assert_nothing_missing(source: Place<'_>, target: Place<'_>, when: &str) {
    let missing = missing(source, target).await;
    assert!(missing.is_empty(), "{when}: missing in the target: {missing:?}");
}

pub async fn missing(source: Place<'_>, target: Place<'_>) -> BTreeMap<String, Value> {
    let sets = leaf_sets(source).await;
    let asked: BTreeMap<&String, &BTreeSet<String>> = sets.iter().map(|(id, (revs, _))| (id, revs)).collect();
    let path = format!("{}/_revs_diff", encode(target.db));
    let (status, answer) = target.couch.ask(Method::POST, &path, Some(json!(asked))).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    serde_json::from_value(answer).expect("an object")
}

fn show(differences: &[String], when: &str) {
    let shown = &differences[..differences.len().min(DIFFERENCES_SHOWN)];
    assert!(differences.is_empty(), "{when}: {} differences, such as:\n{}", differences.len(), shown.join("\n"));
}

/// Id ▶ its leaves, in canonical text, sorted.
type Leaves = BTreeMap<String, Vec<String>>;

fn differing(expected: &Leaves, found: &Leaves) -> Vec<String> {
    let ids: BTreeSet<&String> = expected.keys().chain(found.keys()).collect();
    let mut differences = Vec::new();
    for id in ids {
        let none = Vec::new();
        let (expected, found) = (expected.get(id).unwrap_or(&none), found.get(id).unwrap_or(&none));
        if expected.len() != found.len() {
            differences.push(format!("{id:?} has {} leaves, found {}", expected.len(), found.len()));
        }
        for (expected, found) in expected.iter().zip(found).filter(|(expected, found)| expected != found) {
            let at = expected.bytes().zip(found.bytes()).take_while(|(a, b)| a == b).count();
            let around = |text: &str| {
                let bytes = &text.as_bytes()[at.saturating_sub(120).min(text.len())..(at + 200).min(text.len())];
                String::from_utf8_lossy(bytes).into_owned()
            };
            differences.push(format!("{id:?} at byte {at}:\n  {}\n  found\n  {}", around(expected), around(found)));
        }
    }
    differences
}

#[derive(Deserialize)]
struct Row<'a> {
    #[serde(borrow)]
    ok: Option<&'a RawValue>,
    #[serde(borrow)]
    missing: Option<&'a RawValue>,
}

async fn trees(place: Place<'_>, ids: &[&String], shown: fn(&str) -> String) -> Leaves {
    let reading: Vec<_> = ids.iter().map(|id| open_revs(place, id.to_string(), shown)).collect();
    stream::iter(reading).buffer_unordered(AT_ONCE).collect().await
}

/// CouchDB answers 500 where it closes a database's file under a reader of attachments, because many others are in use.
async fn read(place: Place<'_>, method: Method, path: &str, body: Option<String>) -> String {
    let mut last = (StatusCode::OK, String::new());
    for _ in 0..20 {
        last = place.couch.ask_text(method.clone(), path, body.clone()).await;
        if last.0 != StatusCode::INTERNAL_SERVER_ERROR {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(last.0, StatusCode::OK, "{method} {path}: {}", last.1);
    last.1
}

/// A document with all of its leaves: their bytes, their attachments' too, and how these are kept.
async fn open_revs(place: Place<'_>, id: String, shown: fn(&str) -> String) -> (String, Vec<String>) {
    let options = "open_revs=all&revs=true&attachments=true&att_encoding_info=true";
    let path = format!("{}/{}?{options}", encode(place.db), encode_id(&id));
    let text = read(place, Method::GET, &path, None).await;
    let rows: Vec<Row> = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}: {text}"));
    let text = |row: &Row| row.ok.or(row.missing).map_or_else(|| "neither ok nor missing".into(), |raw| shown(raw.get()));
    let mut texts: Vec<String> = rows.iter().map(text).collect();
    texts.sort();
    (id, texts)
}

/// Members in the order of their names and no spaces; numbers and texts as they were written.
fn canonical(text: &str) -> String {
    let text = text.trim();
    let nested = |raw: &&RawValue| canonical(raw.get());
    match text.as_bytes().first() {
        Some(b'{') => {
            let members: BTreeMap<String, &RawValue> = serde_json::from_str(text).expect("an object");
            let members = members.iter().map(|(name, value)| format!("{}:{}", json!(name), nested(value)));
            format!("{{{}}}", members.collect::<Vec<_>>().join(","))
        }
        Some(b'[') => {
            let items: Vec<&RawValue> = serde_json::from_str(text).expect("an array");
            format!("[{}]", items.iter().map(nested).collect::<Vec<_>>().join(","))
        }
        _ => text.to_string(),
    }
}

fn portable(text: &str) -> String {
    let mut doc: Value = serde_json::from_str(text).expect("JSON");
    let attachments = doc.get_mut("_attachments").and_then(Value::as_object_mut);
    for attachment in attachments.into_iter().flat_map(|all| all.values_mut()) {
        for kept in ["digest", "length", "revpos", "encoding", "encoded_length"] {
            attachment.as_object_mut().expect("an object").remove(kept);
        }
    }
    canonical(&with_doubles(doc).to_string())
}

fn with_doubles(value: Value) -> Value {
    match value {
        // Of the two zeros JavaScript writes one.
        Value::Number(number) => json!(number.as_f64().expect("a double") + 0.0),
        Value::Array(items) => items.into_iter().map(with_doubles).collect(),
        Value::Object(members) => members.into_iter().map(|(name, value)| (name, with_doubles(value))).collect(),
        other => other,
    }
}

#[test]
fn order_and_spaces_do_not_count_and_numbers_do() {
    assert_eq!(canonical(r#" {"b": [1.0, {"d":1,"c":"x y"}], "a":1e2}"#), r#"{"a":1e2,"b":[1.0,{"c":"x y","d":1}]}"#);
}
