//! The documents of the deliveries database: one for each (rule, database, document id) whose delivery failed, and one for each
//! rule whose receiver wants no more.
//!
//! A document holds what is needed to try again and what a person wants to know, and never the body of a document: a try reads
//! it anew. Fields that we do not know are kept, and one of a wrong type counts as absent.

use crate::job::timestamp;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::fmt;
use std::time::SystemTime;

/// In which database the deliveries of a spiegel database are.
pub fn database_of(spiegel_db: &str) -> String {
    format!("{spiegel_db}_deliveries")
}

/// The start of the id of a delivery's document, and of a disabled rule's.
pub const DELIVERY: &str = "delivery:";
pub const DISABLED: &str = "disabled:";

/// Whose deliveries keep their order, and of which one document tells: a rule, a database and a document's id, hashed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key([u8; 20]);

impl Key {
    pub fn of(rule: &str, db: &str, doc_id: &str) -> Self {
        let mut hash = Sha256::new();
        for part in [rule, db, doc_id] {
            // Each part goes in with its length, so that no two lists of parts are one text.
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        let digest: [u8; 32] = hash.finalize().into();
        let mut key = [0; 20];
        key.copy_from_slice(digest.get(..20).unwrap_or(&[0; 20]));
        Self(key)
    }

    /// The `_id` of its document: the same on any node.
    pub fn doc_id(&self) -> String {
        self.0.iter().fold(String::from(DELIVERY), |id, byte| format!("{id}{byte:02x}"))
    }

    pub fn parse(doc_id: &str) -> Option<Self> {
        let hex = doc_id.strip_prefix(DELIVERY).filter(|hex| hex.len() == 40 && hex.is_ascii())?;
        let mut key = [0; 20];
        for (at, byte) in key.iter_mut().enumerate() {
            *byte = u8::from_str_radix(hex.get(2 * at..2 * at + 2)?, 16).ok()?;
        }
        Some(Self(key))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.doc_id())
    }
}

pub fn disabled_id(rule: &str) -> String {
    format!("{DISABLED}{rule}")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    /// It is tried again by itself.
    Parked,
    /// It was given up, by what its rule says; a person may have it tried again.
    Dead,
    /// Nobody wants it any more: its rule or its database is gone, or a person said so.
    Dropped,
}

impl State {
    pub const ALL: [State; 3] = [State::Parked, State::Dead, State::Dropped];

    pub fn name(self) -> &'static str {
        match self {
            State::Parked => "parked",
            State::Dead => "dead",
            State::Dropped => "dropped",
        }
    }

    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }
}

/// What a document of the deliveries database says of one delivery.
#[derive(Debug, Clone, PartialEq)]
pub struct Parked {
    /// Its document's revision; empty where it is not written yet.
    pub doc_rev: String,
    pub state: State,
    pub rule: String,
    pub db: String,
    pub doc_id: String,
    /// The newest that is known to be owed, with the seq that told of it.
    pub rev: String,
    pub seq: Value,
    pub instance_start_time: String,
    pub attempts: u32,
    /// Tries after it was parked, of those.
    pub retries: u32,
    pub first_failed_at: SystemTime,
    pub last_attempt_at: Option<SystemTime>,
    pub next_attempt_at: Option<SystemTime>,
    pub last_status: Option<u16>,
    pub last_error: String,
    /// The first KB.
    pub last_answer: String,
    /// Why it is dead or dropped, and since when.
    pub reason: Option<String>,
    pub ended_at: Option<SystemTime>,
    /// The process that tries it now; until `next_attempt_at` nobody else does.
    pub claimed_by: Option<String>,
    /// How often somebody asked for a new `webhook-id`.
    pub replays: u64,
}

