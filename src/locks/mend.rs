//! Conflicted revisions of a document, and locks that too few nodes took (pure, but for the lock around those that are not there).

use crate::job::timestamp;
use crate::locks::clear;
use crate::locks::held::unlock;
use crate::locks::look::{Known, dead_in, is_dirty, lock_of};
use serde_json::Value;
use std::collections::HashSet;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

/// What to do about conflicted revisions.
#[derive(Debug, Clone, PartialEq)]
pub enum Mend {
    /// Whoever is at work on one of them may still mend it.
    Wait(Duration),
    /// Write the winner first, where that is needed; then remove the others.
    Write { winner: Option<Value>, remove: Vec<String> },
}

/// `losers` are those conflicted revisions of `winner` that can be read. What any of them knew to be owed is not looked for: the
/// winner is owed.
pub fn mend(winner: &Value, losers: &[Value], now: SystemTime, known: &Known<'_>) -> Mend {
    let locks = losers.iter().chain([winner]).filter_map(|doc| lock_of(doc, known.me));
    let wait = locks.map(|lock| dead_in(&lock, now, known)).max().unwrap_or_default();
    if !wait.is_zero() {
        return Mend::Wait(wait);
    }
    let remove = conflicts_of(winner).map(String::from).collect();
    let is_free = lock_of(winner, known.me).is_none();
    if is_free && is_dirty(winner) {
        return Mend::Write { winner: None, remove };
    }
    let mut doc = winner.clone();
    if let Some(fields) = doc.as_object_mut() {
        fields.insert(String::from("dirty"), Value::Bool(true));
        clear(fields, "dirty_at");
        match is_free {
            true => drop(fields.insert(String::from("updated_at"), Value::from(timestamp(now)))),
            false => unlock(fields, now),
        }
        fields.shift_remove("_conflicts");
    }
    Mend::Write { winner: Some(doc), remove }
}

pub fn conflicts_of(doc: &Value) -> impl Iterator<Item = &str> {
    doc["_conflicts"].as_array().into_iter().flatten().filter_map(Value::as_str)
}

/// Conflicted revisions that a server names and does not find: nothing can be done about them, and the work goes on.
#[derive(Debug, Default)]
pub struct Phantoms(Mutex<HashSet<(String, String)>>);

/// There should be none at all.
const PHANTOMS_MAX: usize = 10_000;

impl Phantoms {
    pub fn note(&self, id: &str, rev: &str) {
        if let Ok(mut known) = self.0.lock()
            && known.len() < PHANTOMS_MAX
        {
            known.insert((id.to_string(), rev.to_string()));
        }
    }

    /// Takes them out of the document's `_conflicts`.
    pub fn strip(&self, doc: &mut Value) {
        let Some(id) = doc["_id"].as_str().map(String::from) else { return };
        let Some(Value::Array(conflicts)) = doc.get_mut("_conflicts") else { return };
        if let Ok(known) = self.0.lock() {
            let is_phantom = |rev: &str| known.contains(&(id.clone(), rev.to_string()));
            conflicts.retain(|rev| !rev.as_str().is_some_and(is_phantom));
        }
    }
}

/// What becomes of a lock that only a 202 answered: somebody else may have got a 201.
#[derive(Debug, Clone, PartialEq)]
pub enum Unconfirmed {
    /// Another revision is there: ours goes.
    Remove {
        rev: String,
    },
    /// Ours is all that there is: without its lock it is free again.
    Unlock(Value),
    Nothing,
}

/// `current` is the document now, with its `_conflicts`; `rev` is what the 202 named.
pub fn unconfirmed(current: Option<&Value>, rev: &str, now: SystemTime) -> Unconfirmed {
    let Some(current) = current else { return Unconfirmed::Nothing };
    match (current["_rev"] == rev, conflicts_of(current).next().is_none()) {
        (true, true) => Unconfirmed::Unlock(crate::locks::held::unlocked(current, now)),
        (true, false) => Unconfirmed::Remove { rev: rev.to_string() },
        (false, _) if conflicts_of(current).any(|conflict| conflict == rev) => Unconfirmed::Remove { rev: rev.to_string() },
        (false, _) => Unconfirmed::Nothing,
    }
}
