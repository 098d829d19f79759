//! One look at one document: lock it and work, or unlock it, or remove what conflicts.

use crate::checkpoints::{Checkpoints, UpdateError};
use crate::couch::{CouchError, WriteResult};
use crate::db::listen::Listener;
use crate::locks::Kind;
use crate::locks::held::{End, owed, unlocked};
use crate::locks::hold::{Attempt, Hold, HoldError, Left};
use crate::locks::look::{Known, Next, next};
use crate::locks::mend::{Mend, Unconfirmed, conflicts_of, mend, unconfirmed};
use crate::topology::replicator::Replicator;
use crate::workers::board::{Start, has_conflicts};
use crate::workers::{Shared, listen, replicate};
use serde_json::Value;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};
use tokio_util::sync::CancellationToken;

pub struct Job {
    pub shared: Arc<Shared>,
    /// The feed told of conflicts meanwhile.
    pub has_conflicts: Arc<AtomicBool>,
    pub break_off: CancellationToken,
}

/// What a job leaves.
#[derive(Debug)]
pub enum JobEnd {
    /// The document as it is, for all that we know.
    Is(Value),
    Gone,
    /// Others write it; the feed tells.
    Unknown,
    /// Nothing can be done before.
    Wait(Duration),
    /// As `Wait`, for locks that are dead then if this is the document's revision still.
    Locked {
        rev: String,
        wait: Duration,
    },
    /// As `Wait`; CouchDB did not answer before, so nobody could be heard.
    Deaf(Duration),
    /// As `Wait`, whatever anybody writes meanwhile.
    HoldOff(Duration),
}

/// What the work came to, and what knows the positions.
pub struct Worked {
    pub end: End,
    pub listener: Option<Listener>,
}

impl From<End> for Worked {
    fn from(end: End) -> Self {
        Self { end, listener: None }
    }
}

/// A conflict shows up to so much later on other nodes.
const CONFLICTS_SHOW_AFTER: Duration = Duration::from_secs(3);
/// CouchDB refuses it by somebody's rule: not worth a try each second.
const REFUSED_FOR: Duration = Duration::from_secs(60);
const FAILED_FOR: Duration = Duration::from_secs(1);
/// More are left for the next look.
const CONFLICTS_MAX: usize = 100;

impl Job {
    pub async fn run(self, start: Start) -> JobEnd {
        let id = start.id.clone();
        match self.look(start).await {
            Ok(end) => end,
            Err(error) => {
                if !error.is_outage() {
                    tracing::warn!(%id, %error, "cannot look at the document, trying again");
                }
                JobEnd::Wait(FAILED_FOR)
            }
        }
    }

    async fn look(&self, start: Start) -> Result<JobEnd, CouchError> {
        let Shared { couch, checkpoints, me, settings, .. } = &*self.shared;
        // Nobody could renew a lock meanwhile.
        let was_down = !couch.health().is_up();
        couch.health().up().await;
        let unchanged_for = if was_down { Duration::ZERO } else { start.unchanged_for };
        let (doc, unchanged_for) = match start.doc {
            Some(doc) => (doc, unchanged_for),
            None => match self.read(&start.id).await? {
                Some(doc) if doc["_rev"] == *start.rev => (doc, unchanged_for),
                Some(doc) => (doc, Duration::ZERO),
                None => return Ok(JobEnd::Gone),
            },
        };
        if !is_usable(&doc, start.kind) {
            return Ok(JobEnd::Gone);
        }
        if has_conflicts(&doc) {
            return self.mend(&start.id, unchanged_for).await;
        }
        let known = Known { me, unchanged_for, settings };
        match next(&doc, SystemTime::now(), &known) {
            Next::Take => self.take(doc, start.kind).await,
            Next::Unlock => Ok(match checkpoints.save(unlocked(&doc, SystemTime::now())).await {
                Ok(WriteResult::Refused { .. }) => JobEnd::Wait(REFUSED_FOR),
                _ => JobEnd::Unknown,
            }),
            Next::After(wait) if was_down => Ok(JobEnd::Deaf(wait)),
            Next::Nothing | Next::At(_) | Next::After(_) => Ok(JobEnd::Is(doc)),
        }
    }

    async fn read(&self, id: &str) -> Result<Option<Value>, CouchError> {
        let mut doc = self.shared.couch.doc_with_conflicts(&self.shared.spiegel_db, id).await?;
        if let Some(doc) = &mut doc {
            self.shared.phantoms.strip(doc);
        }
        Ok(doc)
    }

