//! What an update-listener writes of a document whose database changed: the original's words, and as few of them as do.
//!
//! A document that is dirty and unlocked says everything already. A locked one is written again, because its lock may be older than
//! the change: the new revision tells whoever holds the lock. A lock that was taken after we had seen the document without one is
//! younger than the change, and whoever took it reads the change as well.

use crate::couch::generation_of;
use crate::db::{known, listen};
use crate::job::timestamp;
use crate::topology::replicator::Replicator;
use serde_json::{Map, Value};
use std::time::SystemTime;

/// What to mark.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// By its id.
    Replicator(String),
    /// By its database.
    ChangeListener(String),
}

impl Subject {
    pub fn id(&self) -> String {
        match self {
            Subject::Replicator(id) => id.clone(),
            Subject::ChangeListener(db) => listen::document_id(db),
        }
    }
}

/// A document at a moment after its database's change was known.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    is_unlocked: bool,
    updated_at: Value,
    generation: u64,
}

impl Seen {
    pub fn of(doc: Option<&Value>) -> Self {
        let updated_at = doc.map_or(Value::Null, |doc| doc["updated_at"].clone());
        Self {
            is_unlocked: doc.is_none_or(|doc| !is_set(&doc["locked_at"])),
            updated_at,
            generation: doc.map_or(0, generation_of),
        }
    }

    /// Somebody wrote it since.
    pub fn is_older_than(&self, doc: Option<&Value>) -> bool {
        self.generation != doc.map_or(0, generation_of)
    }
}

#[derive(Debug, Clone, PartialEq)]
pub enum Marking {
    /// It says so already.
    IsDirty,
    /// Somebody has taken it up since it was first seen, or is done with it.
    IsTaken,
    /// There is nothing to mark any more.
    IsGone,
    Write(Value),
}

/// `before` is what was seen of the document earlier, if anything.
pub fn mark(subject: &Subject, doc: Option<&Value>, before: Option<&Seen>, now: SystemTime) -> Marking {
    match (subject, doc) {
        (Subject::Replicator(_), Some(doc)) if doc["type"] == "replicator" => replicator(doc, before, now),
        (Subject::Replicator(_), _) => Marking::IsGone,
        (Subject::ChangeListener(db), doc) => change_listener(db, doc, before, now),
    }
}

fn replicator(doc: &Value, before: Option<&Seen>, now: SystemTime) -> Marking {
    let is_dirty = doc["dirty"] != Value::Bool(false);
    let is_locked = is_set(&doc["locked_at"]);
    if !is_locked && (is_dirty || is_set(&doc["dirty_at"])) {
        return Marking::IsDirty;
    }
    if is_taken(doc, before) {
        return Marking::IsTaken;
    }
    let dirty_at = Replicator::parse(doc).ok().and_then(|replicator| now.checked_add(replicator.dirty_after?));
    written(doc, now, |fields| match dirty_at {
        Some(at) => {
            set(fields, "dirty_at", Value::from(timestamp(at)));
            set(fields, "dirty", Value::Bool(false));
        }
        None => set_dirty(fields),
    })
}

fn change_listener(db: &str, doc: Option<&Value>, before: Option<&Seen>, now: SystemTime) -> Marking {
    let Some(doc) = doc else {
        let mut fields = listen::new_document(&listen::document_id(db), db);
        set(&mut fields, "dirty", Value::Bool(true));
        set(&mut fields, "updated_at", Value::from(timestamp(now)));
        return Marking::Write(Value::Object(fields));
    };
    // One that nobody finds by its type or name is mended.
    let is_sound = doc["type"] == "change_listener" && doc["db_name"] == db;
    if is_sound && doc["dirty"] != Value::Bool(false) && !is_set(&doc["locked_at"]) {
        return Marking::IsDirty;
    }
    if is_sound && is_taken(doc, before) {
        return Marking::IsTaken;
    }
    written(doc, now, |fields| {
        set(fields, "type", Value::from("change_listener"));
        set(fields, "db_name", Value::from(db));
        // Left there, it would keep the original from moving `last_seq`.
        set_dirty(fields);
        known::forget(fields);
    })
}

/// Somebody marked it, somebody locked it, somebody wrote that it is done: so many revisions at least.
const REVISIONS_OF_A_RUN: u64 = 3;

/// Seen without a lock, and then locked while dirty, or worked off from end to end.
fn is_taken(doc: &Value, before: Option<&Seen>) -> bool {
    let Some(before) = before.filter(|before| before.is_unlocked) else { return false };
    match is_set(&doc["locked_at"]) {
        true => doc["dirty"] != Value::Bool(false),
        false => {
            let is_run_later = is_set(&doc["updated_at"]) && doc["updated_at"] != before.updated_at;
            doc["dirty"] == Value::Bool(false) && is_run_later && generation_of(doc) >= before.generation + REVISIONS_OF_A_RUN
        }
    }
}

fn set_dirty(fields: &mut Map<String, Value>) {
    set(fields, "dirty", Value::Bool(true));
    if fields.contains_key("dirty_at") {
        set(fields, "dirty_at", Value::Null);
    }
}

