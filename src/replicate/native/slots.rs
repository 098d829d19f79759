//! How far each replication is: a cache of what the checkpoints say, and the checkpoints that are still to be written.
//!
//! A position is used only by a run that has just read, on both sides, the session that was confirmed last: a database that
//! was deleted and made again, or restored, has another or none.

use super::checkpoint::Checkpoint;
use super::peer::Peer;
use super::written::Written;
use crate::couch::Seq;
use crate::replicate::Counts;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

/// What both sides were last confirmed to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Anchor {
    pub session_id: Arc<str>,
    /// The source takes no checkpoint: the target's alone counts.
    pub is_target_only: bool,
}

impl Anchor {
    pub fn holds(&self, source: Option<&Checkpoint>, target: Option<&Checkpoint>) -> bool {
        self.holds_at_target(target) && self.holds_at_source(source)
    }

    pub fn holds_at_target(&self, target: Option<&Checkpoint>) -> bool {
        target.is_some_and(|target| target.session_id.as_ref() == Some(&self.session_id))
    }

    pub fn holds_at_source(&self, source: Option<&Checkpoint>) -> bool {
        self.is_target_only || source.is_some_and(|source| source.session_id.as_ref() == Some(&self.session_id))
    }
}

#[derive(Debug, Clone)]
pub struct Position {
    /// Everything up to here is in the target.
    pub since: Seq,
    pub anchor: Anchor,
    /// Most of what came last were first revisions: the next may come with the changes.
    pub has_new_documents: bool,
    /// When the source was last read to say so.
    pub source_seen: Instant,
    /// Of `Slots::epoch`: what was true before an outage need not be true after it.
    pub epoch: u64,
}

/// Documents that are in the target while the checkpoints do not say so yet.
pub struct Unsaved {
    pub replicator_id: Arc<str>,
    pub source: Peer,
    pub target: Peer,
    pub start: Seq,
    pub counts: Counts,
    pub written: Written,
    pub started: SystemTime,
    pub since: Instant,
}

#[derive(Default)]
pub struct Slot {
    pub position: Option<Position>,
    pub unsaved: Option<Unsaved>,
}

/// By replication id. Whoever works at a replication, a run or a checkpoint, holds its slot.
pub struct Slots {
    slots: Mutex<HashMap<Arc<str>, Arc<tokio::sync::Mutex<Slot>>>>,
    /// Those with something unsaved.
    unsaved: Mutex<HashMap<Arc<str>, Instant>>,
    max: usize,
    epoch: AtomicU64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Slots {
    /// To forget one costs the next run a comparison of histories, so their number may be bounded without care.
    pub fn new(max: usize) -> Self {
        Self { slots: Mutex::default(), unsaved: Mutex::default(), max, epoch: AtomicU64::new(0) }
    }

    pub async fn hold(&self, id: &Arc<str>) -> OwnedMutexGuard<Slot> {
        let slot = {
            let mut slots = locked(&self.slots);
            if slots.len() >= self.max && !slots.contains_key(id) {
                let unsaved = locked(&self.unsaved);
                let mut room = self.max / 8;
                slots.retain(|id, slot| {
                    let goes = room > 0 && Arc::strong_count(slot) == 1 && !unsaved.contains_key(id);
                    room -= usize::from(goes);
                    !goes
                });
            }
            slots.entry(id.clone()).or_default().clone()
        };
        slot.lock_owned().await
    }

    /// None where somebody works at it, who will see to it himself.
    pub fn try_hold(&self, id: &Arc<str>) -> Option<OwnedMutexGuard<Slot>> {
        let slot = locked(&self.slots).get(id).cloned();
        slot?.try_lock_owned().ok()
    }

    pub fn mark_unsaved(&self, id: &Arc<str>, since: Instant) {
        locked(&self.unsaved).entry(id.clone()).or_insert(since);
    }

    pub fn mark_saved(&self, id: &str) {
        locked(&self.unsaved).remove(id);
    }

    /// Those that have waited since before then.
    pub fn unsaved_since(&self, then: Instant) -> Vec<Arc<str>> {
        locked(&self.unsaved).iter().filter(|(_, since)| **since <= then).map(|(id, _)| id.clone()).collect()
    }

    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// A server was away: it may come back with an older copy of its data.
    pub fn next_epoch(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }
}
