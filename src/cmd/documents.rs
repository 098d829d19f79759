//! The documents of the spiegel database, as `check` and `status` see them: read once from end to end, kept in few words.

use crate::couch::{Couch, CouchError, encode_segment};
use crate::locks::look::{By, lock_of, time_of};
use crate::rules::fields::{additions, near_misses};
use crate::rules::handling::Handling;
use crate::rules::invalid::{Invalid as Fault, summary};
use crate::rules::pattern::Pattern;
use crate::rules::rule::Rule;
use crate::topology::replicator::{Endpoint, Replicator};
use reqwest::Method;
use serde::Deserialize;
use serde_json::Value;
use std::time::{Duration, SystemTime};
use url::Url;

/// A page of documents; with their bodies it stays far below a megabyte.
const PAGE: usize = 500;
/// Names of databases are short.
const NAMES_PAGE: usize = 2000;
/// Who wrote before that may be gone.
const RECENT: Duration = Duration::from_secs(24 * 3600);

/// What the spiegel database holds.
#[derive(Default)]
pub(super) struct Census {
    pub rules: Vec<RuleFacts>,
    pub replicators: Vec<ReplicatorFacts>,
    pub change_listeners: usize,
    pub dirty_replicators: usize,
    pub dirty_change_listeners: usize,
    pub invalid: Vec<Invalid>,
    /// Of rules, what means nothing and was perhaps meant, by id.
    pub near_misses: Vec<(String, String)>,
    /// Of rules, fields that the original passes over, by id.
    pub additions: Vec<(String, Vec<&'static str>)>,
    /// Documents in which the original left its marks within the last day.
    pub of_the_original: usize,
    /// The feed's position; none before the first start.
    pub watermark: Option<Value>,
}

pub(super) struct RuleFacts {
    pub id: String,
    pub pattern: Pattern,
    pub url: String,
    pub handling: Handling,
}

pub(super) struct ReplicatorFacts {
    pub id: String,
    /// The database at the end of the source's address.
    pub source_db: String,
    /// Source and target, where they are URLs and not bare names.
    pub urls: Vec<Url>,
    /// What is strange about it and does not stop it; empty where nothing is.
    pub odd: String,
}

pub(super) struct Invalid {
    pub id: String,
    pub why: String,
}

impl Census {
    pub async fn of(couch: &Couch, db: &str) -> Result<Self, CouchError> {
        let mut census = Self::default();
        each_page_of_documents(couch, db, |docs| docs.iter().for_each(|doc| census.add(doc))).await?;
        Ok(census)
    }

