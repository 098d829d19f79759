//! How far each replication is: a cache of what the checkpoints say, and the checkpoints that are still to be written.
//!
//! A position is used only by a run that has just read, on both sides, the session that was confirmed last: a database that
//! was deleted and made again, or restored, has another or none.

use super::checkpoint::Checkpoint;
use super::overlap::Overlap;
use super::peer::Peer;
use super::written::Written;
use crate::couch::Seq;
use crate::replicate::Counts;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

/// What both sides were last confirmed to say. The source's checkpoint is written less often, so its session may be older.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Anchor {
    pub at_target: Arc<str>,
    /// None where the source takes no checkpoint: the target's alone counts.
    pub at_source: Option<Arc<str>>,
}

impl Anchor {
    pub fn holds_at_target(&self, target: Option<&Checkpoint>) -> bool {
        target.is_some_and(|target| target.session_id.as_ref() == Some(&self.at_target))
    }

    pub fn holds_at_source(&self, source: Option<&Checkpoint>) -> bool {
        self.at_source.is_none() || source.is_some_and(|source| source.session_id == self.at_source)
    }
}

#[derive(Debug, Clone)]
pub struct Position {
    /// Everything up to here is in the target.
    pub since: Seq,
    pub anchor: Anchor,
    /// Most of what came last were first revisions: the next may come with the changes.
    pub has_new_documents: bool,
    pub source_behind: SourceBehind,
    /// None: it is not known what was read last.
    pub overlap: Option<Arc<Overlap>>,
    /// Of `Slots::epoch`: what was true before an outage need not be true after it.
    pub epoch: u64,
}

/// How far the source's checkpoint is behind the target's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceBehind {
    /// When it last said as much as the target's. None: it is to be written with the next one.
    pub equal: Option<Instant>,
    pub rows_since: u64,
}

/// So few rows are read again, and found in the target, by one request each.
const ROWS_BEHIND_MAX: u64 = 100;

impl SourceBehind {
    pub fn equal_now() -> Self {
        Self { equal: Some(Instant::now()), rows_since: 0 }
    }

    pub fn unknown() -> Self {
        Self { equal: None, rows_since: 0 }
    }

    /// It is to be written with the next one of the target's.
    pub fn due(self) -> Self {
        Self { equal: None, ..self }
    }

    pub fn is_known(&self) -> bool {
        self.equal.is_some()
    }

    pub fn and(self, rows: u64) -> Self {
        Self { rows_since: self.rows_since.saturating_add(rows), ..self }
    }

    pub fn is_due(&self, after: Duration) -> bool {
        self.rows_since >= ROWS_BEHIND_MAX || self.equal.is_none_or(|equal| equal.elapsed() >= after)
    }
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
    /// Of few at any time.
    pub unsaved: Option<Box<Unsaved>>,
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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_sources_checkpoint_is_due_by_time_or_by_rows() {
        let after = Duration::from_secs(600);
        let equal = SourceBehind::equal_now();
        assert!(!equal.is_due(after));
        assert!(!equal.and(99).is_due(after));
        assert!(equal.and(60).and(40).is_due(after));
        assert!(equal.and(u64::MAX).and(1).is_due(after));
        assert!(SourceBehind::unknown().is_due(after), "it is not known how far it is behind");
        tokio::time::advance(after).await;
        assert!(equal.is_due(after));
        assert!(SourceBehind::equal_now().is_due(Duration::ZERO));
    }

    #[test]
    fn each_side_has_a_session_of_its_own() {
        let side = |session: &str| Checkpoint { session_id: Some(session.into()), ..Checkpoint::default() };
        let (old, new) = (side("old"), side("new"));
        let ahead = Anchor { at_target: "new".into(), at_source: Some("old".into()) };
        let alone = Anchor { at_target: "new".into(), at_source: None };
        for (anchor, source, target, expected) in [
            (&ahead, Some(&old), Some(&new), (true, true)),
            (&ahead, Some(&new), Some(&old), (false, false)),
            (&ahead, None, Some(&new), (false, true)),
            (&ahead, Some(&Checkpoint::default()), None, (false, false)),
            (&alone, None, Some(&new), (true, true)),
            (&alone, Some(&old), Some(&old), (true, false)),
        ] {
            assert_eq!((anchor.holds_at_source(source), anchor.holds_at_target(target)), expected, "{anchor:?}");
        }
    }
}