impl Parked {
    /// None where the document is not one of a delivery.
    pub fn read(doc: &Value) -> Option<Self> {
        let text = |field: &str| doc[field].as_str().unwrap_or_default().to_string();
        let time = |field: &str| doc[field].as_str().and_then(|text| humantime::parse_rfc3339_weak(text).ok());
        let count = |field: &str| doc[field].as_u64().and_then(|count| u32::try_from(count).ok()).unwrap_or(0);
        let (rule, db, doc_id) = (text("rule"), text("db_name"), text("doc_id"));
        let key = Key::parse(doc["_id"].as_str()?)?;
        if doc["type"] != "delivery" || key != Key::of(&rule, &db, &doc_id) {
            return None;
        }
        Some(Self {
            doc_rev: text("_rev"),
            // One that nobody can read is better tried again than forgotten.
            state: State::of(&text("state")).unwrap_or(State::Parked),
            rule,
            db,
            doc_id,
            rev: text("rev"),
            seq: doc["seq"].clone(),
            instance_start_time: text("instance_start_time"),
            attempts: count("attempts"),
            retries: count("retries"),
            first_failed_at: time("first_failed_at").unwrap_or(SystemTime::UNIX_EPOCH),
            last_attempt_at: time("last_attempt_at"),
            next_attempt_at: time("next_attempt_at"),
            last_status: doc["last_status"].as_u64().and_then(|status| u16::try_from(status).ok()),
            last_error: text("last_error"),
            last_answer: text("last_answer"),
            reason: doc["reason"].as_str().map(str::to_string),
            ended_at: time("ended_at"),
            claimed_by: doc["claimed_by"].as_str().map(str::to_string),
            replays: doc["replays"].as_u64().unwrap_or(0),
        })
    }

    pub fn key(&self) -> Key {
        Key::of(&self.rule, &self.db, &self.doc_id)
    }

    /// Into its document as it is in CouchDB, or into a new one.
    pub fn write(&self, doc: Option<Value>) -> Value {
        let mut fields = match doc {
            Some(Value::Object(fields)) => fields,
            _ => Map::new(),
        };
        let time = |at: Option<SystemTime>| at.map_or(Value::Null, |at| Value::from(timestamp(at)));
        let mut set = |field: &str, value: Value| drop(fields.insert(String::from(field), value));
        set("_id", Value::from(self.key().doc_id()));
        set("type", Value::from("delivery"));
        set("state", Value::from(self.state.name()));
        set("rule", Value::from(self.rule.as_str()));
        set("db_name", Value::from(self.db.as_str()));
        set("doc_id", Value::from(self.doc_id.as_str()));
        set("rev", Value::from(self.rev.as_str()));
        set("seq", self.seq.clone());
        set("instance_start_time", Value::from(self.instance_start_time.as_str()));
        set("attempts", Value::from(self.attempts));
        set("retries", Value::from(self.retries));
        set("first_failed_at", time(Some(self.first_failed_at)));
        set("last_attempt_at", time(self.last_attempt_at));
        set("next_attempt_at", time(self.next_attempt_at));
        set("last_status", self.last_status.map_or(Value::Null, Value::from));
        set("last_error", Value::from(self.last_error.as_str()));
        set("last_answer", Value::from(self.last_answer.as_str()));
        set("reason", self.reason.as_deref().map_or(Value::Null, Value::from));
        set("ended_at", time(self.ended_at));
        set("claimed_by", self.claimed_by.as_deref().map_or(Value::Null, Value::from));
        if self.replays > 0 {
            set("replays", Value::from(self.replays));
        }
        Value::Object(fields)
    }

    /// By a person, or because its rule was edited: at once, and patiently from the start.
    pub fn retry(&mut self, now: SystemTime, new_id: bool) {
        if self.state != State::Parked {
            // What is given up after a while would be given up again at once.
            self.first_failed_at = now;
        }
        self.state = State::Parked;
        self.retries = 0;
        (self.reason, self.ended_at, self.claimed_by) = (None, None, None);
        self.next_attempt_at = Some(now);
        self.replays += u64::from(new_id);
    }

    pub fn end(&mut self, state: State, reason: impl Into<String>, now: SystemTime) {
        self.state = state;
        self.reason = Some(reason.into());
        self.ended_at = Some(now);
        (self.next_attempt_at, self.claimed_by) = (None, None);
    }
}

