//! One lock that this process holds, or tries to get: what to write, and what an answer means (pure).

use crate::job::timestamp;
use crate::locks::look::{By, due_at, is_dirty, lock_of, time_of};
use crate::locks::{Kind, Settings, clear};
use serde_json::{Map, Value, json};
use std::time::{Duration, SystemTime};

/// How the work ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All of it is done.
    Clean,
    /// There is more, or it broke off: whoever comes next goes on.
    Again,
    /// Not before then, after so many failures.
    Later { at: SystemTime, retries: u32 },
    /// Its database does not exist; look again then, unless that has been so for long enough.
    Missing { at: SystemTime, retries: u32 },
}

/// The last write.
#[derive(Debug, Clone, PartialEq)]
pub enum Last {
    Save(Value),
    Delete {
        id: String,
        rev: String,
    },
    /// The lock is lost: whoever has the document now sees to it.
    Nothing,
}

/// The document as it is when it is taken. What was due by its time is dirty from here on, so that it stays owed whoever
/// unlocks it.
pub fn taken(doc: &Value, me: &str, now: SystemTime) -> Value {
    let mut doc = doc.clone();
    if let Some(fields) = doc.as_object_mut() {
        if !is_dirty(&Value::Object(fields.clone())) {
            fields.insert(String::from("dirty"), Value::Bool(true));
            clear(fields, "dirty_at");
        }
        stamp(fields, me, now);
    }
    doc
}

fn stamp(fields: &mut Map<String, Value>, me: &str, now: SystemTime) {
    let at = timestamp(now);
    fields.shift_remove("_conflicts");
    fields.insert(String::from("locked_at"), Value::from(at.as_str()));
    fields.insert(String::from("locked_by"), json!({ "owner": me, "locked_at": at }));
    fields.insert(String::from("updated_at"), Value::from(at));
}

/// Without its lock, and otherwise as it is.
pub fn unlocked(doc: &Value, now: SystemTime) -> Value {
    let mut doc = doc.clone();
    if let Some(fields) = doc.as_object_mut() {
        unlock(fields, now);
    }
    doc
}

pub(super) fn unlock(fields: &mut Map<String, Value>, now: SystemTime) {
    fields.shift_remove("_conflicts");
    fields.insert(String::from("locked_at"), Value::Null);
    fields.shift_remove("locked_by");
    fields.insert(String::from("updated_at"), Value::from(timestamp(now)));
}

/// A lock that a 201 gave us.
#[derive(Debug, Clone)]
pub struct Held {
    me: String,
    /// The newest revision that we wrote, or took over as our own.
    doc: Value,
    /// Somebody wrote since we locked: there may be work that this run does not see.
    is_dirtied: bool,
    is_lost: bool,
}

impl Held {
    pub fn new(me: &str, doc: Value) -> Self {
        Self { me: me.to_string(), doc, is_dirtied: false, is_lost: false }
    }

    pub fn doc(&self) -> &Value {
        &self.doc
    }

    pub fn is_lost(&self) -> bool {
        self.is_lost
    }

    /// Conflicts showed up: what they know to be owed is not known here.
    pub fn dirtied(&mut self) {
        self.is_dirtied = true;
    }

    /// The next write of the work, whatever else it is for: every one renews the lock. None: the lock is lost.
    pub fn renewed(&self, now: SystemTime, change: impl FnOnce(&mut Map<String, Value>)) -> Option<Value> {
        if self.is_lost {
            return None;
        }
        let mut doc = self.doc.clone();
        if let Some(fields) = doc.as_object_mut() {
            change(fields);
            stamp(fields, &self.me, now);
        }
        Some(doc)
    }

