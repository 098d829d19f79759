//! What a database owes, written into CouchDB: that there is work, or that the database is missing.

use crate::couch::{CouchError, WriteResult};
use crate::db::dirty::{Marking, Subject, mark};
use crate::db::listen::ListenError;
use crate::db::{Shared, known, listen};
use crate::job::{DbName, timestamp};
use crate::topology;
use serde_json::Value;
use std::time::SystemTime;
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
    if checkpoints.update(&id, update).await.map_err(|error| unsaved(error.to_string()))?.is_some() {
        return Ok(());
    }
    if let Some(None) = shared.tools.couch.dbs_info(&[db]).await?.first() {
        // Nobody has listened to it, and nobody will.
        return Ok(());
    }
    let Marking::Write(doc) = mark(&subject, None, None, SystemTime::now()) else { return Ok(()) };
    match checkpoints.save(doc).await {
        Ok(WriteResult::Saved { .. }) => Ok(()),
        Ok(WriteResult::Refused { reason }) => Err(unsaved(reason)),
        Ok(WriteResult::Conflict) | Err(_) => Err(unsaved(String::from("somebody else made the document meanwhile"))),
    }
}

pub enum Missing {
    /// It could not be written.
    Unmarked,
    /// Marked, to be looked at again later.
    Marked,
    /// Nothing is left of it.
    Forgotten,
}

/// Marks the `change_listener` of a missing database, and deletes it once the database has been missing for long enough.
pub async fn forget_missing(shared: &Shared, db: &DbName) -> Missing {
    let id = listen::document_id(db);
    let now = SystemTime::now();
    let mut long_gone: Option<String> = None;
    let marked = shared.tools.checkpoints.update(&id, |doc| {
        let since = doc["possibly_deleted_at"].as_str().and_then(|text| humantime::parse_rfc3339_weak(text).ok());
        let Some(since) = since else {
            doc["possibly_deleted_at"] = Value::from(timestamp(now));
            doc["dirty"] = Value::Bool(false);
            doc.as_object_mut().map(known::forget);
            return true;
        };
        if now.duration_since(since).unwrap_or_default() >= shared.settings.assume_deleted_after {
            long_gone = doc["_rev"].as_str().map(str::to_string);
        }
        false
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
