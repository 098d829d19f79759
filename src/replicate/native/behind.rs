//! Checkpoints, written behind the documents: bounded in time, many of one database at once, never ahead of what is confirmed.
//!
//! CouchDB compares no revision of a local document: whoever writes last wins, and learns nothing. So both sides are read right
//! before, and a checkpoint is written only where both still say what was confirmed last. Where they do not, a side was
//! deleted and made again, or restored, since the documents were written: then that replicator has to run again.

use super::checkpoint::{Checkpoint, Entry, SourceRefused, common};
use super::peer::{Peer, PeerError};
use super::shared::Shared;
use super::slots::{Anchor, Position, Slot, Slots, Unsaved};
use super::written::Remembered;
use crate::couch::Seq;
use futures_util::stream::StreamExt;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::Notify;
use tokio::time::Instant;

pub struct Behind {
    pub slots: Slots,
    pub shared: Arc<Shared>,
    /// How long a checkpoint may stay behind.
    pub after: Duration,
    /// Replicators whose documents may be gone from the target.
    pub again: Again,
    pub remembered: Remembered,
}

/// Replicators that have to run again although nobody dirtied them; each once.
#[derive(Default)]
pub struct Again {
    ids: Mutex<BTreeSet<Arc<str>>>,
    added: Notify,
}

