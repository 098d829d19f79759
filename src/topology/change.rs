//! What a replicator document says of its work, in the original's words (pure).

use crate::job::timestamp;
use crate::locks::held::owed;
use crate::locks::look::lock_of;
use crate::topology::states::Change;
use serde_json::Value;
use std::time::SystemTime;

/// Whether a run that knew this revision may settle the document. `is_mixed`: others lock documents, and who holds this one sees
/// to it.
pub fn may_clean(doc: &Value, known_rev: &str, is_mixed: bool) -> bool {
    doc["_rev"] == known_rev && !(is_mixed && lock_of(doc, "").is_some())
}

pub fn write(doc: &mut Value, change: &Change, now: SystemTime) {
    let time = |at: SystemTime| Value::from(timestamp(at));
    doc["updated_at"] = time(now);
    match change {
        Change::Dirty | Change::Owed => {
            doc["dirty"] = Value::Bool(true);
            doc["dirty_at"] = Value::Null;
        }
        Change::DirtyAt { at, retries, is_source_gone } => {
            doc["dirty"] = Value::Bool(false);
            doc["dirty_at"] = time(*at);
            doc["retries"] = Value::from(*retries);
            match is_source_gone {
                true if doc["possibly_deleted_at"].is_null() => doc["possibly_deleted_at"] = time(now),
                true => {}
                false => clear(doc, "possibly_deleted_at"),
            }
        }
        Change::Clean => {
            doc["dirty"] = Value::Bool(false);
            // A lock that is left there would keep the original from the next change, and nobody showed himself who could hold it.
            for field in ["dirty_at", "retries", "possibly_deleted_at", "locked_at"] {
                clear(doc, field);
            }
        }
    }
}

/// False where it says so already.
pub fn owe(doc: &mut Value) -> bool {
    match owed(doc, SystemTime::now()) {
        Some(written) => {
            *doc = written;
            true
        }
        None => false,
    }
}

fn clear(doc: &mut Value, field: &str) {
    if let Some(value) = doc.get_mut(field) {
        *value = Value::Null;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_a_source_that_is_gone_makes_it_forgotten_one_day() {
        let (now, long_ago) = (SystemTime::UNIX_EPOCH, json!("2020-01-01T00:00:00.000Z"));
        for (before, is_source_gone, expected) in [
            (json!(null), true, json!(timestamp(now))),
            (long_ago.clone(), true, long_ago.clone()),
            (json!(null), false, json!(null)),
            (long_ago, false, json!(null)),
        ] {
            let mut doc = json!({ "dirty": true, "possibly_deleted_at": before });
            write(&mut doc, &Change::DirtyAt { at: now, retries: 3, is_source_gone }, now);
            assert_eq!(doc["possibly_deleted_at"], expected, "{doc} {is_source_gone}");
            assert_eq!((&doc["dirty"], &doc["dirty_at"], &doc["retries"]), (&json!(false), &json!(timestamp(now)), &json!(3)));
        }
    }

    #[test]
    fn what_others_lock_is_not_settled_by_a_run_without_a_lock() {
        let lock = json!("2027-01-01T00:00:00.000Z");
        for (rev, locked_at, is_mixed, expected) in [
            ("2-known", json!(null), false, true),
            ("2-known", json!(null), true, true),
            // Left there by the dead: nobody showed himself.
            ("2-known", lock.clone(), false, true),
            ("2-known", lock.clone(), true, false),
            ("3-theirs", json!(null), false, false),
            ("3-theirs", lock, true, false),
        ] {
            let doc = json!({ "_id": "r", "_rev": rev, "dirty": true, "locked_at": locked_at });
            assert_eq!(may_clean(&doc, "2-known", is_mixed), expected, "{doc} {is_mixed}");
        }
    }
}
