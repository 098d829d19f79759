//! Locks in documents: how several processes, ours and the original's, share the work in the spiegel database.
//!
//! A `change_listener` or a `replicator` with `dirty` other than `false` is owed work. Whoever writes `locked_at` into it first has
//! it; a conflict means that somebody else was first. The lock of one of ours is renewed while the work lasts, and says whose it is
//! in `locked_by`, so that a dead process's lock is free after a minute. What a document
//! means and what to write are plain functions of it, the time and what this process knows; `hold` has the requests.

pub mod held;
pub mod hold;
pub mod look;
pub mod mend;
pub mod mixed;
pub mod sign;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;

use serde_json::{Map, Value};
use std::time::Duration;

/// The documents that are locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    ChangeListener,
    Replicator,
}

impl Kind {
    pub fn of(doc: &Value) -> Option<Self> {
        match doc["type"].as_str()? {
            "change_listener" => Some(Kind::ChangeListener),
            "replicator" => Some(Kind::Replicator),
            _ => None,
        }
    }
}

#[derive(Debug, Clone)]
pub struct Settings {
    /// How long a lock of the original counts, from its `locked_at`.
    pub retry_after: Duration,
    /// Locks of the original are looked at no more often.
    pub check_stalled: Duration,
    /// So long without a new revision, and a lock of ours is a dead process's.
    pub stale_after: Duration,
    /// How long a missing database's documents are kept.
    pub assume_deleted_after: Duration,
}

impl Settings {
    /// Two renewals may be late before anybody doubts.
    pub fn renew_every(&self) -> Duration {
        self.stale_after / 3
    }
}

fn clear(doc: &mut Map<String, Value>, field: &str) {
    if let Some(value) = doc.get_mut(field) {
        *value = Value::Null;
    }
}