    fn add(&mut self, doc: &Value) {
        let id = doc["_id"].as_str().unwrap_or_default();
        self.of_the_original += usize::from(is_of_the_original(doc, SystemTime::now()));
        match doc["type"].as_str() {
            Some("on_change") => {
                match additions(doc) {
                    ours if ours.is_empty() => {}
                    ours => self.additions.push((id.to_string(), ours)),
                }
                self.near_misses.extend(near_misses(doc).into_iter().map(|line| (id.to_string(), line)));
                match rule_facts(doc) {
                    Ok(rule) => self.rules.push(rule),
                    Err(faults) => self.invalid.push(Invalid { id: id.to_string(), why: summary(&faults) }),
                }
            }
            Some("replicator") => {
                self.dirty_replicators += usize::from(is_dirty(doc));
                match replicator_facts(doc) {
                    Ok(replicator) => self.replicators.push(replicator),
                    Err(faults) => self.invalid.push(Invalid { id: id.to_string(), why: summary(&faults) }),
                }
            }
            Some("change_listener") => {
                self.change_listeners += 1;
                self.dirty_change_listeners += usize::from(is_dirty(doc));
            }
            _ if id == "global_lastSeq" => self.watermark = doc.get("value").filter(|value| !value.is_null()).cloned(),
            _ => {}
        }
    }
}

/// Due now or later. A document that does not say is new, and due.
fn is_dirty(doc: &Value) -> bool {
    doc["dirty"] != Value::Bool(false) || !doc["dirty_at"].is_null()
}

/// A lock that does not say whose it is, or a position without what a process of ours writes beside it: none of ours wrote that.
fn is_of_the_original(doc: &Value, now: SystemTime) -> bool {
    let is_recent = |at: Option<SystemTime>| at.is_some_and(|at| now.duration_since(at).unwrap_or_default() < RECENT);
    let locked = lock_of(doc, "").filter(|lock| lock.by == By::Original);
    match doc["type"].as_str() {
        Some("change_listener" | "replicator") if locked.is_some_and(|lock| is_recent(lock.at)) => true,
        Some("change_listener") => {
            let has_position = !doc["last_seq"].is_null() && doc["instance_start_time"].is_null();
            has_position && is_recent(time_of(&doc["updated_at"]))
        }
        _ => false,
    }
}

fn rule_facts(doc: &Value) -> Result<RuleFacts, Vec<Fault>> {
    let rule = Rule::parse(doc)?;
    Ok(RuleFacts { id: rule.id.to_string(), pattern: rule.pattern, url: rule.url, handling: rule.handling })
}

fn replicator_facts(doc: &Value) -> Result<ReplicatorFacts, Vec<Fault>> {
    let replicator = Replicator::parse(doc)?;
    let source_db = replicator.source.db_name().to_string();
    let urls = [&replicator.source, &replicator.target].into_iter().filter_map(Endpoint::url).collect();
    Ok(ReplicatorFacts { id: replicator.id.to_string(), source_db, urls, odd: summary(&replicator.warnings) })
}

/// Hands each page of a database's documents to `look`.
pub(super) async fn each_page_of_documents(couch: &Couch, db: &str, mut look: impl FnMut(&[Value])) -> Result<(), CouchError> {
    let mut after: Option<String> = None;
    loop {
        let (docs, last_id) = page(couch, db, after.as_deref()).await?;
        look(&docs);
        match last_id {
            Some(id) => after = Some(id),
            None => return Ok(()),
        }
    }
}

/// Documents behind `after`, and the last id where more may follow.
pub(super) async fn page(couch: &Couch, db: &str, after: Option<&str>) -> Result<(Vec<Value>, Option<String>), CouchError> {
    #[derive(Deserialize)]
    struct Row {
        id: String,
        #[serde(default)]
        doc: Value,
    }
    #[derive(Deserialize)]
    struct Rows {
        rows: Vec<Row>,
    }
    let mut request = couch
        .request(Method::GET, &format!("{}/_all_docs", encode_segment(db)))
        .query(&[("include_docs", "true"), ("limit", &PAGE.to_string())]);
    if let Some(after) = after {
        request = request.query(&[("startkey", Value::from(after).to_string())]);
    }
    let mut rows = couch.json::<Rows>("_all_docs", request).await?.rows;
    let last_id = rows.last().filter(|_| rows.len() == PAGE).map(|row| row.id.clone());
    // The page starts with the document that ended the one before, unless that was deleted meanwhile.
    rows.retain(|row| Some(row.id.as_str()) != after);
    Ok((rows.into_iter().map(|row| row.doc).collect(), last_id))
}

/// Hands each page of the server's database names to `look`.
pub(super) async fn each_page_of_names(couch: &Couch, mut look: impl FnMut(&[String])) -> Result<(), CouchError> {
    let mut from: Option<String> = None;
    loop {
        let names = couch.all_dbs(from.as_deref(), NAMES_PAGE).await?;
        // The page starts with the name that ended the one before.
        let new = match (&from, names.first()) {
            (Some(from), Some(first)) if first == from => &names[1..],
            _ => &names[..],
        };
        look(new);
        match names.last() {
            Some(last) if names.len() == NAMES_PAGE => from = Some(last.clone()),
            _ => return Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_original_is_known_by_its_marks() {
        let now = SystemTime::now();
        let time = |seconds| crate::job::timestamp(now - Duration::from_secs(seconds));
        let listener = |more: Value| {
            let mut doc = json!({ "_id": "spiegel_cl_a", "type": "change_listener", "db_name": "a" });
            doc.as_object_mut().expect("an object").extend(more.as_object().cloned().expect("fields"));
            doc
        };
        let cases = [
            (listener(json!({ "last_seq": "5-x", "updated_at": time(60) })), true),
            (listener(json!({ "last_seq": "5-x", "updated_at": time(90_000) })), false),
            (listener(json!({ "last_seq": "5-x", "updated_at": time(60), "instance_start_time": "17" })), false),
            // Made by an update-listener, whose ever it is.
            (listener(json!({ "dirty": true, "updated_at": time(60) })), false),
            (listener(json!({ "locked_at": time(60) })), true),
            (listener(json!({ "locked_at": time(90_000) })), false),
            (listener(json!({ "locked_at": time(60), "locked_by": { "owner": "x", "locked_at": time(60) } })), false),
            (listener(json!({ "locked_at": time(60), "locked_by": { "owner": "x", "locked_at": time(99) } })), true),
            (json!({ "type": "replicator", "locked_at": time(60) }), true),
            (json!({ "type": "replicator", "updated_at": time(60) }), false),
            (json!({ "type": "other", "locked_at": time(60) }), false),
            (Value::Null, false),
        ];
        for (doc, expected) in cases {
            assert_eq!(is_of_the_original(&doc, now), expected, "{doc}");
        }
    }

    #[test]
    fn each_document_is_counted_once() {
        let mut census = Census::default();
        for doc in [
            json!({ "_id": "r1", "type": "on_change", "db_name": "^a$", "url": "http://u@h/x", "metod": "PUT" }),
            json!({ "_id": "r2", "type": "on_change", "db_name": "(", "url": "http://h/x" }),
            json!({ "_id": "r3", "type": "on_change" }),
            json!({ "_id": "p1", "type": "replicator", "source": "http://h/a%2Fb", "target": { "url": "http://h/t" } }),
            json!({ "_id": "p2", "type": "replicator", "source": "http://h/b", "target": "http://h/t", "dirty": false }),
            json!({ "_id": "p3", "type": "replicator", "dirty": false, "source": 5 }),
            json!({ "_id": "spiegel_cl_a", "type": "change_listener", "dirty": false, "dirty_at": "2026-01-01" }),
            json!({ "_id": "spiegel_cl_b", "type": "change_listener", "dirty": false, "dirty_at": null }),
            json!({ "_id": "global_lastSeq", "type": "global", "value": "5-x" }),
            json!({ "_id": "_design/x", "views": {} }),
            json!(null),
        ] {
            census.add(&doc);
        }
        assert_eq!(census.rules.iter().map(|rule| rule.id.as_str()).collect::<Vec<_>>(), ["r1"]);
        assert_eq!(census.replicators.iter().map(|r| r.source_db.as_str()).collect::<Vec<_>>(), ["a/b", "b"]);
        assert_eq!(census.invalid.iter().map(|i| i.id.as_str()).collect::<Vec<_>>(), ["r2", "r3", "p3"]);
        assert_eq!((census.dirty_replicators, census.change_listeners, census.dirty_change_listeners), (1, 2, 1));
        assert_eq!(census.near_misses.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>(), ["r1"]);
        assert_eq!(census.watermark, Some(json!("5-x")));
    }
}
