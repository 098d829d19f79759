//! The checkpoint of one replication: a `_local` document on both sides, as the replication protocol defines it.
//!
//! A position is believed only where both sides tell of the same checkpoint, because each may be restored, or made again,
//! without the other. Nothing here fails on what a document holds: what cannot be read is skipped, and a document without
//! anything to go by means a start from the beginning, which costs time and loses nothing.

use super::parameters::{Parameters, Selection, Side};
use crate::couch::Seq;
use crate::replicate::Counts;
use serde::Serialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// As CouchDB's own replicator keeps.
const HISTORY_MAX: usize = 50;
/// A sequence of a database of many shards has kilobytes, an entry has three of them, and each checkpoint is written twice.
const HISTORY_BYTES_MAX: usize = 64 * 1024;
/// Part of what is hashed: a new way to name replications must not meet checkpoints of the old one.
const NAMING: u64 = 1;
/// The protocol's version of the document, as CouchDB 3 writes it.
const REPLICATION_ID_VERSION: u64 = 4;
/// Headers that say which database is meant, and who reads it; the values of all others may be secrets, and may rotate.
const HEADERS_WITH_VALUE: [&str; 3] = ["host", "x-auth-couchdb-username", "x-auth-couchdb-roles"];
/// 9999-12-31T23:59:59Z: what comes after has no such date.
const LAST_DATE: Duration = Duration::from_secs(253_402_300_799);

/// One side's document. The default is that of a side that has none.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Checkpoint {
    pub rev: Option<String>,
    pub session_id: Option<Arc<str>>,
    pub source_last_seq: Option<Seq>,
    /// Newest first.
    pub history: Vec<Entry>,
    /// On a target whose source refuses to keep a checkpoint.
    pub source_refused: Option<SourceRefused>,
}

/// Which database the refusing source was, so that one made again is told apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceRefused {
    pub instance_start_time: String,
}

/// One checkpoint that was written. Each has a session id of its own.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Entry {
    pub session_id: Arc<str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_last_seq: Option<Seq>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_last_seq: Option<Seq>,
    pub recorded_seq: Seq,
    pub missing_checked: u64,
    pub missing_found: u64,
    pub docs_read: u64,
    pub docs_written: u64,
    pub doc_write_failures: u64,
}

/// What both sides agree on.
#[derive(Debug, Clone, PartialEq)]
pub struct Common {
    pub seq: Seq,
    /// The checkpoints that both know: what the next one may be put before.
    pub history: Vec<Entry>,
}

impl Entry {
    /// That the target has everything up to `recorded_seq`.
    pub fn new(session_id: impl Into<Arc<str>>, started: SystemTime, ended: SystemTime, start: Seq, recorded_seq: Seq) -> Self {
        Self {
            session_id: session_id.into(),
            start_time: Some(http_date(started)),
            end_time: Some(http_date(ended)),
            start_last_seq: Some(start),
            end_last_seq: Some(recorded_seq.clone()),
            recorded_seq,
            missing_checked: 0,
            missing_found: 0,
            docs_read: 0,
            docs_written: 0,
            doc_write_failures: 0,
        }
    }

    pub fn count(&mut self, counts: &Counts) {
        self.missing_checked = counts.missing_checked;
        self.missing_found = counts.missing_found;
        self.docs_read = counts.docs_read;
        self.docs_written = counts.docs_written;
        self.doc_write_failures = counts.doc_write_failures;
    }

    fn read(value: &Value) -> Option<Self> {
        let text = |name: &str| value[name].as_str().map(String::from);
        let count = |name: &str| value[name].as_u64().unwrap_or_default();
        Some(Self {
            session_id: session_id_of(value)?,
            start_time: text("start_time"),
            end_time: text("end_time"),
            start_last_seq: seq_of(&value["start_last_seq"]),
            end_last_seq: seq_of(&value["end_last_seq"]),
            recorded_seq: seq_of(&value["recorded_seq"])?,
            missing_checked: count("missing_checked"),
            missing_found: count("missing_found"),
            docs_read: count("docs_read"),
            docs_written: count("docs_written"),
            doc_write_failures: count("doc_write_failures"),
        })
    }

    fn agrees_with(&self, other: &Self) -> bool {
        self.session_id == other.session_id && self.recorded_seq == other.recorded_seq
    }
}