    async fn take(&self, doc: Value, kind: Kind) -> Result<JobEnd, CouchError> {
        let Shared { checkpoints, me, settings, .. } = &*self.shared;
        let id = doc["_id"].as_str().unwrap_or_default().to_string();
        let hold = match Hold::take(doc, me, checkpoints, settings).await {
            Ok(Attempt::Held(hold)) => Arc::new(hold),
            Ok(Attempt::Contended) => {
                let current = self.read(&id).await?;
                return Ok(current.map_or(JobEnd::Gone, JobEnd::Is));
            }
            Ok(Attempt::TooFew { rev }) => return self.leave(&id, &rev).await,
            Ok(Attempt::Refused { reason }) => {
                tracing::warn!(id, reason, "couchdb refuses the lock of a document");
                return Ok(JobEnd::Wait(REFUSED_FOR));
            }
            Err(_) => return Ok(JobEnd::Wait(FAILED_FOR)),
        };
        let worked = tokio::select! {
            worked = self.work(kind, &hold) => worked,
            () = self.break_off.cancelled() => Worked::from(End::Again),
        };
        if self.has_conflicts.load(Ordering::Relaxed) {
            hold.dirtied().await;
        }
        let ended = hold.end(worked.end, |doc| {
            if let Some(listener) = &worked.listener {
                listener.store(doc);
            }
        });
        Ok(match ended.await {
            Ok(Left::Doc(doc)) => JobEnd::Is(doc),
            Ok(Left::Deleted) => JobEnd::Gone,
            Ok(Left::Unknown) => {
                tracing::debug!(id, "the lock was lost");
                JobEnd::Unknown
            }
            Err(HoldError::Refused(reason)) => {
                tracing::warn!(id, reason, "couchdb refuses the document as the work left it");
                JobEnd::Wait(REFUSED_FOR)
            }
            Err(_) => JobEnd::Unknown,
        })
    }

    async fn work(&self, kind: Kind, hold: &Arc<Hold>) -> Worked {
        match (kind, &self.shared.listen, &self.shared.replicate) {
            (Kind::ChangeListener, Some(tools), _) => Box::pin(listen::work(&self.shared, tools, hold)).await,
            (Kind::Replicator, _, Some(means)) => Box::pin(replicate::work(&self.shared, means, hold)).await.into(),
            _ => End::Again.into(),
        }
    }

    /// A 202 is no lock.
    async fn leave(&self, id: &str, rev: &str) -> Result<JobEnd, CouchError> {
        let Shared { couch, spiegel_db, checkpoints, .. } = &*self.shared;
        let current = self.read(id).await?;
        match unconfirmed(current.as_ref(), rev, SystemTime::now()) {
            Unconfirmed::Remove { rev } => drop(couch.delete_doc(spiegel_db, id, &rev).await?),
            Unconfirmed::Unlock(doc) => drop(checkpoints.save(doc).await),
            Unconfirmed::Nothing => {}
        }
        Ok(JobEnd::HoldOff(CONFLICTS_SHOW_AFTER))
    }

    async fn mend(&self, id: &str, unchanged_for: Duration) -> Result<JobEnd, CouchError> {
        let Shared { couch, spiegel_db, checkpoints, me, settings, phantoms, .. } = &*self.shared;
        let Some(winner) = self.read(id).await? else { return Ok(JobEnd::Gone) };
        let mut losers = Vec::new();
        for rev in conflicts_of(&winner).take(CONFLICTS_MAX) {
            losers.extend(couch.doc_at(spiegel_db, id, rev).await?);
        }
        let known = Known { me, unchanged_for, settings };
        let (written, remove) = match mend(&winner, &losers, SystemTime::now(), &known) {
            Mend::Wait(wait) => {
                let rev = winner["_rev"].as_str().unwrap_or_default().to_string();
                return Ok(JobEnd::Locked { rev, wait });
            }
            Mend::Write { winner, remove } => (winner, remove),
        };
        if let Some(winner) = written
            && !matches!(checkpoints.save(winner).await, Ok(WriteResult::Saved { .. }))
        {
            return Ok(JobEnd::Unknown);
        }
        for rev in remove.iter().take(CONFLICTS_MAX) {
            match couch.delete_doc(spiegel_db, id, rev).await {
                Err(CouchError::NotFound(_)) => phantoms.note(id, rev),
                Err(error) if !error.is_outage() => {
                    tracing::warn!(id, rev, %error, "a conflicted revision cannot be removed, it is passed over");
                    phantoms.note(id, rev);
                }
                removed => drop(removed?),
            }
        }
        tracing::debug!(id, removed = remove.len(), "conflicted revisions are removed");
        match self.read(id).await? {
            Some(doc) if has_conflicts(&doc) => Ok(JobEnd::Wait(FAILED_FOR)),
            Some(doc) => Ok(JobEnd::Is(doc)),
            None => Ok(JobEnd::Gone),
        }
    }
}

/// What nobody can work on is left alone; that it is invalid is said where the rules are read.
fn is_usable(doc: &Value, kind: Kind) -> bool {
    match kind {
        Kind::ChangeListener => doc["db_name"].as_str().is_some_and(|name| !name.is_empty()),
        Kind::Replicator => Replicator::parse(doc).is_ok(),
    }
}

/// Writes that there is work, where the document does not say so already.
pub async fn owe(checkpoints: &Checkpoints, id: &str) -> Result<(), UpdateError> {
    let update = |doc: &mut Value| match owed(doc, SystemTime::now()) {
        Some(written) => {
            *doc = written;
            true
        }
        None => false,
    };
    checkpoints.update(id, update).await.map(drop)
}