    /// What ends the work. `change` carries what the work itself has to say, such as positions.
    pub fn ended(&self, end: End, now: SystemTime, settings: &Settings, change: impl FnOnce(&mut Map<String, Value>)) -> Last {
        if self.is_lost {
            return Last::Nothing;
        }
        if let End::Missing { .. } = end
            && !self.is_dirtied
            && is_long_gone(&self.doc, now, settings)
        {
            let text = |field: &str| self.doc[field].as_str().unwrap_or_default().to_string();
            return Last::Delete { id: text("_id"), rev: text("_rev") };
        }
        let mut doc = self.doc.clone();
        let kept = ["dirty", "dirty_at"].map(|field| (field, doc.get(field).cloned()));
        if let Some(fields) = doc.as_object_mut() {
            change(fields);
            // A run that failed is tried again in its time, and then brings what came meanwhile as well.
            let backs_off = matches!(end, End::Later { .. }) && Kind::of(&self.doc) == Some(Kind::Replicator);
            match self.is_dirtied && !backs_off {
                // What somebody said of it after we locked stands.
                true => kept.into_iter().for_each(|(field, value)| restore(fields, field, value)),
                false => say(fields, end),
            }
            match end {
                End::Missing { .. } if fields.get("possibly_deleted_at").and_then(|at| time_of(at).map(drop)).is_none() => {
                    fields.insert(String::from("possibly_deleted_at"), Value::from(timestamp(now)));
                }
                End::Missing { .. } | End::Again => {}
                End::Clean | End::Later { .. } => clear(fields, "possibly_deleted_at"),
            }
            unlock(fields, now);
        }
        Last::Save(doc)
    }

    /// Our write was confirmed.
    pub fn saved(&mut self, mut doc: Value, rev: &str) {
        doc["_rev"] = Value::from(rev);
        self.doc = doc;
    }

    /// Our write was a conflict: the document is `current` now. True where we still hold it.
    pub fn conflicted(&mut self, current: Option<Value>) -> bool {
        match current {
            Some(current) if lock_of(&current, &self.me).is_some_and(|lock| lock.by == By::Us) => {
                self.is_dirtied = true;
                self.doc = current;
            }
            _ => self.is_lost = true,
        }
        !self.is_lost
    }
}

fn restore(fields: &mut Map<String, Value>, field: &str, value: Option<Value>) {
    match value {
        Some(value) => drop(fields.insert(field.to_string(), value)),
        None => drop(fields.shift_remove(field)),
    }
}

fn say(fields: &mut Map<String, Value>, end: End) {
    let mut set = |field: &str, value: Value| drop(fields.insert(field.to_string(), value));
    match end {
        End::Clean => {
            set("dirty", Value::Bool(false));
            clear(fields, "dirty_at");
            clear(fields, "retries");
        }
        End::Again => {
            set("dirty", Value::Bool(true));
            clear(fields, "dirty_at");
        }
        // Never `dirty: true`: the original would loop on it.
        End::Later { at, retries } | End::Missing { at, retries } => {
            set("dirty", Value::Bool(false));
            set("dirty_at", Value::from(timestamp(at)));
            set("retries", Value::from(retries));
        }
    }
}

/// How often its work has failed so far.
pub fn retries(doc: &Value) -> u32 {
    u32::try_from(doc["retries"].as_u64().unwrap_or_default()).unwrap_or(u32::MAX)
}

/// What is written into a document that is owed work; None where it says so already, by a time that is to come as well, and
/// nobody is at work on it.
pub fn owed(doc: &Value, now: SystemTime) -> Option<Value> {
    let is_free = lock_of(doc, "").is_none();
    // What backs off waits for its time, however often its source changes.
    if is_free && (is_dirty(doc) || due_at(doc).is_some_and(|at| at > now)) {
        return None;
    }
    let mut doc = doc.clone();
    let fields = doc.as_object_mut()?;
    fields.shift_remove("_conflicts");
    fields.insert(String::from("dirty"), Value::Bool(true));
    clear(fields, "dirty_at");
    fields.insert(String::from("updated_at"), Value::from(timestamp(now)));
    Some(doc)
}

/// Whether what it is about has been missing for long enough to be forgotten.
pub fn is_long_gone(doc: &Value, now: SystemTime, settings: &Settings) -> bool {
    let since = time_of(&doc["possibly_deleted_at"]);
    since.is_some_and(|since| now.duration_since(since).unwrap_or_default() >= settings.assume_deleted_after)
}

/// When to look again for a database that is missing: soon at first, because a node may lag, and in the end once it may be
/// forgotten.
pub fn look_for_missing(doc: &Value, now: SystemTime, backoff: Duration, settings: &Settings) -> SystemTime {
    let since = time_of(&doc["possibly_deleted_at"]).unwrap_or(now);
    let forgotten_at = since + settings.assume_deleted_after;
    match forgotten_at <= now {
        true => now + backoff,
        false => (now + backoff).min(forgotten_at),
    }
}