impl Checkpoint {
    pub fn read(document: &Value) -> Self {
        let history = document["history"].as_array().map(Vec::as_slice).unwrap_or_default();
        let spiegel = &document["spiegel"];
        let refused = spiegel["source_checkpoint"] == "refused";
        let instance = spiegel["source_instance_start_time"].as_str().filter(|_| refused);
        Self {
            rev: document["_rev"].as_str().map(String::from),
            session_id: session_id_of(document),
            source_last_seq: seq_of(&document["source_last_seq"]),
            history: history.iter().filter_map(Entry::read).take(HISTORY_MAX).collect(),
            source_refused: instance.map(|text| SourceRefused { instance_start_time: text.to_string() }),
        }
    }

    /// The next checkpoint. `known_to_both` holds only what both sides are known to have: an entry that one of them does not
    /// have would vouch for what it never saw.
    pub fn following(known_to_both: Vec<Entry>, entry: Entry) -> Self {
        let (session_id, source_last_seq) = (Some(entry.session_id.clone()), Some(entry.recorded_seq.clone()));
        let history = std::iter::once(entry).chain(known_to_both).take(HISTORY_MAX).collect();
        Self { rev: None, session_id, source_last_seq, history, source_refused: None }
    }

    /// The document to write in place of the one with `rev`.
    pub fn document(&self, replication_id: &str, rev: Option<&str>) -> Value {
        let mut document = Map::new();
        document.insert(String::from("_id"), Value::from(format!("_local/{replication_id}")));
        if let Some(rev) = rev {
            document.insert(String::from("_rev"), Value::from(rev));
        }
        document.insert(String::from("session_id"), json!(self.session_id));
        document.insert(String::from("source_last_seq"), json!(self.source_last_seq));
        document.insert(String::from("replication_id_version"), json!(REPLICATION_ID_VERSION));
        if let Some(SourceRefused { instance_start_time }) = &self.source_refused {
            let note = json!({ "source_checkpoint": "refused", "source_instance_start_time": instance_start_time });
            document.insert(String::from("spiegel"), note);
        }
        document.insert(String::from("history"), Value::from(bounded(&self.history)));
        Value::Object(document)
    }

    /// Whether this target's document may be believed without one of the source: where the source refused one, and is still
    /// the database that it was. That a source was restored from an older copy cannot be seen this way.
    pub fn trusted_alone(&self, source_instance_start_time: &str) -> Option<&Seq> {
        let SourceRefused { instance_start_time } = self.source_refused.as_ref()?;
        let (newest, seq) = (self.history.first()?, self.source_last_seq.as_ref()?);
        let is_whole = Some(&newest.session_id) == self.session_id.as_ref() && newest.recorded_seq == *seq;
        // CouchDB 2 says "0" of every database. There the sequence itself tells: it names the shards that it is of, and to
        // others it means the beginning. A number is taken as it is.
        let tells = !matches!(source_instance_start_time, "" | "0") || names_shards(seq);
        (is_whole && tells && instance_start_time == source_instance_start_time).then_some(seq)
    }
}

/// Where a run may start: up to there the target has what the source has. None is the beginning.
pub fn common_ancestor(source: Option<&Checkpoint>, target: Option<&Checkpoint>) -> Option<Seq> {
    common(source, target).map(|common| common.seq)
}

/// Stricter than CouchDB, which believes an equal session id alone: a target restored from an older copy while one session went
/// on tells of the same session and has fewer documents.
pub fn common(source: Option<&Checkpoint>, target: Option<&Checkpoint>) -> Option<Common> {
    let (source, target) = (source?, target?);
    let is_known = |entry: &&Entry| source.history.iter().any(|other| other.agrees_with(entry));
    let history: Vec<Entry> = target.history.iter().filter(is_known).cloned().collect();
    let are_equal = source.session_id == target.session_id && source.source_last_seq == target.source_last_seq;
    let latest = target.source_last_seq.as_ref().filter(|_| are_equal && target.session_id.is_some());
    let seq = latest.or_else(|| history.first().map(|entry| &entry.recorded_seq))?.clone();
    Some(Common { seq, history })
}

