//! What a document says of its work, and what to do about it (pure).
//!
//! Fields are read as the original's JavaScript reads them: null, false, 0 and "" are no lock and no time.

use crate::locks::Settings;
use serde_json::Value;
use std::time::{Duration, SystemTime};

/// Whose a lock is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// This process's, as far as the document says.
    Us,
    /// Of another process of ours.
    Ours,
    /// Of the original, or of somebody who writes like it.
    Original,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lock {
    pub by: By,
    /// None where it cannot be read.
    pub at: Option<SystemTime>,
}

/// What this process knows of a document besides its text.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// This process, as `locked_by.owner` names it.
    pub me: &'a str,
    /// For how long its revision has been the same, by a clock that nobody sets.
    pub unchanged_for: Duration,
    pub settings: &'a Settings,
}

/// What to do with a document that this process does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Nothing,
    /// Lock it: it is owed work, and nobody who lives has it.
    Take,
    /// Its lock is a dead one's, and nothing is owed.
    Unlock,
    /// It is due then.
    At(SystemTime),
    /// Somebody works on it, or died; that is known so long from now if its revision stays the same.
    After(Duration),
}

/// As JavaScript sees it.
pub fn is_truthy(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Number(number) => number.as_f64() != Some(0.0),
        _ => true,
    }
}

pub fn time_of(value: &Value) -> Option<SystemTime> {
    humantime::parse_rfc3339_weak(value.as_str()?).ok()
}

/// A new document has no such field and is dirty.
pub fn is_dirty(doc: &Value) -> bool {
    doc["dirty"] != Value::Bool(false)
}

/// When a clean document becomes due; at once where that cannot be read, because that loses nothing.
pub fn due_at(doc: &Value) -> Option<SystemTime> {
    is_truthy(&doc["dirty_at"]).then(|| time_of(&doc["dirty_at"]).unwrap_or(SystemTime::UNIX_EPOCH))
}

pub fn is_owed(doc: &Value, now: SystemTime) -> bool {
    is_dirty(doc) || due_at(doc).is_some_and(|at| at <= now)
}

/// The original copies fields that it does not know into its own lock, so `locked_by` counts only for the lock that it names.
pub fn lock_of(doc: &Value, me: &str) -> Option<Lock> {
    let locked_at = &doc["locked_at"];
    if !is_truthy(locked_at) {
        return None;
    }
    let owner = doc["locked_by"]["owner"].as_str().filter(|_| doc["locked_by"]["locked_at"] == *locked_at);
    let by = match owner {
        Some(owner) if owner == me => By::Us,
        Some(_) => By::Ours,
        None => By::Original,
    };
    Some(Lock { by, at: time_of(locked_at) })
}

/// How long until this lock is known to be dead; zero where it is.
pub fn dead_in(lock: &Lock, now: SystemTime, known: &Known<'_>) -> Duration {
    let Settings { retry_after, stale_after, .. } = *known.settings;
    match lock.by {
        // Ours, and not in our hands: the answer to its write was lost.
        By::Us => Duration::ZERO,
        By::Ours => stale_after.saturating_sub(known.unchanged_for),
        By::Original => {
            // Its clock may be wrong, and its time unreadable: a revision that stays is as good.
            let by_revision = retry_after.saturating_sub(known.unchanged_for);
            let age = lock.at.map(|at| now.duration_since(at).unwrap_or_default());
            age.map_or(by_revision, |age| by_revision.min(retry_after.saturating_sub(age)))
        }
    }
}

/// For a document that this process does not hold and has no conflicts.
pub fn next(doc: &Value, now: SystemTime, known: &Known<'_>) -> Next {
    let is_owed = is_owed(doc, now);
    let Some(lock) = lock_of(doc, known.me) else {
        return match due_at(doc) {
            _ if is_owed => Next::Take,
            Some(at) => Next::At(at),
            None => Next::Nothing,
        };
    };
    match (dead_in(&lock, now, known), lock.by) {
        (Duration::ZERO, _) if is_owed => Next::Take,
        (Duration::ZERO, _) => Next::Unlock,
        (wait, By::Original) => Next::After(wait.max(known.settings.check_stalled)),
        (wait, _) => Next::After(wait),
    }
}
