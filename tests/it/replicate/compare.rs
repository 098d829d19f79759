//! Whether two databases hold the same: every leaf of every document, byte for byte.

use crate::support::Couch;
use crate::support::couch::{encode, encode_id};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Documents of one request: their attachments come with them.
const CHUNK: usize = 40;
/// How many documents are read one by one as well.
const SAMPLE: usize = 25;
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

/// Panics with what differs.
pub async fn assert_same(expected: Place<'_>, found: Place<'_>, when: &str) {
    let (sets, found_sets) = (leaf_sets(expected).await, leaf_sets(found).await);
    let ids: BTreeSet<&String> = sets.keys().chain(found_sets.keys()).collect();
    let mut differences = Vec::new();
    for id in &ids {
        let (expected, found) = (sets.get(*id), found_sets.get(*id));
        if expected != found {
            differences.push(format!("the leaves of {id:?}: {expected:?}, found {found:?}"));
        }
    }
    show(&differences, when);
    let ids: Vec<&String> = ids.into_iter().collect();
    for chunk in ids.chunks(CHUNK) {
        // With their bytes, and with their lengths and how they are kept.
        for options in ["attachments=true", "att_encoding_info=true"] {
            let expected = bulk(expected, chunk, options).await;
            let found = bulk(found, chunk, options).await;
            differences.extend(differing(&expected, &found));
            if differences.len() > DIFFERENCES_SHOWN {
                break;
            }
        }
    }
    for id in ids.iter().step_by(ids.len().div_ceil(SAMPLE).max(1)) {
        let (expected, found) = (open_revs(expected, id).await, open_revs(found, id).await);
        differences.extend(differing(&BTreeMap::from([(id.to_string(), expected)]), &BTreeMap::from([(id.to_string(), found)])));
    }
    show(&differences, when);
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
    error: Option<&'a RawValue>,
    #[serde(borrow)]
    missing: Option<&'a RawValue>,
}

impl Row<'_> {
    fn text(&self) -> String {
        let found = self.ok.or(self.error).or(self.missing);
        found.map_or_else(|| "neither ok nor error".into(), |raw| canonical(raw.get()))
    }
}

/// All leaves: `_bulk_get` without a revision is `open_revs=all` for many.
async fn bulk(place: Place<'_>, ids: &[&String], options: &str) -> Leaves {
    #[derive(Deserialize)]
    struct Answer<'a> {
        #[serde(borrow)]
        results: Vec<Result<'a>>,
    }
    #[derive(Deserialize)]
    struct Result<'a> {
        id: String,
        #[serde(borrow)]
        docs: Vec<Row<'a>>,
    }
    let asked: Vec<Value> = ids.iter().map(|id| json!({ "id": id })).collect();
    let path = format!("{}/_bulk_get?revs=true&{options}", encode(place.db));
    let (status, text) = place.couch.ask_text(Method::POST, &path, Some(json!({ "docs": asked }).to_string())).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let answer: Answer = serde_json::from_str(&text).expect("a _bulk_get answer");
    let mut leaves = Leaves::new();
    for result in answer.results {
        let mut texts: Vec<String> = result.docs.iter().map(Row::text).collect();
        texts.sort();
        leaves.insert(result.id, texts);
    }
    leaves
}

async fn open_revs(place: Place<'_>, id: &str) -> Vec<String> {
    let path = format!("{}/{}?open_revs=all&revs=true&attachments=true", encode(place.db), encode_id(id));
    let (status, text) = place.couch.ask_text(Method::GET, &path, None).await;
    assert_eq!(status, StatusCode::OK, "{id:?}: {text}");
    let rows: Vec<Row> = serde_json::from_str(&text).expect("rows");
    let mut texts: Vec<String> = rows.iter().map(Row::text).collect();
    texts.sort();
    texts
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

#[test]
fn order_and_spaces_do_not_count_and_numbers_do() {
    assert_eq!(canonical(r#" {"b": [1.0, {"d":1,"c":"x y"}], "a":1e2}"#), r#"{"a":1e2,"b":[1.0,{"c":"x y","d":1}]}"#);
}