/// The name of a replication's checkpoint: the same after every restart and in every version, and another one as soon as other
/// documents would be copied. Passwords are no part of it, so that they may change.
///
/// `filter_code` is the function in the source's design document: edited, it lets others through, of which some are old.
pub fn replication_id(server_uuid: &str, replicator_id: &str, parameters: &Parameters, filter_code: Option<&str>) -> String {
    let Parameters { source, target, selection, since_seq, winning_revs_only, .. } = parameters;
    let mut what = vec![
        json!(NAMING),
        json!(server_uuid),
        json!(replicator_id),
        identity_of_side(source),
        identity_of_side(target),
        identity_of_selection(selection),
        json!(since_seq),
        json!(winning_revs_only),
    ];
    what.extend(filter_code.map(Value::from));
    let digest = Sha256::digest(Value::from(what).to_string().as_bytes());
    let hex: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    format!("spiegel-{hex}")
}

/// However it is spelled: by name or URL, encoded or not.
fn identity_of_side(side: &Side) -> Value {
    let prefix = side.url.path().rsplit_once('/').map_or("", |(prefix, _)| prefix);
    let user = side.credentials.as_ref().map(|credentials| &credentials.user);
    let header = |name: &http::HeaderName| {
        let has_value = HEADERS_WITH_VALUE.contains(&name.as_str());
        let values = side.headers.get_all(name).iter().filter(|_| has_value);
        json!([name.as_str(), values.map(|value| String::from_utf8_lossy(value.as_bytes())).collect::<Vec<_>>()])
    };
    let mut headers: Vec<_> = side.headers.keys().collect();
    headers.sort_unstable_by_key(|name| name.as_str());
    json!([side.place(), prefix, side.db_name, user, headers.into_iter().map(header).collect::<Vec<_>>()])
}

fn identity_of_selection(selection: &Selection) -> Value {
    match selection {
        Selection::All => Value::Null,
        Selection::DocIds(ids) => json!({ "doc_ids": ids }),
        Selection::Filter { name, query } => {
            let mut query: Vec<_> = query.iter().collect();
            query.sort_unstable();
            json!({ "filter": name, "query": query })
        }
        Selection::Selector(selector) => json!({ "selector": sorted(selector) }),
    }
}

/// The order of an object's keys means nothing.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(object) => {
            let mut pairs: Vec<_> = object.iter().collect();
            pairs.sort_unstable_by_key(|(key, _)| *key);
            Value::Object(pairs.into_iter().map(|(key, value)| (key.clone(), sorted(value))).collect())
        }
        Value::Array(list) => Value::Array(list.iter().map(sorted).collect()),
        other => other.clone(),
    }
}

/// The newest entry always, and those before it while there is room.
fn bounded(history: &[Entry]) -> Vec<Value> {
    let mut bytes = 0;
    let mut entries = Vec::new();
    for entry in history.iter().take(HISTORY_MAX) {
        let entry = json!(entry);
        bytes += entry.to_string().len();
        if bytes > HISTORY_BYTES_MAX && !entries.is_empty() {
            break;
        }
        entries.push(entry);
    }
    entries
}

fn session_id_of(value: &Value) -> Option<Arc<str>> {
    value["session_id"].as_str().filter(|id| !id.is_empty()).map(Arc::from)
}

/// Clusters of old gave arrays, which `since` does not take as they are.
fn seq_of(value: &Value) -> Option<Seq> {
    match value {
        Value::String(text) if !text.is_empty() => Some(Seq::from(text.as_str())),
        other => other.as_u64().map(Seq::Number),
    }
}

/// `12-g1AAAA…`
fn names_shards(seq: &Seq) -> bool {
    matches!(seq, Seq::Text(text) if text.split_once('-').is_some_and(|(_, shards)| !shards.is_empty()))
}

