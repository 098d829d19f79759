//! What a database owes, written into CouchDB: that there is work, or that the database is missing.

use crate::couch::{CouchError, WriteResult};
use crate::db::dirty::{Marking, Subject, mark};
use crate::db::listen::ListenError;
use crate::db::{Shared, known, listen};
use crate::job::{DbName, timestamp};
use crate::locks::look::{due_at, time_of};
use crate::topology;
use serde_json::Value;
use std::time::{Duration, SystemTime};
use tokio::sync::oneshot;

/// Writes that there is work: `dirty` in the `change_listener`, and in the replicators that wait.
pub async fn make_durable(shared: &Shared, db: &DbName) -> bool {
    let snapshot = shared.snapshot.borrow().clone();
    let (done, replicators) = oneshot::channel();
    let _ = shared.topology.cast(topology::Message::Spill { db: db.clone(), done });
    let listens = snapshot.has_rules_of(db);
    (!listens || mark_dirty(shared, db).await) && replicators.await.is_ok()
}

async fn mark_dirty(shared: &Shared, db: &DbName) -> bool {
    let id = listen::document_id(db);
    // Written even where it says so already: the run under way must not take this for what it started with.
    let marked = shared.tools.checkpoints.update(&id, |doc| {
        doc["dirty"] = Value::Bool(true);
        if let Some(due) = doc.get_mut("dirty_at") {
            // Left there, it would keep the original from moving `last_seq`.
            *due = Value::Null;
        }
        doc.as_object_mut().map(known::forget);
        true
    });
    match marked.await {
        Ok(Some(_)) => true,
        Ok(None) => {
            let mut doc = listen::new_document(&id, db);
            doc.insert(String::from("dirty"), Value::Bool(true));
            let saved = shared.tools.checkpoints.save(Value::Object(doc)).await;
            // A conflict means that the run wrote its first position meanwhile; the next spill marks that.
            matches!(saved, Ok(WriteResult::Saved { .. }))
        }
        Err(error) => {
            tracing::error!(%db, %error, "cannot write that the database has work");
            false
        }
    }
}

/// Others are at work: whoever locks the `change_listener` listens, this process among them.
pub async fn leave_to_locks(shared: &Shared, db: &DbName) -> Result<(), ListenError> {
    let id = listen::document_id(db);
    let checkpoints = &shared.tools.checkpoints;
    let subject = Subject::ChangeListener(db.to_string());
    let update = |doc: &mut Value| match mark(&subject, Some(doc), None, SystemTime::now()) {
        Marking::Write(written) => {
            *doc = written;
            true
        }
        _ => false,
    };
    let unsaved = |reason: String| ListenError::Unsaved(reason);
    for _ in 0..ROUNDS_MAX {
        if checkpoints.update(&id, update).await.map_err(|error| unsaved(error.to_string()))?.is_some() {
            return Ok(());
        }
        if let Some(None) = shared.tools.couch.dbs_info(&[db]).await?.first() {
            // Nobody has listened to it, and nobody will.
            return Ok(());
        }
        let Marking::Write(doc) = mark(&subject, None, None, SystemTime::now()) else { return Ok(()) };
        match checkpoints.save(doc).await {
            Ok(WriteResult::Saved { .. }) => return Ok(()),
            Ok(WriteResult::Refused { reason }) => return Err(unsaved(reason)),
            // Somebody else made it meanwhile, and may not have known of this change.
            Ok(WriteResult::Conflict) => {}
            Err(_) => return Err(unsaved(String::from("the checkpoints are being restarted"))),
        }
    }
    Err(unsaved(String::from("the document is made and deleted all the time")))
}

/// Each round lost a race against whoever makes the document, or deletes it.
const ROUNDS_MAX: usize = 20;

pub enum Missing {
    /// It could not be written.
    Unmarked,
    /// Marked, to be looked at again later.
    Marked,
    /// Nothing is left of it.
    Forgotten,
}

/// Says since when its database is missing, and when somebody is to look again: whoever does the work by then. False where it
/// says so already.
fn say_missing(doc: &mut Value, since: Option<SystemTime>, now: SystemTime, assume_deleted_after: Duration) -> bool {
    let is_said = since.is_some() && doc["dirty"] == Value::Bool(false) && due_at(doc).is_some();
    if !is_said {
        let since = since.unwrap_or(now);
        doc["possibly_deleted_at"] = Value::from(timestamp(since));
        doc["dirty"] = Value::Bool(false);
        doc["dirty_at"] = Value::from(timestamp(since.min(now) + assume_deleted_after));
        doc.as_object_mut().map(known::forget);
    }
    !is_said
}

/// Marks the `change_listener` of a missing database, and deletes it once the database has been missing for long enough.
pub async fn forget_missing(shared: &Shared, db: &DbName) -> Missing {
    let id = listen::document_id(db);
    let now = SystemTime::now();
    let mut long_gone: Option<String> = None;
    let assume_deleted_after = shared.settings.assume_deleted_after;
    let marked = shared.tools.checkpoints.update(&id, |doc| match time_of(&doc["possibly_deleted_at"]) {
        Some(since) if now.duration_since(since).unwrap_or_default() >= assume_deleted_after => {
            long_gone = doc["_rev"].as_str().map(str::to_string);
            false
        }
        since => say_missing(doc, since, now, assume_deleted_after),
    });
    match marked.await {
        Ok(None) => return Missing::Forgotten,
        Ok(Some(_)) => {}
        Err(error) => {
            tracing::error!(%db, %error, "cannot mark the database as possibly deleted");
            return Missing::Unmarked;
        }
    }
    let Some(rev) = long_gone else { return Missing::Marked };
    match shared.tools.couch.delete_doc(&shared.tools.spiegel_db, &id, &rev).await {
        Ok(WriteResult::Saved { .. }) | Err(CouchError::NotFound(_)) => Missing::Forgotten,
        Ok(_) | Err(_) => Missing::Unmarked,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_missing_database_is_looked_at_again_by_whoever_works_then() {
        let wait = Duration::from_secs(300);
        let at = |seconds: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds);
        let text = |seconds: u64| json!(timestamp(at(seconds)));
        let said = |since: u64, due: u64| json!({ "dirty": false, "possibly_deleted_at": text(since), "dirty_at": text(due) });
        for (before, expected) in [
            (json!({ "dirty": true, "update_seq": "7-x" }), Some(said(100, 400))),
            (json!({ "dirty": false, "possibly_deleted_at": null }), Some(said(100, 400))),
            // Said by somebody who did not say when to look again.
            (json!({ "dirty": false, "possibly_deleted_at": text(50) }), Some(said(50, 350))),
            (json!({ "dirty": true, "possibly_deleted_at": text(50), "dirty_at": null }), Some(said(50, 350))),
            (said(50, 350), None),
        ] {
            let mut doc = before.clone();
            let since = time_of(&doc["possibly_deleted_at"]);
            assert_eq!(say_missing(&mut doc, since, at(100), wait), expected.is_some(), "{before}");
            assert_eq!(doc, expected.unwrap_or(before));
        }
    }
}