fn set(fields: &mut Map<String, Value>, name: &str, value: Value) {
    fields.insert(String::from(name), value);
}

fn written(doc: &Value, now: SystemTime, change: impl FnOnce(&mut Map<String, Value>)) -> Marking {
    let Value::Object(fields) = doc else { return Marking::IsGone };
    let mut fields = fields.clone();
    change(&mut fields);
    set(&mut fields, "updated_at", Value::from(timestamp(now)));
    Marking::Write(Value::Object(fields))
}

/// As JavaScript sees it.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        _ => true,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::time::Duration;

    const NOW: &str = "2026-11-21T12:00:00.000Z";
    const LATER: &str = "2026-11-21T12:00:01.500Z";

    fn now() -> SystemTime {
        humantime::parse_rfc3339(NOW).expect("a time")
    }

    fn on_top_of(base: Value, fields: Value) -> Value {
        let mut doc = base;
        for (name, value) in fields.as_object().expect("an object") {
            doc[name] = value.clone();
        }
        doc
    }

    fn a_replicator(fields: Value) -> Value {
        on_top_of(json!({ "_id": "r", "_rev": "4-x", "type": "replicator", "source": "a", "target": "b", "mine": [1] }), fields)
    }

    fn a_listener(fields: Value) -> Value {
        let base =
            json!({ "_id": "spiegel_cl_a/b", "_rev": "4-x", "type": "change_listener", "db_name": "a/b", "last_seq": "9-z" });
        on_top_of(base, fields)
    }

    fn write(doc: Value) -> Marking {
        Marking::Write(doc)
    }

    #[test]
    fn a_replicator_is_marked_in_the_original_s_words() {
        let dirty = |fields| write(on_top_of(a_replicator(fields), json!({ "dirty": true, "updated_at": NOW })));
        let due =
            |fields| write(on_top_of(a_replicator(fields), json!({ "dirty": false, "dirty_at": LATER, "updated_at": NOW })));
        let cases = [
            (json!({}), Marking::IsDirty),
            (json!({ "dirty": true }), Marking::IsDirty),
            (json!({ "dirty": null, "locked_at": "" }), Marking::IsDirty),
            (json!({ "dirty": false }), dirty(json!({}))),
            (json!({ "dirty": false, "dirty_at": null }), dirty(json!({ "dirty_at": null }))),
            // Backing off, or waiting as its `dirty_after_milliseconds` asks: it runs anyway.
            (json!({ "dirty": false, "dirty_at": "2026-11-21T11:00:00.000Z" }), Marking::IsDirty),
            (json!({ "dirty": false, "dirty_at": "no time" }), Marking::IsDirty),
            // Whoever holds the lock may have begun before the change.
            (json!({ "dirty": true, "locked_at": NOW }), dirty(json!({ "locked_at": NOW }))),
            (
                json!({ "locked_at": NOW, "locked_by": { "owner": "p" } }),
                dirty(json!({ "locked_at": NOW, "locked_by": { "owner": "p" } })),
            ),
            (json!({ "dirty": false, "dirty_at": NOW, "locked_at": NOW }), dirty(json!({ "dirty_at": null, "locked_at": NOW }))),
            (json!({ "dirty": false, "dirty_after_milliseconds": 1500 }), due(json!({ "dirty_after_milliseconds": 1500 }))),
            (
                json!({ "dirty": true, "locked_at": NOW, "dirty_after_milliseconds": 1500 }),
                due(json!({ "locked_at": NOW, "dirty_after_milliseconds": 1500 })),
            ),
            (json!({ "dirty": false, "dirty_after_milliseconds": "soon" }), dirty(json!({ "dirty_after_milliseconds": "soon" }))),
            (json!({ "dirty": false, "source": 7 }), dirty(json!({ "source": 7 }))),
            (json!({ "type": "other", "dirty": false }), Marking::IsGone),
        ];
        for (fields, expected) in cases {
            let doc = a_replicator(fields);
            assert_eq!(mark(&Subject::Replicator("r".into()), Some(&doc), None, now()), expected, "{doc}");
        }
        assert_eq!(mark(&Subject::Replicator("r".into()), None, None, now()), Marking::IsGone);
    }

    #[test]
    fn a_change_listener_is_made_or_marked_in_the_original_s_words() {
        let subject = Subject::ChangeListener("a/b".into());
        assert_eq!(subject.id(), "spiegel_cl_a/b");
        let made =
            json!({ "_id": "spiegel_cl_a/b", "type": "change_listener", "db_name": "a/b", "dirty": true, "updated_at": NOW });
        assert_eq!(mark(&subject, None, None, now()), write(made));

        let dirty = |fields| write(on_top_of(a_listener(fields), json!({ "dirty": true, "updated_at": NOW })));
        let cases = [
            (json!({}), Marking::IsDirty),
            (json!({ "dirty": true, "dirty_at": null }), Marking::IsDirty),
            (json!({ "dirty": false, "mine": 1 }), dirty(json!({ "mine": 1 }))),
            // A change ends the pause, as in the original; left there, `dirty_at` would keep it from moving `last_seq`.
            (json!({ "dirty": false, "dirty_at": NOW, "retries": 3 }), dirty(json!({ "dirty_at": null, "retries": 3 }))),
            (json!({ "dirty": true, "locked_at": NOW }), dirty(json!({ "locked_at": NOW }))),
            (json!({ "dirty": false, "possibly_deleted_at": NOW }), dirty(json!({ "possibly_deleted_at": NOW }))),
            // What it looked like is known no more.
            (json!({ "dirty": false, "update_seq": "1:2:3:4@9-z" }), dirty(json!({}))),
            (json!({ "type": "x", "dirty": true }), dirty(json!({}))),
            (json!({ "db_name": 5, "dirty": true }), dirty(json!({}))),
        ];
        for (fields, expected) in cases {
            let doc = a_listener(fields);
            assert_eq!(mark(&subject, Some(&doc), None, now()), expected, "{doc}");
        }
    }

    #[test]
    fn who_took_it_up_after_it_was_seen_without_a_lock_reads_the_change() {
        let free = json!({ "dirty": false, "updated_at": "u" });
        let held = json!({ "dirty": true, "locked_at": "l", "updated_at": "u" });
        let cases = [
            // Marked by somebody else, and locked.
            (&free, json!({ "dirty": true, "locked_at": NOW, "_rev": "6-x" }), true),
            (&free, json!({ "locked_at": NOW, "_rev": "6-x" }), true),
            // Worked off.
            (&free, json!({ "dirty": false, "locked_at": null, "updated_at": NOW, "_rev": "7-x" }), true),
            // Edited; or a position that was saved without a lock.
            (&free, json!({ "dirty": false, "updated_at": "u", "_rev": "9-x" }), false),
            (&free, json!({ "dirty": false, "updated_at": NOW, "_rev": "5-x" }), false),
            (&free, json!({ "dirty": false, "_rev": "9-x" }), false),
            // A lock on what is clean says nothing of work.
            (&free, json!({ "dirty": false, "locked_at": NOW, "_rev": "9-x" }), false),
            // The lock may have been there before the change.
            (&held, json!({ "dirty": true, "locked_at": NOW, "_rev": "9-x" }), false),
            (&held, json!({ "dirty": false, "updated_at": NOW, "_rev": "9-x" }), false),
        ];
        for (before, after, expected) in cases {
            for (subject, base) in [
                (Subject::Replicator("r".into()), a_replicator as fn(Value) -> Value),
                (Subject::ChangeListener("a/b".into()), a_listener),
            ] {
                let seen = Seen::of(Some(&base(before.clone())));
                let doc = base(after.clone());
                let marking = mark(&subject, Some(&doc), Some(&seen), now());
                assert_eq!(marking == Marking::IsTaken, expected, "{before} then {doc}");
                assert_eq!(matches!(marking, Marking::Write(_)), !expected, "{before} then {doc}");
            }
        }
    }

    fn a_value() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(json!(null)),
            Just(json!(true)),
            Just(json!(false)),
            Just(json!(0)),
            Just(json!("")),
            Just(json!(NOW)),
            Just(json!({ "a": [1] })),
            (-2000i64..2000).prop_map(|number| json!(number)),
        ]
    }

    fn a_doc() -> impl Strategy<Value = Value> {
        let names =
            ["dirty", "dirty_at", "locked_at", "locked_by", "updated_at", "retries", "dirty_after_milliseconds", "db_name", "x"];
        proptest::collection::vec((0..names.len(), a_value()), 0..6).prop_map(move |fields| {
            let mut doc = json!({ "_id": "d", "_rev": "2-x", "source": "a", "target": "b" });
            for (index, value) in fields {
                doc[names[index]] = value;
            }
            doc
        })
    }

    proptest! {
        /// Whatever a document says: after it was marked its work is due, now or at a time, its lock and what others wrote
        /// are as they were, and nobody marks it again unless somebody holds it.
        #[test]
        fn what_is_marked_is_due_and_stays_as_it_was(doc in a_doc(), is_listener: bool) {
            let subject = if is_listener { Subject::ChangeListener("a".into()) } else { Subject::Replicator("d".into()) };
            let mut doc = doc;
            doc["type"] = json!(if is_listener { "change_listener" } else { "replicator" });
            match mark(&subject, Some(&doc), None, now()) {
                Marking::Write(marked) => {
                    prop_assert!(marked["dirty"] != json!(false) || is_set(&marked["dirty_at"]));
                    for field in ["_id", "_rev", "locked_at", "locked_by", "x", "retries", "source"] {
                        prop_assert_eq!(&marked[field], &doc[field]);
                    }
                    let again = mark(&subject, Some(&marked), None, now() + Duration::from_secs(1));
                    prop_assert_eq!(again == Marking::IsDirty, !is_set(&doc["locked_at"]));
                }
                Marking::IsDirty => {
                    prop_assert!(!is_set(&doc["locked_at"]));
                    prop_assert!(doc["dirty"] != json!(false) || is_set(&doc["dirty_at"]));
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }
}
