//! Up to which state of a database everything was delivered, as its `change_listener` says in `update_seq`.
//!
//! It is the fingerprint that a sweep read before its hint, and only the last write of the run that followed may say so, where
//! no rule was left behind: then it stays true, because positions only move on. What takes it back is a position that was moved
//! by somebody else and a rule with a `since` of its own that has not met the database yet; both show in the document.

use crate::couch::Seq;
use crate::couch::fingerprint::Fingerprint;
use crate::rules::rule::Rule;
use serde_json::{Map, Value};
use std::sync::Arc;

const FIELD: &str = "update_seq";

/// Holds for this position only.
fn text(fingerprint: &Fingerprint, last_seq: &Seq) -> String {
    format!("{fingerprint}@{}", last_seq.as_query())
}

pub fn store(doc: &mut Map<String, Value>, fingerprint: &Fingerprint, last_seq: &Seq) {
    match fingerprint.is_lasting() {
        true => drop(doc.insert(String::from(FIELD), Value::from(text(fingerprint, last_seq)))),
        false => forget(doc),
    }
}

pub fn forget(doc: &mut Map<String, Value>) {
    doc.shift_remove(FIELD);
}

/// True where the document says that `rules`, those of its database now, have everything up to the state that looks so.
pub fn is_delivered(doc: &Value, fingerprint: &Fingerprint, rules: &[Arc<Rule>]) -> bool {
    let Some(last_seq) = Seq::of_json(&doc["last_seq"]) else { return false };
    let has_work =
        doc["dirty"] != Value::Bool(false) || ["dirty_at", "possibly_deleted_at"].iter().any(|field| !doc[*field].is_null());
    doc["type"] == "change_listener"
        && !has_work
        && fingerprint.is_lasting()
        && doc[FIELD] == text(fingerprint, &last_seq)
        && nobody_is_elsewhere(&doc["ahead"], &doc["last_seq"], rules)
}

/// A rule with a `since` of its own is named in `ahead` once it has met the database. Any other rule starts at `last_seq`.
fn nobody_is_elsewhere(ahead: &Value, last_seq: &Value, rules: &[Arc<Rule>]) -> bool {
    let named = ahead["rules"].as_object();
    let has_met = |rule: &Rule| rule.since.is_none() || named.is_some_and(|named| named.contains_key(rule.id.as_ref()));
    let stand_together = match named {
        Some(named) => ahead["from"] == *last_seq && named.values().all(|seq| seq == last_seq),
        None => ahead.is_null(),
    };
    stand_together && rules.iter().all(|rule| has_met(rule))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::couch::docs::DbInfo;
    use serde_json::json;

    fn fingerprint(number: u64) -> Fingerprint {
        Fingerprint::of(&DbInfo {
            update_seq: Seq::Text(format!("{number}-x").into()),
            doc_count: 3,
            doc_del_count: 1,
            instance_start_time: String::from("1731000000"),
        })
    }

    fn rule(id: &str, since: Value) -> Arc<Rule> {
        let mut doc = json!({ "_id": id, "_rev": "1-r", "type": "on_change", "db_name": "^db$", "url": "http://127.0.0.1/" });
        if !since.is_null() {
            doc["since"] = since;
        }
        Arc::new(Rule::parse(&doc).expect("a rule"))
    }

    fn settled() -> Value {
        let doc =
            json!({ "_id": "spiegel_cl_db", "type": "change_listener", "db_name": "db", "last_seq": "7-a", "dirty": false });
        let mut doc = doc.as_object().cloned().unwrap();
        store(&mut doc, &fingerprint(7), &Seq::from("7-a"));
        Value::Object(doc)
    }

    #[test]
    fn it_is_written_to_be_read() {
        let mut doc = settled();
        assert_eq!(doc["update_seq"], "1731000000:7:3:1@7-a");
        assert!(is_delivered(&doc, &fingerprint(7), &[rule("r", Value::Null)]));
        assert!(!is_delivered(&doc, &fingerprint(8), &[rule("r", Value::Null)]), "it looks otherwise");
        forget(doc.as_object_mut().unwrap());
        assert!(doc.get("update_seq").is_none());
        assert!(!is_delivered(&doc, &fingerprint(7), &[rule("r", Value::Null)]));
    }

    #[test]
    fn whatever_is_owed_or_was_moved_takes_it_back() {
        let cases = [
            (json!({}), true),
            (json!({ "dirty_at": null, "possibly_deleted_at": null, "ahead": null, "locked_at": "2026-01-01T00:00:00Z" }), true),
            (json!({ "dirty": true }), false),
            (json!({ "dirty": null }), false),
            (json!({ "dirty_at": "2026-01-01T00:00:00Z" }), false),
            (json!({ "possibly_deleted_at": "2026-01-01T00:00:00Z" }), false),
            (json!({ "last_seq": "0" }), false),
            (json!({ "last_seq": 0 }), false),
            (json!({ "last_seq": null }), false),
            (json!({ "last_seq": "9-later" }), false),
            (json!({ "type": "other" }), false),
            (json!({ "ahead": 7 }), false),
            (json!({ "ahead": { "from": "7-a" } }), false),
            (json!({ "ahead": { "from": "7-a", "rules": {} } }), true),
            (json!({ "ahead": { "from": "7-a", "rules": { "r": "7-a" } } }), true),
            (json!({ "ahead": { "from": "7-a", "rules": { "r": "9-b" } } }), false),
            (json!({ "ahead": { "from": "6-z", "rules": { "r": "7-a" } } }), false),
            (json!({ "update_seq": 7 }), false),
            (json!({ "update_seq": "7-a" }), false),
            (json!({ "update_seq": null }), false),
        ];
        for (fields, expected) in cases {
            let mut doc = settled();
            doc.as_object_mut().unwrap().extend(fields.as_object().cloned().unwrap());
            assert_eq!(is_delivered(&doc, &fingerprint(7), &[rule("r", Value::Null)]), expected, "{fields}");
        }
        for doc in [Value::Null, json!([]), json!("text")] {
            assert!(!is_delivered(&doc, &fingerprint(7), &[]), "{doc}");
        }
    }

    #[test]
    fn a_rule_with_a_start_of_its_own_must_have_met_the_database() {
        let met = json!({ "from": "7-a", "rules": { "own": "7-a" } });
        for (since, ahead, expected) in [
            (json!("0"), Value::Null, false),
            (json!("now"), Value::Null, false),
            (json!("0"), json!({ "from": "7-a", "rules": { "other": "7-a" } }), false),
            (json!("0"), met.clone(), true),
            (json!("now"), met.clone(), true),
            (Value::Null, met, true),
        ] {
            let mut doc = settled();
            doc["ahead"] = ahead;
            let rules = [rule("r", Value::Null), rule("own", since.clone())];
            assert_eq!(is_delivered(&doc, &fingerprint(7), &rules), expected, "{since} {doc}");
        }
    }

    #[test]
    fn a_server_that_cannot_tell_instances_apart_is_asked_each_time() {
        let zero = Fingerprint::of(&DbInfo {
            update_seq: Seq::from("7-x"),
            doc_count: 3,
            doc_del_count: 1,
            instance_start_time: String::from("0"),
        });
        let mut doc = settled();
        store(doc.as_object_mut().unwrap(), &zero, &Seq::from("7-a"));
        assert!(doc.get("update_seq").is_none(), "{doc}");
        doc["update_seq"] = Value::from("0:7:3:1@7-a");
        assert!(!is_delivered(&doc, &zero, &[]));
    }
}
