//! Checkpoints, written behind the documents: bounded in time, many of one database at once, never ahead of what is confirmed.
//!
//! CouchDB compares no revision of a local document: whoever writes last wins, and learns nothing. So both sides are read right
//! before, and a checkpoint is written only where both still say what was confirmed last. Where they do not, a side was
//! deleted and made again, or restored, since the documents were written: then that replicator has to run again.

use super::checkpoint::{Checkpoint, Entry, SourceRefused, common};
use super::peer::{Peer, PeerError};
use super::shared::Shared;
use super::slots::{Anchor, Position, Slot, Slots, Unsaved};
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
        let anchor = self.write(id, unsaved, since, at_source.as_ref(), at_target.as_ref(), anchor.is_target_only).await?;
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

    /// A new session on both sides; on the target alone where the source takes none.
    pub async fn write(
        &self,
        id: &Arc<str>,
        unsaved: &Unsaved,
        seq: &Seq,
        at_source: Option<&Checkpoint>,
        at_target: Option<&Checkpoint>,
        source_refuses: bool,
    ) -> Result<Anchor> {
        let session_id: Arc<str> = format!("{:032x}", fastrand::u128(..)).into();
        let mut entry = Entry::new(session_id.clone(), unsaved.started, SystemTime::now(), unsaved.start.clone(), seq.clone());
        entry.missing_checked = unsaved.counts.missing_checked;
        entry.missing_found = unsaved.counts.missing_found;
        entry.docs_read = unsaved.counts.docs_read;
        entry.docs_written = unsaved.counts.docs_written;
        entry.doc_write_failures = unsaved.counts.doc_write_failures;
        let rev_of = |checkpoint: Option<&Checkpoint>| checkpoint.and_then(|checkpoint| checkpoint.rev.clone());
        let known_to_both = common(at_source, at_target).map(|common| common.history).unwrap_or_default();
        let mut next = Checkpoint::following(known_to_both, entry.clone());
        let refused = source_refuses || {
            let document = next.document(id, rev_of(at_source).as_deref());
            match self.shared.write_local(&unsaved.source, id, document).await {
                Ok(()) => false,
                Err(error) if error.is_refusal() => true,
                Err(error) => return Err(error),
            }
        };
        if refused {
            let alone = at_target.filter(|target| target.source_refused.is_some());
            next = Checkpoint::following(alone.map(|target| target.history.clone()).unwrap_or_default(), entry);
            let instance_start_time = unsaved.source.instance_start_time().await?;
            next.source_refused = Some(SourceRefused { instance_start_time });
        }
        self.shared.write_local(&unsaved.target, id, next.document(id, rev_of(at_target).as_deref())).await?;
        Ok(Anchor { session_id, is_target_only: refused })
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
            tokio::time::sleep(self.after / 4).await;
            for replicator_id in self.save_older_than(self.after).await {
                self.again.add(replicator_id);
            }
        }
    }
}