/// A rule that answered 410: nothing more is sent for it until it is edited or somebody enables it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disabled {
    pub doc_rev: String,
    pub rule: String,
    pub rule_rev: String,
}

impl Disabled {
    pub fn read(doc: &Value) -> Option<Self> {
        let text = |field: &str| doc[field].as_str().map(str::to_string);
        let rule = text("_id")?.strip_prefix(DISABLED)?.to_string();
        (doc["type"] == "disabled_rule").then_some(())?;
        Some(Self { doc_rev: text("_rev").unwrap_or_default(), rule, rule_rev: text("rule_rev").unwrap_or_default() })
    }

    pub fn document(rule: &str, rule_rev: &str, db: &str, error: &str, now: SystemTime) -> Value {
        serde_json::json!({
            "_id": disabled_id(rule), "type": "disabled_rule", "rule": rule, "rule_rev": rule_rev, "db_name": db,
            "error": error, "disabled_at": timestamp(now),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::time::Duration;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn parked() -> Parked {
        Parked {
            doc_rev: String::new(),
            state: State::Parked,
            rule: "mail".into(),
            db: "user_a/b".into(),
            doc_id: "order:7".into(),
            rev: "3-abc".into(),
            seq: json!("12-xyz"),
            instance_start_time: "1700000000".into(),
            attempts: 3,
            retries: 0,
            first_failed_at: at(100),
            last_attempt_at: Some(at(101)),
            next_attempt_at: Some(at(106)),
            last_status: Some(503),
            last_error: "answered 503".into(),
            last_answer: "busy".into(),
            reason: None,
            ended_at: None,
            claimed_by: Some("me".into()),
            replays: 0,
        }
    }

    #[test]
    fn a_document_says_all_and_keeps_what_is_not_ours() {
        let existing = json!({ "_id": "x", "_rev": "4-d", "note": "call them", "claimed_by": "other" });
        let doc = parked().write(Some(existing));
        assert_eq!((&doc["note"], &doc["_rev"]), (&json!("call them"), &json!("4-d")));
        assert_eq!(Parked::read(&doc), Some(Parked { doc_rev: "4-d".into(), ..parked() }));
        assert!(!doc.to_string().contains("\"doc\":"), "no body: {doc}");
    }

    #[test]
    fn what_is_damaged_is_read_as_work_or_not_at_all() {
        let mut doc = parked().write(None);
        for field in ["attempts", "next_attempt_at", "state", "seq", "last_status", "reason"] {
            doc[field] = json!({ "odd": [1] });
        }
        let read = Parked::read(&doc).expect("still a delivery");
        assert_eq!((read.state, read.next_attempt_at, read.attempts), (State::Parked, None, 0));
        for (field, value) in [("rule", json!("other")), ("type", json!("x")), ("_id", json!("delivery:00")), ("_id", json!(7))] {
            let mut doc = parked().write(None);
            doc[field] = value;
            assert_eq!(Parked::read(&doc), None, "{field}");
        }
        assert_eq!(Parked::read(&json!(null)), None);
    }

    #[test]
    fn a_disabled_rule_reads_back() {
        let doc = Disabled::document("r/1 x", "2-b", "db", "answered 410", at(5));
        let read = Disabled::read(&doc).expect("it is one");
        assert_eq!((read.rule.as_str(), read.rule_rev.as_str()), ("r/1 x", "2-b"));
        assert_eq!(Disabled::read(&parked().write(None)), None);
    }

    proptest! {
        #[test]
        fn a_key_is_its_documents_id(rule: String, db: String, doc_id: String) {
            let key = Key::of(&rule, &db, &doc_id);
            prop_assert_eq!(Key::parse(&key.doc_id()), Some(key));
        }

        #[test]
        fn no_id_of_somebody_elses_is_a_key_by_accident(id in "(delivery:)?.{0,44}") {
            if let Some(key) = Key::parse(&id) {
                prop_assert_eq!(key.doc_id(), id.to_lowercase());
            }
        }
    }
}