/// RFC 1123. A clock that is far off must not end a run: the formatter panics before 1970 and after 9999.
fn http_date(time: SystemTime) -> String {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().min(LAST_DATE);
    httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + since)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::super::parameters::Local;
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn entry(session_id: &str, seq: u64) -> Entry {
        Entry::new(session_id, SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH, Seq::zero(), Seq::Number(seq))
    }

    /// Newest first.
    fn checkpoint(entries: &[(&str, u64)]) -> Checkpoint {
        let mut entries = entries.iter().map(|(session_id, seq)| entry(session_id, *seq));
        let newest = entries.next().unwrap();
        Checkpoint::following(entries.collect(), newest)
    }

    fn parameters(extra: Value) -> Parameters {
        let mut params = json!({"source": "http://u:p@h:5984/a%2Fb", "target": "b"});
        params.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let local = Local { url: url::Url::parse("http://couch:5984").unwrap(), credentials: None };
        Parameters::parse(&params, &local).unwrap_or_else(|error| panic!("{params}: {error}"))
    }

    fn id(extra: Value) -> String {
        replication_id("uuid", "r", &parameters(extra), None)
    }

    #[test]
    fn the_id_stays_the_same_in_every_version() {
        assert_eq!(id(json!({})), "spiegel-c699c885d7baedbc6a03e11d09174290");
        let full = json!({
            "source": {"url": "http://u:p@h:5984/a", "headers": {"Cookie": "x", "Host": "v"}},
            "selector": {"b": 1, "a": [{"d": 1, "c": null}]}, "since_seq": "5-x", "winning_revs_only": true
        });
        assert_eq!(id(full), "spiegel-b23eb97a3b231ccf02f2d1a11f00bd7d");
    }

    #[test]
    fn the_id_is_of_what_is_copied_and_not_of_how() {
        let plain = json!({});
        let headers = |headers: Value| json!({"source": {"url": "http://u:p@h:5984/a%2Fb", "headers": headers}});
        for (one, other) in [
            (&plain, json!({"source": "http://u:other@H:5984/a%2fb/"})),
            (&plain, json!({"source": {"url": "http://h:5984/a%2Fb", "auth": {"basic": {"username": "u", "password": "q"}}}})),
            (&plain, json!({"target": "http://couch:5984/b"})),
            (&plain, json!({"create_target": true, "create_target_params": {"q": 1}, "worker_batch_size": 7})),
            (&plain, json!({"use_checkpoints": true, "http_connections": 3, "query_params": {"unused": 1}})),
            (
                &json!({"filter": "d/f", "query_params": {"a": "1", "b": 2}}),
                json!({"filter": "d/f", "query_params": {"b": "2", "a": 1}}),
            ),
            (&json!({"doc_ids": ["a", "b"]}), json!({"doc_ids": ["b", "a", "a"]})),
            (&json!({"selector": {"a": {"x": 1, "y": 2}, "b": 1}}), json!({"selector": {"b": 1, "a": {"y": 2, "x": 1}}})),
            (&headers(json!({"Cookie": "1", "X-Token": "1"})), headers(json!({"x-token": "2", "cookie": "2"}))),
        ] {
            assert_eq!(id(one.clone()), id(other.clone()), "{one} and {other}");
        }
        let different = [
            plain,
            json!({"source": "http://h:5984/a%2Fb"}),
            json!({"source": "http://v:p@h:5984/a%2Fb"}),
            json!({"source": "http://u:p@h:5984/a/b"}),
            json!({"source": "http://u:p@h:5985/a%2Fb"}),
            json!({"source": "http://u:p@h:5984/c"}),
            json!({"target": "c"}),
            json!({"target": "http://u:p@couch:5984/b"}),
            json!({"source": "b", "target": "http://u:p@h:5984/a%2Fb"}),
            json!({"doc_ids": []}),
            json!({"doc_ids": ["a"]}),
            json!({"doc_ids": ["a", "b"]}),
            json!({"filter": "d/f"}),
            json!({"filter": "d/g"}),
            json!({"filter": "d/f", "query_params": {"a": 1}}),
            json!({"filter": "_design"}),
            json!({"selector": {}}),
            json!({"selector": {"a": [1, 2]}}),
            json!({"selector": {"a": [2, 1]}}),
            json!({"winning_revs_only": true}),
            json!({"since_seq": 5}),
            json!({"since_seq": "5-x"}),
            headers(json!({"Cookie": "1"})),
            headers(json!({"X-Token": "1"})),
            headers(json!({"Host": "v"})),
            headers(json!({"Host": "w"})),
        ];
        let mut ids: BTreeSet<String> = different.iter().map(|extra| id(extra.clone())).collect();
        ids.insert(replication_id("other", "r", &parameters(json!({})), None));
        ids.insert(replication_id("uuid", "other", &parameters(json!({})), None));
        ids.insert(replication_id("uuid", "r", &parameters(json!({})), Some("function (doc) { return true; }")));
        assert_eq!(ids.len(), different.len() + 3);
    }

    #[test]
    fn a_written_document_reads_the_same() {
        let at = |secs| SystemTime::UNIX_EPOCH + Duration::from_secs(secs);
        let mut newest = Entry::new("s2", at(1), at(784_111_777), Seq::from("5-x"), Seq::from("9-y"));
        (newest.missing_checked, newest.missing_found, newest.docs_read) = (5, 4, 3);
        (newest.docs_written, newest.doc_write_failures) = (2, 1);
        let mut written = Checkpoint::following(vec![entry("s1", 5)], newest);
        let document = written.document("spiegel-x", Some("0-4"));
        assert_eq!(
            document,
            json!({
                "_id": "_local/spiegel-x", "_rev": "0-4", "session_id": "s2", "source_last_seq": "9-y", "replication_id_version": 4,
                "history": [
                    {
                        "session_id": "s2", "start_time": "Thu, 01 Jan 1970 00:00:01 GMT", "end_time": "Sun, 06 Nov 1994 08:49:37 GMT",
                        "start_last_seq": "5-x", "end_last_seq": "9-y", "recorded_seq": "9-y",
                        "missing_checked": 5, "missing_found": 4, "docs_read": 3, "docs_written": 2, "doc_write_failures": 1
                    },
                    {
                        "session_id": "s1", "start_time": "Thu, 01 Jan 1970 00:00:00 GMT", "end_time": "Thu, 01 Jan 1970 00:00:00 GMT",
                        "start_last_seq": 0, "end_last_seq": 5, "recorded_seq": 5,
                        "missing_checked": 0, "missing_found": 0, "docs_read": 0, "docs_written": 0, "doc_write_failures": 0
                    }
                ]
            })
        );
        written.rev = Some(String::from("0-4"));
        assert_eq!(Checkpoint::read(&document), written);
        assert!(written.document("spiegel-x", None).get("_rev").is_none());
        written.source_refused = Some(SourceRefused { instance_start_time: String::from("17") });
        let document = written.document("spiegel-x", Some("0-4"));
        assert_eq!(document["spiegel"], json!({"source_checkpoint": "refused", "source_instance_start_time": "17"}));
        assert_eq!(Checkpoint::read(&document), written);
    }

    #[test]
    fn what_cannot_be_read_is_skipped() {
        for nothing in [json!(null), json!([]), json!("x"), json!({}), json!({"history": {}}), json!({"history": [5, null, {}]})]
        {
            assert_eq!(Checkpoint::read(&nothing), Checkpoint::default(), "{nothing}");
        }
        let read = Checkpoint::read(&json!({
            "_rev": 5, "session_id": 7, "source_last_seq": [5, "x"], "spiegel": {"source_checkpoint": "refused"},
            "history": [
                {"session_id": "array", "recorded_seq": [5, "x"]},
                {"session_id": "negative", "recorded_seq": -5},
                {"session_id": "none"},
                {"session_id": "", "recorded_seq": 5},
                {"recorded_seq": 5},
                {"session_id": "good", "recorded_seq": 5, "docs_read": "x", "start_time": 5, "start_last_seq": {}, "more": 1}
            ]
        }));
        let good = Entry { start_time: None, end_time: None, start_last_seq: None, end_last_seq: None, ..entry("good", 5) };
        assert_eq!(read, Checkpoint { history: vec![good], ..Checkpoint::default() });
    }

    #[test]
    fn a_history_is_bounded() {
        let many: Vec<Entry> = (0..200).map(|n| entry(&format!("s{n}"), n)).collect();
        let count = |checkpoint: &Checkpoint| checkpoint.document("x", None)["history"].as_array().unwrap().len();
        let long = Checkpoint::following(many.clone(), entry("new", 200));
        assert_eq!((long.history.len(), count(&long)), (50, 50));
        assert_eq!(long.history[0].session_id.as_ref(), "new");
        let unbounded = Checkpoint { history: many.clone(), ..Checkpoint::default() };
        assert_eq!(count(&unbounded), 50);
        assert_eq!(Checkpoint::read(&json!({"history": many})).history.len(), 50);

        let wide = |n: u64| Entry { recorded_seq: Seq::from("x".repeat(10_000).as_str()), ..entry(&format!("s{n}"), 0) };
        assert_eq!(count(&Checkpoint::following((0..50).map(wide).collect(), wide(99))), 6);
        let huge = Entry { recorded_seq: Seq::from("x".repeat(100_000).as_str()), ..entry("huge", 0) };
        assert_eq!(count(&Checkpoint::following(vec![entry("old", 1)], huge)), 1, "the newest always");
    }

    #[test]
    fn a_wrong_clock_has_a_date_too() {
        let century = Duration::from_secs(100 * 365 * 86_400);
        let early = SystemTime::UNIX_EPOCH - century;
        let late = SystemTime::UNIX_EPOCH + LAST_DATE + century;
        assert_eq!(http_date(early), "Thu, 01 Jan 1970 00:00:00 GMT");
        assert_eq!(http_date(late), "Fri, 31 Dec 9999 23:59:59 GMT");
    }

    #[test]
    fn the_ancestor_is_what_both_sides_tell() {
        let same = [("c", 9), ("b", 5), ("a", 2)];
        for (source, target, expected) in [
            (&same[..], &same[..], Some(9)),
            (&same[..], &same[1..], Some(5)),
            (&same[2..], &same[..], Some(2)),
            (&[("x", 9), ("a", 2)], &[("y", 9), ("a", 2)], Some(2)),
            (&[("x", 9)], &[("y", 9)], None),
            // One session that went on, as CouchDB's would: the target was restored meanwhile.
            (&[("c", 9), ("a", 2)], &[("c", 5), ("a", 2)], Some(2)),
            (&[("c", 9)], &[("c", 5)], None),
            (&[("c", 9), ("c", 5)], &[("c", 5)], Some(5)),
            // A source that was restored goes on with sequences of its own.
            (&[("d", 3), ("a", 2)], &same, Some(2)),
        ] as [(&[(&str, u64)], &[(&str, u64)], Option<u64>); 9]
        {
            let (source, target) = (checkpoint(source), checkpoint(target));
            let expected = expected.map(Seq::Number);
            assert_eq!(common_ancestor(Some(&source), Some(&target)), expected, "{source:?} {target:?}");
            assert_eq!(common_ancestor(Some(&target), Some(&source)), expected);
        }
        let known = checkpoint(&same);
        assert_eq!(common_ancestor(None, Some(&known)), None);
        assert_eq!(common_ancestor(Some(&known), None), None);
        assert_eq!(common_ancestor(Some(&Checkpoint::default()), Some(&Checkpoint::default())), None);
    }

    #[test]
    fn the_heads_count_where_a_history_was_lost() {
        let whole = checkpoint(&[("c", 9), ("b", 5)]);
        let bare = Checkpoint { history: vec![], ..whole.clone() };
        assert_eq!(common(Some(&whole), Some(&bare)), Some(Common { seq: Seq::Number(9), history: vec![] }));
        let no_session = Checkpoint { session_id: None, history: vec![], ..whole.clone() };
        assert_eq!(common(Some(&no_session), Some(&no_session)), None);
        let no_seq = Checkpoint { source_last_seq: None, ..whole.clone() };
        assert_eq!(common_ancestor(Some(&no_seq), Some(&whole)), Some(Seq::Number(9)), "by the histories");
    }

    #[test]
    fn the_common_history_holds_what_both_know() {
        let source = checkpoint(&[("d", 9), ("b", 5), ("a", 2)]);
        let target = checkpoint(&[("c", 7), ("b", 5), ("a", 3), ("z", 1)]);
        let common = common(Some(&source), Some(&target)).unwrap();
        assert_eq!(common, Common { seq: Seq::Number(5), history: vec![entry("b", 5)] });
    }

    #[test]
    fn a_target_is_believed_alone_only_while_its_source_is_the_same_database() {
        let alone = |seq: Seq, instance: &str| {
            let mut checkpoint = Checkpoint::following(vec![], Entry { recorded_seq: seq, ..entry("s", 0) });
            checkpoint.source_refused = Some(SourceRefused { instance_start_time: instance.to_string() });
            checkpoint
        };
        let sharded = Seq::from("12-g1AAAA");
        for (seq, noted, now, trusted) in [
            (&sharded, "1700000000", "1700000000", true),
            (&Seq::Number(12), "1700000000", "1700000000", true),
            (&sharded, "1700000000", "1700000001", false),
            (&sharded, "1700000000", "0", false),
            (&sharded, "0", "1700000000", false),
            (&sharded, "0", "0", true),
            (&Seq::Number(12), "0", "0", false),
            (&Seq::from("12"), "0", "0", false),
            (&Seq::from("12"), "", "", false),
        ] {
            assert_eq!(alone(seq.clone(), noted).trusted_alone(now).is_some(), trusted, "{seq:?} {noted} {now}");
        }
        let good = alone(sharded.clone(), "17");
        assert_eq!(good.trusted_alone("17"), Some(&sharded));
        for bad in [
            Checkpoint { source_refused: None, ..good.clone() },
            Checkpoint { history: vec![], ..good.clone() },
            Checkpoint { session_id: None, ..good.clone() },
            Checkpoint { session_id: Some("other".into()), ..good.clone() },
            Checkpoint { source_last_seq: Some(Seq::Number(12)), ..good.clone() },
        ] {
            assert_eq!(bad.trusted_alone("17"), None, "{bad:?}");
        }
    }

    /// What may happen to the two sides, in any order.
    #[derive(Debug, Clone)]
    enum Event {
        SourceGrows(usize),
        /// A run, and which of the two checkpoints it managed to write.
        Run {
            on_source: bool,
            on_target: bool,
        },
        CopySource,
        CopyTarget,
        RestoreSource(usize),
        RestoreTarget(usize),
        SourceLosesCheckpoint,
        TargetLosesCheckpoint,
        TargetIsMadeAgain,
    }

    fn undisturbed() -> impl Strategy<Value = Event> {
        prop_oneof![
            2 => (1usize..4).prop_map(Event::SourceGrows),
            2 => Just(Event::Run { on_source: true, on_target: true }),
            1 => Just(Event::Run { on_source: true, on_target: false }),
            1 => Just(Event::Run { on_source: false, on_target: true }),
            1 => Just(Event::Run { on_source: false, on_target: false }),
        ]
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            8 => undisturbed(),
            2 => Just(Event::CopySource),
            2 => Just(Event::CopyTarget),
            1 => any::<prop::sample::Index>().prop_map(|at| Event::RestoreSource(at.index(100))),
            1 => any::<prop::sample::Index>().prop_map(|at| Event::RestoreTarget(at.index(100))),
            1 => Just(Event::SourceLosesCheckpoint),
            1 => Just(Event::TargetLosesCheckpoint),
            1 => Just(Event::TargetIsMadeAgain),
        ]
    }

    fn only_the_target_is_disturbed() -> impl Strategy<Value = Event> {
        prop_oneof![
            6 => undisturbed(),
            2 => Just(Event::CopyTarget),
            1 => any::<prop::sample::Index>().prop_map(|at| Event::RestoreTarget(at.index(100))),
            1 => Just(Event::TargetLosesCheckpoint),
        ]
    }

    /// A database as a copy of it would hold it: its `_local` documents are part of it.
    #[derive(Debug, Clone, Default)]
    struct Source {
        /// A document's sequence is its place; after a restore the next documents take the same sequences.
        docs: Vec<u64>,
        checkpoint: Option<Value>,
    }

    #[derive(Debug, Clone, Default)]
    struct Target {
        docs: BTreeSet<u64>,
        checkpoint: Option<Value>,
    }

    #[derive(Debug, Default)]
    struct World {
        source: Source,
        target: Target,
        source_copies: Vec<Source>,
        target_copies: Vec<Target>,
        docs_made: u64,
        sessions: u64,
        /// As CouchDB's jobs do: one session id for all of their checkpoints.
        is_one_session: bool,
        last_written_to_both: Option<u64>,
    }

    impl World {
        /// The same whichever side is asked first.
        fn common(&self) -> Option<Common> {
            let read = |checkpoint: &Option<Value>| checkpoint.as_ref().map(Checkpoint::read);
            let (source, target) = (read(&self.source.checkpoint), read(&self.target.checkpoint));
            let found = common(source.as_ref(), target.as_ref());
            assert_eq!(common_ancestor(target.as_ref(), source.as_ref()), found.clone().map(|common| common.seq));
            found
        }

        fn ancestor(&self) -> Option<usize> {
            match self.common()?.seq {
                Seq::Number(seq) => Some(seq as usize),
                Seq::Text(text) => panic!("{text}"),
            }
        }

        /// Up to the ancestor the target has everything.
        fn is_safe(&self) -> bool {
            let known = self.source.docs.get(..self.ancestor().unwrap_or_default());
            known.is_some_and(|docs| docs.iter().all(|doc| self.target.docs.contains(doc)))
        }

        fn step(&mut self, event: &Event) {
            match event {
                Event::SourceGrows(count) => {
                    for _ in 0..*count {
                        self.docs_made += 1;
                        self.source.docs.push(self.docs_made);
                    }
                }
                Event::Run { on_source, on_target } => self.run(*on_source, *on_target),
                Event::CopySource => self.source_copies.push(self.source.clone()),
                Event::CopyTarget => self.target_copies.push(self.target.clone()),
                Event::RestoreSource(at) if !self.source_copies.is_empty() => {
                    self.source = self.source_copies[at % self.source_copies.len()].clone();
                }
                Event::RestoreTarget(at) if !self.target_copies.is_empty() => {
                    self.target = self.target_copies[at % self.target_copies.len()].clone();
                }
                Event::RestoreSource(_) | Event::RestoreTarget(_) => {}
                Event::SourceLosesCheckpoint => self.source.checkpoint = None,
                Event::TargetLosesCheckpoint => self.target.checkpoint = None,
                Event::TargetIsMadeAgain => self.target = Target::default(),
            }
        }

        fn run(&mut self, on_source: bool, on_target: bool) {
            let start = self.ancestor().unwrap_or_default();
            self.target.docs.extend(&self.source.docs[start..]);
            self.sessions += u64::from(!self.is_one_session);
            let known = self.common().map(|common| common.history).unwrap_or_default();
            let seq = self.source.docs.len() as u64;
            let document = Checkpoint::following(known, entry(&self.sessions.to_string(), seq)).document("spiegel-x", None);
            if on_source {
                self.source.checkpoint = Some(document.clone());
            }
            if on_target {
                self.target.checkpoint = Some(document);
            }
            if on_source && on_target {
                self.last_written_to_both = Some(seq);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn the_ancestor_is_never_ahead_of_the_targets_documents(events in prop::collection::vec(event(), 0..60)) {
            let mut world = World::default();
            for event in &events {
                world.step(event);
                prop_assert!(world.is_safe(), "after {:?}: {:?}", event, world);
            }
        }

        #[test]
        fn a_session_that_goes_on_vouches_for_no_restored_target(
            events in prop::collection::vec(only_the_target_is_disturbed(), 0..60),
        ) {
            let mut world = World { is_one_session: true, ..World::default() };
            for event in &events {
                world.step(event);
                prop_assert!(world.is_safe(), "after {:?}: {:?}", event, world);
            }
        }

        #[test]
        fn undisturbed_it_is_the_last_checkpoint_of_both(events in prop::collection::vec(undisturbed(), 0..60)) {
            let mut world = World::default();
            for event in &events {
                world.step(event);
                let expected = world.last_written_to_both.map(|seq| seq as usize);
                prop_assert_eq!(world.ancestor(), expected, "after {:?}: {:?}", event, world);
            }
        }

        #[test]
        fn no_document_panics(keys in prop::collection::vec("session_id|history|recorded_seq|source_last_seq|spiegel", 4), n: i64, text in "\\PC{0,9}") {
            let inner = json!({&keys[0]: n, &keys[1]: &text, &keys[2]: [n, &text]});
            let read = Checkpoint::read(&json!({&keys[3]: [&inner], &keys[2]: &inner, "history": [&inner, n, {"session_id": &text, "recorded_seq": n}]}));
            let written = Checkpoint::read(&read.document("spiegel-x", None));
            prop_assert_eq!(common_ancestor(Some(&read), Some(&read)), common_ancestor(Some(&written), Some(&written)));
            let _ = read.trusted_alone(&text);
        }
    }
}