impl Again {
    fn ids(&self) -> MutexGuard<'_, BTreeSet<Arc<str>>> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add(&self, id: Arc<str>) {
        self.ids().insert(id);
        self.added.notify_one();
    }

    pub async fn next(&self) -> Arc<str> {
        loop {
            let added = self.added.notified();
            let id = self.ids().pop_first();
            match id {
                Some(id) => return id,
                None => added.await,
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checked {
    Saved,
    /// One side is not what it was.
    Moved,
}

type Result<T> = std::result::Result<T, PeerError>;

/// Checkpoints written at once when many are due: so many share their requests.
const AT_ONCE: usize = 256;
/// No longer between two looks at what is due, because too much may be remembered.
const LOOK_EACH: Duration = Duration::from_secs(5);
/// A side that could not be written for so long is not waited for any longer.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(600);

impl Behind {
    pub async fn read_checkpoint(&self, peer: &Peer, id: &Arc<str>) -> Result<Option<Checkpoint>> {
        let text = self.shared.read_local(peer, id).await?;
        // What is no JSON is no checkpoint, and no reason to stop: it is written anew.
        let document = text.map(|text| serde_json::from_slice(&text).unwrap_or_default());
        Ok(document.as_ref().map(Checkpoint::read))
    }

    /// What is unsaved in this slot, if both sides still stand where they were.
    pub async fn save(&self, id: &Arc<str>, slot: &mut Slot) -> Result<Checked> {
        let (Some(unsaved), Some(position)) = (&slot.unsaved, &slot.position) else {
            slot.unsaved = None;
            self.slots.mark_saved(id);
            return Ok(Checked::Saved);
        };
        let Position { since, anchor, epoch, .. } = position;
        let at_source = async {
            match anchor.is_target_only {
                true => Ok(None),
                false => self.read_checkpoint(&unsaved.source, id).await,
            }
        };
        let (at_source, at_target) = tokio::join!(at_source, self.read_checkpoint(&unsaved.target, id));
        let gone = |error: &PeerError| error.is_missing_database();
        let (at_source, at_target) = match (at_source, at_target) {
            (Err(error), _) | (_, Err(error)) if !gone(&error) => return Err(error),
            (at_source, at_target) => (at_source.ok().flatten(), at_target.ok().flatten()),
        };
        if *epoch != self.slots.epoch() || !anchor.holds(at_source.as_ref(), at_target.as_ref()) {
            self.forget(id, slot);
            return Ok(Checked::Moved);
        }
        let written = self.write(id, unsaved, since, at_source.as_ref(), at_target.as_ref(), anchor.is_target_only).await?;
        let Some(anchor) = written else {
            self.forget(id, slot);
            return Ok(Checked::Moved);
        };
        slot.position = Some(Position { anchor, source_seen: Instant::now(), ..position.clone() });
        slot.unsaved = None;
        self.slots.mark_saved(id);
        Ok(Checked::Saved)
    }

    /// The next run begins where the checkpoints say.
    pub fn forget(&self, id: &str, slot: &mut Slot) {
        *slot = Slot::default();
        self.slots.mark_saved(id);
    }

    /// A new session on both sides; on the target alone where the source takes none. None where the target has lost documents.
    ///
    /// The target is written first, and asked for its documents after that: until the source tells of the session as well,
    /// nobody believes it. So whatever the target is at that moment, a later copy of it has the documents, and an earlier one
    /// has another session.
    pub async fn write(
        &self,
        id: &Arc<str>,
        unsaved: &Unsaved,
        seq: &Seq,
        at_source: Option<&Checkpoint>,
        at_target: Option<&Checkpoint>,
        source_refuses: bool,
    ) -> Result<Option<Anchor>> {
        let session_id: Arc<str> = format!("{:032x}", fastrand::u128(..)).into();
        let mut entry = Entry::new(session_id.clone(), unsaved.started, SystemTime::now(), unsaved.start.clone(), seq.clone());
        entry.count(&unsaved.counts);
        let rev_of = |checkpoint: Option<&Checkpoint>| checkpoint.and_then(|checkpoint| checkpoint.rev.clone());
        let mut target_rev = rev_of(at_target);
        if !source_refuses {
            let known_to_both = common(at_source, at_target).map(|common| common.history).unwrap_or_default();
            let next = Checkpoint::following(known_to_both, entry.clone());
            self.shared.write_local(&unsaved.target, id, next.document(id, target_rev.as_deref())).await?;
            if !self.has_all(unsaved).await? {
                return Ok(None);
            }
            match self.shared.write_local(&unsaved.source, id, next.document(id, rev_of(at_source).as_deref())).await {
                Ok(()) => return Ok(Some(Anchor { session_id, is_target_only: false })),
                Err(error) if error.is_refusal() => {}
                Err(error) => return Err(error),
            }
            target_rev = rev_of(self.read_checkpoint(&unsaved.target, id).await?.as_ref());
        } else if !self.has_all(unsaved).await? {
            return Ok(None);
        }
        let alone = at_target.filter(|target| target.source_refused.is_some());
        let mut next = Checkpoint::following(alone.map(|target| target.history.clone()).unwrap_or_default(), entry);
        let instance_start_time = unsaved.source.instance_start_time().await?;
        next.source_refused = Some(SourceRefused { instance_start_time });
        self.shared.write_local(&unsaved.target, id, next.document(id, target_rev.as_deref())).await?;
        Ok(Some(Anchor { session_id, is_target_only: true }))
    }

    /// Whether the target still has what was written since its last checkpoint.
    async fn has_all(&self, unsaved: &Unsaved) -> Result<bool> {
        let rows = unsaved.written.rows();
        if rows.is_empty() {
            return Ok(true);
        }
        let diff = self.shared.revs_diff(&unsaved.target, Arc::new(rows)).await?;
        Ok(diff.values().all(|missing| missing.missing.is_empty()))
    }

    /// Writes what has been behind for so long; those at which a run works are left to it. Returns the replicators whose
    /// documents may be gone.
    pub async fn save_older_than(&self, age: Duration) -> Vec<Arc<str>> {
        let now = Instant::now();
        let due = self.slots.unsaved_since(now.checked_sub(age).unwrap_or(now));
        let saving = due.into_iter().map(|id| self.save_if_idle(id));
        let saved = futures_util::stream::iter(saving).buffer_unordered(AT_ONCE);
        saved.filter_map(std::future::ready).collect().await
    }

    async fn save_if_idle(&self, id: Arc<str>) -> Option<Arc<str>> {
        let mut slot = self.slots.try_hold(&id)?;
        let (replicator_id, since) = slot.unsaved.as_ref().map(|unsaved| (unsaved.replicator_id.clone(), unsaved.since))?;
        match self.save(&id, &mut slot).await {
            Ok(Checked::Saved) => None,
            Ok(Checked::Moved) => Some(replicator_id),
            Err(error) => {
                tracing::debug!(%replicator_id, %error, "the checkpoint could not be written, it is tried again");
                if since.elapsed() > self.after + GIVEN_UP_AFTER {
                    self.forget(&id, &mut slot);
                }
                None
            }
        }
    }

    /// Until it is dropped.
    pub async fn forever(&self) {
        loop {
            let age = if self.remembered.is_crowded() { Duration::ZERO } else { self.after };
            for replicator_id in self.save_older_than(age).await {
                self.again.add(replicator_id);
            }
            tokio::time::sleep((self.after / 4).min(LOOK_EACH)).await;
        }
    }
}
