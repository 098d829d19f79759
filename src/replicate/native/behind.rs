//! Checkpoints, written behind the documents: bounded in time, many of one database at once, never ahead of what is confirmed.
//!
//! CouchDB compares no revision of a local document: whoever writes last wins, and learns nothing. So a side is read right
//! before, and a checkpoint is written only where it still says what was confirmed last. Where it does not, that side was
//! deleted and made again, or restored, since the documents were written: then that replicator has to run again.
//!
//! Many sources share a target, whose checkpoints are written many at a time; a source's are requests of their own. They are
//! written after more changes or a longer time: until then a start after a crash reads those changes again and finds them in
//! the target.

use super::checkpoint::{Checkpoint, Entry, SourceRefused, common};
use super::peer::{Peer, PeerError};
use super::shared::Shared;
use super::slots::{Anchor, Position, Slot, Slots, SourceBehind, Unsaved};
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
    /// The same for the source's, beyond the target's.
    pub source_after: Duration,
    /// Replicators whose documents may be gone from the target.
    pub again: Again,
    pub remembered: Remembered,
    /// Of what sources are asked for once more.
    pub overlapping: Remembered,
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
/// A database that remembers fewer (`_revs_limit`) may have forgotten by now what a document was a moment ago.
const FEW_REVS: u64 = 100;
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
        let Position { since, anchor, source_behind, epoch, .. } = position;
        // Those that ran for the first time together are not due together.
        let source_after = self.source_after.mul_f64(0.5 + fastrand::f64() / 2.0);
        let is_source_left_out = anchor.at_source.is_some() && !source_behind.is_due(source_after);
        let at_source = async {
            match is_source_left_out || anchor.at_source.is_none() {
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
        let holds =
            anchor.holds_at_target(at_target.as_ref()) && (is_source_left_out || anchor.holds_at_source(at_source.as_ref()));
        if *epoch != self.slots.epoch() || !holds {
            self.forget(id, slot);
            return Ok(Checked::Moved);
        }
        let (written, source_behind) = match is_source_left_out {
            true => (self.write_at_target(id, unsaved, since, at_target.as_ref(), anchor).await?, *source_behind),
            false => {
                let refuses = anchor.at_source.is_none();
                let written = self.write(id, unsaved, since, at_source.as_ref(), at_target.as_ref(), refuses).await?;
                (written, SourceBehind::equal_now())
            }
        };
        let Some(anchor) = written else {
            self.forget(id, slot);
            return Ok(Checked::Moved);
        };
        slot.position = Some(Position { anchor, source_behind, ..position.clone() });
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
        let entry = entry_of(unsaved, seq);
        let session_id = entry.session_id.clone();
        let mut target_rev = rev_of(at_target);
        if !source_refuses {
            let known_to_both = common(at_source, at_target).map(|common| common.history).unwrap_or_default();
            let next = Checkpoint::following(known_to_both, entry.clone());
            self.shared.write_local(&unsaved.target, id, next.document(id, target_rev.as_deref())).await?;
            if !self.has_all(unsaved).await? {
                return Ok(None);
            }
            match self.shared.write_local(&unsaved.source, id, next.document(id, rev_of(at_source).as_deref())).await {
                Ok(()) => return Ok(Some(Anchor { at_source: Some(session_id.clone()), at_target: session_id })),
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
        Ok(Some(Anchor { at_target: session_id, at_source: None }))
    }

    /// The target's half alone. The checkpoint that the source has, too, stays in the history: it is what a comparison finds.
    async fn write_at_target(
        &self,
        id: &Arc<str>,
        unsaved: &Unsaved,
        seq: &Seq,
        at_target: Option<&Checkpoint>,
        anchor: &Anchor,
    ) -> Result<Option<Anchor>> {
        let entry = entry_of(unsaved, seq);
        let session_id = entry.session_id.clone();
        let history = at_target.map(|target| target.history.as_slice()).unwrap_or_default();
        let at_source = history.iter().position(|entry| Some(&entry.session_id) == anchor.at_source.as_ref());
        let next = Checkpoint::following(history.get(at_source.unwrap_or_default()..).unwrap_or_default().to_vec(), entry);
        self.shared.write_local(&unsaved.target, id, next.document(id, rev_of(at_target).as_deref())).await?;
        let has_all = self.has_all(unsaved).await?;
        Ok(has_all.then(|| Anchor { at_target: session_id, at_source: anchor.at_source.clone() }))
    }

    /// Whether the target still has what was written since its last checkpoint.
    async fn has_all(&self, unsaved: &Unsaved) -> Result<bool> {
        Ok(unsaved.written.is_empty() || self.knows(&unsaved.target, unsaved.written.rows()).await?)
    }

    async fn knows(&self, side: &Peer, revs: Vec<(String, Vec<String>)>) -> Result<bool> {
        let diff = self.shared.revs_diff(side, Arc::new(revs)).await?;
        Ok(diff.values().all(|missing| missing.missing.is_empty()))
    }

    /// Whether a source once had these revisions. What it keeps no trace of, and what it lets nobody ask, is no sign that it
    /// did not.
    pub async fn had(&self, source: &Peer, revs: Vec<(String, Vec<String>)>) -> Result<bool> {
        let asked = async { Ok(self.knows(source, revs).await? || source.revs_limit().await? < FEW_REVS) };
        match asked.await {
            Err(error) if PeerError::is_answer(&error) => Ok(true),
            other => other,
        }
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

/// A session of its own for each checkpoint.
fn entry_of(unsaved: &Unsaved, seq: &Seq) -> Entry {
    let session_id = format!("{:032x}", fastrand::u128(..));
    let mut entry = Entry::new(session_id, unsaved.started, SystemTime::now(), unsaved.start.clone(), seq.clone());
    entry.count(&unsaved.counts);
    entry
}

fn rev_of(checkpoint: Option<&Checkpoint>) -> Option<String> {
    checkpoint.and_then(|checkpoint| checkpoint.rev.clone())
}
